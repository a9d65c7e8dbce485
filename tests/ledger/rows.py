"""A made-up run for the tests of the ledger: its rows, booking them, and holding a ledger to them."""

from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun.ledger import Ledger, LedgerWriter

RUN = {"targets": ["code", "math"], "identity": {"scheme": "path", "nodes": 1}}
Row = tuple[int, Any, str, float]


def rows_of(step: int) -> list[Row]:
    """The value rows of a step of the made-up run; its first id is used twice in the step."""
    ids = [f"e{step % 5}", f"e{step % 5}", f"e{step % 7}-{step}"]
    return [
        (step, identity, target, step + at / 8 + 100 * number)
        for number, target in enumerate(("code", "math"))
        for at, identity in enumerate(ids)
    ]


def book(writer: LedgerWriter, *steps: int) -> None:
    for step in steps:
        rows = rows_of(step)
        values = {
            target: np.array([value for _, _, name, value in rows if name == target]) for target in ("code", "math")
        }
        writer.book(
            step,
            [identity for _, identity, target, _ in rows if target == "code"],
            values,
            [{"target": target, "value": float(values[target].sum())} for target in values],
        )


def book_unasked(writer: LedgerWriter, *steps: int) -> None:
    """Book without asking how the background is doing; return when what it is writing is on disk, or has failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer._background, "keep_up", lambda allowed: None)
        book(writer, *steps)
    if writer._background._writing is not None:
        wait([writer._background._writing])


def rows_in(folder: Path) -> list[Row]:
    return Ledger(folder).scan().collect().rows()


def assert_holds(folder: Path, last: int) -> None:
    """Rows of the steps 1..last are there once, in values and in steps, and no others."""
    assert sorted(rows_in(folder)) == sorted(row for step in range(1, last + 1) for row in rows_of(step))
    steps = Ledger(folder).steps().select("step", "target").rows()
    assert steps == [(step, target) for step in range(1, last + 1) for target in ("code", "math")]


def names(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (folder / kind).iterdir())

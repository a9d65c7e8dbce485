"""A made-up run for the tests of the ledger: its rows, booking them, and holding a ledger to them."""

from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
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


def parts_of(rows: list[Row]) -> list[tuple[int, Any, str, str, float]]:
    """The rows by module of these rows."""
    return [
        (step, identity, target, module, part)
        for step, identity, target, value in rows
        for module, part in (("early", value + 1), ("late", -1.0))
    ]


def tokens_of(rows: list[Row]) -> list[tuple[int, Any, str, list[float]]]:
    """The rows by token: as many as the step says."""
    return [(step, identity, target, [value - step] + [1.0] * (step % 9)) for step, identity, target, value in rows]


def book(writer: LedgerWriter, *steps: int, parts: bool = False) -> None:
    """Book these steps; with their parts by module and by token, if asked for."""
    for step in steps:
        rows = rows_of(step)
        values = {
            target: np.array([value for _, _, name, value in rows if name == target]) for target in ("code", "math")
        }
        by_module = {
            target: {
                module: np.array([part for *_, name, of, part in parts_of(rows) if (name, of) == (target, module)])
                for module in ("early", "late")
            }
            for target in values
        }
        tokens = {target: [np.array(of) for *_, name, of in tokens_of(rows) if name == target] for target in values}
        writer.book(
            step,
            [identity for _, identity, target, _ in rows if target == "code"],
            values,
            [{"target": target, "value": float(values[target].sum())} for target in values],
            by_module if parts else {},
            tokens if parts else {},
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


def assert_holds(folder: Path, last: int, parts: bool = False) -> None:
    """Rows of the steps 1..last are there once, in the files of every kind, and no others."""
    rows = [row for step in range(1, last + 1) for row in rows_of(step)]
    assert sorted(rows_in(folder)) == sorted(rows)
    for kind, wanted in (("modules", parts_of(rows)), ("token_values", tokens_of(rows))) if parts else ():
        found = pl.concat([pl.read_parquet(folder / kind / name) for name in names(folder, kind)]) if rows else None
        assert sorted(found.rows() if found is not None else []) == sorted(wanted)
    steps = Ledger(folder).steps().select("step", "target").rows()
    assert steps == [(step, target) for step in range(1, last + 1) for target in ("code", "math")]


def names(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (folder / kind).iterdir())

"""Steps on their way to disk: what is kept of each, and the two parts that a batch of them becomes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.ma  # or polars would, in the background, and a fork meanwhile leaves the child a locked import
import polars as pl

from inrun.ledger.checks import Floats, Ids
from inrun.ledger.files import parquet, write_whole
from inrun.ledger.schema import STEPS, STEPS_SCHEMA, VALUES, LedgerError, part_name, values_schema

# About what Python takes, in bytes: a row of steps/, and a string id and its place in a list, beside its characters.
_ROW_BYTES, _TEXT_BYTES = 512, 64


class Booked(NamedTuple):
    """One step, in arrays of its own."""

    step: int
    ids: Ids
    targets: list[str]
    values: Floats  # [targets, ids]
    rows: list[tuple[Any, ...]]  # of steps/

    @property
    def size(self) -> int:
        """About how many bytes of memory the step takes."""
        ids = self.ids
        of_ids = ids.nbytes if isinstance(ids, np.ndarray) else _TEXT_BYTES * len(ids) + sum(map(len, ids))
        return of_ids + self.values.nbytes + _ROW_BYTES * (1 + len(self.rows))


class Batch(NamedTuple):
    """Whole steps, in their order, that are written together; `size` is theirs in bytes."""

    steps: list[Booked]
    size: int

    def until(self, step: int) -> "Batch":
        """The steps up to `step`, inclusive: maybe none."""
        return batch_of([one for one in self.steps if one.step <= step])

    def write(self, folder: Path, rank: int) -> None:
        """Write the parts of values/ and steps/, durable on return; may be done again.

        Raises LedgerError, leaving nothing half-written.
        """
        for kind, frame in self._frames():
            path = folder / kind / part_name(frame["step"][0], frame["step"][-1], rank)
            try:
                write_whole(path, rank, parquet(frame))
            except OSError as error:
                raise LedgerError(
                    f"{path} could not be written ({error.strerror or error}). What is booked is kept in "
                    "memory: free space or correct the folder's rights, then call flush()."
                ) from error

    def _frames(self) -> Iterator[tuple[str, pl.DataFrame]]:
        if valued := [one for one in self.steps if one.values.size]:
            yield VALUES, _values_frame(valued)
        if rows := [row for one in self.steps for row in one.rows]:
            yield STEPS, pl.DataFrame(rows, schema=STEPS_SCHEMA, orient="row")


def batch_of(steps: list[Booked]) -> Batch:
    """`steps` with their size."""
    return Batch(steps, sum(one.size for one in steps))


def _values_frame(booked: Sequence[Booked]) -> pl.DataFrame:
    names = list(dict.fromkeys(target for one in booked for target in one.targets))
    code = {name: number for number, name in enumerate(names)}
    codes = [np.repeat([code[target] for target in one.targets], len(one.ids)) for one in booked]
    # Each step's rows are target by target, as its values lie in memory.
    if isinstance(booked[0].ids, np.ndarray):
        ids = pl.Series(np.concatenate([np.tile(one.ids, len(one.targets)) for one in booked]))
    else:
        ids = pl.Series([identity for one in booked for identity in [*one.ids] * len(one.targets)], dtype=pl.String)
    return pl.DataFrame(
        {
            "step": np.repeat([one.step for one in booked], [one.values.size for one in booked]),
            "id": ids,
            "target": pl.Series(names, dtype=pl.String).gather(np.concatenate(codes)),
            "value": np.concatenate([one.values.ravel() for one in booked]),
        },
        schema=values_schema(pl.Int64 if ids.dtype == pl.Int64 else pl.String),
    )

"""Steps on their way to disk: what is kept of each, and the parts that a batch of them becomes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.ma  # or polars would, in the background, and a fork meanwhile leaves the child a locked import
import polars as pl

from inrun.ledger.checks import Floats, Ids, TokenValues
from inrun.ledger.files import parquet, sync_folder, write_whole
from inrun.ledger.schema import (
    IF_ASKED_FOR,
    MODULES,
    STEPS,
    STEPS_SCHEMA,
    TOKENS,
    VALUES,
    LedgerError,
    id_type_in,
    modules_schema,
    part_name,
    tokens_schema,
    values_schema,
)

# About what Python takes, in bytes: a row of steps/, and a string id and its place in a list, beside its characters.
_ROW_BYTES, _TEXT_BYTES = 512, 64


class Booked(NamedTuple):
    """One step, in arrays of its own."""

    step: int
    ids: Ids
    targets: list[str]
    values: Floats  # [targets, ids]
    rows: list[tuple[Any, ...]]  # of steps/
    by_module: Mapping[str, Floats] = {}  # values by part
    tokens: TokenValues | None = None

    @property
    def size(self) -> int:
        """About how many bytes of memory the step takes."""
        ids = self.ids
        of_ids = ids.nbytes if isinstance(ids, np.ndarray) else _TEXT_BYTES * len(ids) + sum(map(len, ids))
        of_tokens = 0 if self.tokens is None else self.tokens.values.nbytes + self.tokens.counts.nbytes
        of_values = self.values.nbytes * (1 + len(self.by_module))
        return of_ids + of_values + of_tokens + _ROW_BYTES * (1 + len(self.rows))

    @property
    def value_rows(self) -> int:
        """How many rows of values it becomes, of all kinds."""
        return int(self.values.size) * (1 + len(self.by_module) + (self.tokens is not None))


class Batch(NamedTuple):
    """Whole steps, in their order, that are written together; `size` is theirs in bytes."""

    steps: list[Booked]
    size: int

    def until(self, step: int) -> "Batch":
        """The steps up to `step`, inclusive: maybe none."""
        return batch_of([one for one in self.steps if one.step <= step])

    def write(self, folder: Path, rank: int) -> None:
        """Write the part of every kind, durable on return; may be done again.

        Raises LedgerError, leaving nothing half-written.
        """
        for kind, frame in self._frames():
            path = folder / kind / part_name(frame["step"][0], frame["step"][-1], rank)
            try:
                if kind in IF_ASKED_FOR and not path.parent.exists():
                    path.parent.mkdir(exist_ok=True)
                    sync_folder(folder)
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
        parts = [(name, one._replace(values=part)) for one in self.steps for name, part in one.by_module.items()]
        if parts := [(name, one) for name, one in parts if one.values.size]:
            yield MODULES, _modules_frame(*zip(*parts, strict=True))
        if with_tokens := [one for one in self.steps if one.tokens is not None and one.values.size]:
            yield TOKENS, _tokens_frame(with_tokens)


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


def _modules_frame(names: Sequence[str], booked: Sequence[Booked]) -> pl.DataFrame:
    """`booked` holds the values of one module each."""
    known = list(dict.fromkeys(names))
    codes = np.repeat([known.index(name) for name in names], [one.values.size for one in booked])
    frame = _values_frame(booked)
    column = pl.Series("module", known, dtype=pl.String).gather(codes)
    return frame.with_columns(column).select(*modules_schema(id_type_in(frame.schema)))


def _tokens_frame(booked: Sequence[Booked]) -> pl.DataFrame:
    frame = _values_frame(booked).drop("value")
    tokens = [(one.tokens, len(one.targets)) for one in booked if one.tokens is not None]
    counts = np.concatenate([np.tile(of.counts, targets) for of, targets in tokens])
    flat = pl.DataFrame(
        {
            "row": np.repeat(np.arange(len(counts)), counts),
            "token_values": np.concatenate([of.values.ravel() for of, _ in tokens]),
        }
    )
    lists = flat.group_by("row", maintain_order=True).agg("token_values")
    return frame.with_columns(lists["token_values"]).select(*tokens_schema(id_type_in(frame.schema)))

"""What a ledger folder holds: its columns, the names of its parts, its run.json (design, section 6).

    run.json           what ran, and "format"
    values/*.parquet   one row per use of an example in a step and target
    steps/*.parquet    one row per step and target
    modules/*.parquet  where values by module are asked for: the rows of values/ in parts, with the module of each
    token_values/*.parquet  where values by token are: the rows of values/ with a list of one value per token
    examples.parquet   optional: id and the user's columns
    totals/            of large ledgers, made by who reads: what each example's values add up to (inrun.ledger.totals)
    schemes/NAME/      of a run that was replayed: values of another scheme, laid out like this (inrun.ledger.schemes)

A part is named FIRST-LAST-rRANK.parquet by its steps, so that names sort by step, and is only ever replaced
whole.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from inrun.errors import InrunError

FORMAT = 1
RUN = "run.json"
VALUES = "values"
STEPS = "steps"
MODULES = "modules"
TOKENS = "token_values"
IF_ASKED_FOR = (MODULES, TOKENS)  # their folders are made with their first part
KINDS = (VALUES, STEPS, *IF_ASKED_FOR)
EXAMPLES = "examples.parquet"

STEPS_SCHEMA: dict[str, type[pl.DataType]] = {
    "step": pl.Int64,
    "target": pl.String,
    "examples": pl.Int64,
    "loss": pl.Float64,
    "value": pl.Float64,
    "train_loss": pl.Float64,
    "learning_rate": pl.Float64,
    "conservation": pl.Float64,
    "skipped": pl.Boolean,
    "loss_before": pl.Float64,
    "loss_after": pl.Float64,
    "momentum": pl.Float64,
    "decay": pl.Float64,
    "unexplained": pl.Float64,
    # how many gradients of the target the step's values took
    "target_gradients": pl.Int64,
    # the values against the Shapley values of the step's real game, where it was played: relative error, root mean
    # square error (nats), rank correlation; and the standard error of the game's own values, root mean square (nats),
    # 0 where it was played in full
    "game_error": pl.Float64,
    "game_rmse": pl.Float64,
    "game_spearman": pl.Float64,
    "game_noise": pl.Float64,
    # of a replay: the norm of the adjoint of the weights after the step, which is what a change of theirs does to the
    # target's loss later (nats per unit of weight)
    "adjoint": pl.Float64,
    # of a replay: the relative error of the step's Hessian-vector product, where it was measured
    "hessian_error": pl.Float64,
}

# What polars raises on a file that it cannot read; some damage makes it panic.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)

_PART_NAME = re.compile(r"(\d+)-(\d+)-r(\d+)\.parquet")


class LedgerError(InrunError):
    """A ledger cannot be written or read as asked: says what, where, and what to do."""


class Part(NamedTuple):
    """One file of rows: its steps (both inclusive) and the rank that wrote it."""

    path: Path
    first: int
    last: int
    rank: int


def id_type_in(schema: pl.Schema) -> type[pl.DataType]:
    """Int64 or String, as the column of the ids is."""
    return pl.Int64 if schema["id"] == pl.Int64 else pl.String


def values_schema(id_type: type[pl.DataType]) -> dict[str, type[pl.DataType]]:
    """Columns of values/. `id_type`: Int64 or String, one per run; `value` in nats, positive = helped."""
    return {"step": pl.Int64, "id": id_type, "target": pl.String, "value": pl.Float64}


def modules_schema(id_type: type[pl.DataType]) -> dict[str, type[pl.DataType]]:
    """Columns of modules/: those of values/, and the name of the part that the value came through."""
    return {"step": pl.Int64, "id": id_type, "target": pl.String, "module": pl.String, "value": pl.Float64}


def tokens_schema(id_type: type[pl.DataType]) -> dict[str, type[pl.DataType] | pl.DataType]:
    """Columns of token_values/: those of values/, with a list of nats, one for each of the example's tokens."""
    return {"step": pl.Int64, "id": id_type, "target": pl.String, "token_values": pl.List(pl.Float64)}


def part_name(first: int, last: int, rank: int) -> str:
    """File name of the part with the steps first..last of one rank."""
    return f"{first:09d}-{last:09d}-r{rank}.parquet"


def list_parts(folder: Path, kind: str) -> list[Part]:
    """The parts of `kind` (one of KINDS), sorted by step and rank; empty when there are none."""
    found = []
    if (folder / kind).is_dir():
        for path in (folder / kind).iterdir():
            if match := _PART_NAME.fullmatch(path.name):
                first, last, rank = map(int, match.groups())
                found.append(Part(path, first, last, rank))
    return sorted(found, key=lambda part: (part.first, part.rank))


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json. Raises LedgerError where there is none, or not one that this version reads."""
    path = folder / RUN
    try:
        run = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LedgerError(
            f"{folder} holds no ledger: there is no {RUN} in it. Give the folder that the run wrote to."
        ) from error
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror}): check its path and its rights.") from error
    except ValueError as error:
        raise LedgerError(f"{path} is not valid JSON ({error}): restore it from a copy of the run.") from error
    found = run.get("format") if isinstance(run, dict) else None
    if not isinstance(run, dict) or found != FORMAT:
        raise LedgerError(
            f"{path} has format {found!r}; this version of inrun reads format {FORMAT}: "
            "read it with the version that wrote it."
        )
    return run


def id_type_of(path: Path) -> type[pl.DataType]:
    """Int64 or String: the type of the ids in a values part. Raises LedgerError naming a bad file."""
    try:
        schema = scan(path).collect_schema()
    except UNREADABLE as error:
        raise corrupt(path, error) from error
    for id_type in (pl.Int64, pl.String):
        if schema == pl.Schema(values_schema(id_type)):
            return id_type
    raise LedgerError(f"{path} is no part of a ledger: its columns are {dict(schema)}. Move it elsewhere.")


def scan(path: Path | list[Path]) -> pl.LazyFrame:
    """Parquet files as they are: no pattern in their names, no columns from their folders."""
    return pl.scan_parquet(path, glob=False, hive_partitioning=False)


def scan_steps(paths: list[Path]) -> pl.LazyFrame:
    """Parts of steps/ with all columns of today: null in a part written before there was such a column."""
    return pl.scan_parquet(paths, glob=False, hive_partitioning=False, schema=STEPS_SCHEMA, missing_columns="insert")


def first_corrupt(paths: Iterable[Path]) -> LedgerError | None:
    """The error of the first of these files that cannot be read whole: polars does not always name it."""
    for path in paths:
        try:
            for _ in scan(path).collect_batches() if path.exists() else ():
                pass
        except UNREADABLE as error:
            return corrupt(path, error)
    return None


def corrupt(path: Path, error: BaseException) -> LedgerError:
    """The error of a file that cannot be read as Parquet."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return LedgerError(
        f"{path} cannot be read ({reason}): it is corrupt, or not yours to read. Restore it from a copy."
    )

"""The examples table: what the user knows of each example, to group and show values by."""

import os
from pathlib import Path

import polars as pl

from inrun.ledger.files import open_temp, sync, sync_folder, temp_path
from inrun.ledger.schema import EXAMPLES, LedgerError, scan

_AT_ONCE = 2**23  # ids that are counted at once, where they are not sorted


def write_examples(folder: str | os.PathLike[str], frame: pl.DataFrame | pl.LazyFrame) -> None:
    """Write the examples table of a ledger, or replace it: `id` and any columns to group or show by.

    `id` is of ints or strings, as they are booked, without null and each once. A lazy frame is streamed.
    A table of many millions of examples is best sorted by id: `Ledger.by` then reads it in pieces, not whole.
    Raises LedgerError, leaving an earlier table as it was, where the ids are not so (naming one that repeats)
    or the table cannot be written.
    """
    path = Path(folder) / EXAMPLES
    temp = temp_path(path, 0)
    lazy = frame.lazy()
    try:
        schema = lazy.collect_schema()
        id_type = schema.get("id")
        if id_type is None:
            columns = ", ".join(schema.names()) or "none"
            raise LedgerError(f'{path}: the examples have no column "id"; their columns are: {columns}.')
        if not (id_type.is_integer() or id_type == pl.String):
            raise LedgerError(f"{path}: the ids of the examples are {id_type}; make them ints or strings.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = lazy if id_type == pl.String else lazy.with_columns(pl.col("id").cast(pl.Int64))
            # opened here: a sink given a path may make the file after its failure was told, when it was cleared away
            with open_temp(temp) as file:
                stored.sink_parquet(file, compression="zstd")
            _check_unique(path, scan(temp))
            sync(temp)
            os.replace(temp, path)
            sync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise LedgerError(
            f"{path} could not be written ({error}); an earlier table is as it was. "
            "Check the frame and the free space, then write it again."
        ) from error


def _check_unique(path: Path, examples: pl.LazyFrame) -> None:
    ids, before = pl.col("id"), pl.col("id").shift()
    told = examples.select(rising=(ids > before).all(), nulls=ids.null_count(), rows=pl.len())
    rising, nulls, rows = told.collect(engine="streaming").row(0)
    if rising and not nulls:
        return
    pieces = rows // _AT_ONCE + 1
    for piece in range(pieces):
        some = examples if pieces == 1 else examples.filter(ids.hash() % pieces == piece)
        counted = some.group_by("id").len().filter((pl.col("len") > 1) | ids.is_null())
        wrong = counted.sort("id", nulls_last=False).limit(1).collect(engine="streaming")
        for repeated, count in wrong.iter_rows():
            what = "a null id" if repeated is None else f"the id {repeated!r} {count} times"
            raise LedgerError(f"{path}: the examples hold {what}; give each example one row and an id of its own.")

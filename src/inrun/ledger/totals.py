"""Totals: what every example's values add up to, kept beside the parts they were added up from.

    totals/totals.json       the folder of the newest totals, and the parts that they cover
    totals/FOLDER/*.parquet  id, then for every target "value:NAME" and "count:NAME" (0.0 and 0 where it has none);
                             sorted by id from the first file to the last

They are derived, and may be removed at any time. A part that was cut, replaced or removed since is known by its name,
size and time: the totals are then not used at all. Parts that came after them are added by whoever reads.

Making them takes memory for some millions of rows, however many there are: parts are read some at a time, each batch is
added up and written sorted by id (a *run*), and then all runs are merged, one span of ids after another.
"""

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from inrun.ledger.files import locked, sync, sync_folder, write_whole
from inrun.ledger.schema import (
    UNREADABLE,
    VALUES,
    LedgerError,
    Part,
    corrupt,
    first_corrupt,
    id_type_of,
    list_parts,
    scan,
)

TOTALS = "totals"
MANIFEST = "totals.json"
_FORMAT = 1
_BATCH = 2**27  # bytes of parts that become a run: some 17 million values
_SPAN = 2**20  # rows of runs that become a file
_GROUP = 2**16  # rows of a run that are read at once
_AHEAD = 4  # files that are read at once
_SAMPLED = 1024  # one id in so many tells where spans end

Tell = Callable[[str], None]


class Totals(NamedTuple):
    """Totals that can be used: the parts that they cover are as they were."""

    files: list[Path]
    targets: list[str]
    covered: dict[str, list[int]]  # the names of parts, and what they were known by
    id_type: type[pl.DataType]

    def frames(self, target: str | None) -> Iterator[pl.DataFrame]:
        """File by file, some read ahead: id, [target,] value, count of the examples that have values, sorted by id."""
        if target is None or target in self.targets:
            with ThreadPoolExecutor(_AHEAD) as pool:
                for first in range(0, len(self.files), _AHEAD):
                    yield from pool.map(partial(self._read, target=target), self.files[first : first + _AHEAD])

    def _read(self, path: Path, target: str | None) -> pl.DataFrame:
        frames = []
        for name in self.targets if target is None else [target]:
            columns = [pl.col(f"{of}:{name}").alias(of) for of in ("value", "count")]
            label = [pl.lit(name).alias("target")] if target is None else []
            frames.append(scan(path).select("id", *label, *columns))
        try:
            found = pl.concat(frames).collect(engine="streaming")
        except UNREADABLE as error:
            raise LedgerError(
                f"{path} cannot be read ({error}): ask again if totals were being made; if not, remove "
                f"{path.parent.parent}, which is made anew of the parts."
            ) from error
        if found["count"].min() == 0:
            found = found.filter(pl.col("count") > 0)
        return found if target is not None else found.sort("id", maintain_order=True)


def usable(folder: Path) -> Totals | None:
    """The ledger's totals; None where there are none, or where a part that they cover is not what it was."""
    try:
        manifest = json.loads((folder / TOTALS / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LedgerError(f"{folder / TOTALS / MANIFEST} is not valid JSON ({error}): remove {TOTALS}/.") from error
    if manifest["format"] != _FORMAT:
        return None
    now = {part.path.name: stamp(part) for part in list_parts(folder, VALUES)}
    covered = manifest["parts"]
    if any(now.get(name) != was for name, was in covered.items()):
        return None
    files = [folder / TOTALS / manifest["folder"] / name for name in manifest["files"]]
    return Totals(files, manifest["targets"], covered, pl.Int64 if manifest["ids"] == "Int64" else pl.String)


def stamp(part: Part) -> list[int]:
    """What a part is known by: its size and the time of its last change."""
    found = part.path.stat()
    return [found.st_size, found.st_mtime_ns]


def forget(folder: Path) -> None:
    """Let no totals be used: before a part that they may cover is changed. What they take is freed by the next."""
    manifest = folder / TOTALS / MANIFEST
    manifest.unlink(missing_ok=True)  # every process of a run that goes on cuts its own parts, at the same time
    if manifest.parent.exists():
        sync_folder(manifest.parent)


def later_parts(folder: Path, totals: Totals | None) -> list[Part]:
    """The parts that are not in the totals."""
    covered = {} if totals is None else totals.covered
    return [part for part in list_parts(folder, VALUES) if part.path.name not in covered]


def compact(folder: Path, tell: Tell) -> None:
    """Bring the totals up to date. Another process that does so is waited for; a kill leaves what was there.

    Needs room on disk for the totals twice (some 8 bytes for each example and target).
    Raises LedgerError where the disk refuses or a part cannot be read.
    """
    try:
        (folder / TOTALS).mkdir(exist_ok=True)
        with locked(folder / TOTALS / "lock"):
            before = usable(folder)
            parts = later_parts(folder, before)
            if parts:
                _make(folder, before, parts, tell)
    except OSError as error:
        raise LedgerError(
            f"{folder / TOTALS}: the totals could not be written ({error.strerror or error}): free space or correct "
            "the folder's rights."
        ) from error


def to_stderr(text: str) -> None:
    print(f"inrun: {text}", file=sys.stderr, flush=True)


def _make(folder: Path, before: Totals | None, parts: list[Part], tell: Tell) -> None:
    began = time.perf_counter()
    stamps = {part.path.name: stamp(part) for part in parts}  # before any of them is read
    size = sum(of for of, _ in stamps.values())
    tell(f"{folder}: adding up {len(parts)} parts ({size / 1e9:.3g} GB) once, so that queries are quick")
    token = uuid.uuid4().hex
    work = folder / TOTALS / f".{token}"
    work.mkdir()
    try:
        runs = [] if before is None else list(before.files)
        done = 0
        for number, batch in enumerate(_batches(parts, stamps)):
            runs.append(_write(work / f"run-{number:06d}.parquet", _added_up(batch), "uncompressed", _GROUP))
            done += sum(stamps[part.path.name][0] for part in batch)
            if number % 10 == 9:
                tell(f"{done / size:.0%} read, {time.perf_counter() - began:.0f} s")
        every = pl.LazyFrame(schema={k: v for run in runs for k, v in scan(run).collect_schema().items()})
        files, spans = [], _spans(runs)
        for number, slices in enumerate(spans):
            frame = _merged([every, *(scan(run).slice(first, length) for run, first, length in slices)])
            files.append(_write(work / f"{number:06d}.parquet", frame, "zstd", _SPAN))
            if number % 20 == 19:
                tell(f"{(number + 1) / len(spans):.0%} merged, {time.perf_counter() - began:.0f} s")
        for run in work.glob("run-*"):
            run.unlink()
        os.rename(work, folder / TOTALS / token)
        sync_folder(folder / TOTALS)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    schema = every.collect_schema()
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "folder": token,
        "files": [path.name for path in files],
        "ids": str(schema["id"]),
        "targets": [name.removeprefix("value:") for name in schema if name.startswith("value:")],
        "parts": {**(before.covered if before else {}), **stamps},
    }
    write_whole(folder / TOTALS / MANIFEST, 0, json.dumps(manifest).encode())
    for place in (folder / TOTALS).iterdir():  # what earlier totals, and kills, have left
        if place.is_dir() and place.name != token:
            shutil.rmtree(place)
    tell(f"{folder}: totals made in {time.perf_counter() - began:.0f} s")


def _batches(parts: Sequence[Part], stamps: dict[str, list[int]]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += stamps[part.path.name][0]
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _added_up(parts: Sequence[Part]) -> pl.DataFrame:
    """The totals of these parts alone."""
    kinds = {id_type_of(part.path): part.path for part in parts}
    if len(kinds) > 1:
        raise LedgerError(f"{' and '.join(map(str, kinds.values()))} have ids of two types; run it again with one.")
    columns = ("id", pl.col("target").cast(pl.Categorical), "value")
    try:
        rows = scan([part.path for part in parts]).select(*columns).collect(engine="streaming")
    except UNREADABLE as error:
        raise first_corrupt(part.path for part in parts) or corrupt(parts[0].path.parent, error) from error
    wide: list[pl.DataFrame] = []
    for name in rows["target"].unique(maintain_order=True).to_list():
        of = rows.filter(pl.col("target") == name)
        count = pl.repeat(1, of.height, dtype=pl.Int64, eager=True)
        pair = [of["value"].alias(f"value:{name}"), count.alias(f"count:{name}")]
        # Nearly always every target has a value of the same uses, in the same order: no join is needed then.
        same = next((at for at, frame in enumerate(wide) if frame["id"].equals(of["id"])), None)
        if same is None:
            wide.append(pl.DataFrame([of["id"], *pair]))
        else:
            wide[same] = wide[same].hstack(pair)
    del rows
    return _merged([frame.lazy() for frame in wide])


def _merged(frames: Sequence[pl.LazyFrame]) -> pl.DataFrame:
    """One row per id, sorted."""
    frame = pl.concat(frames, how="diagonal").collect(engine="streaming")
    if frame["id"].n_unique() < frame.height:
        frame = frame.lazy().group_by("id").agg(pl.all().sum()).collect(engine="streaming")
    return frame.sort("id").fill_null(0)


def _spans(runs: Sequence[Path]) -> list[list[tuple[Path, int, int]]]:
    """Of every span of ids, the slices of the runs that hold it: first row and number of rows."""
    ids = {run: scan(run).select("id").collect(engine="streaming")["id"] for run in runs}
    sampled = pl.concat([of.gather_every(_SAMPLED) for of in ids.values()]).sort()
    edges = sampled.gather_every(max(_SPAN // _SAMPLED, 1)).unique().sort()[1:]
    found: list[list[tuple[Path, int, int]]] = [[] for _ in range(len(edges) + 1)]
    for run, of in ids.items():
        ends = [0, *of.search_sorted(edges, side="left").to_list(), len(of)]
        for span, (first, end) in enumerate(pairwise(ends)):
            if end > first:
                found[span].append((run, first, end - first))
    return [slices for slices in found if slices]


def _write(path: Path, frame: pl.DataFrame, compression: Any, group: int) -> Path:
    try:
        frame.write_parquet(path, compression=compression, row_group_size=group)
        sync(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise LedgerError(
            f"{path} could not be written ({error}): free space or correct the folder's rights."
        ) from error
    return path

"""Writing a ledger during training: rows are buffered, written as parts in the background, and cut back on resume.

No kill can leave a row twice. A flush covers whole steps, so the parts of a rank never overlap, and each
appears by one rename. Cutting works from the last part back: parts after the step are removed, and the one
that straddles it is replaced, under its own name, by its first rows, then renamed to the steps it now has.
Every state in between is a ledger with each row at most once, and cutting again finishes the work.
"""

import json
import operator
import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import polars as pl

from inrun.ledger.background import Background
from inrun.ledger.batch import Batch, Booked, batch_of
from inrun.ledger.checks import (
    GivenIds,
    check_by_module,
    check_ids,
    check_step_row,
    check_targets,
    check_token_values,
    check_values,
)
from inrun.ledger.files import list_temps, parquet, sync_folder, write_whole
from inrun.ledger.schema import (
    FORMAT,
    KINDS,
    RUN,
    STEPS,
    UNREADABLE,
    VALUES,
    LedgerError,
    Part,
    corrupt,
    id_type_of,
    list_parts,
    part_name,
    read_run,
    scan,
)
from inrun.ledger.totals import forget


class LedgerWriter:
    """Writes one rank's rows of a ledger.

    `run` describes what ran and becomes run.json; its entry "identity" (a mapping) is what a resumed run must
    have in common with the first. `ranks` is how many writers the run has; each opens with its own `rank`.
    Only rank 0 writes run.json, and it also cuts the rows of ranks that a resumed run no longer has. A part
    is written when `part_rows` value rows are buffered, by a thread of the writer's own. `memory` is how many
    bytes booked steps may take until they are on disk; then `book` waits for the disk. (What making a part
    takes comes on top, some 100 bytes for each of its rows.)

    One thread of one process books: in a forked one `close` does nothing, and all else raises LedgerError.

    Raises LedgerError where the folder holds another run, or cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        run: Mapping[str, Any],
        *,
        resume: bool = False,
        rank: int = 0,
        ranks: int = 1,
        part_rows: int = 500_000,
        memory: int = 2**27,
    ) -> None:
        if not 0 <= rank < ranks:
            raise LedgerError(f"rank {rank} of {ranks} writers: give ranks= the number of writers of this run.")
        if part_rows < 1:
            raise LedgerError(f"part_rows is {part_rows}; give 1 or more.")
        if memory < 1:
            raise LedgerError(f"memory is {memory}; give a number of bytes, 1 or more.")
        self._folder = Path(folder)
        self._rank, self._ranks, self._part_rows, self._memory = rank, ranks, part_rows, memory
        self._process = os.getpid()
        self._buffer: list[Booked] = []
        self._rows = self._size = 0  # value rows and bytes in the buffer
        self._background = Background(partial(Batch.write, folder=self._folder, rank=rank))
        self._closed = False
        self._open(_as_json(self._folder, run), resume)
        self._last = max((part.last for part in self._parts()), default=0)
        parts = list_parts(self._folder, VALUES)
        self._id_type = id_type_of(parts[0].path) if parts else None

    def _open(self, run: dict[str, Any], resume: bool) -> None:
        folder = self._folder
        stored = (folder / RUN).exists()
        if stored and self._rank == 0 and not resume:
            raise LedgerError(f"{folder} already holds another run: choose another folder, or resume that one.")
        if stored:
            _check_identity(folder, read_run(folder), run)
        if self._parts() and not (stored and resume):
            whose = "of an earlier run" if stored else f"without its {RUN}"
            raise LedgerError(f"{folder} already holds parts of a ledger, {whose}: choose another folder.")
        try:
            for place in (folder, folder / VALUES, folder / STEPS):
                place.mkdir(parents=True, exist_ok=True)
            for place in (folder, *(folder / kind for kind in KINDS)):
                for path, rank in list_temps(place) if place.exists() else ():
                    if self._mine(rank):
                        path.unlink(missing_ok=True)
            if not stored and self._rank == 0:
                write_whole(folder / RUN, self._rank, json.dumps(run, indent=2, ensure_ascii=False).encode())
                sync_folder(folder.parent)
        except OSError as error:
            raise LedgerError(
                f"{folder}: the ledger could not be begun ({error.strerror or error}). "
                "Free space, correct the folder's rights, or choose another folder."
            ) from error

    def describe(self, more: Mapping[str, Any]) -> None:
        """Put these entries into run.json, which is written anew as a whole."""
        if self._rank == 0:
            run = {**read_run(self._folder), **_as_json(self._folder, more)}
            try:
                write_whole(self._folder / RUN, 0, json.dumps(run, indent=2, ensure_ascii=False).encode())
            except OSError as error:
                raise LedgerError(f"{self._folder / RUN}: could not be written ({error.strerror or error}).") from error

    @property
    def last_step(self) -> int:
        """The highest step booked or found on disk; 0 when there is none."""
        return self._last

    def book(
        self,
        step: int,
        ids: GivenIds,
        values: Mapping[str, np.ndarray[Any, Any]],
        steps: Sequence[Mapping[str, Any]],
        by_module: Mapping[str, Mapping[str, np.ndarray[Any, Any]]] = MappingProxyType({}),
        token_values: Mapping[str, Sequence[np.ndarray[Any, Any]]] = MappingProxyType({}),
    ) -> None:
        """Book one step: checked and copied here, written later and elsewhere.

        `values` maps a target to its values, in nats of target loss, positive = helped, in the order of
        `ids`; the same id twice makes two rows. `steps` has one mapping per target, with columns of steps/:
        `target` is needed; `step`, `examples` and `skipped` are by default this step, the number of ids and
        False, any other null. `by_module` maps every target to its values by module, `token_values` to one
        array per id, of any length; without them, there are no such rows.

        Raises LedgerError before anything is buffered where an argument is wrong; and where a part of earlier
        steps could not be written, once for each try: this step is booked then all the same, in memory. Free
        space and call `flush`.
        """
        self._check_process()
        step = self._check_step(step)
        listed, id_type = check_ids(step, ids)
        if id_type and self._id_type and id_type is not self._id_type:
            raise LedgerError(
                f"{self._folder}, step {step}: the ids are {id_type.__name__} (as {listed[0]}), "
                f"but this run's are {self._id_type.__name__}; keep to one type."
            )
        rows = [check_step_row(step, len(listed), row) for row in steps]
        check_targets(step, values, [row[1] for row in rows])
        checked = check_values(step, listed, values)
        parts = check_by_module(step, listed, values, by_module)
        tokens = check_token_values(step, listed, values, token_values)
        if checked.size:
            self._id_type = id_type
        if checked.size or rows:
            booked = Booked(step, listed, list(values), checked, rows, parts, tokens)
            self._buffer.append(booked)
            self._rows += booked.value_rows
            self._size += booked.size
        self._last = step
        # By half of the memory at the latest, so that one half is written while the other fills.
        if self._rows >= self._part_rows or self._size > self._memory // 2:
            self._hand_over()
        self._background.keep_up(self._memory - self._size)

    def flush(self) -> None:
        """Write all that is booked: durable on return. Raises LedgerError, and can then be called again."""
        self._check_process()
        self._hand_over()
        self._background.drain()

    def cut(self, step: int) -> None:
        """Forget every row with a step > `step`, on disk and in memory: what a resume needs.

        Raises LedgerError where the disk refuses or a part is corrupt; what is left is a ledger still, and
        cutting again finishes the work.
        """
        step = operator.index(step)
        if step < 0:
            raise LedgerError(f"{self._folder}: cannot cut to step {step}; 0 forgets every step.")
        self._check_process()
        self._background.settle()
        # A batch stays by itself: one that could not be written in whole may have left a part under its name.
        batches = [batch.until(step) for batch in (*self._background.waiting, batch_of(self._buffer))]
        self._buffer, self._rows, self._size = [], 0, 0
        self._background.waiting = deque(batch for batch in batches if batch.steps)
        if any(part.last > step for part in self._parts()):
            forget(self._folder)
        # From the last step back, so that a kill on the way leaves no hole.
        for part in sorted(self._parts(), key=lambda part: part.first, reverse=True):
            if part.last > step:
                self._cut_part(part, step)
        lasts = [part.last for part in self._parts()]
        lasts += [batch.steps[-1].step for batch in self._background.waiting]
        self._last = max(lasts, default=0)
        if not self._background.waiting and not list_parts(self._folder, VALUES):
            self._id_type = None

    def close(self) -> None:
        """Flush, and book no more. May be called again. Raises LedgerError, and is then not closed."""
        if os.getpid() == self._process:
            self.flush()
            self._background.stop()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mine(self, rank: int) -> bool:
        """Whether `rank` is kept by this writer: its own; by rank 0, also those that are no more."""
        return rank == self._rank or (self._rank == 0 and rank >= self._ranks)

    def _parts(self) -> list[Part]:
        return [part for kind in KINDS for part in list_parts(self._folder, kind) if self._mine(part.rank)]

    def _check_step(self, step: int) -> int:
        if self._closed:
            raise LedgerError(f"{self._folder}: step {step} was booked after close(); open the ledger to resume.")
        try:
            number = operator.index(step)
        except TypeError as error:
            raise LedgerError(f"{self._folder}: step is {step!r}; give a whole number.") from error
        if not 1 <= number < 2**63:
            raise LedgerError(f"{self._folder}: step {number} cannot be booked; steps count from 1.")
        if number <= self._last:
            raise LedgerError(
                f"{self._folder}: step {number} is booked already, the last was step {self._last}. Where a "
                "run resumes from a checkpoint, load its state first (load_state_dict), or cut() to its step."
            )
        return number

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise LedgerError(
                f"{self._folder}: its writer was opened by process {self._process}, of which this one, "
                f"{os.getpid()}, is a fork; book there, or open the ledger after the fork."
            )

    def _hand_over(self) -> None:
        if self._buffer:
            batch = Batch(self._buffer, self._size)
            self._buffer, self._rows, self._size = [], 0, 0
            self._background.put(batch)

    def _cut_part(self, part: Part, step: int) -> None:
        try:
            if part.first <= step:
                kept = _first_rows(part, step)
                write_whole(part.path, self._rank, parquet(kept))
                name = part_name(part.first, kept["step"][-1], part.rank)
                os.replace(part.path, part.path.with_name(name))
            else:
                part.path.unlink()
            sync_folder(part.path.parent)
        except OSError as error:
            raise LedgerError(
                f"{part.path} could not be cut to step {step} ({error.strerror or error}): "
                "free space or correct the folder's rights, then cut again."
            ) from error


def _first_rows(part: Part, step: int) -> pl.DataFrame:
    try:
        return scan(part.path).filter(pl.col("step") <= step).collect()
    except UNREADABLE as error:
        raise corrupt(part.path, error) from error


def _as_json(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """`run` as it reads back from JSON, so that what is stored and what is given can be compared."""
    try:
        read: dict[str, Any] = json.loads(json.dumps({**run, "format": FORMAT}))
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"{folder}: what describes the run does not fit JSON ({error}); keep to numbers, strings, lists, dicts."
        ) from error
    return read


def _check_identity(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    before, now = stored.get("identity") or {}, given.get("identity") or {}
    keys = list({**before, **now})
    differing = [key for key in keys if (key in before, before.get(key)) != (key in now, now.get(key))]
    if differing:
        told = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in differing)
        raise LedgerError(
            f"{folder} holds a run that differs ({told}): resume with the same settings, or choose another folder."
        )

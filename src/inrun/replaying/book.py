"""Where a replay keeps what it has found so far, and how its values come into the run's ledger once they are whole.

While it goes on: RUN/recording/walks/KEY, which holds parts as a ledger's and the adjoint at the step that it has come
back to. In the end: RUN/schemes/NAME, a ledger whose parts of one replay have a rank of their own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from inrun.ledger.batch import Booked, batch_of
from inrun.ledger.checks import check_ids, check_step_row
from inrun.ledger.files import list_temps, lock_at_once, locked, parquet, sync_folder, write_whole
from inrun.ledger.schema import FORMAT, RUN, STEPS, VALUES, LedgerError, list_parts, part_name, read_run, scan
from inrun.replaying.store import place_of, read_tensors, write_tensors
from inrun.step import Step

PART_ROWS = 500_000
_ADJOINT = "adjoint.safetensors"


def scheme_name(horizon: float | None) -> str:
    """What a replay's values are called in the ledger: "replay", or with a horizon "replay-h10"."""
    return "replay" if horizon is None else f"replay-h{horizon:g}"


def place_of_scheme(run: Path, name: str) -> Path:
    """The folder of its ledger."""
    return run / "schemes" / name


End = tuple[int, str]  # of a run: its last step, and the mark of the weights after it


def replayed(run: Path, name: str, end: End) -> dict[str, str]:
    """The targets that a scheme has values of, each with its mark.

    Raises LedgerError if they are by another end than the run has now.
    """
    folder = place_of_scheme(run, name)
    if not (folder / RUN).exists():
        return {}
    found = read_run(folder)
    if (found["steps"], found.get("end", end[1])) != end:
        raise LedgerError(
            f"{folder} has values by the run's end after step {found['steps']}; the run was trained on since, to step "
            f"{end[0]}, and has another end. Remove that folder, or move it elsewhere, and call replay again."
        )
    return {target: of["mark"] for target, of in found["targets"].items()}


class Walk:
    """What one replay has found so far; it goes on from there if it was stopped."""

    def __init__(self, run: Path, name: str, horizon: float | None, targets: Mapping[str, str], end: End) -> None:
        self._run, self._name, self._horizon, self._targets, self._end = run, name, horizon, dict(targets), end
        key = hashlib.sha256(json.dumps([name, self._targets, *end]).encode()).hexdigest()[:16]
        self._folder = place_of(run) / "walks" / key
        self._booked: list[Booked] = []
        self.rows = 0  # that wait to be written
        try:
            for kind in (VALUES, STEPS):
                (self._folder / kind).mkdir(parents=True, exist_ok=True)
            self._lock = lock_at_once(self._folder / "lock")
        except BlockingIOError as error:
            raise LedgerError(
                f"{self._folder}: another process replays this run for the same targets: wait for its end."
            ) from error
        except OSError as error:
            raise LedgerError(f"{self._folder}: could not be made ({error.strerror or error}): free space.") from error

    def resumed(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The step that it had come back to, the adjoint there and what else was saved; None if it begins anew."""
        path = self._folder / _ADJOINT
        tensors, told = read_tensors(path) if path.exists() else ({}, {"step": self._end[0]})
        for kind in (VALUES, STEPS):
            for part in list_parts(self._folder, kind):
                if part.first <= told["step"]:  # written, but not the adjoint that belongs to it
                    part.path.unlink()
            for torn, _ in list_temps(self._folder / kind):
                torn.unlink()
        return (told["step"], tensors, told) if tensors else None

    def add(self, step: Step, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """A step's values, and its rows of the steps table by target."""
        ids, _ = check_ids(step.step, step.ids)
        values = torch.stack([step.values[target] for target in rows]).numpy()
        listed = [check_step_row(step.step, len(step.ids), {"target": target, **row}) for target, row in rows.items()]
        self._booked.append(Booked(step.step, ids, list(rows), values, listed))
        self.rows += values.size

    def save(self, step: int, adjoint: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Make all of it durable: the values of the steps after this one, and the adjoint at it."""
        if self._booked:
            batch_of(self._booked[::-1]).write(self._folder, 0)
        self._booked, self.rows = [], 0
        write_tensors(self._folder / _ADJOINT, adjoint, {"step": step, **numbers})

    def close(self) -> None:
        """Let another replay go on from here."""
        self._lock.close()

    def finish(self, about: Mapping[str, Any]) -> None:
        """Bring the values into the run's ledger, and remove what was kept on the way."""
        with locked(place_of(self._run) / "finish.lock"):  # for other targets, others may come to their end
            self._write(about)
        shutil.rmtree(self._folder)

    def _write(self, about: Mapping[str, Any]) -> None:
        folder = place_of_scheme(self._run, self._name)
        try:
            for kind in (VALUES, STEPS):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            run = read_run(folder) if (folder / RUN).exists() else self._begun()
            rank = len(run["replays"])
            for kind in (VALUES, STEPS):
                for part in list_parts(folder, kind):
                    if part.rank == rank:  # of one that was stopped here
                        part.path.unlink()
                for frame in self._frames(kind):
                    first, last = int(frame["step"][0]), int(frame["step"][-1])
                    write_whole(folder / kind / part_name(first, last, rank), rank, parquet(frame))
            losses = zip(self._targets.items(), about["losses"], strict=True)
            run["targets"] |= {target: {"mark": mark, "loss": loss} for (target, mark), loss in losses}
            run["replays"].append({"targets": list(self._targets), **about})
            write_whole(folder / RUN, 0, json.dumps(run, indent=2, ensure_ascii=False).encode())
            sync_folder(folder)
        except OSError as error:
            raise LedgerError(
                f"{folder}: the values could not be written ({error.strerror or error}): free space there, and call "
                "replay again; it has nothing to repeat."
            ) from error

    def _begun(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "scheme": "replay",
            "horizon": self._horizon,
            "steps": self._end[0],
            "end": self._end[1],
            "units": {"value": "nats of target loss at the end of the run", "positive": "the use lowered it"},
            "versions": {"inrun": version("inrun"), "torch": torch.__version__},
            "targets": {},
            "replays": [],
        }

    def _frames(self, kind: str) -> Iterator[pl.DataFrame]:
        """The rows of all parts by step, a few parts at a time."""
        waiting: list[pl.DataFrame] = []
        for part in list_parts(self._folder, kind):
            waiting.append(scan(part.path).collect())
            if sum(frame.height for frame in waiting) >= PART_ROWS:
                yield pl.concat(waiting)
                waiting = []
        if waiting:
            yield pl.concat(waiting)

"""How close every scheme comes to the Shapley values of the real step, and to the loss of the whole run.

    python -m experiments.fidelity.run [--quick] [--store FOLDER] [--out FOLDER] [--workers N]

Every finished piece, a game of part A or a run of part B, is a file in the store; a run that was stopped goes on from
there. Results are written to the folder --out: result.json, the tables of README.md, figure.svg.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.fidelity import report
from experiments.fidelity.games import play
from experiments.fidelity.training import QUICK, Run, Study, books, write_text
from experiments.language import loss
from experiments.results import fill, write

LINE_EVERY = 30.0  # seconds between two lines of a log
WORK = {"game": 24.0, "books": 11.0}  # about how many seconds a piece takes, for the time left


@dataclass(frozen=True)
class Store:
    """Finished pieces of one study, as JSON files that appear whole."""

    folder: Path
    study: Study

    @property
    def text(self) -> Path:
        return self.folder / "text.npz"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> Any:
        return json.loads(self.path(name).read_text("utf-8"))

    def write(self, name: str, found: Any) -> None:
        draft = self.folder / f".{name}.partial"
        draft.write_text(json.dumps(found), "utf-8")
        os.replace(draft, self.path(name))


@dataclass(frozen=True)
class Trajectory:
    """A run whose games are played: the task of a worker in part A."""

    optimizer: str
    rate: float
    seed: int

    def pieces(self, study: Study) -> dict[int, str]:
        """The games' names, by step."""
        moments = study.moments if self.optimizer in study.first else study.moments[1:]
        return {step: f"game-{self.optimizer}-{self.rate:g}-seed{self.seed}-step{step}" for step in moments}

    def work(self, store: Store) -> None:
        """Train, and play the games that are not in the store."""
        missing = {step: name for step, name in self.pieces(store.study).items() if not store.has(name)}
        if not missing:
            return
        study = store.study
        run = Run(study, store.text, self.optimizer, self.rate, self.seed, torch.float64, study.warmup)
        for step, ids in run.batches():
            if step in missing:
                store.write(missing[step], play(run, study, step, ids, self.seed))
            else:
                loss(run.model, ids).backward()  # type: ignore[no-untyped-call]
            if step == max(missing):
                break
            run.step()


@dataclass(frozen=True)
class Booked:
    """A run whose books are kept: the task of a worker in part B."""

    optimizer: str
    rate: float
    warmup: bool
    scheme: str
    seed: int

    def pieces(self, study: Study) -> dict[int, str]:
        warm = "warm" if self.warmup else "cold"
        scheme = self.scheme.replace(" ", "")
        return {0: f"books-{self.optimizer}-{self.rate:g}-{warm}-{scheme}-seed{self.seed}"}

    def work(self, store: Store) -> None:
        (name,) = self.pieces(store.study).values()
        if not store.has(name):
            warmup = store.study.warmup if self.warmup else 0
            study = store.study
            store.write(name, books(study, store.text, self.optimizer, self.rate, warmup, self.seed, self.scheme))


Task = Trajectory | Booked


def tasks_of(study: Study) -> Iterator[Task]:
    """All of the study, what takes longest first."""
    for optimizer, rates in reversed(study.rates):
        for rate in rates:
            for seed in study.seeds:
                yield Trajectory(optimizer, rate, seed)
    for optimizer, rates in study.books:
        for rate in rates:
            for warmup in (True, False):
                for scheme in study.accounts:
                    for seed in study.seeds:
                        yield Booked(optimizer, rate, warmup, scheme, seed)


def begin() -> None:
    """A worker computes with one thread."""
    torch.set_num_threads(1)


def work(task: Task, store: Store) -> None:
    task.work(store)


def compute(study: Study, store: Store, workers: int, console: Console) -> None:
    """Bring every piece into the store."""
    tasks = list(tasks_of(study))
    names = [name for task in tasks for name in task.pieces(study).values()]
    weights = {name: WORK[name.partition("-")[0]] for name in names}
    tasks = [task for task in tasks if not all(map(store.has, task.pieces(study).values()))]
    if not tasks:
        return
    if not store.text.exists():
        console.print("reading and tokenizing the text", highlight=False)
        write_text(study, store.text)
    if workers == 1:
        threads = torch.get_num_threads()
        begin()
        for task in tasks:
            task.work(store)
        torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin)
    with pool, Shown(console, weights, store) as shown:
        waiting = {pool.submit(work, task, store) for task in tasks}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                shown.look()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Shown:
    """How far the study is, by the pieces in the store: a bar in a terminal, lines elsewhere."""

    def __init__(self, console: Console, weights: dict[str, float], store: Store) -> None:
        self._console, self._weights, self._store = console, weights, store
        self._missing = [name for name in weights if not store.has(name)]
        self._at_first = sum(weights[name] for name in self._missing)
        self._begun = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total} pieces"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=len(weights))

    def __enter__(self) -> "Shown":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def look(self) -> None:
        """Count again."""
        self._missing = [name for name in self._missing if not self._store.has(name)]
        left, now = sum(self._weights[name] for name in self._missing), time.monotonic()
        done, count = self._at_first - left, len(self._weights) - len(self._missing)
        text = f"{(now - self._begun) * left / done / 60:.0f} min left" if done else ""
        self._bar.update(self._task, completed=count, description=text)
        if not self._console.is_terminal and now - self._said >= LINE_EVERY:
            self._said = now
            self._console.print(f"{count}/{len(self._weights)} pieces  {text}", highlight=False)


def collect(study: Study, store: Store) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every game and every booked run, with the names of what it is."""
    games, booked = [], []
    for task in tasks_of(study):
        for step, name in task.pieces(study).items():
            found = store.read(name)
            if isinstance(task, Trajectory):
                key = {"optimizer": task.optimizer, "rate": task.rate, "seed": task.seed, "step": step}
                games.append(key | found)
            else:
                key = {"optimizer": task.optimizer, "rate": task.rate, "warmup": task.warmup, "seed": task.seed}
                booked.append(key | {"scheme": task.scheme, "accounts": found})
    return games, booked


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny study, to see that everything works")
    parser.add_argument("--store", type=Path, default=Path("runs/study-fidelity"), help="where pieces are kept")
    parser.add_argument("--out", type=Path, help="where results go; by default here, or to the store if --quick")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--no-figure", action="store_true", help="leave the figure out, which needs matplotlib")
    options = parser.parse_args(arguments)
    study = QUICK if options.quick else Study()
    store = Store(options.store / study.fingerprint(), study)
    store.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    begun = time.monotonic()
    compute(study, store, options.workers, console)
    games, booked = collect(study, store)
    out = options.out or (store.folder if options.quick else Path(__file__).parent)
    result = report.summarise(study, games, booked)
    write(result, out, report.tables(result), None if options.no_figure else report.draw)
    if not options.quick and options.out is None:
        fill(Path(__file__).parents[2] / "README.md", report.short_table(result))
    console.print(f"{out / 'result.json'}  ({(time.monotonic() - begun) / 60:.1f} min)", highlight=False)


if __name__ == "__main__":
    main()

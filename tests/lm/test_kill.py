"""`inrun train` killed at random moments and resumed each time ends with the ledger of a run that never was."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import polars as pl
import torch

from inrun import Ledger
from inrun.cli.main import main
from inrun.replaying.record import Record
from tests.lm.corpus import write_corpus

KILLS = 10


def command(corpus: Path, run: Path) -> list[str]:
    return [
        "train", str(corpus), "--out", str(run), "--target-from", "domain",
        "--target-share", "0.2", "--target-examples", "6", "--target-batch", "3", "--vocab-size", "400",
        "--sequence", "32",
        "--batch", "4", "--accumulation", "2", "--steps", "120", "--audit-every", "7", "--save-every", "5",
        "--replayable", "--replay-every", "30",
    ]  # fmt: skip


def train(arguments: list[str], out: Connection) -> None:
    """`inrun train` in a process of its own, which writes, errors too, to the connection."""
    for told in (1, 2):
        os.dup2(out.fileno(), told)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 - until the process ends
    torch.set_num_threads(1)
    sys.exit(main(arguments))


@contextmanager
def started(arguments: list[str]) -> Iterator[tuple[BaseProcess, TextIO]]:
    """The process, from one that has imported all it needs, and what it prints."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inrun.cli.main", "inrun.lm.train", __name__])
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(arguments, its))
    process.start()
    its.close()
    with mine, os.fdopen(os.dup(mine.fileno()), encoding="utf-8") as lines:
        yield process, lines
    process.join()


def finish(arguments: list[str]) -> None:
    with started(arguments) as (process, lines):
        said = lines.read()
        process.join()
    assert process.exitcode == 0, said


def start_and_kill(arguments: list[str], chance: random.Random) -> bool:
    """Start a run and kill it, at any moment of its start or of its first steps; False if it had ended."""
    with started(arguments) as (process, lines):
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.1, 2.0))
        else:
            for line in lines:
                if line.startswith("step "):
                    break
            time.sleep(chance.uniform(0.1, 2.0))
        running = process.is_alive()
        process.kill()
    return running


def rows(run: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    ledger = Ledger(run)
    return ledger.scan().collect().sort("step", "target", "id", "value"), ledger.steps()


def test_ten_kills_leave_no_trace_in_the_ledger(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    finish(command(corpus, tmp_path / "whole"))
    chance = random.Random(7)
    killed = [*command(corpus, tmp_path / "killed"), "--resume"]
    reached, kills = [], 0
    while kills < KILLS:
        kills += start_and_kill(killed, chance)
        parts = sorted(path.name for path in (tmp_path / "killed" / "steps").glob("*.parquet"))
        reached.append(int(parts[-1].split("-")[1]) if parts else 0)
        assert reached[-1] < 120, f"the run ended before it was killed {KILLS} times: {reached}"
    assert any(reached), reached  # some kills came in mid-training
    finish(killed)
    for mine, its in zip(rows(tmp_path / "killed"), rows(tmp_path / "whole"), strict=True):
        assert mine.equals(its)
    records = [Record(tmp_path / name) for name in ("killed", "whole")]
    assert records[0].lines == records[1].lines  # the marks of the weights among them
    for step in (1, 60, 120):
        for one, other in zip(*(of.batches(step, None, torch.device("cpu")) for of in records), strict=True):
            assert str(one) == str(other)
    assert records[0].checkpoints() == records[1].checkpoints() == [0, 30, 60, 90, 120]
    assert rows(tmp_path / "whole")[1]["step"].unique().to_list() == list(range(1, 121))

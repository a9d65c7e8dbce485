"""A process that dies, hangs or differs leaves no other waiting: each says what happened, and to whom."""

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from inrun import Ledger
from tests.parallel.runs import ROOT, environment
from tests.parallel.worker import Run, stored


def alone_together(
    runs: list[list[Run]], place: Path, patience: float = 120.0
) -> list[subprocess.CompletedProcess[str]]:
    """The processes, each with its own list of runs, without a launcher that ends the others when one has ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank, mine in enumerate(runs):
        of = {"RANK": str(rank), "WORLD_SIZE": str(len(runs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.worker", str(stored(mine, place / f"{rank}.json"))],
                cwd=ROOT, env=environment() | of, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    until = time.monotonic() + patience
    found_of = []
    for process in processes:
        try:
            out, said = process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, said = process.communicate()
            said += "\nSTILL WAITING"
        found_of.append(subprocess.CompletedProcess([], process.returncode, out, said))
    return found_of


@pytest.mark.parametrize(
    ("wrap", "where", "rank"),
    [("ddp", "step", 1), ("ddp", "backward", 1), ("fsdp", "hang", 1), ("fsdp", "step", 0)],  # 0 keeps the store
)
def test_the_others_say_which_process_has_gone(wrap: str, where: str, rank: int, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), 2, wrap=wrap, steps=4, stop=3, stop_rank=rank, stop_where=where, patience=15)
    here = alone_together([[run], [run]], tmp_path)[1 - rank]
    assert here.returncode == 1, here.stderr
    assert f"ProcessError: step 3: process {rank} of 2 has gone, or does something else" in here.stderr
    assert "start the run again from its last checkpoint" in here.stderr


def test_processes_that_differ_are_told(tmp_path: Path) -> None:
    runs = [Run(str(tmp_path / name), 2, steps=2, patience=15, refused=True) for name in ("settings", "targets")]
    others = [replace(runs[0], audit_every=3), replace(runs[1], others_seed=1)]
    for one in alone_together([runs, others], tmp_path):
        assert one.returncode == 0, one.stderr
    for name in ("settings", "targets"):
        for rank in range(2):
            said = (tmp_path / f"REFUSED-{name}-{rank}.txt").read_text()
            assert said.startswith("process 1 was given another model, other targets or settings than process 0")


def test_what_is_found_by_one_is_all_processes_business(tmp_path: Path) -> None:
    run = Run(
        str(tmp_path / "run"),
        2,
        wrap="fsdp",
        steps=3,
        poison=2,
        patience=15,
        optimizer="sgd",
        settings={"nonfinite": "skip"},
    )
    scaled = Run(str(tmp_path / "scaled"), 2, wrap="fsdp", case="mlp", optimizer="sgd", steps=3, overflow=2)
    branching = Run(str(tmp_path / "branching"), 2, case="branching", refused=True)
    unexpandable = Run(str(tmp_path / "unexpandable"), 2, wrap="fsdp", case="unexpandable", refused=True)
    runs = [run, scaled, branching, unexpandable]
    for one in alone_together([runs, runs], tmp_path):
        assert one.returncode == 0, one.stderr
    assert Ledger(tmp_path / "run").steps("t1")["skipped"].to_list() == [False, True, False]
    assert len(Ledger(tmp_path / "scaled").steps("t1")) == 2  # the scaler left one out, on every process
    # what processes would sum up otherwise, or what sharded weights leave nobody to value, is refused on all of them
    for rank in range(2):
        said = (tmp_path / f"REFUSED-branching-{rank}.txt").read_text()
        assert "step 1: process 1 values the parameters by other modules than process 0" in said
        said = (tmp_path / f"REFUSED-unexpandable-{rank}.txt").read_text()
        assert "shared: the output has no example dimension" in said
        assert "Without fully_shard, as in DistributedDataParallel" in said

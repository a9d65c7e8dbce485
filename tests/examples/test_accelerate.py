"""The Accelerate example, against the plain loop over the batches that it saw."""

import runpy
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import nn

from inrun import Attributor, Ledger
from tests.examples.running import run
from tests.parallel.runs import ROOT

EXAMPLE = "examples/accelerate_loop.py"


def test_its_values_are_the_plain_loops(tmp_path: Path) -> None:
    printed = run("accelerate_loop", "--out", str(tmp_path / "run"), "--steps", "18")
    assert "shape: (10, 3)" in printed
    assert Ledger(tmp_path / "run").steps("held out")["examples"].to_list() == [32] * 18
    booked = pl.read_parquet(tmp_path / "run" / "values" / "*.parquet")
    example = runpy.run_path(str(ROOT / EXAMPLE))
    data, target = example["data_and_target"]()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attributor = Attributor(model, optimizer, {"held out": target}, example["loss"])
    for step in range(1, 19):
        rows = booked.filter(pl.col("step") == step)
        ids = rows["id"].to_list()
        for part in (ids[:16], ids[16:]):
            batch = {name: torch.stack([data[k][name] for k in part]) for name in ("x", "y")}
            with attributor.batch(part):
                (example["loss"](model, batch) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert attributor.last is not None
        assert rows["value"].to_list() == pytest.approx(attributor.last.values["held out"].tolist(), rel=1e-5, abs=1e-9)
    attributor.close()

"""On several processes, under torchrun: every value, and the books, are those of one process on the same batches."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from inrun import Ledger
from tests.parallel.runs import apart, run_on
from tests.parallel.worker import Run, weights_of

EXACT, SINGLE = 1e-9, 1e-4
AT_ONCE: dict[str, Any] = {"optimizer": "sgd", "settings": {"scheme": "first"}}
# name -> the run, and how far its values may be from those of one process
FEW: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, EXACT),
    "single": ({"dtype": "float32"}, SINGLE),
    "accumulated": ({"accumulation": 3}, EXACT),
    "uneven": ({"uneven": True, "batch": 4}, EXACT),
    "clipped": ({"clip": 0.05, "accumulation": 2}, EXACT),
    "many-target-batches": ({"targets": [4, 5], "settings": {"target_batches": 4}}, EXACT),
}
MORE: dict[str, tuple[dict[str, Any], float]] = {
    "accumulated-synced": ({"accumulation": 2, "no_sync": False}, EXACT),
    "clipped-by-value": ({"clip_value": 0.01}, EXACT),
    "sgd": ({"optimizer": "sgd", "rate": 0.5}, EXACT),
    "nodes": ({"settings": {"nodes": 2}}, EXACT),
    "adaptive": ({"rate": 0.1, "settings": {"nodes": "adaptive", "tolerance": 0.001}}, EXACT),
    "refresh": ({"steps": 5, "settings": {"scheme": "first", "refresh": 3}}, EXACT),
    "tangent": ({"settings": {"kernel": "tangent"}}, EXACT),
    "by-module": ({"settings": {"by_module": ["h.*"]}}, EXACT),
    "by-token": ({"settings": {"token_values": True}}, EXACT),
    "mlp": ({"case": "mlp"}, EXACT),
    "convolutional": ({"case": "convolutional"}, EXACT),
    "lstm": ({"case": "lstm"}, EXACT),
    "repeated": ({"case": "repeated"}, EXACT),
    "llama": ({"case": "hugging-face-llama"}, SINGLE),  # its norms compute in float32
    "gpt2": ({"case": "hugging-face-gpt2"}, EXACT),
}
ONLY: dict[str, dict[str, tuple[dict[str, Any], float]]] = {
    "ddp": {
        "at-once": (AT_ONCE, EXACT),
        "at-once-accumulated": (AT_ONCE | {"accumulation": 2, "clip": 0.05}, EXACT),
        "second": ({"optimizer": "sgd", "settings": {"scheme": "second"}}, EXACT),
        "perexample": ({"settings": {"kernel": "perexample"}}, EXACT),
        "muon": ({"optimizer": "muon"}, 1e-6),
    },
    "fsdp": {
        "summed": ({"summed": True, "targets": [1, 3], "settings": {"target_batches": 1}}, EXACT),
        "replicas": ({"replicas": True, "clip": 0.05}, EXACT),
        "looked-at": ({"looks": True, "steps": 2}, EXACT),
        "looked-at-refresh": (
            {"looks": True, "case": "repeated", "settings": {"scheme": "first", "refresh": 3}},
            EXACT,
        ),
        "kept-whole": ({"kept_whole": True, "case": "repeated"}, EXACT),
        "mixed-lstm": ({"dtype": "float32", "mixed": True, "optimizer": "sgd", "steps": 2, "case": "lstm"}, 0.02),
        # bfloat16 in the forward, on one process as on several; and without
        "mixed": ({"dtype": "float32", "mixed": True, "optimizer": "sgd", "steps": 2}, 0.02),
        "unmixed": ({"dtype": "float32", "optimizer": "sgd", "steps": 2}, SINGLE),
    },
}


def named(wrap: str, ranks: int = 2) -> dict[str, tuple[dict[str, Any], float]]:
    return FEW | MORE | ONLY[wrap] if ranks == 2 else FEW


def compare(several: Path, alone: Path, ranks: int, tolerance: float) -> Iterator[str]:
    """What is not as it should be."""
    if (far := apart(several, alone)) > tolerance:
        yield f"values are {far} apart"
    if {int(path.stem.rpartition("-r")[2]) for path in (several / "values").iterdir()} != set(range(ranks)):
        yield "not every process booked its own"
    mine, its = Ledger(several).steps(), Ledger(alone).steps()
    if not mine["examples"].equals(its["examples"]):
        yield "other numbers of examples"
    size = float(its["value"].abs().max() or 0)  # type: ignore[arg-type]
    for column in ("loss", "value", "train_loss", "momentum", "decay", "unexplained"):
        far = float((mine[column] - its[column]).abs().max() or 0)  # type: ignore[arg-type]
        if far > 10 * tolerance * max(size, 0.1):
            yield f"{column} is {far} apart"
    weights = weights_of(alone)
    for name, x in weights_of(several).items():
        if not torch.allclose(x, weights[name], rtol=tolerance, atol=tolerance):
            yield f"other weights {name}"


@pytest.mark.parametrize("ranks", [2, 3])
def test_values_books_and_weights_are_those_of_one_process(ranks: int, tmp_path: Path) -> None:
    kinds = {(wrap, name): of for wrap in ("ddp", "fsdp") for name, of in named(wrap, ranks).items()}
    runs = {
        (wrap, name): Run(str(tmp_path / f"{wrap}-{name}"), ranks, wrap=wrap, **of)
        for (wrap, name), (of, _) in kinds.items()
    }
    alone = {name: replace(run, folder=str(tmp_path / f"alone-{name}")) for (_, name), run in runs.items()}
    plain = [Run(str(tmp_path / f"{wrap}-unattached"), ranks, wrap=wrap, attached=False) for wrap in ("ddp", "fsdp")]
    run_on(ranks, [*runs.values(), *plain], tmp_path)
    run_on(1, list(alone.values()), tmp_path)
    wrong = [
        f"{wrap} {name}: {problem}"
        for (wrap, name), (_, tolerance) in kinds.items()
        for problem in compare(tmp_path / f"{wrap}-{name}", tmp_path / f"alone-{name}", ranks, tolerance)
    ]
    assert not wrong, "\n".join(wrong)
    if ranks == 2:
        check_parts(tmp_path)
        assert apart(tmp_path / "fsdp-mixed", tmp_path / "alone-unmixed") <= 0.03
        for wrap in ("ddp", "fsdp"):  # bit for bit
            weights = weights_of(tmp_path / f"{wrap}-tangent")
            assert all(torch.equal(x, weights[n]) for n, x in weights_of(tmp_path / f"{wrap}-unattached").items())


def check_parts(place: Path) -> None:
    """By module and by token, and what the audits do not explain."""
    for wrap in ("ddp", "fsdp"):
        mine, its = (
            Ledger(place / f"{of}-by-module").modules().sort("id", "target", "module") for of in (wrap, "alone")
        )
        assert mine.drop("value").equals(its.drop("value"))
        torch.testing.assert_close(mine["value"].to_torch(), its["value"].to_torch(), rtol=1e-9, atol=1e-13)
        for one in Ledger(place / f"{wrap}-by-token").values("t1")["id"].to_list()[:5]:
            tokens = [Ledger(place / f"{of}-by-token").token_values(one, "t1") for of in (wrap, "alone")]
            assert tokens[0] is not None
            assert tokens[0] == pytest.approx(tokens[1], rel=1e-9, abs=1e-14)
        audited = Ledger(place / f"{wrap}-nodes").steps().filter(pl.col("unexplained").is_not_null())
        drop = float((audited["loss_before"] - audited["loss_after"]).abs().sum())
        assert float(audited["unexplained"].abs().sum()) < 0.05 * drop

"""The page of large runs is what its formulas say, and those are what the kernels do."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ledger_scale
from benchmarks.scale import (
    BATCH,
    BEGIN,
    END,
    LLAMA_7B,
    LLAMA_70B,
    PAGE,
    SEQUENCE,
    Model,
    plain,
    refreshed,
    replicated,
    sharded,
    written,
)


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run `python -m benchmarks.scale`"
    assert page.count(BEGIN) == page.count(END) == 1


@pytest.mark.parametrize(("model", "billions"), [(LLAMA_7B, 6.738), (LLAMA_70B, 68.98)])
def test_the_models_have_the_parameters_that_are_known(model: Model, billions: float) -> None:
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("targets", [1, 4])
def test_tangent_takes_two_operations_for_every_weight_and_token(targets: int) -> None:
    gpus = 64
    more, base = sharded(LLAMA_7B, gpus, targets), plain(LLAMA_7B, gpus, True)
    contraction = more.operations - targets * LLAMA_7B.operations(SEQUENCE)
    assert contraction == pytest.approx(2 * targets * LLAMA_7B.products * BATCH / gpus)
    assert contraction / base.operations < targets / 3
    per_token = 32 * (11 * 4096 + 3 * 11008) + 4096 + 32_000
    assert more.captured == 2 * per_token * BATCH / gpus


def test_a_process_sends_what_a_microbatch_does_and_q_for_every_target() -> None:
    P, R = LLAMA_7B.parameters, 8
    assert sharded(LLAMA_7B, R, 4).network == pytest.approx(4 * 10 * P * 7 / 8)
    assert plain(LLAMA_7B, R, True).network == pytest.approx(32 * 8 * P * 7 / 8)
    assert replicated(LLAMA_7B, R, 4).network == pytest.approx(4 * 8 * P * 7 / 8)
    assert plain(LLAMA_7B, R, False).network == pytest.approx(8 * P * 7 / 8)
    assert sharded(LLAMA_7B, R, 4).state == pytest.approx(28 * P / 8)


def test_what_makes_it_cheaper_does() -> None:
    adapted, gpus = replace(LLAMA_7B, rank=16), 64
    assert adapted.moved == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert replicated(adapted, gpus, 4).captured < 0.01 * replicated(LLAMA_7B, gpus, 4).captured
    for targets in (1, 4):
        seldom, always = refreshed(LLAMA_7B, gpus, targets, 10), sharded(LLAMA_7B, gpus, targets)
        assert refreshed(LLAMA_7B, gpus, targets, 1).operations == always.operations
        assert seldom.operations < always.operations
        assert seldom.network < always.network / 3


def test_the_ledgers_benchmark_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--examples", "3000", "--targets", "2", "--folder", str(tmp_path), "--batch", "100"]
    assert ledger_scale.main(options) == 0
    told = capfd.readouterr().out
    assert "6,000 values" in told
    assert [line.split()[0] for line in told.splitlines()[2:] if line[0] != " "] == [
        "write", "compact", "values", "top", "by",
    ]  # fmt: skip
    assert "3,000 rows" in told
    assert not list(tmp_path.iterdir())

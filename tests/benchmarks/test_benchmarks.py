"""The benchmarks at toy sizes, from the command line to table, JSON and figure; and that they measure what they say."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, figure, measure, plan, report, rivals
from benchmarks.__main__ import main
from benchmarks.measure import Alternation, Measured, memory
from benchmarks.models import WORKLOADS, Setting
from benchmarks.variants import VARIANTS, Line, Opened, Stock, Variant, lines_of, own_line, plain_line
from inrun import Attributor, InrunError
from inrun.oracle import per_example_gradients


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, which is all that a toy has use for, and no step repeated for the sake of the clock."""
    monkeypatch.setattr(measure, "VISIT", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_from_the_command_line(tmp_path: Path) -> None:
    rivals_here = ",".join(name for name, variant in VARIANTS.items() if variant.needs)
    arguments = ["--quick", "--models", "gpt-tiny,mlp-tiny", "--rounds", "3", "--no-memory", "--device", "cpu"]
    arguments += ["--variants", f"first-sgd,path,path-2,second,naive,forward-mode,{rivals_here}", "--targets", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert result["machine"]["torch"] == torch.__version__
    assert [case["workload"] for case in result["cases"]] == ["gpt-tiny", "mlp-tiny"]
    for case in result["cases"]:
        assert case["complete"]
        assert (case["rounds"], case["targets"], case["dtype"]) == (3, 2, "fp32")
        rows = {row["variant"]: row for row in case["rows"]}
        assert {"plain-adamw", "plain-sgd", "passes-adamw 2", "passes-adamw 4", "double-adamw 2"} < set(rows)
        assert rows["second"]["beyond_what"] == "double-adamw 2"
        assert rows["path-2"]["beyond_what"] == "passes-adamw 4"
        for row in rows.values():
            if row["status"] == "measured":
                assert len(row["times"]) == 3
                assert all(math.isfinite(x) and x > 0 for x in [*row["seconds"], *row["ratio"]])
                assert row["baseline"] or all(map(math.isfinite, row["beyond"]))
            else:
                assert row["variant"] in rivals_here
                assert row["status"] == "failed" if rivals.installed(row["variant"]) else "not installed"
    table = (tmp_path / "table.txt").read_text("utf-8")
    assert "path, 1 node" in table
    assert "plain, AdamW + 2 double backwards" in table
    assert (tmp_path / "figure.svg").exists() == (find_spec("matplotlib") is not None)


def test_a_refusal_is_shown_with_its_reason() -> None:
    assert "ghost" in VARIANTS["path/ghost"].name
    of = Measured(Line(VARIANTS["path/ghost"], 1))
    of.out(InrunError("kernel='ghost' is for first under SGD. Take another."))
    assert (of.status, of.reason) == ("refused", "kernel='ghost' is for first under SGD.")
    of.out(ValueError("no\nyes"))
    assert (of.status, of.reason) == ("failed", "ValueError: no")


def test_a_line_that_is_refused_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refused(stock: Stock, targets: int) -> Iterator[Opened]:
        def step(batch: object) -> None:
            raise InrunError("not today. Tomorrow.")

        yield Opened(step)

    monkeypatch.setitem(VARIANTS, "refused", Variant("refused", "refused", refused))
    case = cases.Case("mlp-tiny", 4, "fp32", 1, ("refused", "path"), 1.0)
    with Alternation(case, "cpu") as running:
        for _ in range(running.warm + 2):
            running.round(lambda _: None)
        found = report.summarise(case, running, complete=True)
    rows = {row["variant"]: row for row in found["rows"]}
    assert (rows["refused"]["status"], rows["refused"]["reason"]) == ("refused", "not today.")
    assert len(rows["path"]["times"]) == 2
    assert "refused: not today." in report.table(found)


# the other libraries are no part of the tests' set-up: they are held against the truth where `make bench` put them
COMPARED = [
    (name, workload)
    for name, variant in VARIANTS.items()
    for workload in ("gpt-tiny", "mlp-tiny", "resnet-tiny")
    if not name.startswith(("first", "path", "second"))
    and (not variant.needs or rivals.installed(variant.needs) is not None)
    and name != "bergson"
    and (name, workload) != ("opacus", "resnet-tiny")
]


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients:UserWarning")  # captum
@pytest.mark.filterwarnings('ignore:Since `loss_fn` has no "reduction" attribute:UserWarning')  # captum
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")  # opacus
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented:UserWarning"
)  # dattri
@pytest.mark.parametrize(("name", "workload"), COMPARED)
def test_what_is_compared_is_the_same(name: str, workload: str) -> None:
    """Values are <g_i, grad L>, and the step trains as the plain one does."""
    setting = Setting(WORKLOADS[workload], WORKLOADS[workload].batch, "fp32", "cpu")
    batch = setting.draw(setting.batch, 0)
    before = setting.build()
    gradients = per_example_gradients(before, lambda model: setting.losses(model, batch) / setting.batch)
    parameters = dict(before.named_parameters())
    truth = torch.zeros(2, setting.batch)
    for k, target in enumerate(setting.targets(2)):
        directions = torch.autograd.grad(setting.loss(before, target), list(parameters.values()))
        for direction, of in zip(directions, parameters, strict=True):
            truth[k] += gradients[of].flatten(1) @ direction.flatten()
    line, trained = Line(VARIANTS[name], 2), []
    rule = line.variant.rule
    for one in (plain_line(rule), line):
        stock = Stock(setting, shared=True)
        with one.variant.open(stock, one.targets) as opened:
            values = opened.step(batch)
        trained.append([p.detach() for p in stock.take(rule)[0].parameters()])
    torch.testing.assert_close(values, truth, rtol=1e-4, atol=1e-6)
    for mine, plain in zip(*trained, strict=True):
        # under AdamW the first step is the gradient's sign, whatever the rounding
        assert ((mine - plain).abs() < 1e-6).float().mean() > 0.99


def test_what_is_very_slow_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLOW", 0.0)
    case = cases.Case("mlp-tiny", 4, "fp32", 1, ("path", "naive"), 1.0, memory=("path", "naive"))
    with Alternation(case, "cpu") as running:
        for _ in range(4):
            running.round(lambda _: None)
        found = report.summarise(case, running, complete=True)
    rows = {row["variant"]: row for row in found["rows"]}
    assert [len(rows[name]["times"]) for name in ("plain-adamw", "path", "naive")] == [2, 2, 1]
    assert rows["naive"]["once"]
    assert math.isfinite(rows["naive"]["ratio"][0])
    assert math.isfinite(rows["naive"]["beyond"][0])
    assert "(one step)" in report.table(found)
    assert [of.line.key for of in measure.remembered(case, list(running.lines.values()))] == ["plain-adamw", "path"]


def test_shared_weights_are_given_back_unhooked() -> None:
    case = cases.Case("gpt-tiny-shared", 3, "fp32", 1, ("path", "first-sgd"), 1.0, rounds=2)
    with Alternation(case, "cpu") as running:
        for _ in range(2):
            running.round(lambda _: None)
        assert running.shared
        assert not any(module._forward_hooks for module in running._stock.take("adamw")[0].modules())
        assert all(len(of.times) == 2 for of in running.lines.values())


def test_peak_memory_is_of_a_process_of_its_own() -> None:
    case = cases.Case("mlp-tiny", 4, "fp32", 1, ("path",), 1.0)
    most, later = memory(case, "cpu", "path")
    assert most is not None
    assert later is not None
    assert 0.05 < later <= most < 4


def test_plans_are_held_against_what_was_measured() -> None:
    class Plan:
        seconds = 0.5

    class Planning(Attributor):
        def __init__(self) -> None: ...

        def plan(self) -> Any:
            return Plan()

    assert plan.predicted(Planning()) == 0.5
    assert plan.error(0.5, 0.4) == pytest.approx(0.25)
    assert plan.error(0.5, 0.0) is None


def test_spread_and_beyond() -> None:
    assert report.spread([]) is None
    assert report.spread([2.0]) == [2.0, 2.0, 2.0]
    assert report.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == [3.0, 2.0, 4.0]
    lines = {line.key: Measured(line) for line in lines_of(["path"], 4)}
    assert list(lines) == ["plain-adamw", "passes-adamw 4", "path"]
    lines["plain-adamw"].times, lines["passes-adamw 4"].times, lines["path"].times = [1.0, 2.0], [1.5, 3.0], [1.75, 3.5]
    row = report._row(lines["path"], 4, lines)
    assert row["ratio"] == [1.75, 1.75, 1.75]
    assert row["beyond"] == [1.25, 1.25, 1.25]


def test_sets_of_cases_name_what_there_is() -> None:
    for case in [*cases.standard(), *cases.quick()]:
        assert case.workload in WORKLOADS
        assert set(case.memory) <= set(case.variants) <= set(VARIANTS)
    only = cases.asked(cases.standard(), ["mlp"], None, None, None, None, 2)
    assert {case.workload for case in only} == {"mlp"}
    assert {case.rounds for case in only} == {2}
    grid = cases.asked(cases.standard(), ["mlp", "gpt14m"], ["path"], "bf16", [1, 4], [8, 16], None)
    assert len(grid) == 8
    assert own_line(VARIANTS["path-2"], 4).targets == 8


def test_errors_of_the_fidelity_study_are_found() -> None:
    found = figure.errors()
    assert found
    for of in found.values():
        assert set(figure.SCHEMES.values()) <= set(of)


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third round that counts: the first two are written."""
    taken = []
    take = Alternation.round

    def interrupted(self: Alternation, tell: Any) -> None:
        if self.counted == 2:
            raise KeyboardInterrupt
        taken.append(self.taken)
        take(self, tell)

    monkeypatch.setattr(Alternation, "round", interrupted)
    arguments = ["--models", "mlp-tiny", "--variants", "path", "--rounds", "9", "--no-memory", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    (case,) = json.loads((tmp_path / "result.json").read_text("utf-8"))["cases"]
    assert not case["complete"]
    assert case["rounds"] == 2
    assert "(cut short)" in (tmp_path / "table.txt").read_text("utf-8")

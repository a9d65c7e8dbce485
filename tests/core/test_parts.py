"""Values by module against <g_i, q> of each part's parameters, by every kernel."""

from fnmatch import fnmatchcase
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from inrun import Attributor, InrunError
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from inrun.step import Step
from tests.models import CASES, Case, tokens
from tests.reference import reference_direction

pytestmark = pytest.mark.usefixtures("float64")

# a part for weights and one for biases takes units in two
SPLIT = {"head": "*head*", "biases": "*bias*", "block": "*block*"}


def attributed(case: Case, scheme: Literal["first", "path"], **settings: Any) -> tuple[Step, nn.Module, Any, Any]:
    """The second step of two uneven batches; with the model, g_i by name and q at it."""
    torch.manual_seed(0)
    model = case.build()
    optimizer: Optimizer = SGD(model.parameters(), lr=0.1) if scheme == "first" else AdamW(model.parameters(), lr=1e-2)
    targets = {"t": case.batch(3, 90), "u": case.batch(2, 91)}
    with Attributor(model, optimizer, targets, case.loss, scheme=scheme, **settings) as attributor:
        for step in range(2):
            batches = [case.batch(n, 10 * step + n) for n in (4, 3)]
            parts = [per_example_gradients(model, case.parts(b, 2 * n)) for b, n in zip(batches, (4, 3), strict=True)]
            g = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            optimizer.zero_grad()
            for batch, n in zip(batches, (4, 3), strict=True):
                with attributor.batch(range(n)):
                    (case.loss(model, batch) / 2).backward()
            q = {name: reference_direction(model, optimizer, case.at(of), scheme, 1) for name, of in targets.items()}
            optimizer.step()
    assert attributor.last is not None
    return attributor.last, model, g, q


def wanted(model: nn.Module, g: dict[str, Tensor], q: dict[nn.Parameter, Tensor], mine: Any) -> Tensor:
    """<g_i, q> over the parameters whose name is a part's."""
    found = [(g[name] * q[p]).flatten(1).sum(1) for name, p in model.named_parameters() if p in q and mine(name)]
    return torch.stack(found).sum(dim=0)


WAYS: list[tuple[Literal["first", "path"], Kernel]] = [
    *(("first", kernel) for kernel in ("auto", "tangent", "perexample", "ghost")),
    *(("path", kernel) for kernel in ("auto", "tangent", "perexample")),
]


def check(found: dict[str, Tensor], values: Tensor, of: dict[str, Tensor]) -> None:
    assert found.keys() == of.keys()
    largest = values.abs().max()
    for name, part in found.items():
        assert part.dtype == torch.float64
        assert float((part - of[name]).abs().max() / largest) < 1e-9, name
    torch.testing.assert_close(torch.stack(list(found.values())).sum(dim=0), values, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("scheme", "kernel"), WAYS)
@pytest.mark.parametrize("name", ["gpt", "repeated", "lstm", "convolutional"])
def test_a_part_for_every_module(name: str, scheme: Literal["first", "path"], kernel: Kernel) -> None:
    """The head's weight, which is the embedding's, is in the part of its first name."""
    last, model, g, q = attributed(CASES[name], scheme, kernel=kernel, by_module=True)
    modules = {n.rpartition(".")[0] or type(model).__name__ for n, _ in model.named_parameters()}
    assert ("lm_head" in modules) is False
    for target in q:
        of = {
            m: wanted(model, g, q[target], lambda n, m=m: (n.rpartition(".")[0] or type(model).__name__) == m)
            for m in modules
        }
        check(last.by_module[target], last.values[target], of)


@pytest.mark.parametrize(("scheme", "kernel"), WAYS)
def test_patterns(scheme: Literal["first", "path"], kernel: Kernel) -> None:
    """The first that matches has a parameter, the rest is other; biases are apart from their units' weights."""
    last, model, g, q = attributed(CASES["repeated"], scheme, kernel=kernel, by_module=SPLIT)
    part = {
        n: next((k for k, pattern in SPLIT.items() if fnmatchcase(n, pattern)), "other")
        for n, _ in model.named_parameters()
    }
    assert part["head.bias"] == "head"
    assert part["block.bias"] == "biases"
    for target in q:
        of = {k: wanted(model, g, q[target], lambda n, k=k: part[n] == k) for k in (*SPLIT, "other")}
        check(last.by_module[target], last.values[target], of)


def test_a_list_of_patterns_names_its_parts() -> None:
    patterns = ["h.0.*", "h.1.*", "*"]
    last, model, g, q = attributed(CASES["gpt"], "path", by_module=patterns)
    for target in q:
        of = {
            "h.0.*": wanted(model, g, q[target], lambda n: n.startswith("h.0.")),
            "h.1.*": wanted(model, g, q[target], lambda n: n.startswith("h.1.")),
            "*": wanted(model, g, q[target], lambda n: not n.startswith("h.")),
        }
        check(last.by_module[target], last.values[target], of)


def test_by_token_and_document() -> None:
    """The parts are of what has a value: examples, or the documents that are packed in them."""
    case, batch = CASES["gpt"], tokens(3, 1, length=7)
    ids = torch.tensor([[4, 4, 4, 9, 9, 9], [9, 9, 9, 9, 9, -1], [1, 1, 1, 1, 4, 4]])
    found = []
    for given in (range(3), ids):
        torch.manual_seed(0)
        model = case.build()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        settings: Any = {"token_values": True, "by_module": {"attention": "*.attn.*"}}
        with Attributor(model, optimizer, {"t": case.batch(3, 90)}, case.loss, **settings) as attributor:
            with attributor.batch(given):
                case.loss(model, batch).backward()
            optimizer.step()
        assert attributor.last is not None
        last = attributor.last
        parts = last.by_module["t"]
        assert list(parts) == ["attention", "other"]
        torch.testing.assert_close(parts["attention"] + parts["other"], last.values["t"], rtol=1e-12, atol=1e-15)
        found.append(last)
    assert found[1].ids == [4, 9, 1]
    every, some = (last.by_module["t"]["attention"].sum() for last in found)
    assert float((every - some).abs()) > 1e-8  # what went through the token that is nobody's
    of_some = found[1].values["t"].sum() + found[1].token_values["t"][1, 5]
    torch.testing.assert_close(of_some, found[0].values["t"].sum(), rtol=1e-9, atol=1e-14)


def test_nothing_is_kept_where_it_is_not_asked_for() -> None:
    last, *_ = attributed(CASES["mlp"], "path")
    assert last.by_module == {}
    assert last.token_values == {}


@pytest.mark.parametrize(
    ("by_module", "message"),
    [
        ("*.attn.*", "give True, a list of patterns"),
        ([], "give True, a list of patterns"),
        ([3], "give True, a list of patterns"),
        ({"a": 3}, "give True, a list of patterns"),
        (["nothing.*"], r"no trained parameter belongs to the pattern 'nothing.\*'.*such as wte.weight"),
        (["*", "h.0.*"], r"pattern 'h.0.\*'.*only such as match an earlier one"),
        ({"other": "h.0.*"}, "'other' is what matches no pattern"),
    ],
)
def test_what_is_no_pattern_is_refused(by_module: Any, message: str) -> None:
    with pytest.raises(InrunError, match=message):
        attributed(CASES["gpt"], "path", by_module=by_module)


def test_credit_has_no_parts() -> None:
    with pytest.raises(InrunError, match="momentum='credit' has no values of tokens or modules"):
        attributed(CASES["mlp"], "path", momentum="credit", by_module=True)

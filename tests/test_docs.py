"""The pages of docs/ do what they say."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import inrun
from inrun.update import Moved, base, supported_optimizers, update_of
from tests.models import CASES
from tests.reference import real_move

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def lion(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The optimizer of docs/optimizers.md, its update registered for the length of the test."""
    monkeypatch.setattr(base, "_updates", dict(base._updates))
    page: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / "optimizers.md").read_text(), re.DOTALL | re.MULTILINE):
        exec(block, page)
    return page["Lion"]


def test_the_page_names_every_supported_optimizer() -> None:
    table = re.findall(r"^\| (`.*?) \|", (DOCS / "optimizers.md").read_text(), re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert named == {*supported_optimizers(), "Muon", "LBFGS", "SparseAdam"}


def test_the_pages_own_optimizer_moves_as_its_update_says(lion: Any) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = lion([p], lr=0.03, weight_decay=0.1)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        moved = Moved(p.detach(), p.grad, optimizer.state.get(p, {}), optimizer.param_groups[0], update_of(optimizer))
        for s in (0.0, 0.25, 1.0):
            torch.testing.assert_close(moved.update.displacement(moved, s), real_move(optimizer, s)[p])
        still = moved.update.displacement(moved, 0.0, decay=False)
        torch.testing.assert_close(moved.update.displacement(moved, 0.0) - still, -0.003 * p.detach())
        optimizer.step()


def test_the_pages_own_optimizer_is_attributed(lion: Any) -> None:
    """Its real steps are audited, and its values balance."""
    case = CASES["gpt"]
    model = case.build()
    optimizer = lion(model.parameters(), lr=1e-3, weight_decay=0.1)
    with inrun.Attributor(model, optimizer, {"held out": case.batch(4, 99)}, case.loss, audit_every=1) as attributor:
        for step in range(3):
            optimizer.zero_grad()
            with attributor.batch(range(5)):
                case.loss(model, case.batch(5, step)).backward()
            optimizer.step()
    assert attributor.last is not None
    assert float(attributor.last.values["held out"].abs().sum()) > 0

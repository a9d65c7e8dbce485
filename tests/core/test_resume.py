"""A raw loop that was cut off goes on from its checkpoint with the ledger of one that never was."""

import io
from pathlib import Path

import torch

from inrun import Attributor, Ledger
from tests.models import CASES

case = CASES["gpt"]


def run(folder: Path, first: int, last: int, checkpoint: bytes | None = None, keep: int | None = None) -> bytes:
    """Steps first..last, from a checkpoint if one is given; the checkpoint taken after step `keep`."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    targets = {"many": [case.batch(2, k) for k in (90, 91, 92)], "one": case.batch(3, 93)}
    attributor = Attributor(model, optimizer, targets, case.loss, ledger=folder, resume=first > 1, audit_every=3)
    if checkpoint is not None:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        attributor.load_state_dict(state["attributor"])
    kept = io.BytesIO()
    for step in range(first, last + 1):
        with attributor.batch(range(10 * step, 10 * step + 4)):
            case.loss(model, case.batch(4, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == keep:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"attributor": attributor.state_dict()}, kept)
    attributor.close()
    return kept.getvalue()


def test_the_ledger_is_the_same_row_for_row(tmp_path: Path) -> None:
    run(tmp_path / "whole", 1, 9)
    checkpoint = run(tmp_path / "broken", 1, 7, keep=4)
    run(tmp_path / "broken", 5, 9, checkpoint)
    whole, broken = Ledger(tmp_path / "whole"), Ledger(tmp_path / "broken")
    order = ["step", "target", "id"]
    assert broken.scan().collect().sort(order).equals(whole.scan().collect().sort(order))
    assert broken.steps().equals(whole.steps())
    assert whole.steps("many").height == 9

"""The public surface, held to one list, and the README's loop, run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import inrun
from tests.models import class_losses, mlp, vectors

README = Path(__file__).parents[1] / "README.md"


def test_the_public_names_are_these_and_can_be_had() -> None:
    assert inrun.__all__ == [
        "Attributor", "ConservationError", "CoupledUpdate", "InrunError", "Ledger", "LedgerError",
        "MixedExamplesWarning", "NonFiniteError", "Recording", "RecordingError", "Step", "Update", "audit", "oracle",
        "register_update", "replay", "write_examples",
    ]  # fmt: skip
    assert dir(inrun) == inrun.__all__
    for name in inrun.__all__:
        found = getattr(inrun, name)
        assert found.__doc__
    with pytest.raises(AttributeError, match="Atributor"):
        inrun.Atributor  # noqa: B018


def test_the_readmes_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    loop = next(block for block in blocks if "inrun.Attributor(" in block)
    model = mlp()

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        inputs = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return class_losses(model, inputs).mean()

    loader = []
    for seed in range(3):
        x, y = vectors(4, seed)
        loader.append({"x": x, "y": y, "id": [f"{seed}-{k}" for k in range(4)]})
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "math_batches": [vectors(3, 9), vectors(3, 8)],
        "loss": loss,
        "loader": loader,
    }
    exec(loop, names)
    assert inrun.Ledger(tmp_path / "runs" / "first-try").values("math").height == 12

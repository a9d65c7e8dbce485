"""A loop with Accelerate, as it is but for the lines of inrun: the Attributor, its `batch` and close().

python examples/accelerate_loop.py [--out RUN] [--steps N]
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import inrun


def data_and_target() -> tuple[Any, dict[str, Tensor]]:
    """512 examples of three classes, every eighth with a wrong label, and a batch that is held out."""
    x = torch.randn(576, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    rows = [{"id": k, "x": x[k], "y": (y[k] + (k % 8 == 0)) % 3} for k in range(512)]
    return rows, {"x": x[512:], "y": y[512:]}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, target = data_and_target()
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=16, shuffle=True))
    attributor = inrun.Attributor(model, optimizer, {"held out": target}, loss, ledger=options.out)
    while attributor.step < options.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                with attributor.batch(batch["id"]):
                    accelerator.backward(loss(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if attributor.step == options.steps:
                break
    attributor.close()
    accelerator.wait_for_everyone()
    accelerator.print(inrun.Ledger(options.out).bottom(10))


if __name__ == "__main__":
    main()

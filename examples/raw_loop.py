"""A small model of letters trained by hand, in a plain loop, with the value of every training example for two targets.

python examples/raw_loop.py [--out RUN] [--steps N] [--resume]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import inrun

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/raw-loop"))
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()
letters, length, rate, warmup, save_every = "abcdefghijklmnopqrstuvwxyz .,_()=:", 48, 1e-3, 20, 5

texts = {"prose": Path("LICENSE").read_text() * 8, "code": Path(json.__file__).read_text()}
codes = {name: torch.tensor([letters.find(c) + 1 for c in text.lower()]) for name, text in texts.items()}
rows = {name: of[: len(of) // length * length].view(-1, length) for name, of in codes.items()}
train = torch.cat([of[8:] for of in rows.values()])
ids = [f"{name}-{k}" for name, of in rows.items() for k in range(8, len(of))]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:])


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(35, 64), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 35))
optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
targets = {name: of[:8] for name, of in rows.items()}
attributor = inrun.Attributor(model, optimizer, targets, loss, ledger=options.out, resume=options.resume)
saved: dict[str, Any] = {"model": model, "optimizer": optimizer, "inrun": attributor}
if options.resume:
    checkpoint = torch.load(options.out / "checkpoint.pt")
    for name, part in saved.items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random"])
while attributor.step < options.steps:
    optimizer.param_groups[0]["lr"] = rate * min(1, (attributor.step + 1) / warmup)
    chosen = torch.randint(len(train), (16,))
    with attributor.batch(ids=[ids[k] for k in chosen]):
        loss(model, train[chosen]).backward()
    optimizer.step()
    optimizer.zero_grad()
    if attributor.step % save_every == 0:
        checkpoint = {name: part.state_dict() for name, part in saved.items()}
        torch.save({**checkpoint, "random": torch.get_rng_state()}, options.out / "checkpoint.pt")
attributor.close()
for name in targets:
    print(inrun.Ledger(options.out).values(name).head(5))

"""A recorded run, and what every example did to the loss of the model that came out, for a target named afterwards.

python examples/replay.py [--out RUN] [--steps N]
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import inrun

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/replay"))
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()
letters, length = "abcdefghijklmnopqrstuvwxyz .,_()=:", 48

texts = {"prose": Path("LICENSE").read_text() * 8, "code": Path(json.__file__).read_text()}
codes = {name: torch.tensor([letters.find(c) + 1 for c in text.lower()]) for name, text in texts.items()}
rows = {name: of[: len(of) // length * length].view(-1, length) for name, of in codes.items()}
train = torch.cat([of[8:] for of in rows.values()])
ids = [f"{name}-{k}" for name, of in rows.items() for k in range(8, len(of))]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:])


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(35, 64), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 35))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


model, optimizer = build()
how = inrun.Recording(clip_norm=1.0)
with inrun.Attributor(
    model, optimizer, {"prose": rows["prose"][:8]}, loss, ledger=options.out, replayable=how
) as attributor:
    while attributor.step < options.steps:
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (attributor.step + 1) / 20)
        chosen = torch.randint(len(train), (16,))
        with attributor.batch(ids=[ids[k] for k in chosen], data=train[chosen]):
            loss(model, train[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

model, optimizer = build()
later = {"code": rows["code"][:8]}
print(inrun.replay(options.out, later, loss, model=model, optimizer=optimizer).values("code").head(5))

"""A small GPT trained by hand, in a plain loop, with the value of every training example for two targets.

    python examples/raw_loop.py [--out RUN] [--steps N]

Three lines are inrun's: the Attributor, the `with attributor.batch(...)` around forward and backward, and close().
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

import inrun


class Model(torch.nn.Module):
    """A bigram model with a hidden layer: enough to learn which letter follows which."""

    def __init__(self, letters: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(letters, width)
        self.hidden, self.head = torch.nn.Linear(width, width), torch.nn.Linear(width, letters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.hidden(self.embedding(tokens))))
        return logits


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


def windows(text: str, letters: str, length: int = 48) -> torch.Tensor:
    """The text cut into rows of letters."""
    codes = torch.tensor([letters.find(c) + 1 for c in text.lower()])
    return codes[: len(codes) // length * length].reshape(-1, length)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/raw-loop"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    letters = "abcdefghijklmnopqrstuvwxyz .,_()=:"
    texts = {"prose": Path("LICENSE").read_text() * 8, "code": Path(json.__file__).read_text()}
    rows = {name: windows(text, letters) for name, text in texts.items()}
    train = torch.cat([found[8:] for found in rows.values()])
    ids = [f"{name}-{k}" for name, found in rows.items() for k in range(8, len(found))]

    torch.manual_seed(0)
    model = Model(len(letters) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = {name: found[:8] for name, found in rows.items()}
    attributor = inrun.Attributor(model, optimizer, targets, loss, ledger=options.out)
    for _ in range(options.steps):
        chosen = torch.randint(len(train), (16,))
        with attributor.batch(ids=[ids[k] for k in chosen]):
            loss(model, train[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    attributor.close()

    for name in targets:
        print(inrun.Ledger(options.out).values(name).head(5))


if __name__ == "__main__":
    main()

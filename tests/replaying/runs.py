"""Small runs that are recorded, replayed, and trained again with other weights of their examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun import Attributor, Ledger, Recording, replay
from tests.models import CASES, Case

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
    "adamw, large eps": lambda ps: torch.optim.AdamW(ps, lr=1e-2, eps=1e-4),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
}
EXAMPLES = 4  # of a batch


@dataclass
class Run:
    """Steps of two batches each, under a rate that rises and falls."""

    case: Case = field(default_factory=lambda: CASES["mlp"])
    optimizer: str = "adamw"
    clip: float | None = 0.5
    steps: int = 5
    folder: Path = Path()
    recording: dict[str, Any] = field(default_factory=lambda: {"every": 2})
    rates: Sequence[float] = (0.1, 0.2, 0.3, 0.2, 0.1)
    cast: torch.dtype | None = None
    wrong: Callable[[int, nn.Module], None] = lambda step, model: None  # done to the model after every step

    def make(self) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = self.case.build()
        return model, OPTIMIZERS[self.optimizer](model.parameters())

    def batches(self, step: int) -> list[Any]:
        return [self.case.batch(EXAMPLES, 10 * step + k) for k in range(2)]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Of every example, its part of what backward() is called on."""
        return self.case.losses(model, batch) / (2 * EXAMPLES)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", self.cast or torch.bfloat16, self.cast is not None):
            return self.losses(model, batch).sum()

    def target(self, seed: int = 0) -> Any:
        return self.case.batch(5, 999 + seed)

    def ids(self, step: int, k: int) -> list[int]:
        return [100 * step + 10 * k + i for i in range(EXAMPLES)]

    def rate(self, step: int) -> float:
        return self.rates[(step - 1) % len(self.rates)] * (0.1 if self.optimizer.startswith("adam") else 1.0)

    def step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """What follows the backward passes."""
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()
        self.wrong(step, model)

    def record(self, until: int | None = None, **settings: Any) -> nn.Module:
        """Train, and return the model."""
        model, optimizer = self.make()
        replayable = Recording(**self.recording, clip_norm=self.clip)
        settings = {"targets": {"t": self.target()}, "replayable": replayable, **settings}
        given: dict[str, Any] = settings
        attributor = Attributor(model, optimizer, loss=self.case.loss, ledger=self.folder, **given)
        first = 1
        if settings.get("resume"):
            state = torch.load(self.folder.with_suffix(".pt"))
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            attributor.load_state_dict(state["attributor"])
            torch.set_rng_state(state["random"])
            first = state["attributor"]["step"] + 1
        with attributor:
            for step in range(first, (until or self.steps) + 1):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(step)
                for k, batch in enumerate(self.batches(step)):
                    with attributor.batch(ids=self.ids(step, k), data=batch):
                        self.loss(model, batch).backward()
                self.step(model, optimizer, step)
                if until is not None:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    state |= {"attributor": attributor.state_dict(), "random": torch.get_rng_state()}
                    torch.save(state, self.folder.with_suffix(".pt"))
        return model

    def replay(self, targets: dict[str, Any] | None = None, **settings: Any) -> Ledger:
        model, optimizer = self.make()
        return replay(
            self.folder,
            targets or {"t": self.target()},
            self.case.loss,
            model=model,
            optimizer=optimizer,
            train_loss=self.loss,
            progress=_silent,
            **settings,
        )

    def values(self, ledger: Ledger, target: str = "t") -> list[Tensor]:
        """By step, in the order of `ids`."""
        found = {(step, i): v for step, i, name, v in ledger.scan().collect().iter_rows() if name == target}
        assert len(found) == self.steps * 2 * EXAMPLES
        steps = range(1, self.steps + 1)
        return [torch.tensor([found[s, i] for k in range(2) for i in self.ids(s, k)]).double() for s in steps]

    def retrained(self, step: int, example: int, weight: float) -> float:
        """The target's loss at the end of a training of its own, in which one use of an example has this weight."""
        model, optimizer = self.make()
        for s in range(1, self.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self.rate(s)
            for k, batch in enumerate(self.batches(s)):
                weights = torch.ones(EXAMPLES)
                if s == step and k == 0:
                    weights[example] = weight
                (self.losses(model, batch) * weights).sum().backward()
            self.step(model, optimizer, s)
        model.eval()
        with torch.no_grad():
            return float(self.case.loss(model, self.target()))


def _silent(done: float, steps: int, loss: float | None) -> None:
    return None


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value."""
    scale = max(float(x.abs().max()) for x in expected)
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)) / scale

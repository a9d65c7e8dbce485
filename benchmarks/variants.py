"""What is measured: training steps, plain and with values, each a function of a batch.

A step trains: forward, backward, optimizer. Besides, it may compute values. Where these are plain gradient products it
returns them, <g_i, grad L of target k> as [targets, examples], so that what is compared can be seen to be the same.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.optim import SGD, AdamW, Optimizer

from benchmarks import rivals
from benchmarks.models import Batch, Setting
from inrun import Attributor
from inrun.tangent.generic import plain_kernels

Step = Callable[[Batch], Tensor | None]
Rule = Literal["adamw", "sgd"]
OPTIMIZERS: Mapping[Rule, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-4),
    "sgd": lambda parameters: SGD(parameters, lr=1e-3),
}


class Stock:
    """Models and their optimizers: one pair for all steps that leave no hooks on a model, one for each of the others.

    With `shared`, where memory has no room for more, one set of weights for all of them, and one optimizer of a kind.
    """

    def __init__(self, setting: Setting, shared: bool) -> None:
        self.setting, self.shared = setting, shared
        self._models: dict[Rule, nn.Module] = {}
        self._optimizers: dict[Rule, Optimizer] = {}

    def take(self, rule: Rule, *, hooks: bool = False) -> tuple[nn.Module, Optimizer]:
        if hooks and not self.shared:
            model = self.setting.build()
            return model, OPTIMIZERS[rule](list(model.parameters()))
        if rule not in self._models:
            others = list(self._models.values()) if self.shared else []
            self._models[rule] = others[0] if others else self.setting.build()
            self._optimizers[rule] = OPTIMIZERS[rule](list(self._models[rule].parameters()))
        return self._models[rule], self._optimizers[rule]

    def clear(self) -> None:
        """Drop the gradients that a step left which did not come to its end."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()


@dataclass(frozen=True)
class Opened:
    """A step that is ready to be taken, and the attributor at work in it, if there is one."""

    step: Step
    attributor: Attributor | None = None


@dataclass(frozen=True)
class Variant:
    """A kind of step.

    name: on the command line. open: open(stock, targets) -> the step, for as long as the block lasts. rule: the
    optimizer. passes: how many gradients of every target it cannot do without. own: what these are held to cost, plain
    passes or double backward passes. needs: the distribution that has to be installed.
    """

    name: str
    label: str
    open: Callable[[Stock, int], AbstractContextManager[Opened]]
    rule: Rule = "adamw"
    passes: int = 1
    own: Literal["passes", "double"] = "passes"
    needs: str | None = None


@contextmanager
def plain(stock: Stock, targets: int, *, rule: Rule) -> Iterator[Opened]:
    """A training step and `targets` forward and backward passes of target batches."""
    setting, (model, optimizer) = stock.setting, stock.take(rule)
    parameters, batches = list(model.parameters()), setting.targets(targets)

    def step(batch: Batch) -> None:
        setting.loss(model, batch).backward()
        for one in batches:
            torch.autograd.grad(setting.loss(model, one), parameters)
        optimizer.step()
        optimizer.zero_grad()

    yield Opened(step)


@contextmanager
def double(stock: Stock, targets: int, *, rule: Rule) -> Iterator[Opened]:
    """A training step, and of every target the gradient and the Hessian's product with the training gradient."""
    setting, (model, optimizer) = stock.setting, stock.take(rule)
    parameters, batches = list(model.parameters()), setting.targets(targets)

    def step(batch: Batch) -> None:
        setting.loss(model, batch).backward()
        for one in batches:
            with plain_kernels():  # the fused kernels of attention have no double backward
                gradients = torch.autograd.grad(setting.loss(model, one), parameters, create_graph=True)
                along = [(g * p.grad).sum() for g, p in zip(gradients, parameters, strict=True) if p.grad is not None]
                torch.autograd.grad(torch.stack(along).sum(), parameters, allow_unused=True)
        optimizer.step()
        optimizer.zero_grad()

    yield Opened(step)


@contextmanager
def attributed(stock: Stock, targets: int, *, rule: Rule, ledger: bool = False, **arguments: Any) -> Iterator[Opened]:
    """A training step with inrun attached."""
    setting, (model, optimizer) = stock.setting, stock.take(rule, hooks=True)
    batches = {f"target-{k}": batch for k, batch in enumerate(setting.targets(targets))}
    with tempfile.TemporaryDirectory() if ledger else contextlib.nullcontext() as folder:
        attributor = Attributor(model, optimizer, batches, setting.loss, ledger=folder, **arguments)

        def step(batch: Batch) -> None:
            with attributor.batch(range(len(batch[0]))):
                setting.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        try:
            yield Opened(step, attributor)
        finally:
            attributor.discard()
            attributor.close()


@contextmanager
def naive(stock: Stock, targets: int, *, rule: Rule) -> Iterator[Opened]:
    """One backward pass per example, its gradient multiplied with the targets' and added to the training gradient."""
    setting, (model, optimizer) = stock.setting, stock.take(rule)
    parameters, batches = list(model.parameters()), setting.targets(targets)

    def step(batch: Batch) -> Tensor:
        directions = [torch.autograd.grad(setting.loss(model, one), parameters) for one in batches]
        number = len(batch[0])
        total: tuple[Tensor, ...] = ()
        values = []
        for i in range(number):
            one = batch[0][i : i + 1], batch[1][i : i + 1]
            mine = torch.autograd.grad(setting.loss(model, one) / number, parameters)
            values.append(torch.stack([dot(mine, direction) for direction in directions]))
            if total:
                torch._foreach_add_(total, mine)
            else:
                total = mine
        for p, gradient in zip(parameters, total, strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(values, dim=1)

    yield Opened(step)


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(g.reshape(-1), q.reshape(-1)) for g, q in zip(one, other, strict=True)]).sum()


@contextmanager
def forward_mode(stock: Stock, targets: int, *, rule: Rule) -> Iterator[Opened]:
    """A training step, and of all examples' losses the derivative along every target's gradient, in forward mode."""
    setting, (model, optimizer) = stock.setting, stock.take(rule)
    parameters, batches = dict(model.named_parameters()), setting.targets(targets)

    def step(batch: Batch) -> Tensor:
        directions = [torch.autograd.grad(setting.loss(model, one), list(parameters.values())) for one in batches]

        def losses(own: dict[str, Tensor]) -> Tensor:
            return setting.losses(lambda inputs: functional_call(model, own, (inputs,)), batch) / len(batch[0])

        values: list[Tensor] = []
        own = {name: p.detach() for name, p in parameters.items()}
        with plain_kernels():  # the fused kernels of attention have no forward mode
            for direction in directions:
                values.append(jvp(losses, (own,), (dict(zip(own, direction, strict=True)),))[1])
        setting.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(values)

    yield Opened(step)


@contextmanager
def rival(stock: Stock, targets: int, *, make: rivals.Make) -> Iterator[Opened]:
    """What another library computes, with a training step under AdamW."""
    model, optimizer = stock.take("adamw", hooks=make in (rivals.opacus, rivals.bergson))
    with make(stock.setting, model, optimizer, stock.setting.targets(targets)) as step:
        yield Opened(step)


def _attributed(
    name: str, label: str, *, rule: Rule = "adamw", passes: int = 1, own: Literal["passes", "double"] = "passes",
    **arguments: Any,
) -> Variant:  # fmt: skip
    return Variant(name, label, partial(attributed, rule=rule, **arguments), rule, passes, own)


RULES: dict[Rule, str] = {"adamw": "AdamW", "sgd": "SGD"}
KERNELS = ("tangent", "perexample", "ghost")
_SLOW: Sequence[tuple[str, str, Rule]] = (("-sgd", ", SGD", "sgd"), ("", "", "adamw"))
RIVALS: Mapping[str, tuple[str, rivals.Make]] = {
    "opacus": ("opacus: gradients per example", rivals.opacus),
    "captum": ("captum: TracInCP", rivals.captum),
    "dattri": ("dattri: TracIn", rivals.dattri),
    "bergson": ("bergson: collector, linear layers only", rivals.bergson),
}
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _attributed("first-sgd", "first, SGD", rule="sgd", scheme="first"),
        _attributed("path-sgd", "path, 1 node, SGD", rule="sgd"),
        _attributed("first", "first", scheme="first"),
        _attributed("second", "second", scheme="second", own="double"),
        _attributed("path", "path, 1 node"),
        _attributed("path-2", "path, 2 nodes", nodes=2, passes=2),
        _attributed("path-adaptive", "path, adaptive", nodes="adaptive"),
        _attributed("path-ledger", "path, 1 node, with a ledger", ledger=True),
        *(_attributed(f"first-sgd/{k}", f"first, SGD, {k}", rule="sgd", scheme="first", kernel=k) for k in KERNELS),
        *(_attributed(f"path/{k}", f"path, 1 node, {k}", kernel=k) for k in KERNELS),
        # under SGD these are the same numbers as `first`; under AdamW they know nothing of the optimizer
        *(
            Variant(f"naive{end}", f"naive: a backward per example{of}", partial(naive, rule=rule), rule)
            for end, of, rule in _SLOW
        ),
        *(
            Variant(f"forward-mode{end}", f"forward mode, whole model{of}", partial(forward_mode, rule=rule), rule)
            for end, of, rule in _SLOW
        ),
        *(Variant(name, label, partial(rival, make=make), needs=name) for name, (label, make) in RIVALS.items()),
    )
}


@dataclass(frozen=True)
class Line:
    """A line of a table: a variant, and for how many targets. `baseline`: it is there to be compared with."""

    variant: Variant
    targets: int
    baseline: bool = False

    @property
    def key(self) -> str:
        return f"{self.variant.name} {self.targets}" if self.baseline and self.targets else self.variant.name


def plain_line(rule: Rule) -> Line:
    return Line(Variant(f"plain-{rule}", f"plain, {RULES[rule]}", partial(plain, rule=rule), rule), 0, True)


def own_line(variant: Variant, targets: int) -> Line:
    """Plain training and the targets' own passes, which the variant's cost beyond them is measured from."""
    rule = variant.rule
    if variant.own == "double":
        label = f"plain, {RULES[rule]} + {counted(targets, 'double backward')}"
        return Line(Variant(f"double-{rule}", label, partial(double, rule=rule), rule), targets, True)
    number = targets * variant.passes
    label = f"plain, {RULES[rule]} + {counted(number, 'target pass')}"
    return Line(Variant(f"passes-{rule}", label, partial(plain, rule=rule), rule), number, True)


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def lines_of(names: Sequence[str], targets: int) -> list[Line]:
    """The lines of the named variants, after all that they are compared with."""
    chosen = [VARIANTS[name] for name in names]
    rules: list[Rule] = [rule for rule in RULES if any(variant.rule == rule for variant in chosen)]
    found = [plain_line(rule) for rule in rules or ["adamw"]]
    for variant in chosen:
        line = own_line(variant, targets)
        if line.key not in [other.key for other in found]:
            found.append(line)
    return found + [Line(variant, targets) for variant in chosen]

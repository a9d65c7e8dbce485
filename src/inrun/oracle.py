"""The slow, exact versions of everything inrun computes fast: for tests, and for users who doubt.

* `per_example_gradients`: g_i by plain autograd, one backward pass per example.
* `StepGame`: the game of one step (design, 2.1), U(S) = L(w + D(0)) - L(w + D(sum of g_i, i in S)), played with the
  real optimizer and the real target loss.
* `exact_shapley`, `monte_carlo_shapley`: the Shapley values of any game.
* `replay_values`: what every use of an example did to a loss at the end of a run, by autograd through the whole run.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inrun.errors import InrunError
from inrun.parallel import Processes
from inrun.tangent.generic import plain_kernels
from inrun.target import Evaluation, uncompiled

Utility = Callable[[frozenset[int]], float]
MOST_PLAYERS = 14


def per_example_gradients(model: nn.Module, losses: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The gradient of every example's own part of the batch's loss.

    Args:
        model: parameters without requires_grad are left out.
        losses: losses(model) -> tensor [examples] whose sum is the batch's loss: for a mean over the batch, each
            example's loss divided by their number.

    Returns:
        parameter name -> tensor [examples, *parameter.shape]; zeros where an example does not depend on the parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    with uncompiled():  # the loss's graph is gone through once for every example, which a compiled one may refuse
        parts = losses(model)
        if parts.ndim != 1:
            raise InrunError(
                "losses(model) must return one number per example, a tensor of one dimension; got shape "
                f"{tuple(parts.shape)}."
            )
        for part in parts:
            found = torch.autograd.grad(part, list(parameters.values()), retain_graph=True, allow_unused=True)
            for (name, p), gradient in zip(parameters.items(), found, strict=True):
                gradients[name].append(torch.zeros_like(p) if gradient is None else gradient.detach())
    return {name: torch.stack(of) for name, of in gradients.items()}


class StepGame:
    """One step's game, with the real optimizer: call it with a set of examples for their utility in nats.

    Args:
        model: as it is before the step.
        optimizer: over the model's parameters, with its state before the step. Neither is changed.
        contributions: parameter name -> [examples, *shape], what each example adds to the gradient that the optimizer
            receives (after clipping, if there is any); a parameter without an entry has no gradient.
        target_loss: target_loss(model) -> scalar, evaluated in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        contributions: Mapping[str, Tensor],
        target_loss: Callable[[nn.Module], Tensor],
    ) -> None:
        self.model, self.target_loss = model, target_loss
        self._optimizer, self._contributions = optimizer, contributions
        self._evaluation = Evaluation(Processes(model, alone=True))
        self._names = {p: name for name, p in model.named_parameters()}
        self.players = len(next(iter(contributions.values())))
        self._nothing = self.loss_after(frozenset())

    def __call__(self, coalition: frozenset[int]) -> float:
        """U(S): by how much the examples of the coalition lower the target's loss, beyond the step on no data."""
        return self._nothing - self.loss_after(coalition)

    def moved(self, coalition: Iterable[int]) -> dict[nn.Parameter, Tensor]:
        """The weights after the optimizer's real step on the coalition's gradient."""
        members = sorted(coalition)
        trial = copy.deepcopy(self._optimizer)  # its parameters too; hooks stay behind
        moved = {}
        for group, trial_group in zip(self._optimizer.param_groups, trial.param_groups, strict=True):
            for p, trial_p in zip(group["params"], trial_group["params"], strict=True):
                parts = self._contributions.get(self._names[p])
                trial_p.grad = None if parts is None else parts[members].sum(dim=0)
                moved[p] = trial_p
        trial.step()
        return {p: trial_p.detach() for p, trial_p in moved.items()}

    def loss_after(self, coalition: Iterable[int]) -> float:
        """L(w + D(the coalition's gradient))."""
        moved = self.moved(coalition)
        kept = {p: p.detach().clone() for p in moved}
        try:
            with torch.no_grad(), self._evaluation():
                for p, weight in moved.items():
                    p.copy_(weight)
                return float(self.target_loss(self.model))
        finally:
            with torch.no_grad():
                for p, weight in kept.items():
                    p.copy_(weight)


def exact_shapley(utility: Utility, players: int) -> Tensor:
    """The Shapley values of a game of up to 14 players, by all of its coalitions: float64 [players].

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (U(S with i) - U(S)).
    """
    if not 1 <= players <= MOST_PLAYERS:
        raise InrunError(
            f"exact Shapley values take 2^n coalitions: {players} players are not between 1 and {MOST_PLAYERS}. Use "
            "monte_carlo_shapley."
        )
    worth = {}
    for size in range(players + 1):
        for members in itertools.combinations(range(players), size):
            coalition = frozenset(members)
            worth[coalition] = utility(coalition)
    values = torch.zeros(players, dtype=torch.float64)
    for coalition, value in worth.items():
        size = len(coalition)
        for i in range(players):
            if i in coalition:
                values[i] += value / (players * math.comb(players - 1, size - 1))
            else:
                values[i] -= value / (players * math.comb(players - 1, size))
    return values


def monte_carlo_shapley(utility: Utility, players: int, permutations: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Estimated Shapley values and their standard errors, float64 [players] each, from random orders of the players."""
    if players < 1 or permutations < 2:
        raise InrunError(
            f"monte_carlo_shapley needs a player and two permutations at least, got {players} and {permutations}."
        )
    generator = torch.Generator().manual_seed(seed)
    nothing = utility(frozenset())
    marginal = torch.zeros(permutations, players, dtype=torch.float64)
    for row in marginal:
        coalition: frozenset[int] = frozenset()
        before = nothing
        for i in torch.randperm(players, generator=generator).tolist():
            coalition = coalition | {i}
            after = utility(coalition)
            row[i], before = after - before, after
    return marginal.mean(dim=0), marginal.std(dim=0) / math.sqrt(permutations)


def replay_values(
    model: nn.Module,
    optimizer: Optimizer,
    steps: Sequence[Sequence[Callable[[nn.Module], Tensor]]],
    target: Callable[[nn.Module], Tensor],
    *,
    clip_norm: float | None = None,
    rates: Sequence[float] | None = None,
) -> list[Tensor]:
    """Minus the derivative of the target's loss after these steps by every example's weight in every step (design,
    2.6), by autograd through the unrolled training, in which torch's own optimizer takes the steps.

    Everything is kept in one graph: for a few steps of a small model, best in float64.

    Args:
        model, optimizer: as before the first step, with no state yet. Neither is changed.
        steps: of every step its batches, losses(model) -> tensor [examples], whose sum is what backward() is called on.
        target: target(model) -> scalar, evaluated in eval mode.
        clip_norm: the norm that the gradient is clipped to. rates: the learning rate of every step.

    Returns:
        For every step a tensor [examples], of its batches one after another; positive = lowered the target's loss.
    """
    names = {p: name for name, p in model.named_parameters()}
    now: dict[str, Tensor] = {name: p.detach().clone().requires_grad_() for p, name in names.items()}
    states: dict[str, dict[str, Any]] = {}
    weights: list[Tensor] = []
    for k, batches in enumerate(steps):
        losses = torch.cat([_with(model, now, losses) for losses in batches])
        weights.append(torch.ones_like(losses, requires_grad=True))
        made = torch.autograd.grad((losses * weights[-1]).sum(), list(now.values()), create_graph=True)
        if clip_norm is not None:
            norm = torch.stack([g.square().sum() for g in made]).sum().sqrt()
            made = tuple(g * torch.clamp(clip_norm / (norm + 1e-6), max=1.0) for g in made)
        after = {name: x.clone() for name, x in now.items()}
        groups = []
        for group in optimizer.param_groups:
            rate = group["lr"] if rates is None else rates[k]
            groups.append({**group, "params": [after[names[p]] for p in group["params"]], "lr": rate})
        kind: Any = type(optimizer)
        stepping: Optimizer = kind(groups, lr=0.0, differentiable=True)
        for group in stepping.param_groups:
            group |= {"differentiable": True, "foreach": False, "fused": None}
            if k == 0 and group.get("dampening"):
                group["dampening"] = 0.0  # torch does not dampen the gradient that starts the buffer
        for (name, x), g in zip(after.items(), made, strict=True):
            state = {key: one.clone() if isinstance(one, Tensor) else one for key, one in states.get(name, {}).items()}
            if isinstance(optimizer, torch.optim.Adam):
                # where no gradient came so far, the root has no derivative, and nothing moves
                g = torch.where((g == 0) & (state.get("exp_avg_sq", torch.zeros_like(g)) == 0), 0.0, g)
            x.retain_grad()
            x.grad = g
            stepping.state[x] = state
            if isinstance(optimizer, torch.optim.SGD) and "momentum_buffer" not in stepping.state[x]:
                stepping.state[x]["momentum_buffer"] = torch.zeros_like(x)  # torch would detach what starts it
        stepping.step()
        now, states = after, {name: stepping.state[x] for name, x in after.items()}
    was = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        end = _with(model, now, target)
    finally:
        for module, training in was:
            module.training = training
    return [-found for found in torch.autograd.grad(end, weights)]


class _Of(nn.Module):
    """A function of a model, as a module."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self._function = model, function

    def forward(self) -> Tensor:
        return self._function(self.model)


def _with(model: nn.Module, weights: Mapping[str, Tensor], function: Callable[[nn.Module], Tensor]) -> Tensor:
    """The function of the model with these weights."""
    named = {f"model.{name}": x for name, x in weights.items()}
    with plain_kernels():
        found: Tensor = torch.func.functional_call(_Of(model, function), named, ())
    return found

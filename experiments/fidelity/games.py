"""Part A: the game of one real step (design, 2.1), its Shapley values by random orders, and how far schemes are off.

U(S) = L(w + D(0)) - L(w + D(sum of g_i, i in S)) takes one forward pass of the target for every coalition S that the
orders meet, about 9,300 of them. They are evaluated in chunks, with a leading dimension of coalitions (C) on weights
and gradients; a few are held against the torch optimizers' real step.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim import Optimizer

from experiments.fidelity.training import Run, Study, settings_of
from experiments.language import GPT, example_losses, loss, mean_loss
from inrun.direction import Direction, Scheme, scheme_of
from inrun.game import Game
from inrun.oracle import StepGame, monte_carlo_shapley, per_example_gradients
from inrun.parallel import Processes
from inrun.piece import Moves
from inrun.target import Evaluation, Target, gradients
from inrun.update import CoupledUpdate, Moved, update_of

CHUNK = 16  # coalitions at once: many more no longer fit the processor's cache
CHECKED = 4  # coalitions held against the real optimizer
TOLERANCE = 1e-9  # nats, for those
DRAWS = 400  # of the noise of the ground truth


class SGDProxy(Scheme):
    """The gradient at w times the learning rate, whatever the optimizer: what the paper's code does under AdamW."""

    target_gradients = 1

    def scaled(self, moved: Moved, gradient: Tensor) -> Tensor:
        """c * gradient."""
        return gradient * float(moved.group["lr"])

    def directions(self, targets: Sequence[Target], step: int, moves: Moves) -> dict[str, Direction]:
        found = {}
        for target, (value, found_for) in zip(targets, gradients(targets, step, list(moves)), strict=True):
            pairs = zip(moves.items(), found_for, strict=True)
            q = {p: self.scaled(moved, gradient) for (p, moved), gradient in pairs if gradient is not None}
            found[target.name] = Direction(q, value, 1)
        return found


class Past(SGDProxy):
    """The gradient at w times what the optimizer would do to a tiny gradient, from the moments before the step alone.

    For Adam lr (1 - beta1) / bias1 / (sqrt(v / bias2) + eps), with v and bias2 those of the step before; at the first
    step, where v is 0, that is lr / eps. For SGD the learning rate. For Muon the derivative of its move at no gradient.
    """

    def scaled(self, moved: Moved, gradient: Tensor) -> Tensor:
        if "betas" not in moved.group:
            if not isinstance(moved.update, CoupledUpdate):
                return moved.update.pull_back(moved, 0.0, 1.0)[1](gradient)
            with torch.enable_grad():
                none = torch.zeros_like(gradient).requires_grad_()
                (pulled,) = torch.autograd.grad(
                    moved.update.smooth(replace(moved, gradient=none), 1.0), none, -gradient
                )
            return pulled
        beta1, beta2 = moved.group["betas"]
        before = float(moved.state.get("step", 0.0))
        root = torch.zeros_like(gradient)
        if before:
            root = (moved.state["exp_avg_sq"] / (1 - beta2**before)).sqrt()
        rate = float(moved.group["lr"]) * (1 - beta1) / (1 - beta1 ** (before + 1))
        c: Tensor = rate / (root + moved.group["eps"])
        return c * gradient


def scheme_named(name: str) -> Scheme:
    """The scheme by the study's name of it."""
    if name in ("sgd-proxy", "past"):
        return SGDProxy() if name == "sgd-proxy" else Past()
    settings: dict[str, Any] = {"nodes": 1, "rule": "midpoint", "tolerance": 0.02, "max_nodes": 9} | settings_of(name)
    return scheme_of(**settings)


class BatchedGame:
    """One step's game: `utility` looks up what `evaluate` has computed.

    Args:
        model, optimizers: as they are before the step. Nothing is changed.
        contributions: parameter name -> g_i, [players, *shape].
        moves: what the optimizers do with their sum.
        target: the held-out batch.
    """

    def __init__(
        self,
        model: GPT,
        optimizers: Sequence[Optimizer],
        contributions: Mapping[str, Tensor],
        moves: Moves,
        target: Tensor,
    ) -> None:
        self._model, self._optimizers, self._contributions, self._target = model, optimizers, contributions, target
        self._moves = {name: moves[p] for name, p in model.named_parameters()}
        self.players = len(next(iter(contributions.values())))
        self._losses: dict[frozenset[int], float] = {}

    def utility(self, coalition: frozenset[int]) -> float:
        """U(S) in nats; positive helps."""
        return self._losses[frozenset()] - self._losses[coalition]

    def shapley(self, permutations: int, seed: int) -> tuple[Tensor, Tensor]:
        """Shapley values by so many random orders, and their standard errors."""
        wanted: dict[frozenset[int], None] = {frozenset(): None, frozenset(range(self.players)): None}

        def note(coalition: frozenset[int]) -> float:
            wanted[coalition] = None
            return 0.0

        monte_carlo_shapley(note, self.players, permutations, seed)  # which coalitions the orders meet
        self._evaluate(list(wanted))
        self._check(seed)
        return monte_carlo_shapley(self.utility, self.players, permutations, seed)

    def _evaluate(self, coalitions: Sequence[frozenset[int]]) -> None:
        with torch.no_grad():
            for start in range(0, len(coalitions), CHUNK):
                chunk = coalitions[start : start + CHUNK]
                members = torch.zeros(len(chunk), self.players, dtype=torch.float64)
                for row, coalition in zip(members, chunk, strict=True):
                    row[list(coalition)] = 1.0
                weights = {name: self._moved(name, moved, members) for name, moved in self._moves.items()}
                losses: Tensor = vmap(self._loss)(weights)
                self._losses.update(zip(chunk, losses.tolist(), strict=True))

    def _moved(self, name: str, moved: Moved, members: Tensor) -> Tensor:
        """The weights after the step on every coalition's gradient: [C, *shape]."""
        g = self._contributions[name]
        gradients = (members @ g.flatten(1)).view(len(members), *g.shape[1:])
        return displacements(moved, gradients).add_(moved.weight)

    def _loss(self, weights: dict[str, Tensor]) -> Tensor:
        return mean_loss(functional_call(self._model, weights, (self._target,)), self._target)

    def _check(self, seed: int) -> None:
        """A few coalitions, the whole batch among them, by the optimizers' real step."""
        real = [
            StepGame(self._model, optimizer, self._contributions, lambda model: loss(model, self._target))
            for optimizer in self._optimizers
        ]
        names = {p: name for name, p in self._model.named_parameters()}
        known = list(self._losses)
        chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[: CHECKED - 1].tolist()
        for coalition in [frozenset(range(self.players)), *(known[k] for k in chosen)]:
            weights = {names[p]: weight for game in real for p, weight in game.moved(coalition).items()}
            with torch.no_grad():
                difference = abs(float(self._loss(weights)) - self._losses[coalition])
            if difference > TOLERANCE:
                raise AssertionError(
                    f"the loss after coalition {sorted(coalition)} is off by {difference:.1e} nats from the loss after "
                    "the optimizers' real step"
                )


def displacements(moved: Moved, gradients: Tensor) -> Tensor:
    """D of every gradient: [C, *shape]."""
    if not isinstance(moved.update, CoupledUpdate):
        return moved.update.displacement(replace(moved, gradient=gradients), 1.0)
    first = moved.update.displacement(replace(moved, gradient=gradients[0]), 1.0)
    together = _muon_displacements(moved, gradients)
    if torch.allclose(together[0], first, rtol=1e-9, atol=0.0):
        return together
    rest = [moved.update.displacement(replace(moved, gradient=one), 1.0) for one in gradients[1:]]
    return torch.stack([first, *rest])


def _muon_displacements(moved: Moved, gradients: Tensor) -> Tensor:
    """Muon's move for many gradients at once: where the processor multiplies a batch of matrices as it multiplies one,
    bit for bit what the optimizer does, in bfloat16, for each; five times as fast.
    """
    group, shape = moved.group, moved.weight.shape
    a, b, c = group["ns_coefficients"]
    buffer = moved.state.get("momentum_buffer", torch.zeros_like(moved.weight))
    mean = torch.lerp(gradients, torch.lerp(buffer, gradients, 1 - group["momentum"]), group["momentum"])
    y = mean.bfloat16()
    y = y.mT if shape[0] > shape[1] else y
    y = y / y.flatten(1).norm(dim=1).clamp(min=group["eps"])[:, None, None]
    for _ in range(group["ns_steps"]):
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = (y.mT if shape[0] > shape[1] else y).to(gradients.dtype)
    rate = float(group["lr"])
    adjusted = rate * 0.2 * math.sqrt(max(shape))  # adjust_lr_fn="match_rms_adamw"
    return (y * -adjusted).add_(moved.weight, alpha=-rate * group["weight_decay"])


def play(run: Run, study: Study, step: int, ids: Tensor, seed: int) -> dict[str, Any]:
    """The game of this step: Shapley values and their noise, and every scheme's values against them.

    The gradients of the step must not be set yet; they are when this returns, as the sum of the examples' parts.

    Returns:
        shapley, error: by player, the values and their standard errors, in nats.
        drop: U of the whole batch. noise: RMSE and Spearman that a perfect scheme would show against these values.
        schemes: name -> relative error, rmse, spearman, total (the error of the sum, as a share of the drop),
        target gradients, and seconds over those of one target gradient.
    """
    begun = time.perf_counter()
    contributions = per_example_gradients(run.model, lambda model: example_losses(model, ids) / len(ids))
    for name, p in run.model.named_parameters():
        p.grad = contributions[name].sum(dim=0)
    moves = {
        p: Moved(p.detach(), p.grad, optimizer.state.get(p, {}), group, update_of(optimizer))
        for optimizer in run.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    game = BatchedGame(run.model, run.optimizers, contributions, moves, run.target)
    shapley, error = game.shapley(study.permutations, 1000 * seed + step)
    played = time.perf_counter() - begun
    target = Target("held-out", run.target, loss, Evaluation(Processes(run.model, alone=True)))
    unit = _gradient_seconds(target, step, moves)
    drop = game.utility(frozenset(range(game.players)))
    schemes = {}
    for name in study.schemes:
        scheme = scheme_named(name)
        begun = time.process_time()
        direction = scheme.directions([target], step, moves)["held-out"]
        seconds = time.process_time() - begun
        values = torch.zeros(game.players, dtype=torch.float64)
        for parameter, p in run.model.named_parameters():
            if p in direction.vectors:
                values += contributions[parameter].flatten(1) @ direction.q(p).flatten()
        schemes[name] = compare(values, shapley) | {
            "total": float(values.sum() - drop) / abs(drop),
            "target_gradients": direction.target_gradients,
            "time": seconds / unit,
        }
    noisy = torch.Generator().manual_seed(step)
    draws = shapley + error * torch.randn(DRAWS, game.players, generator=noisy, dtype=torch.float64)
    spearmans = [compare(draw, shapley)["spearman"] for draw in draws]
    return {
        "shapley": shapley.tolist(),
        "error": error.tolist(),
        "drop": drop,
        "noise": {"rmse": float(error.square().mean().sqrt()), "spearman": statistics.median(spearmans)},
        "schemes": schemes,
        "seconds": played,
    }


def compare(values: Tensor, truth: Tensor) -> dict[str, Any]:
    """How far values are from the truth: relative error, RMSE in nats, Spearman correlation."""
    game = Game(truth, torch.zeros_like(truth), values)
    return {"relative": game.relative_error, "rmse": game.rmse, "spearman": game.spearman}


def _gradient_seconds(target: Target, step: int, moves: Moves) -> float:
    """Of one target gradient: processor time of this process, which others on the machine do not add to."""
    found = []
    for _ in range(5):
        begun = time.process_time()
        gradients([target], step, list(moves))
        found.append(time.process_time() - begun)
    return statistics.median(found)

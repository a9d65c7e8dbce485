"""The real game of one step (design, 2.1 and 2.5), against which the values of any scheme can be held.

A coalition S of the step's examples is worth what it lowers the target's loss by, beyond the step on no data:

    U(S) = L(w + D(0)) - L(w + D(sum of g_i, i in S))

with D the optimizer's own move and L the target's own loss, on the weights really moved. The Shapley values of this
game are what the values of the step stand for. They take 2^n losses in full, n losses for a random order of n players.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inrun.direction import displaced
from inrun.oracle import exact_shapley, monte_carlo_shapley
from inrun.target import Target, losses
from inrun.update import Moved

MOST_EXACT = 12  # players of a game that is played in full: 4096 losses


@dataclass(frozen=True, eq=False)
class Game:
    """What one step's game says about the values of its examples for one target. All in nats; positive helps.

    `shapley`, `noise`, `values`: float64 [examples], the game's Shapley values, their standard errors (zero where the
    game was played in full) and the scheme's values. `permutations`: how many random orders of the examples were
    played, 0 where all coalitions were.
    """

    shapley: Tensor
    noise: Tensor
    values: Tensor
    permutations: int = 0

    @property
    def exact(self) -> bool:
        """Whether all coalitions were played, so that nothing is estimated."""
        return self.permutations == 0

    @property
    def relative_error(self) -> float:
        """|values - shapley| / |shapley|, with Euclidean norms; 0 where both are zero."""
        difference = float((self.values - self.shapley).norm())
        if difference == 0:
            return 0.0
        size = float(self.shapley.norm())
        return difference / size if size != 0 else float("inf")

    @property
    def rmse(self) -> float:
        """The root mean square over the examples of values - shapley, in nats."""
        return _root_mean_square(self.values - self.shapley)

    @property
    def spearman(self) -> float | None:
        """The rank correlation of values and shapley; None for a single example, or where either is constant."""
        return spearman(self.values, self.shapley)

    def row(self) -> dict[str, float | None]:
        """The game's columns of the ledger's steps table; `game_noise` is the root mean square of `noise`."""
        return {
            "game_error": self.relative_error,
            "game_rmse": self.rmse,
            "game_spearman": self.spearman,
            "game_noise": _root_mean_square(self.noise),
        }


def play(
    contributions: Mapping[nn.Parameter, Tensor],
    moves: Mapping[nn.Parameter, Moved],
    targets: Sequence[Target],
    step: int,
    values: Mapping[str, Tensor],
    permutations: int,
    seed: int = 0,
) -> dict[str, Game]:
    """The game of the step that the optimizer is about to take, for every target. Changes nothing.

    Every coalition moves the weights once, for all targets. A coalition whose loss is not finite makes the game's
    numbers NaN.

    Args:
        contributions: [examples, *shape] by parameter, g_i as the optimizer receives it. A parameter of `moves` that
            has none here moves as on a gradient of zero in every coalition.
        moves: the parameters as the optimizer meets them, before its step.
        step: which of their batches the targets use.
        values: the scheme's values by target, [examples].
        permutations: random orders to play, two or more, where there are more than 12 examples.

    Raises:
        InrunError: fewer than two permutations, where the game is too large to be played in full.
    """
    players = len(next(iter(values.values())))
    losses_of = _losses_after(contributions, moves, targets, step)
    games = {}
    for target in targets:
        nothing = losses_of(frozenset())[target.name]

        def utility(coalition: frozenset[int], name: str = target.name, nothing: float = nothing) -> float:
            return nothing - losses_of(coalition)[name]

        if players <= MOST_EXACT:
            shapley, played = exact_shapley(utility, players), 0
            noise = torch.zeros_like(shapley)
        else:
            # the same orders for all targets, so that they share what was moved
            shapley, noise = monte_carlo_shapley(utility, players, permutations, seed)
            played = permutations
        games[target.name] = Game(shapley, noise, values[target.name].double().cpu(), played)
    return games


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation of two vectors: Pearson's of their ranks, equal entries sharing the mean of theirs.

    None where it is not defined: fewer than two entries, all entries of one vector equal, or one not finite.
    """
    if len(x) < 2 or not bool((x.isfinite() & y.isfinite()).all()):
        return None
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    size = float(a.norm() * b.norm())
    return max(-1.0, min(1.0, float(a @ b) / size)) if size != 0 else None


def _ranks(x: Tensor) -> Tensor:
    """From 1; equal entries have the mean of the ranks that they take up together."""
    _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[which]


def _losses_after(
    contributions: Mapping[nn.Parameter, Tensor],
    moves: Mapping[nn.Parameter, Moved],
    targets: Sequence[Target],
    step: int,
) -> Callable[[frozenset[int]], dict[str, float]]:
    """L(w + D(a coalition's gradient)) by target, as a function that remembers every coalition."""
    with torch.no_grad():
        still = {p: _displacement(m, torch.zeros_like(m.gradient)) for p, m in moves.items() if p not in contributions}
    known: dict[frozenset[int], dict[str, float]] = {}

    def losses_of(coalition: frozenset[int]) -> dict[str, float]:
        if coalition not in known:
            members = sorted(coalition)
            with torch.no_grad():
                move = {
                    p: still[p] if p in still else _displacement(moved, contributions[p][members].sum(dim=0))
                    for p, moved in moves.items()
                }
            with displaced(move):
                found = losses(targets, step)
                known[coalition] = {target.name: loss for target, loss in zip(targets, found, strict=True)}
        return known[coalition]

    return losses_of


def _displacement(moved: Moved, gradient: Tensor) -> Tensor:
    """D(gradient)."""
    return moved.update.displacement(replace(moved, gradient=gradient), 1.0)


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())

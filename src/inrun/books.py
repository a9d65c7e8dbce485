"""Conservation and audit: the two checks that make the values trustworthy (design, 2.5).

Conservation, at every step: over all examples, sum_i phi_i = <G, q>, for every group of units that share parameters, to
float tolerance. Audit, on chosen steps: loss drop = values + momentum + decay + unexplained, by the target's real loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inrun.direction import displaced, displacements
from inrun.errors import InrunError
from inrun.gradient import wide
from inrun.piece import Moves
from inrun.target import Target, losses
from inrun.units import Group

# what rounding may do to a group's sum, relative to |G| |q| + sum |b| |tangent|: ten times or more what was measured
# (7e-8 in float32; 4e-9 in float64 models that compute a norm in float32), and far below a missing call or example
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
# in half precision, which rounds every number of a sum by itself: so many times what such roundings come to if they are
# independent of one another, sqrt(sum_k (eps G_k q_k)^2) for a gradient G (three were measured); never more than HALF
ROUNDINGS, HALF = 30.0, 3e-2
# nats: a smaller difference is nobody's. Where gradients vanish their squares underflow, and they have few digits
NOTHING = 1e-20


class ConservationError(InrunError):
    """The values of a step do not add up to what the optimizer received: some use of a parameter was not seen."""


def check_conservation(
    groups: Sequence[Group],
    seen: Tensor,
    size: Tensor,
    expected: Tensor,
    lengths: Tensor,
    rounding: Tensor,
    where: str,
) -> float:
    """The largest relative error of sum_i phi_i = <G, q> over the groups.

    Args:
        seen, expected: [groups], the two sides. size, lengths: [groups], what their rounding is judged against.
        rounding: [groups], what one rounding of every number in half precision may change; zero where none was.
        where: the step and the target, for the error.

    Raises:
        ConservationError: naming the parameters, if a group's error is more than rounding.
    """
    apart = (seen - expected).abs()
    bound = (size + lengths).nan_to_num(math.inf, math.inf)  # where squares of huge numbers are none of float32's
    errors = torch.where((bound > 0) & (apart > NOTHING), apart / bound, 0.0)
    worst = 0.0
    columns = torch.stack([apart, bound, errors, rounding, seen, expected, size]).tolist()  # waits once
    for group, gap, against, error, rounded, left, right, magnitude in zip(groups, *columns, strict=True):
        exact = max(TOLERANCE[wide(p.dtype)] for p in group.parameters) * against
        allowed = exact + min(HALF * against, ROUNDINGS * rounded)
        unseen = magnitude == 0 and gap > NOTHING
        if unseen or not gap <= max(allowed, NOTHING):
            tolerance = allowed / against if against else 0.0
            raise ConservationError(
                f"{where}: the values that came through {', '.join(group.parameters.values())} add up to {left:.6g}, "
                f"but <G, q> is {right:.6g} (a relative error of {error:.1e}, tolerance {tolerance:.0e}). "
                f"{_CAUSES}{_HALF_CAUSES if rounded else ''}"
            )
        worst = max(worst, error)
    return worst


def check_contributions(
    groups: Sequence[Group], contributions: Mapping[nn.Parameter, Tensor], moves: Moves, cast: bool, where: str
) -> float:
    """The largest relative error of sum_i g_i = G over the groups, g_i [examples, *shape] by parameter.

    `cast`: the training's own gradient was summed in half precision.

    Raises ConservationError, naming the parameters, if a group's error is more than rounding.
    """
    worst = 0.0
    for group in groups:
        error, bound = [], []
        for p in group.parameters:
            g, whole = contributions.get(p), moves[p].gradient if p in moves else None
            if g is not None:
                error.append((g.sum(dim=0) - (0 if whole is None else whole)).double().norm())
                bound += [part.double().norm() for part in g]
            elif whole is not None:
                error.append(whole.double().norm())
            if whole is not None:
                bound.append(whole.double().norm())
        if error and (apart := float(torch.stack(error).norm())):
            relative = apart / float(torch.stack(bound).sum())
            tolerance = HALF if cast else max(TOLERANCE.get(p.dtype, HALF) for p in group.parameters)
            if not relative <= tolerance:
                raise ConservationError(
                    f"{where}: the examples' gradients of {', '.join(group.parameters.values())} do not add up to what "
                    f"the optimizer receives (a relative error of {relative:.1e}, tolerance {tolerance:.0e}). {_CAUSES}"
                )
            worst = max(worst, relative)
    return worst


_CAUSES = (
    "A use of these parameters was not seen. Usual causes: gradients not zeroed before the batch, changed inside its "
    "block (clip after it), or made outside of it; a parameter read without calling its module, as in F.linear(x, "
    "m.weight); a penalty on the weights inside the loss (use the optimizer's weight_decay); autograd.grad() inside "
    "the block (a gradient penalty); a hook that changes gradients; on several processes, one that compresses what "
    "they exchange, or a divisor other than their number (set_gradient_divide_factor). If nothing of this can be "
    "changed, freeze these parameters (requires_grad_(False))."
)
_HALF_CAUSES = (
    " If all uses are seen: weights in half precision, whose gradients some operators add up over thousands of rows in "
    "that precision, are trained on sums that are far off; keep them in float32, under autocast."
)


@dataclass(frozen=True)
class Audit:
    """A target's real losses around one step, in nats: before it, after momentum alone, after momentum and
    decay (D(0)), after it.
    """

    before: float
    after_momentum: float
    after_zero: float
    after: float

    def row(self, value: float) -> dict[str, float]:
        """The accounts of the step, given the sum of its values: drop = value + momentum + decay + unexplained."""
        momentum, decay = self.before - self.after_momentum, self.after_momentum - self.after_zero
        return {
            "loss_before": self.before,
            "loss_after": self.after,
            "momentum": momentum,
            "decay": decay,
            "unexplained": self.after_zero - self.after - value,
        }


def losses_without_data(targets: Sequence[Target], step: int, moves: Moves) -> dict[str, list[float]]:
    """By target: its loss at w, after momentum alone, and at w + D(0)."""
    zero, still = displacements(moves, 0.0), displacements(moves, 0.0, decay=False)
    found = []
    for move in ({}, still, zero):
        with displaced(move):
            found.append(losses(targets, step))
    return {target.name: list(of) for target, *of in zip(targets, *found, strict=True)}

"""Muon: the momentum with its singular values made equal, by a Newton-Schulz iteration that torch runs in bfloat16."""

import math

import torch
from torch import Tensor

from inrun.update.base import CoupledUpdate, Moved, register_update
from inrun.update.parts import before, decayed


class MuonUpdate(CoupledUpdate):
    """torch.optim.Muon with plain and Nesterov's momentum, its adjusted rates and weight decay.

    The move is the real one, in bfloat16. Its derivative is that of the same iteration in the weight's precision,
    since what bfloat16 rounds away is noise in a derivative.
    """

    def displacement(self, moved: Moved, s: float, *, decay: bool = True) -> Tensor:
        return decayed(_move(moved, s, torch.bfloat16), moved, decay)

    def smooth(self, moved: Moved, s: float) -> Tensor:
        return _move(moved, s, moved.weight.dtype)


def _move(moved: Moved, s: float, dtype: torch.dtype) -> Tensor:
    """D(sG) without decay, its iteration in this precision."""
    group, g = moved.group, moved.gradient * s
    mean = torch.lerp(before(moved, "momentum_buffer"), g, 1 - group["momentum"])
    if group["nesterov"]:
        mean = torch.lerp(g, mean, group["momentum"])
    rows, columns = moved.weight.shape
    match group["adjust_lr_fn"]:
        case "original" | None:
            adjusted = math.sqrt(max(1, rows / columns))
        case "match_rms_adamw":
            adjusted = 0.2 * math.sqrt(max(rows, columns))
        case _:
            adjusted = 1.0
    flat = _orthogonal(mean.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
    return flat.to(g.dtype) * (-float(group["lr"]) * adjusted)


def _orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T, of x = U S V^T, by a quintic Newton-Schulz iteration in the precision of x."""
    a, b, c = coefficients
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if x.shape[0] > x.shape[1] else y


if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    register_update(torch.optim.Muon)(MuonUpdate)

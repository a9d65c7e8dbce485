"""<g_i, q> of a linear layer where q is a target's own gradient, without a tensor of the weight's size (design, 2.4).

With inputs a and output gradients b of the example's rows, and a', b' of the target's, both gradients are sums of
outer products, and

    <sum_r b_r a_r^T, sum_m b'_m a'_m^T> = sum over r and m of (a_r . a'_m)(b_r . b'_m).

Shapes: N examples of R rows, M rows of the target, I and O features in and out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # a'_MI and b'_MO of one call


def ghost(a_NRI: Tensor, b_NRO: Tensor, pairs: Sequence[Sequence[Pair]]) -> Tensor:
    """<g_i, q> of the weight, for the pairs of every target: float64 [targets, examples]."""
    N = len(a_NRI)
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a_NRI, b_NRO))
    found = torch.zeros(len(pairs), N, dtype=torch.float64, device=a.device)
    for k, of in enumerate(pairs):
        for other_a, other_b in of:
            found[k] += (a @ other_a.T).mul_(b @ other_b.T).view(N, -1).sum(dim=1)
    return found


def ghost_bias(b_NRO: Tensor, pairs: Sequence[Sequence[Pair]]) -> Tensor:
    """The same of the bias, whose gradient is the sum of b over the rows."""
    b_NO = b_NRO.sum(dim=1)
    whole = [torch.stack([other.sum(dim=0) for _, other in of]).sum(dim=0) for of in pairs]
    return (torch.stack(whole) @ b_NO.T).double()

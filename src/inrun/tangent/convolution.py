"""g_i of a convolution's weight and bias, of any kind, without unfolding the input in memory.

A convolution's output at a position is W times the patch of the input that the kernel lies over. So the gradient of W
is the sum over positions of y x^T, where x is that patch of the padded input and y the output's gradient. A transposed
convolution is the same with its sides exchanged: x is a patch of its output's gradient, and y its input.

There are two ways to that sum for every example, and the sizes say which:

* the examples as groups of one convolution, whose weight's gradient is then every example's (Rochette, Manoel and
  Tramel, arXiv:1912.06015): the faster where an example's gradient is small against its input;
* a matrix product for every example, with its patches: the faster, and taken, where the patches of an example are fewer
  numbers than its gradient, or no more than its input.

Either goes through a few examples at a time, whose numbers stay in the cache.

Shapes: N examples, R entries of each, C channels and P positions of a group.
"""

from collections.abc import Collection, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_AT_ONCE = 2**20  # numbers made in one go: many more leave the cache, many fewer are small products


def per_example_convolution(
    module: _ConvNd,
    a: Tensor,
    b: Tensor,
    names: Collection[str] = ("weight", "bias"),
    entries: int = 1,
    out: Tensor | None = None,
) -> dict[str, Tensor]:
    """{"weight": [N, *weight.shape], "bias": [N, channels]}, those of `names` that the module has, in b's dtype.

    Args:
        module: one of torch's convolutions, transposed or not.
        a: the input of a call of it, [N, channels, *space] in any memory format.
        b: the gradient of that call's output, [N, channels, *space].
        entries: where it is more than one, each example has so many consecutive entries in a and b, [N * entries, ...],
            and its gradients are the sums over them.
        out: contiguous memory in b's dtype for the weight's gradients, which are most of the cost where the weight is
            large and the memory new.

    Without groups, b (a if transposed) may hold some of the channels: they give those rows of the weight's gradients.
    """
    found = {}
    with torch.no_grad():
        if "weight" in names:
            found["weight"] = _of_weight(module, a.to(b.dtype), b, entries, out)
        if "bias" in names and module.bias is not None:
            b_NR = b.reshape(len(b) // entries, entries, *b.shape[1:])
            found["bias"] = b_NR.sum(dim=(1, *range(3, b_NR.ndim)))
    return found


def _of_weight(module: _ConvNd, a: Tensor, b: Tensor, entries: int, out: Tensor | None) -> Tensor:
    x, y = (b, a) if isinstance(module, _ConvTransposeNd) else (a, b)
    N, shape = len(y) // entries, (y.shape[1], *module.weight.shape[1:])
    gradients = y.new_empty(N, *shape) if out is None else out
    patches = entries * x.shape[1] * prod(shape[2:]) * prod(y.shape[2:])
    by_patches = patches < prod(shape) or patches <= entries * prod(x.shape[1:])
    at_once = max(1, _AT_ONCE // (patches if by_patches else prod(shape)))
    for i in range(0, N, at_once):
        some = slice(i * entries, (i + at_once) * entries)
        (by_products if by_patches else by_groups)(module, x[some], y[some], gradients[i : i + at_once])
    return gradients


def by_groups(module: _ConvNd, x: Tensor, y: Tensor, into: Tensor) -> None:
    """The weight's gradient of one convolution of R entries, with every example's groups side by side."""
    N, kernel = len(into), into.shape[3:]
    x, padding = _padded(module, x)
    geometry = zip(x.shape[2:], y.shape[2:], kernel, module.stride, padding, module.dilation, strict=True)
    # output_padding of a stride or more makes room for more positions than there are: no input stood there
    more = [(size + 2 * p - d * (k - 1) - 1) // s + 1 - given for size, given, k, s, p, d in geometry]
    if any(more):
        y = F.pad(y, _sides([(0, after) for after in more]))

    def grouped(z: Tensor) -> Tensor:
        z_RN = z.reshape(N, -1, *z.shape[1:]).transpose(0, 1)
        return z_RN.reshape(z_RN.shape[0], -1, *z.shape[2:])

    _, gradients, _ = torch.ops.aten.convolution_backward(
        grouped(y),
        grouped(x),
        y.new_empty(into.shape).flatten(0, 1),  # a weight of which only the shape is read
        None,
        module.stride,
        padding,
        module.dilation,
        False,  # transposed
        [0] * len(kernel),  # output_padding
        N * module.groups,
        [False, True, False],  # of the input, the weight, the bias
    )
    into.copy_(gradients.view(into.shape))


def by_products(module: _ConvNd, x: Tensor, y: Tensor, into: Tensor) -> None:
    """For every example and group the product of y and the patches, over the positions of all entries."""
    N, G, kernel, positions = len(into), module.groups, into.shape[3:], y.shape[2:]
    R, C = len(y) // N, into.shape[2]
    x, padding = _padded(module, x)
    if any(padding):
        x = F.pad(x, _sides([(p, p) for p in padding]))
    entry, channel, *space = x.stride()
    steps = [stride * step for stride, step in zip(space, module.stride, strict=True)]
    within = [stride * step for stride, step in zip(space, module.dilation, strict=True)]
    patches = x.as_strided((N, G, C, *kernel, R, *positions), (entry * R, channel * C, channel, *within, entry, *steps))
    x_NGCP = patches.reshape(N * G, C * prod(kernel), R * prod(positions))
    y_NGCP = y.reshape(N, R, G, y.shape[1] // G, -1).permute(0, 2, 3, 1, 4).reshape(N * G, -1, x_NGCP.shape[2])
    torch.bmm(y_NGCP, x_NGCP.transpose(1, 2), out=into.view(N * G, -1, x_NGCP.shape[1]))


def _padded(module: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that a convolution cannot add itself, and the zeros on both sides that it can."""
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), (0,) * (x.ndim - 2)
    if not isinstance(module.padding, str):
        return x, module.padding
    around = [d * (k - 1) for d, k in zip(module.dilation, module.weight.shape[2:], strict=True)]
    if module.padding == "valid":
        around = [0] * len(around)
    x = F.pad(x, _sides([(0, zeros % 2) for zeros in around]))
    return x, tuple(zeros // 2 for zeros in around)


def _sides(by_dimension: Sequence[tuple[int, int]]) -> list[int]:
    """As F.pad takes it, from the last dimension to the first."""
    return [side for sides in reversed(by_dimension) for side in sides]

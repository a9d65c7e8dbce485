"""Every example's gradient of a convolution, against one backward pass per example."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from inrun.tangent import convolution
from inrun.tangent.convolution import by_groups, by_products, per_example_convolution

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
N = 3
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
# what does not depend on the number of dimensions
EVERYWHERE: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "one": {"kernel_size": 1},
    "one-strided": {"kernel_size": 1, "stride": 2, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "patches": {"kernel_size": 2, "stride": 2},
    "with-gaps": {"kernel_size": 2, "stride": 3},
    "dilated": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 3},
    "even-kernel": {"kernel_size": 4, "padding": 2, "bias": False},
    "padding-beyond-kernel": {"kernel_size": 2, "padding": 1},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "groups-strided-dilated": {"kernel_size": 2, "stride": 2, "dilation": 2, "groups": 2, "bias": False},
}  # fmt: skip
UNTRANSPOSED: dict[str, dict[str, Any]] = {
    "same": {"kernel_size": 3, "padding": "same"},
    "same-uneven": {"kernel_size": 4, "padding": "same"},
    "same-uneven-dilated": {"kernel_size": 2, "padding": "same", "dilation": 3, "groups": 2},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    **{
        f"{mode}-{padding}": {"kernel_size": 4, "padding": padding, "padding_mode": mode, "dilation": dilation}
        for mode in ("circular", "reflect", "replicate")
        for padding, dilation in ((1, 1), ("same", 1))
    },
}
ONLY_TRANSPOSED: dict[str, dict[str, Any]] = {
    "output-padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "output-padding-of-a-stride": {"kernel_size": 2, "stride": 1, "dilation": 3, "padding": 1, "output_padding": 2},
    "output-padding-of-two-strides": {"kernel_size": 2, "stride": 2, "dilation": 5, "padding": 2, "output_padding": 4},
    "depthwise": {"kernel_size": 3, "stride": 2, "groups": 4},
}
BY_DIMENSION: dict[str, tuple[type[_ConvNd], dict[str, Any]]] = {
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)}),
    "2d-same": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)}),
    "2d-circular": (nn.Conv2d, {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "circular"}),
    "3d": (nn.Conv3d, {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 2), "dilation": (1, 3, 1)}),
    "3d-same": (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": "same", "dilation": (1, 3, 1)}),
    "3d-replicate": (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": (0, 1, 2), "padding_mode": "replicate"}),
    "transposed-2d": (
        nn.ConvTranspose2d,
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (3, 1), "output_padding": (2, 1)},
    ),
    "transposed-3d": (
        nn.ConvTranspose3d,
        {"kernel_size": (1, 2, 3), "stride": (2, 1, 3), "padding": (0, 1, 2), "output_padding": (1, 0, 2)},
    ),
}
KINDS: dict[str, tuple[type[_ConvNd], dict[str, Any]]] = {
    **{f"{kind.__name__}-{n}": (kind, s) for kind in CONVOLUTIONS for n, s in {**EVERYWHERE, **UNTRANSPOSED}.items()},
    **{f"{kind.__name__}-{n}": (kind, s) for kind in TRANSPOSED for n, s in {**EVERYWHERE, **ONLY_TRANSPOSED}.items()},
    **BY_DIMENSION,
}


def build(kind: type[_ConvNd], options: dict[str, Any], inner: int = 4, outer: int = 8) -> tuple[_ConvNd, list[int]]:
    """The module, and sizes of space for it, of which no two are alike."""
    module = kind(inner, outer, **options)
    return module, [7, 6, 5][-(module.weight.ndim - 2) :]


def example(module: _ConvNd, space: list[int], n: int = N) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    a = torch.randn(n, module.in_channels, *space)
    return a, torch.randn_like(module(a)).detach()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert float((found - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


def autograd(module: _ConvNd, a: Tensor, b: Tensor, entries: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    """By one pass per example."""
    own = dict(module.named_parameters())
    parts = [
        torch.autograd.grad(module(a_i, **kwargs), list(own.values()), b_i)
        for a_i, b_i in zip(a.split(entries), b.split(entries), strict=True)
    ]
    return {name: torch.stack(of) for name, of in zip(own, zip(*parts, strict=True), strict=True)}


def check(module: _ConvNd, a: Tensor, b: Tensor, entries: int = 1, **kwargs: Any) -> None:
    """The rule, and both ways whichever it takes."""
    wanted = autograd(module, a, b, entries, **kwargs)
    found = per_example_convolution(module, a.detach(), b.detach(), entries=entries)
    assert set(found) == set(wanted)
    x, y = (b, a) if isinstance(module, _ConvTransposeNd) else (a, b)
    with torch.no_grad():
        for way in (by_groups, by_products):
            weight = torch.full(wanted["weight"].shape, torch.nan)
            way(module, x, y, weight)
            assert_close(weight, wanted["weight"])
    for name in wanted:
        assert_close(found[name], wanted[name])


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_autograds(name: str) -> None:
    torch.manual_seed(0)
    module, space = build(*KINDS[name])
    check(module, *example(module, space))
    check(module, *example(module, space, n=2 * N), entries=2)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[type[_ConvNd], dict[str, Any], tuple[int, int], list[int]]:
    """A kind of convolution with its settings, its channels, and sizes of space that it has an output for."""
    dimensions, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dimensions, max_size=dimensions)))

    options: dict[str, Any] = {name: sizes(1, 3) for name in ("kernel_size", "stride", "dilation")}
    options["padding"], options["groups"] = sizes(0, 3), draw(st.sampled_from([1, 2, 4]))
    geometry = list(zip(*(options[name] for name in ("kernel_size", "stride", "dilation", "padding")), strict=True))
    if transposed:
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for _, s, d, _ in geometry)
        least = [1 + max(0, -(-(2 * p - d * (k - 1)) // s)) for k, s, d, p in geometry]
    else:
        least = [max(1, d * (k - 1) + 1 - 2 * p) for k, s, d, p in geometry]
    channels = tuple(options["groups"] * draw(st.integers(1, 3)) for _ in range(2))
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[dimensions - 1]
    return kind, options, (channels[0], channels[1]), [size + draw(st.integers(0, 3)) for size in least]


@settings(max_examples=80, deadline=None)
@given(geometries(), st.integers(1, 3), st.integers(1, 2))
def test_any_geometry(
    geometry: tuple[type[_ConvNd], dict[str, Any], tuple[int, int], list[int]], n: int, entries: int
) -> None:
    torch.manual_seed(0)
    kind, options, channels, space = geometry
    module, _ = build(kind, options, *channels)
    check(module, *example(module, space, n * entries), entries=entries)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "batch-last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "space-reversed": lambda x: x.mT.contiguous().mT,
    "every-other": lambda x: torch.stack([x, torch.randn_like(x)], dim=-1).flatten(-2)[..., ::2],
    "an-end": lambda x: torch.cat([torch.randn_like(x), x])[len(x) :],
    "channels-of-more": lambda x: torch.cat([torch.randn_like(x), x], dim=1)[:, x.shape[1] :],
    "expanded": lambda x: x[:, :1, :1].expand_as(x),
    "expanded-to-the-batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
def test_any_layout_in_memory(kind: type[_ConvNd], of_a: str, of_b: str) -> None:
    torch.manual_seed(0)
    for options in ({"kernel_size": 3, "stride": 2, "groups": 2}, {"kernel_size": 1, "bias": False}):
        module, space = build(kind, options)
        a, b = example(module, space, n=4)
        a, b = LAYOUTS[of_a](a), LAYOUTS[of_b](b)
        check(module, a, b)
        check(module, a, b, entries=2)


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_channels_last_in_three_dimensions_and_in_the_weight(kind: type[_ConvNd]) -> None:
    torch.manual_seed(0)
    module, space = build(kind, {"kernel_size": 2, "stride": 2})
    module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    a, b = (x.to(memory_format=torch.channels_last_3d) for x in example(module, space))
    check(module, a, b)


@pytest.mark.parametrize("name", KINDS)
def test_no_examples(name: str) -> None:
    module, space = build(*KINDS[name])
    a, b = example(module, space)
    found = per_example_convolution(module, a[:0], b[:0])
    assert {name: g.shape for name, g in found.items()} == {
        name: (0, *p.shape) for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *TRANSPOSED])
def test_space_of_one(kind: type[_ConvNd]) -> None:
    torch.manual_seed(0)
    for options in ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "stride": 2}):
        module, space = build(kind, options)
        check(module, *example(module, [1] * len(space)))
        check(module, *example(module, [1] * len(space), n=1))


@pytest.mark.parametrize("kind", TRANSPOSED)
@pytest.mark.parametrize("more", [0, 1, 2])
def test_an_output_size_given_in_the_call(kind: type[_ConvNd], more: int) -> None:
    torch.manual_seed(0)
    module, space = build(kind, {"kernel_size": 2, "stride": 3, "padding": 1})
    a = torch.randn(N, module.in_channels, *space)
    size = [3 * (s - 1) + more for s in space]
    b = torch.randn_like(module(a, output_size=size)).detach()
    assert list(b.shape[2:]) == size
    check(module, a, b, output_size=size)


def test_a_geometry_that_was_changed_after_construction() -> None:
    """As segmentation models do with the strides of a trained network."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
    check(module, *example(module, [7, 6]))
    module = nn.Conv2d(4, 8, 2, padding="same")
    module.dilation = (3, 2)
    check(module, *example(module, [7, 6]))


@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 1}, {"kernel_size": 3, "groups": 4}])
@pytest.mark.parametrize("at_once", [1, 700])
def test_examples_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], at_once: int) -> None:
    torch.manual_seed(0)
    module, space = build(nn.Conv2d, {**options, "padding": 1})
    monkeypatch.setattr(convolution, "_AT_ONCE", at_once)
    for entries in (1, 2):
        a, b = example(module, space, n=14)
        wanted = autograd(module, a, b, entries)
        for name, g in per_example_convolution(module, a, b, entries=entries).items():
            assert_close(g, wanted[name])


def test_only_what_was_asked_for() -> None:
    module, space = build(nn.Conv2d, {"kernel_size": 3})
    a, b = example(module, space)
    assert set(per_example_convolution(module, a, b, names={"bias"})) == {"bias"}
    assert set(per_example_convolution(module, a, b, names={"weight"})) == {"weight"}
    module.bias = None
    assert set(per_example_convolution(module, a, b)) == {"weight"}


@pytest.mark.parametrize("size", [2, 7])  # one way, and the other
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_into_memory_that_is_there_and_some_rows_of_the_weight(kind: type[_ConvNd], size: int) -> None:
    torch.manual_seed(0)
    module, _ = build(kind, {"kernel_size": 3, "padding": 1})
    a, b = example(module, [size, size])
    wanted = autograd(module, a, b)["weight"]
    out = torch.full(wanted.shape, torch.nan)
    found = per_example_convolution(module, a, b, names={"weight"}, out=out)["weight"]
    assert found.data_ptr() == out.data_ptr()
    assert_close(out, wanted)
    rows = slice(1, 3)
    of_rows = (a[:, rows], b) if isinstance(module, _ConvTransposeNd) else (a, b[:, rows])
    assert_close(per_example_convolution(module, *of_rows, names={"weight"})["weight"], wanted[:, rows])


class Largest(TorchDispatchMode):
    """The most numbers that one operator returned in memory of its own."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for x in returned if isinstance(returned, tuple) else (returned,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return returned


@pytest.mark.parametrize(
    ("inner", "outer", "kernel", "size"),
    [(3, 8, 3, 16), (8, 8, 5, 10), (16, 16, 5, 4), (8, 64, 5, 8), (8, 64, 5, 7), (64, 8, 1, 16), (8, 8, 7, 20)],
)
@pytest.mark.parametrize("entries", [1, 2])
def test_nothing_is_larger_than_what_comes_and_goes(
    inner: int, outer: int, kernel: int, size: int, entries: int
) -> None:
    """Unfolded, a 5 x 5 kernel's input would be 25 times as large."""
    module = nn.Conv2d(inner, outer, kernel, padding=kernel // 2)
    a, b = example(module, [size, size], n=4 * entries)
    padded = len(a) * inner * (size + 2 * (kernel // 2)) ** 2
    with Largest() as largest:
        per_example_convolution(module, a, b, entries=entries)
    gradients = 4 * prod(module.weight.shape)
    assert largest.numbers <= max(padded, b.numel(), gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_in_the_outputs_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, space = build(*KINDS[name])
    a, b = (x.to(dtype) for x in example(module, space))
    wanted = autograd(module, a.double(), b.double())
    for input_ in (a, a.double()):
        for way, found in per_example_convolution(module, input_, b).items():
            assert found.dtype == dtype
            error = float((found.double() - wanted[way]).abs().max())
            assert error <= 4 * torch.finfo(dtype).eps * float(wanted[way].abs().max())


@pytest.mark.parametrize(
    ("way", "inner", "outer", "options", "size"),
    [
        ("by_groups", 16, 16, {"kernel_size": 3, "padding": 1}, 8),
        ("by_groups", 16, 32, {"kernel_size": 3, "padding": 1, "stride": 2}, 12),
        ("by_groups", 16, 16, {"kernel_size": 3, "padding": 1, "groups": 16}, 4),
        ("by_groups", 64, 64, {"kernel_size": 3, "padding": 1, "groups": 4}, 4),
        ("by_products", 16, 32, {"kernel_size": 3, "padding": 1, "stride": 2}, 8),
        ("by_products", 32, 32, {"kernel_size": 3, "padding": 1}, 4),
        ("by_products", 16, 8, {"kernel_size": 1}, 16),
        ("by_products", 3, 8, {"kernel_size": 4, "stride": 4}, 16),
    ],
)
def test_the_way_is_the_one_that_was_faster(
    monkeypatch: pytest.MonkeyPatch, way: str, inner: int, outer: int, options: dict[str, Any], size: int
) -> None:
    module = nn.Conv2d(inner, outer, **options)
    a, b = example(module, [size, size])
    monkeypatch.delattr(convolution, {"by_groups": "by_products", "by_products": "by_groups"}[way])
    per_example_convolution(module, a, b)

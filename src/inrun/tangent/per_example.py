"""g_i itself: every example's gradient of every trained parameter, from what a batch captured (design, 2.1).

If a unit computes y = f(a; W) in a call, the part of g_i that goes through this call is the pull-back to W of the
output's gradient with all rows but example i's set to zero. The parts of all calls of all units that use a parameter
add up to g_i. Layers whose pull-back is one product or one sum per example have a rule of their own; any other is run
again and pulled back once for every example.

Shapes: N examples, R rows of each, I and O features in and out, D of an embedding, V entries of its table.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _global_forward_hooks

from inrun.captured import Call, Captured, Hook
from inrun.rows import Rows
from inrun.tangent.convolution import per_example_convolution
from inrun.tangent.generic import run_again
from inrun.tangent.linear import linear_in_parameters
from inrun.tangent.rules import Rules
from inrun.trees import flatten

# what a layer's formula rests on: another library may put something else in their place
_AS_IMPORTED = {
    (where, name): getattr(where, name)
    for where, name in (
        *((functional, name) for name in ("linear", "conv1d", "conv2d", "conv3d", "layer_norm", "rms_norm")),
        *((kind, "forward") for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm)),
    )
}

# rule(call, examples) -> [examples, *shape] by the parameter's name in the unit, of trained parameters at least
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
)
_CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_PART = 2**18  # entries: on a processor

Rule = Callable[[Call, int], dict[str, Tensor]]

rules: Rules[Rule] = Rules()


def per_example_gradients(captured: Captured) -> dict[nn.Parameter, Tensor]:
    """g_i by parameter: [examples, *parameter.shape] in the parameter's dtype, as backward made it.

    The parameters are those of the units that a gradient came back to; any other has a gradient of zero. All of it is
    formed, examples times the size of the model: for small models, and for steps that are looked at closely.
    """
    found = captured.formed.contributions()
    for call in captured.calls:
        with call.again():
            part = (rule_of(call) or pulled_back)(call, captured.examples)
        for name, p in call.unit.parameters.items():
            g = part[name].to(p.dtype)
            found[p] = found[p].add_(g) if p in found else g
    return found


def rule_of(call: Call) -> Rule | None:
    """The closed form for this call, None where there is none."""
    module = call.unit.module
    return rules.of(module) if unchanged(module) else None


def unchanged(module: nn.Module) -> bool:
    """Whether its type alone says what the module computes: no hook of another's, no forward put in its place."""
    hooks = (*module._forward_hooks.values(), *_global_forward_hooks.values())
    theirs = "forward" in vars(module) or torch._C._len_torch_function_stack() > 0
    patched = any(getattr(where, name) is not was for (where, name), was in _AS_IMPORTED.items())
    return all(isinstance(hook, Hook) for hook in hooks) and not theirs and not patched


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm with a rule here: it has few parameters, whatever its inputs."""
    return rules.of(module) in (_norm, _channel_norm)


def pulled_back(call: Call, examples: int) -> dict[str, Tensor]:
    """The generic rule: the unit run again on its inputs, and one pull-back per example. Exact for any unit."""
    found = {name: p.new_zeros(examples, *p.shape) for name, p in call.unit.parameters.items()}

    def put(i: int, g: dict[str, Tensor]) -> None:
        for name, gradient in g.items():
            found[name][i] = gradient

    pull_back_each(call, examples, put)
    return found


def pull_back_each(call: Call, examples: int, see: Callable[[int, dict[str, Tensor]], None]) -> None:
    """`see(i, g)` with the gradients of one example after another, by name, of the parameters that it depends on."""
    own = {name: p.detach().requires_grad_() for name, p in call.unit.parameters.items()}
    with torch.enable_grad():
        leaves, _ = flatten(run_again(call.unit.module, own, *call.inputs(), call.before))
        outputs, parts = [], []
        for leaf, rows, gradient in zip(leaves, call.rows, call.gradients, strict=True):
            if gradient is not None and rows is not None and leaf.requires_grad:
                # a batchless output was expanded, and its gradient arrived per example
                outputs.append(leaf.expand_as(gradient))
                parts.append(_Parts(gradient.to(call.device), rows, examples))
    for i in range(examples if outputs else 0):
        masked = [part.of(i) for part in parts]
        got = torch.autograd.grad(outputs, list(own.values()), masked, retain_graph=True, allow_unused=True)
        see(i, {name: g for name, g in zip(own, got, strict=True) if g is not None})


class _Parts:
    """The gradient of one output, example by example."""

    def __init__(self, gradient: Tensor, rows: Rows, examples: int) -> None:
        self._shape, self._entries = gradient.shape, gradient.reshape(-1)
        places = torch.arange(gradient.numel(), device=gradient.device).view(gradient.shape)
        self._places = rows.per_example(places, examples)

    def of(self, i: int) -> Tensor:
        """The gradient with the rows of all examples but `i` set to zero."""
        mine = self._places[i]
        return torch.zeros_like(self._entries).index_copy_(0, mine, self._entries[mine]).view(self._shape)


@rules.register(nn.Linear)
def _linear(call: Call, examples: int) -> dict[str, Tensor]:
    a_NRI, b_NRO = rows_in_and_out(call, examples)
    found = {}
    if "weight" in call.unit.parameters:
        found["weight"] = torch.einsum("nro,nri->noi", b_NRO, a_NRI)
    if "bias" in call.unit.parameters:
        found["bias"] = b_NRO.sum(dim=1)
    return found


@rules.register("transformers.pytorch_utils.Conv1D")
def _transposed_linear(call: Call, examples: int) -> dict[str, Tensor]:
    """As a linear layer whose weight lies [in, out]."""
    found = _linear(call, examples)
    return {name: g.transpose(1, 2) if name == "weight" else g for name, g in found.items()}


@rules.register(nn.Embedding)
def _embedding(call: Call, examples: int) -> dict[str, Tensor]:
    module = call.unit.module
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq:
        return pulled_back(call, examples)
    gradient, rows = _output(call)
    b_NRD = rows.by_features(gradient, examples)
    ids_NR = rows.per_example(_input(call).expand(gradient.shape[:-1]), examples)
    V, D = module.weight.shape
    own_NR = ids_NR + V * torch.arange(examples, device=ids_NR.device)[:, None]  # a table for every example
    g_NVD = gradient.new_zeros(examples * V, D).index_add_(0, own_NR.reshape(-1), b_NRD.reshape(-1, D))
    g_NVD = g_NVD.view(examples, V, D)
    if module.padding_idx is not None:
        g_NVD[:, module.padding_idx] = 0
    return {"weight": g_NVD}


@rules.register(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _convolution(call: Call, examples: int) -> dict[str, Tensor]:
    module = call.unit.module
    assert isinstance(module, _ConvNd)
    gradient, rows = _output(call)
    args, kwargs = call.inputs()
    a = args[0] if args else kwargs["input"]  # output_size= may stand beside it
    a = a.expand(len(gradient), *a.shape[1:])
    a, b = (rows.per_example(x, examples).reshape(x.shape) for x in (a, gradient))
    return per_example_convolution(module, a, b, call.unit.parameters, len(b) // examples)


@rules.register(*_NORMS)
def _norm(call: Call, examples: int) -> dict[str, Tensor]:
    """y = x * w + b over the last dimensions, with x the norm run with weight one and bias zero."""
    gradient, rows = _output(call)
    parameters = call.unit.parameters
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for some, x, b in _in_parts(call, gradient, rows, examples):
        for name, p in parameters.items():
            with_x = b
            if name == "weight":
                with_x = _normalised(call.unit.module, x, p) * b
            found[name].append(rows.by_features(with_x, some, p.ndim).sum(dim=1))
    return {name: torch.cat(parts) for name, parts in found.items()}


@rules.register(*_CHANNEL_NORMS)
def _channel_norm(call: Call, examples: int) -> dict[str, Tensor]:
    """y = x * w + b with one w and b for every channel, the dimension after the first."""
    gradient, rows = _output(call)
    if rows.dim != 0 or not rows.blocks:
        return pulled_back(call, examples)
    found: dict[str, list[Tensor]] = {name: [] for name in call.unit.parameters}
    for some, x, b in _in_parts(call, gradient, rows, examples):
        for name, p in call.unit.parameters.items():
            with_x = b
            if name == "weight":
                with_x = linear_in_parameters(call.unit.module, {"weight": torch.ones_like(p)}, (x,), {}).mul_(b)
            found[name].append(with_x.reshape(some, -1, len(p), with_x[0, 0].numel()).sum(dim=(1, 3)))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _normalised(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the norm makes of x before its weight."""
    if type(module) is nn.LayerNorm:
        return functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if type(module) is nn.RMSNorm:
        return functional.rms_norm(x, module.normalized_shape, None, module.eps)
    found: Tensor = linear_in_parameters(module, {"weight": torch.ones_like(weight)}, (x,), {})
    return found


def _in_parts(call: Call, gradient: Tensor, rows: Rows, examples: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some examples' rows of the input and the output's gradient at a time: as many as fit a processor's cache; all of
    them where they are normalised together.
    """
    x, module = _input(call), call.unit.module
    some = max(1, _PART * examples // max(1, gradient.numel()))
    together = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    if together or rows.dim != 0 or not rows.blocks or len(x) != len(gradient) or some >= examples:
        yield examples, x, gradient
        return
    entries = len(gradient) // examples
    for parts in zip(torch.split(x, some * entries), torch.split(gradient, some * entries), strict=True):
        yield len(parts[0]) // entries, *parts


def _output(call: Call) -> tuple[Tensor, Rows]:
    """The gradient and the rows of the one output of a unit."""
    (gradient,), (rows,) = call.gradients, call.rows
    assert gradient is not None
    assert rows is not None
    return gradient.to(call.device), rows


def _input(call: Call) -> Tensor:
    """The one input of a unit."""
    args, kwargs = call.inputs()
    (x,) = (*args, *kwargs.values())
    assert isinstance(x, Tensor)
    return x


def rows_in_and_out(call: Call, examples: int) -> tuple[Tensor, Tensor]:
    """The inputs a_NRI and the output gradients b_NRO: a linear layer's rows stand in its input as in its output."""
    gradient, rows = _output(call)
    a = _input(call)
    a = a.expand(*gradient.shape[:-1], a.shape[-1])
    return rows.by_features(a, examples), rows.by_features(gradient, examples)

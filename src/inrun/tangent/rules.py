"""Which rule gives a module's tangent: by its type, and the generic one for every other."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from inrun.state import Before
from inrun.tangent.generic import as_looked_up, forward_mode

# what a subclass may override and still compute what its base does, is anything but these
_COMPUTES = ("forward", "_conv_forward", "__call__", "__getattr__")

R = TypeVar("R", bound=Callable[..., Any])

# rule(module, direction by parameter name, args, kwargs) -> tangents, in the structure of the module's output
Rule = Callable[[nn.Module, Mapping[str, Tensor], tuple[Any, ...], dict[str, Any]], Any]


class Rules(Generic[R]):
    """Rules by the type of the module they are for."""

    def __init__(self) -> None:
        self._rules: dict[type[nn.Module] | str, R] = {}

    def register(self, *kinds: type[nn.Module] | str) -> Callable[[R], R]:
        """Use a rule for modules of these types, or of types with these full names (which are then not imported);
        of a subclass, too, that does not override what is computed.
        """

        def decorate(rule: R) -> R:
            for kind in kinds:
                self._rules[kind] = rule
            return rule

        return decorate

    def of(self, module: nn.Module) -> R | None:
        """The rule for this module, None if there is none for its type, or for one that it computes the same as."""
        elsewhere = {"weight", "bias"} & {*module._buffers, *vars(module)}
        if not set(module._parameters) <= {"weight", "bias"} or elsewhere or is_parametrized(module):
            return None  # weight norm, or a weight that is a buffer: not linear in what it owns
        for kind in type(module).__mro__:
            if not issubclass(kind, nn.Module):  # what fully_shard, say, mixes in
                continue
            if not all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _COMPUTES):
                return None
            rule = self._rules.get(kind) or self._rules.get(f"{kind.__module__}.{kind.__qualname__}")
            if rule is not None:
                return rule
        return None


_tangents: Rules[Rule] = Rules()
register_tangent = _tangents.register


def has_closed_form(module: nn.Module) -> bool:
    """Whether a rule was written for this type; a module without one is run again in forward mode."""
    return _tangents.of(module) is not None


def tangent(
    module: nn.Module,
    direction: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: Before | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """The derivative of module(*args, **kwargs) in `direction` of its parameters, in the structure of the output.

    Those of modules inside it have dotted names.
    Parameters that `direction` does not name stand still. `before` is what the call found; `weights` are all parameters
    of a module that holds only pieces of them.
    """
    if isinstance(module, nn.Embedding) and "weight" in direction:
        ids, *_ = *args, *kwargs.values()
        q = as_looked_up(direction["weight"], ids, module.padding_idx, module.scale_grad_by_freq)
        direction = {**direction, "weight": q}
    rule = _tangents.of(module)
    if rule is not None and not any("." in name for name in direction):
        return rule(module, direction, args, kwargs)
    return forward_mode(module, direction, args, kwargs, before, weights)

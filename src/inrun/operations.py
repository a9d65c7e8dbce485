"""The operations of a forward pass, seen one by one: their shapes, the parameters they use, the numbers they draw."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from inrun.trees import tensors
from inrun.units import Stack

Reads = dict[nn.Parameter, dict[Stack, None]]

# operations whose result has no gradient
_ASIDE = {"detach", "_local_scalar_dense", "equal", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like"}
# random numbers in place, by their mean
_MEAN: dict[str, Callable[..., float]] = {
    "bernoulli_": lambda p=0.5, **_: p,
    "uniform_": lambda low=0.0, high=1.0, **_: (low + high) / 2,
    "normal_": lambda mean=0.0, *_, **__: mean,
    "exponential_": lambda rate=1.0, **_: 1 / rate,
}
_MEANS = {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The name and the shape of every operation inside the block, and whether one of them chose entries by value; and
    in `reads`, by parameter, the modules that were being called as an operation used it.

    `still`: random numbers are their mean; `drew` says whether there were others.
    """

    def __init__(self, reads: Reads | None = None, still: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, list[torch.Size]]] = []
        self.counted = self.drew = False
        self._reads, self._still = reads, still
        self._stack: list[nn.Module] = []
        self._paused = False
        self.written: list[nn.Parameter] = []
        self._places: dict[int, nn.Parameter] = {}
        self._saved: dict[nn.Parameter, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Operations":
        self._handles = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def used(self, p: nn.Parameter, by: nn.Module) -> None:
        """A module that is called by those on the stack uses a parameter."""
        if self._reads is not None:
            self._reads[p][*self._stack, by] = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = tensors((args, kwargs))
        updating = func._schema.is_mutable and self._save(func._schema.arguments, args, kwargs)
        if self._reads is not None and name not in _ASIDE and not updating:
            for x in given:
                if isinstance(x, nn.Parameter):
                    self._reads[x][tuple(self._stack)] = None
        output = self._random(func, name, args, kwargs) if _is_random(func) else func(*args, **kwargs)
        masked = "index" in name and any(x.dtype in (torch.bool, torch.uint8) for x in given)
        self.counted |= masked or any(word in name for word in ("nonzero", "masked_select", "unique", "pack_padded"))
        self.seen.append((str(func), [x.shape for x in tensors(output)]))
        return output

    def _save(self, wanted: Any, args: Any, kwargs: Any) -> bool:
        """Keep a copy of the parameters that are about to be written to, and say whether there are any."""
        found = False
        for k, argument in enumerate(wanted):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(args[k] if k < len(args) else kwargs.get(argument.name)):
                    p = self._places.get(x.data_ptr())
                    found |= p is not None
                    if p is not None and p not in self._saved:
                        self._saved[p] = p.detach().clone()
        return found

    @contextmanager
    def keeping(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Have the parameters as they were after the block, whatever the model writes to them; `written` are these."""
        memory = {p: p.data for p in parameters}
        self._places = {p.data_ptr(): p for p in memory}
        try:
            yield
        finally:
            for p, data in memory.items():
                if p.data_ptr() != data.data_ptr():
                    self.written.append(p)
                    p.data = data
            for p, copy in self._saved.items():
                if not torch.equal(p.data, copy):
                    self.written.append(p)
                    p.data.copy_(copy)
            self._places, self._saved = {}, {}

    def _random(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if self._still and name in _MEAN and not any(isinstance(x, Tensor) for x in args[1:]):
            return args[0].fill_(_MEAN[name](*args[1:], **kwargs))
        if self._still and name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        output = func(*args, **kwargs)
        if self._still and name == "randint":
            low, high = args[:2] if isinstance(args[1], int) else (0, args[0])
            return output.fill_((low + high) // 2)
        if self._still and name in _MEANS:
            return output.fill_(_MEANS[name])
        self.drew = True
        return output


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def drawn() -> tuple[object, ...]:
    """Where the generators that are not torch's are."""
    _, _, at, *_ = np.random.get_state()
    return random.getstate(), at

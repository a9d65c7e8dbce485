"""What a forward pass depends on and may change, besides parameters, as it was at one time.

Random generators; and what modules hold in buffers and attributes: running statistics, a recurrent layer's state kept
for the next call, a power iteration, the length up to which a table was made, a count of calls.
"""

import random
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class RandomState:
    """The generators of torch (on a module's devices too), numpy and Python, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._torch = torch.get_rng_state()
        self._devices = {d: torch.cuda.get_rng_state(d) for d in _devices(module)}
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()

    def restore(self) -> None:
        """Set them to this state."""
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors, from which `of` makes it again."""
        version, python, gauss = self._python
        _, keys, *rest = self._numpy
        return {
            "torch": self._torch,
            **{f"cuda:{device}": state for device, state in self._devices.items()},
            "python": torch.tensor([version, *python], dtype=torch.int64),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
            "numpy_rest": torch.tensor([float(x) for x in rest], dtype=torch.float64),
        }

    @classmethod
    def of(cls, module: nn.Module, tensors: Mapping[str, Tensor]) -> "RandomState":
        """The state that `tensors` gave, for a module on the devices that are there now."""
        found = cls(module)
        found._torch = tensors["torch"]
        found._devices = {int(k.partition(":")[2]): x for k, x in tensors.items() if k.startswith("cuda:")}
        version, *python = tensors["python"].tolist()
        gauss = tensors["python_gauss"].tolist()
        found._python = version, tuple(python), gauss[0] if gauss else None
        place, has_gauss, cached = tensors["numpy_rest"].tolist()
        keys = tensors["numpy"].numpy().astype(np.uint32)
        found._numpy = "MT19937", keys, int(place), int(has_gauss), cached
        return found

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The generators in this state inside the block, and back to where they were after it."""
        with preserved_random_state(self._module):
            self.restore()
            yield


@contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Leave the random states of torch (on the model's devices too), numpy and Python as they were."""
    state = RandomState(model)
    try:
        yield
    finally:
        state.restore()


def _devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})


_INTERNAL = vars(nn.Module()).keys()
_NONE = object()
_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict, deque)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, np.generic)
_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _leaves(x: Any) -> list[Any] | None:
    """What a list, tuple or dict holds, or a tensor by itself; None of anything else."""
    return tree_flatten(x)[0] if type(x) in _CONTAINERS else [x] if isinstance(x, Tensor) else None


def _alike(x: Any, y: Any) -> bool:
    return x is y or (isinstance(x, _PLAIN) and type(x) is type(y) and bool(x == y))


def _same(these: Sequence[Any] | None, those: Sequence[Any] | None) -> bool:
    if these is None or those is None:
        return these is those
    return len(these) == len(those) and all(map(_alike, these, those))


def _fill(x: Any, parts: Any) -> Any:
    """The container with other parts; itself, where that can be, since another may hold it too."""
    if isinstance(x, dict):
        x.clear()
        x.update(parts)
    elif isinstance(x, list | deque):
        x.clear()
        x.extend(parts)
    else:
        return parts
    return x


def _state_of(generator: _Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: _Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _written_out(state: Any) -> str:
    """The state of a generator, to be compared."""
    return str([x.tolist() if isinstance(x, Tensor | np.ndarray) else x for x in tree_flatten(state)[0]])


class _Of:
    """What one module holds: its mode, its buffers, and its attributes: tensors, numbers, words, generators, and lists,
    tuples and dicts of them. An object of another kind is not looked into.
    """

    def __init__(self, m: nn.Module) -> None:
        self.module, self.training, self.buffers = m, m.training, dict(m._buffers)
        # what installs hooks in its first forward says so in an attribute
        self.hooks = [(hooks, dict(hooks)) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.passing = set(m._non_persistent_buffers_set)  # buffers that are not saved
        self.attributes = {name: x for name, x in vars(m).items() if name not in _INTERNAL}
        self.inside: dict[str, list[Any]] = {}
        self._specs: dict[str, TreeSpec] = {}
        for name, x in self.attributes.items():
            if isinstance(x, Tensor):
                self.inside[name] = [x]
            elif type(x) in _CONTAINERS:
                self.inside[name], self._specs[name] = tree_flatten(x)
        self._generators = [(x, _state_of(x)) for x in self.attributes.values() if isinstance(x, _Generator)]

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        held = [*self.buffers.values(), *(leaf for leaves in self.inside.values() for leaf in leaves)]
        return [x for x in held if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)]

    def replaced(self) -> list[Tensor | None]:
        """Buffers that are not there any more; one None if there are others."""
        now = self.module._buffers
        gone = [x for name, x in self.buffers.items() if name not in now or now[name] is not x]
        return gone or ([] if now.keys() == self.buffers.keys() else [None])

    def changed(self) -> list[str]:
        """The names of attributes that are, or hold, something else than they did."""
        now = {name: x for name, x in vars(self.module).items() if name not in _INTERNAL}
        found = []
        for name in {**self.attributes, **now}:
            was, is_ = self.attributes.get(name, _NONE), now.get(name, _NONE)
            if not any(isinstance(x, (*_PLAIN, *_CONTAINERS, Tensor)) for x in (was, is_)):
                continue
            then, here = self.inside.get(name), _leaves(is_)
            if not (_alike(was, is_) if then is None and here is None else _same(here, then)):
                found.append(name)
        return found

    def drawn(self) -> list[str]:
        """Where the generators that it holds are now."""
        return [_written_out(_state_of(x)) for x, _ in self._generators]

    def drew(self) -> bool:
        """Whether numbers were drawn from a generator that it holds."""
        return self.drawn() != [_written_out(state) for _, state in self._generators]

    def put_back(self, copies: Mapping[int, Tensor] | None = None, filled: dict[int, Any] | None = None) -> None:
        """Have all of it there again; or copies of it, those of containers that several modules hold in `filled`."""
        m = self.module
        m.training = self.training
        m._non_persistent_buffers_set = self.passing
        for hooks, then in self.hooks:
            if list(hooks) != list(then):
                hooks.clear()
                hooks.update(then)
        for generator, state in self._generators:
            _set_state(generator, state)
        if copies is not None or self.replaced():
            buffers = {name: (copies or {}).get(id(x), x) for name, x in self.buffers.items()}
            m._buffers.clear()
            m._buffers.update(buffers)
        for name in dict.fromkeys([*self.changed(), *(() if copies is None else self.inside)]):
            if name not in self.attributes:
                del vars(m)[name]
                continue
            x = self.attributes[name]
            if name in self.inside and (copies is not None or not _same(_leaves(x), self.inside[name])):
                # in other memory, or it was worked on in place
                leaves = [(copies or {}).get(id(leaf), leaf) for leaf in self.inside[name]]
                if isinstance(x, Tensor):
                    x = leaves[0]
                elif copies is None:
                    x = _fill(x, tree_unflatten(leaves, self._specs[name]))
                elif filled is not None and id(x) in filled:
                    x = filled[id(x)]
                else:
                    parts = tree_unflatten(leaves, self._specs[name])
                    x = parts if filled is None else filled.setdefault(id(x), parts)
            vars(m)[name] = x


class State:
    """The modes, buffers and attributes of a module and of those inside it, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._of = [_Of(m) for m in module.modules()]
        # what has a graph is a result: the next forward makes another
        held = [x for of in self._of for x in of.tensors() if x.is_leaf]
        self._copies = {id(x): (x, _version(x), x.detach().clone()) for x in held}

    def restore(self) -> None:
        """Have everything as it was: what a forward wrote to, replaced, made or took away."""
        for of in self._of:
            of.put_back()
        with torch.no_grad():
            for x in self._written():
                x.copy_(self._copies[id(x)][2])

    def _written(self) -> list[Tensor]:
        return [x for x, version, copy in self._copies.values() if _version(x) != version or _differs(x, copy)]

    def unchanged(self) -> bool:
        """Whether all is still as it was."""
        return not self._written() and not any(of.replaced() or of.changed() or of.drew() for of in self._of)

    def drawn(self) -> list[list[str]]:
        """Where the generators that modules hold are now."""
        return [of.drawn() for of in self._of]

    def drew(self) -> bool:
        """Whether numbers were drawn from generators that modules hold."""
        return any(of.drew() for of in self._of)

    def moved(self) -> bool:
        """Whether a tensor that was there was written to, or replaced by another."""
        gone = [x for of in self._of for x in of.replaced()]
        gone += [x for of in self._of for name in of.changed() for x in of.inside.get(name, ())]
        return bool(self._written()) or any(isinstance(x, Tensor) and x.is_leaf for x in gone)

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Inside the block the tensors are as they were, on copies: what is written there is lost."""
        now = [_Of(of.module) for of in self._of]
        copies = {key: copy.clone() for key, (_, _, copy) in self._copies.items()}
        filled: dict[int, Any] = {}
        for of in self._of:
            of.put_back(copies, filled)
        try:
            yield
        finally:
            for of in now:
                of.put_back()


def _differs(x: Tensor, copy: Tensor) -> bool:
    """Whether one number a channel is another: batch and instance norms write their statistics past the versions."""
    return x.ndim == 1 and x.is_floating_point() and not torch.equal(x, copy)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # which nobody can write to


class Before:
    """What a call of a module finds: random states, buffers and attributes."""

    def __init__(self, module: nn.Module) -> None:
        self._random = RandomState(module)
        self._state: State | None = State(module)
        self.seconds, self._begun = 0.0, time.perf_counter()

    def called(self) -> None:
        """The call is over, after so many `seconds`: what it left as it was need not be kept."""
        self.seconds = time.perf_counter() - self._begun
        if self._state is not None and self._state.unchanged():
            self._state = None

    @contextmanager
    def again(self, module: nn.Module) -> Iterator[None]:
        """All of it as the call found it; what is changed inside the block is lost."""
        with self._random.replayed(), (self._state or State(module)).copied():
            yield

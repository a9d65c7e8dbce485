"""Units: which module's calls each trained parameter is valued by.

A module that owns trained parameters is their unit, as long as every use of them is inside of its own calls and the
rows of its outputs can be told apart. A parameter for which this does not hold is *lifted*: the nearest module around
it becomes its unit, which is run again as a whole to find what the parameter did. (So are a weight that is read without
calling its module, one that is computed of other parameters, a position bias that all layers share.) The whole model is
the last that can.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from inrun.errors import InrunError
from inrun.parallel import in_place_of
from inrun.tangent.rules import has_closed_form

Stack = tuple[nn.Module, ...]  # modules whose calls are open, the outermost first


@dataclass(frozen=True, eq=False)
class Unit:
    """A module and the trained parameters that are valued by its calls, by their names in the module."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]

    @property
    def closed_form(self) -> bool:
        """Whether a rule was written for what it computes; one without is run again in forward mode."""
        return not self.lifted and has_closed_form(self.module)

    @property
    def lifted(self) -> bool:
        """Whether it has a parameter of a module inside it."""
        return any("." in name for name in self.parameters)

    def stands(self) -> bool:
        """Whether the module has its parameters in their places now, and not others that functional_call put there.

        Raises InrunError if it has some of them.
        """
        own = [(n, p) for n, p in self.parameters.items() if n in self.module._parameters]
        here = [n for n, p in own if in_place_of(p, self.module._parameters[n])]
        if here and len(here) < len(own):
            raise InrunError(
                f"{self.name}: it was called with other parameters in place of some of its own, by functional_call: "
                "put all of them in their place, or none."
            )
        return bool(here) or not own


@dataclass(frozen=True, eq=False)
class Group:
    """Units that share parameters (most stand alone), checked together because g_i is the gradient of the
    shared parameter.
    """

    units: tuple[Unit, ...]
    parameters: dict[nn.Parameter, str]


def trained_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[nn.Parameter, str]:
    """The parameters that the optimizers move, with their names in the model.

    Raises InrunError if one is not the model's, if two optimizers hold it, or if none is trained.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise InrunError(f"{name}: an embedding with max_norm rewrites its weight when read: build it without.")
    names = {p: name for name, p in model.named_parameters()}
    trained: dict[nn.Parameter, str] = {}
    groups = [(k, group) for optimizer in optimizers for k, group in enumerate(optimizer.param_groups)]
    for k, group in groups:
        for p in group["params"]:
            if p in trained:
                raise InrunError(f"{names[p]} is held by two optimizers: give each parameter to one of them.")
            if p not in names and not p.requires_grad:  # of a frozen part beside it
                continue
            if p not in names:
                raise InrunError(
                    f"the optimizer's group {k} holds a parameter of shape {tuple(p.shape)} that is not the model's. "
                    "Give the Attributor the module that holds all parameters of the optimizer (and build the "
                    "optimizer after the model was moved or wrapped)."
                )
            if p.is_complex():
                raise InrunError(f"{names[p]}: complex parameters are not supported.")
            if p.requires_grad:
                trained[p] = names[p]
    if not trained:
        raise InrunError(
            "the model is frozen: no parameter of the optimizer has requires_grad, so no example can have a value."
        )
    return trained


class Units:
    """The units of a model. `all` and `groups` change as `settle` learns how the model uses its parameters.

    `trained` are the parameters that are valued, with their names in the model.
    """

    def __init__(self, model: nn.Module, trained: Mapping[nn.Parameter, str]) -> None:
        self._model, self.trained = model, trained
        self._owners: dict[nn.Parameter, list[nn.Module]] = {p: [] for p in trained}
        for module in model.modules():
            for p in {p for p in module._parameters.values() if p is not None and p in trained}:
                self._owners[p].append(module)
        self._lifted: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
        self._given_up: dict[tuple[nn.Module, nn.Parameter], InrunError | None] = {}
        self._inside: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self.all: list[Unit] = []
        self._rebuild()

    def settle(
        self, reads: Mapping[nn.Parameter, Iterable[Stack]], problems: Mapping[Unit, InrunError]
    ) -> list[nn.Parameter]:
        """Have every use of a parameter counted by one unit's call, and none by those with a problem.

        Args:
            reads: the modules that were being called as a parameter was used.
            problems: why a unit cannot be valued by its calls.

        Returns:
            The parameters that have other units than before.

        Raises:
            InrunError: no module around a use of the parameter can be its unit.
        """
        changed: dict[nn.Parameter, None] = {}
        for unit, problem in problems.items():
            for p in unit.parameters.values():
                self._give_up(unit.module, p, problem)
                changed[p] = None
        for p, stacks in reads.items():
            if p in self.trained and self._settle(p, list(stacks)):
                changed[p] = None
        if changed:
            self._rebuild()
        return list(changed)

    def known(self, once: Iterable[Unit]) -> list[Unit]:
        """All units, and after them those that were some `once` and are no more."""
        return list(dict.fromkeys([*self.all, *once]))

    def joined(self, once: Iterable[Unit]) -> tuple[list[Group], dict[nn.Parameter, int]]:
        """The groups, and the group of every parameter, with units that were some `once`, since which others were
        found.
        """
        units = self.known(once)
        if len(units) == len(self.all):
            return self.groups, self.group_of
        groups = groups_of(units)
        return groups, {p: k for k, group in enumerate(groups) for p in group.parameters}

    def _settle(self, p: nn.Parameter, stacks: Collection[Stack]) -> bool:
        changed = False
        while True:
            counted = [self._counting(p, stack) for stack in stacks]
            twice = next((by for by in counted if len(by) > 1), None)
            unseen = [stack for stack, by in zip(stacks, counted, strict=True) if not by]
            if twice is not None:
                for module in twice[1:]:  # the outermost sees all of it
                    self._give_up(module, p, None)
            elif unseen:
                self._lifted[p].add(self._around(p, unseen))
            else:
                return changed
            changed = True

    def _counting(self, p: nn.Parameter, stack: Stack) -> list[nn.Module]:
        """The modules on the stack whose tangent has this use of the parameter in it, the outermost first."""
        owner = next((module for module in reversed(stack) if module in self._owners[p]), None)
        return [
            module
            for module in dict.fromkeys(stack)
            if module in self._lifted[p] or (module is owner and (module, p) not in self._given_up)
        ]

    def _around(self, p: nn.Parameter, stacks: Sequence[Stack]) -> nn.Module:
        """The innermost module that is being called at all of these uses and can be the parameter's unit."""
        for k in reversed(range(min(map(len, stacks)))):
            module = stacks[0][k]
            common = all(stack[: k + 1] == stacks[0][: k + 1] for stack in stacks)
            if common and (module, p) not in self._given_up and any(p is x for x in self._names_in(module).values()):
                return module
        reasons = [why for (_, of), why in self._given_up.items() if of is p and why is not None]
        raise (
            reasons[0]
            if reasons
            else InrunError(
                f"{self.trained[p]} is used where no module that holds it is being called, so that its use cannot be "
                "seen. Use it in the forward of the model that the Attributor is given, or freeze it "
                "(requires_grad_(False))."
            )
        )

    def _give_up(self, module: nn.Module, p: nn.Parameter, why: InrunError | None) -> None:
        self._lifted[p].discard(module)
        self._given_up.setdefault((module, p), why)

    def _names_in(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters of the module and of those inside it, by every place that holds them."""
        if module not in self._inside:
            # each place once: functional_call leaves its own in a place that it is given by two names
            places = ((path, n, p) for path, m in module.named_modules() for n, p in m._parameters.items())
            self._inside[module] = {
                f"{path}.{n}" if path else n: p for path, n, p in places if p is not None and p in self.trained
            }
        return self._inside[module]

    def _rebuild(self) -> None:
        before = {unit.module: unit for unit in self.all}
        self.all = []
        for name, module in self._model.named_modules():
            lifted = {p for p, by in self._lifted.items() if module in by}
            mine = {
                n: p
                for n, p in module._parameters.items()
                if p is not None and p in self.trained and (module, p) not in self._given_up
            }
            if lifted:
                mine |= {n: p for n, p in self._names_in(module).items() if p in lifted}
            if mine:
                unit, now = before.get(module), Unit(name or type(module).__name__, module, mine)
                self.all.append(unit if unit is not None and _names(unit) == _names(now) else now)
        self.groups = groups_of(self.all)
        self.group_of = {p: k for k, group in enumerate(self.groups) for p in group.parameters}


def _names(unit: Unit) -> dict[str, int]:
    return {name: id(p) for name, p in unit.parameters.items()}


def groups_of(units: Sequence[Unit]) -> list[Group]:
    """The units joined wherever they share a parameter."""
    groups: list[list[Unit]] = []
    for unit in units:
        mine = set(unit.parameters.values())
        joined = [g for g in groups if any(mine & set(other.parameters.values()) for other in g)]
        groups = [g for g in groups if g not in joined]
        groups.append([member for g in joined for member in g] + [unit])
    return [Group(tuple(g), {p: f"{u.name}.{n}" for u in reversed(g) for n, p in u.parameters.items()}) for g in groups]

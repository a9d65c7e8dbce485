"""Which kernel each unit uses to get to <g_i, q> (design, 2.4), and what it costs beyond plain training.

| kernel       | what it does                                                   | work beyond plain training        |
|--------------|----------------------------------------------------------------|-----------------------------------|
| `perexample` | forms g_i in the backward pass, in place of their sum          | N I O entries written and read    |
|              | ... or at the step, from what was kept of the call (`late`)    | and 2 N R I O operations          |
| `tangent`    | keeps input and output gradient, runs the unit again with q    | 2 N R I O operations a target     |
| `ghost`      | (a_i . a_j)(b_i . b_j), summed over rows of example and target | 2 N R M (I + O) operations each   |

for N examples of R rows, M rows of a target, I features in and O out. What is cheapest follows from these shapes and
from how many operations the device does while it moves a byte, never from a clock: a run takes the same way each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from inrun.captured import Captured
from inrun.errors import InrunError
from inrun.tangent.fused import is_convolution, is_linear, turned
from inrun.tangent.per_example import is_norm, unchanged
from inrun.units import Unit, Units

Kernel = Literal["auto", "tangent", "perexample", "ghost"]
How = Literal["fused", "formed", "late", "tangent", "ghost"]

# floating point operations in the time of a byte, by the bytes of a number: a server's core, an H100
_INTENSITY = {"cpu": {8: 6, 4: 12, 2: 40}, "cuda": {8: 10, 4: 20, 2: 240}}
# g_i may take up to so many times the memory of the inputs and output gradients that the unit would keep instead
_LARGER = 4.0


@dataclass(frozen=True)
class Shape:
    """One call of a linear unit: N examples of R rows, I features in and O out, numbers of so many bytes; and the bytes
    of its inputs and outputs together.
    """

    N: int
    R: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    size: int
    pair: int

    @property
    def formed(self) -> int:
        """Bytes of all g_i."""
        return self.N * self.I * self.O * self.size


@dataclass(frozen=True)
class Chosen:
    """One call of a unit: its kernel, its shape if it is a linear layer's or a convolution's, the bytes of its inputs
    and output, the rows that each target has there, if they are known, and how long a call took that must be made
    again.
    """

    unit: Unit
    how: How
    shape: Shape | None
    size: int
    target_rows: Sequence[int]
    seconds: float = 0.0


class Kernels:
    """The choice, unit by unit.

    Args:
        targets: how many.
        at_once: examples' gradients are contracted as soon as they are formed (inrun.formed).
        meets: every target's gradient is made here, of one batch, at every step.
        memory: bytes that gradients formed in a step may take; None: what the shapes say.
    """

    def __init__(
        self, kernel: Kernel, units: Units, targets: int, at_once: bool, meets: bool, memory: int | None
    ) -> None:
        if kernel == "ghost" and not (at_once and meets):
            raise InrunError(
                "kernel='ghost' contracts the gradients of examples and targets as they are, which is what "
                "scheme='first' with SGD and momentum='account' values, with one target pass at every step, on one "
                "process. Use kernel='auto'."
            )
        self._units, self._kernel, self._targets, self._at_once, self._memory = units, kernel, targets, at_once, memory
        self._ghosts = at_once and meets and kernel in ("auto", "ghost")
        self._device = next(iter(units.group_of)).device.type
        self._used = 0
        self.calls: list[Chosen] = []  # of the step

    def fuses(self, unit: Unit) -> bool:
        """Whether the unit can form its weights' gradients in place of their sum, with rows for features."""
        return self._kernel != "tangent" and _linear(unit)

    def begin(self) -> None:
        """A new step: no gradient is kept."""
        self._used, self.calls = 0, []

    def watches(self, unit: Unit) -> bool:
        """Whether the unit can use the inputs and output gradients of a target's pass."""
        alone = len(self._units.groups[self._units.group_of[next(iter(unit.parameters.values()))]].units) == 1
        return self._ghosts and alone and _linear(unit) and unchanged(unit.module)

    def of(
        self, unit: Unit, captured: Captured, inputs: Sequence[Any], output: Any, fits: bool, seconds: float = 0.0
    ) -> How:
        """How the unit's call with these inputs and this output, which took so many seconds, is valued.

        `fits`: what the unit computes follows from its type, and its rows stand where a kernel can take them.
        """
        plain = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
        shape = _shape(unit, captured, inputs[0], output) if plain else None
        pairs = [of.pairs.get(unit, []) for of in captured.formed.ahead or ()]
        rows = [sum(len(a) for a, _ in of) for of in pairs] if all(pairs) else []
        how = self._how(unit, shape, rows) if fits and not captured.by_token else "tangent"
        if how == "fused" and shape is not None and not self._at_once:
            self._used += shape.formed
        size = sum(x.nbytes for x in (*inputs, output) if isinstance(x, Tensor))
        self.calls.append(Chosen(unit, how, shape, size, rows, seconds))
        return how

    def _how(self, unit: Unit, shape: Shape | None, target_rows: Sequence[int]) -> How:
        if self._kernel == "tangent":
            return "tangent"
        if shape is None:
            return "formed" if is_norm(unit.module) else "tangent"
        room = self._at_once or (
            shape.formed <= _LARGER * shape.pair if self._memory is None else self._used + shape.formed <= self._memory
        )
        if self._kernel == "ghost" and target_rows:
            return "ghost"
        linear = _linear(unit)
        if self._kernel in ("perexample", "ghost"):
            return "fused" if room or self._memory is None else "late" if linear else "tangent"
        costs: dict[How, float] = {"tangent": self.cost("tangent", shape)}
        if linear:
            costs["late"] = self.cost("late", shape)
        if room:
            costs["fused"] = self.cost("fused", shape)
        if target_rows:
            costs["ghost"] = self.cost("ghost", shape, target_rows)
        return min(costs, key=lambda how: costs[how])

    def cost(self, how: How, shape: Shape, target_rows: Sequence[int] = ()) -> float:
        """Work beyond plain training, in floating point operations."""
        of_a_byte = _INTENSITY.get(self._device, _INTENSITY["cuda"])[shape.size]
        operations, traffic = work(how, shape, self._targets, target_rows, self._at_once)
        return operations + traffic * of_a_byte


def work(how: How, shape: Shape, targets: int, target_rows: Sequence[int], at_once: bool) -> tuple[float, float]:
    """What a kernel does beyond plain training: floating point operations, and bytes through memory."""
    products = 2.0 * shape.N * shape.R * shape.I * shape.O
    if how == "tangent":
        # the output's tangent is made, multiplied and added up; and before it q, of two tensors of the weight's size
        return targets * products, targets * (3 * shape.N * shape.R + 4 * shape.I) * shape.O * shape.size
    if how == "ghost":
        inner = shape.N * shape.R * sum(target_rows)
        return inner * 2.0 * (shape.I + shape.O), inner * 3 * shape.size
    # written, added up, and read once for all targets; of what is contracted at once a part stays in the cache
    return products if how == "late" else 0.0, (2 if at_once else 3) * shape.formed


def _linear(unit: Unit) -> bool:
    return unit.closed_form and is_linear(unit.module) and "weight" in unit.parameters


def _shape(unit: Unit, captured: Captured, x: Tensor, output: Tensor) -> Shape | None:
    """Of a linear layer's call; of a convolution's, with positions for rows, and None for any other."""
    module = unit.module
    if "weight" not in unit.parameters or not (is_linear(module) or is_convolution(module)):
        return None
    weight = unit.parameters["weight"]
    if not weight.numel() or not captured.examples:
        return None
    O = weight.shape[1 if is_linear(module) and turned(module) else 0]  # noqa: E741
    N, size = captured.examples, output.element_size()
    return Shape(N, output.numel() // (N * O), weight.numel() // O, O, size, (x.numel() + output.numel()) * size)

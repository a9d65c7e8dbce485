"""What attribution costs beyond training and the targets' own passes: which kernel every unit has, time and memory.

The kernels follow from shapes (inrun.kernels). The times here are those of this machine: how fast it multiplies
matrices, goes through memory, and evaluates the optimizer's move is measured when the plan is asked for.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inrun.kernels import Chosen, work
from inrun.piece import Piece, Room
from inrun.update import CoupledUpdate, Moved

NAMES = {"fused": "perexample", "formed": "perexample", "late": "perexample, late"}
_ENTRIES = 2**23  # of a parameter are enough to measure an optimizer's move on
_COLD = 0.4  # in a step, memory is gone through at so much of the rate at which it is when nothing else is used
_HOOKS = 2e-4  # seconds that a unit's hooks take on a processor, whatever it computes
_DUAL = 2.5  # times as long as its forward does a module take in forward mode
_SIDE = 1024  # of the matrices that are multiplied


@dataclass(frozen=True)
class Row:
    """One line of the plan: seconds a step, and bytes that are kept until the step."""

    name: str
    kernel: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """`print` it for a table. `seconds` is what a step takes beyond training and the targets' own passes, `bytes` what
    it keeps beyond the model, its gradients, the optimizer's state and the activations of a plain step.
    """

    rows: list[Row]

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [*self.rows, Row("all", "", self.seconds, self.bytes)]
        width, middle = (max(len(getattr(row, of)) for row in lines) for of in ("name", "kernel"))
        head = f"{'unit':{width}}  {'kernel':{middle}}  {'extra time':>10}  {'extra memory':>12}"
        table = [head]
        for row in lines:
            numbers = f"{1e3 * row.seconds:7.2f} ms  {row.bytes / 2**20:8.1f} MiB"
            table.append(f"{row.name:{width}}  {row.kernel:{middle}}  {numbers}")
        return "\n".join(table)


def plan_of(
    calls: Sequence[Chosen],
    moves: Mapping[nn.Parameter, Moved],
    targets: int,
    at_once: bool,
    nodes: int,
) -> Plan:
    """The plan of a step with these calls and moves.

    Args:
        targets: how many. at_once: gradients are contracted as soon as they are formed.
        nodes: points of the path at which the targets' gradients are taken; 0: at the weights themselves.
    """
    some = next(iter(moves)).detach()
    machine = _Machine(some.device)
    rows = [_row(call, machine, targets, at_once) for call in calls]
    size = sum(p.nbytes for p in moves)
    seconds = max(1, nodes) * sum(machine.move(moved, nodes > 0) for moved in _kinds(moves))
    rows.append(Row("the optimizer's move", "", seconds, (2 if nodes else 1) * size))
    # the gradient is looked at, and every target's held, made into q and weighed
    streams = 1 + (3.5 + max(0, nodes - 1) * 3) * targets
    rows.append(Row("the books", "", streams * size / machine.bytes, targets * size))
    return Plan(rows)


def _row(call: Chosen, machine: "_Machine", targets: int, at_once: bool) -> Row:
    shape, name = call.shape, NAMES.get(call.how, call.how)
    if shape is None:
        # a norm is run again once, what has no closed form for every target; a table's rows are picked
        passes, kept = (3, 0) if call.how == "formed" else (4 * targets, call.size)
        seconds = max(passes * call.size / machine.bytes, _DUAL * targets * call.seconds)
        return Row(call.unit.name, name, _HOOKS + seconds, kept)
    operations, traffic = work(call.how, shape, targets, call.target_rows, at_once)
    seconds = _HOOKS + operations / machine.products(shape.size) + traffic / machine.bytes
    kept = {"fused": 0 if at_once else shape.formed, "ghost": 0}.get(call.how, shape.pair)
    return Row(call.unit.name, name, seconds, kept)


def _kinds(moves: Mapping[nn.Parameter, Moved]) -> list[tuple[Moved, int]]:
    """A large parameter of every kind of update, and the entries of all that are like it."""
    found: dict[object, tuple[Moved, int]] = {}
    for moved in moves.values():
        key = (
            type(moved.update),
            moved.weight.dtype,
            moved.weight.ndim if isinstance(moved.update, CoupledUpdate) else 0,
        )
        best, entries = found.get(key, (moved, 0))
        larger = moved if moved.weight.numel() > best.weight.numel() else best
        found[key] = larger, entries + moved.weight.numel()
    return list(found.values())


class _Machine:
    """What the device does in a second, measured now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rates: dict[int, float] = {}
        room = torch.ones(2**26, device=device)  # 256 MiB: no cache holds it
        other = torch.ones(2**20, device=device)
        parts = room.view(-1, len(other))
        self.bytes = _COLD * room.nbytes / self._time(lambda: parts @ other)

    def products(self, size: int) -> float:
        """Floating point operations a second of a matrix product of numbers of so many bytes."""
        if size not in self._rates:
            dtype = {8: torch.float64, 4: torch.float32}.get(size, torch.bfloat16)
            x = torch.ones(_SIDE, _SIDE, dtype=dtype, device=self._device)
            self._rates[size] = 2.0 * _SIDE**3 / self._time(lambda: x @ x)
        return self._rates[size]

    def move(self, kind: tuple[Moved, int], displaces: bool) -> float:
        """Seconds of the chord, and of a point on the way if the weights are displaced, for so many entries."""
        moved, entries = kind
        moved = _part(moved)
        p = nn.Parameter(moved.weight.clone())
        room, moves = Room(), {p: replace(moved, weight=p.detach())}
        if p.numel() == 0:
            return 0.0

        def once() -> None:
            piece = Piece(moves, 0.0, 1.0, room)
            if displaces:
                with piece.at(0.5):
                    return
            piece.pull([torch.zeros_like(p)])

        return self._time(once) * entries / p.numel()

    def _time(self, work: Callable[[], object]) -> float:
        work()
        found = []
        for _ in range(5):
            self._wait()
            begun = time.perf_counter()
            work()
            self._wait()
            found.append(time.perf_counter() - begun)
        return sorted(found)[2]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _part(moved: Moved) -> Moved:
    """As many entries of it as are enough to measure on, if it is moved entry by entry."""
    weight = moved.weight
    if isinstance(moved.update, CoupledUpdate) or weight.numel() <= _ENTRIES:
        return moved

    def cut(x: Tensor) -> Tensor:
        return x.reshape(-1)[:_ENTRIES].clone()

    state = {k: cut(v) if isinstance(v, Tensor) and v.shape == weight.shape else v for k, v in moved.state.items()}
    return replace(moved, weight=cut(weight), gradient=cut(moved.gradient), state=state)

"""What goes into a step, the ids of its batches, and what comes out of it, their values."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from inrun.captured import Captured
from inrun.errors import InrunError

Id = int | str


@dataclass(frozen=True)
class Step:
    """The values of one optimizer step: `values[target]` is a float64 tensor [examples] in nats, in the order of `ids`.

    Positive helps: the example lowered the target's loss. `losses[target]` is the target's loss where its gradient was
    taken. `train_loss` is the sum of the losses that the step's batches reported, None if one did not. A step skipped
    for a non-finite number has no values.
    """

    step: int
    ids: list[Id]
    values: dict[str, Tensor]
    losses: dict[str, float]
    train_loss: float | None = None
    skipped: bool = False


@dataclass
class Microbatch:
    """One `batch` block. Set `loss` to have the training loss in the ledger; what one does not set is left
    empty there.
    """

    ids: list[Id]
    captured: Captured
    loss: Tensor | float | None = None


def as_ids(ids: Any) -> list[Id]:
    """Ids as a list of ints or of strings."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    elif isinstance(ids, Sequence) and not isinstance(ids, str):
        ids = [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for i in ids]
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InrunError(f"ids must be a sequence with one int or string per example, got {type(ids).__name__}.")
    kinds = {type(i) for i in ids}
    if not ids or len(kinds) > 1 or not kinds <= {int, str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise InrunError(f"ids must be ints or strings, one per example and all of one type; got {names}.")
    return list(ids)

"""What goes into a step, the ids of its batches, and what comes out of it, their values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor

from inrun.captured import Captured
from inrun.errors import InrunError
from inrun.packed import Id


@dataclass(frozen=True)
class Step:
    """The values of one optimizer step: `values[target]` is a float64 tensor [examples] in nats, in the order of `ids`.

    Positive helps: the example lowered the target's loss. `losses[target]` is the target's loss where its gradient was
    taken. `train_loss` is the sum of the losses that the step's batches reported, None if one did not. A step skipped
    for a non-finite number has no values.

    Of packed documents, `ids` are the documents of every batch, in the order in which they first appear in it.

    With `token_values=True`, `token_values[target]` is a float64 tensor [examples, time] in nats, whose sum over time
    is the examples' values: what went through the output rows of token t of every unit, the sum over units of
    <b_it, df(a_i)[q]_t> (design, 2.4). So it holds the part of later tokens' losses that goes through this token's
    rows, and not the part of its own loss that goes through earlier tokens' rows, which is theirs. Of packed documents
    the examples are the sequences; where batches differ in length, zeros follow the shorter ones.

    With `by_module=`, `by_module[target]` has a float64 tensor like `values[target]` for every part of the model, which
    add up to it.
    """

    step: int
    ids: list[Id]
    values: dict[str, Tensor]
    losses: dict[str, float]
    train_loss: float | None = None
    skipped: bool = False
    token_values: dict[str, Tensor] = field(default_factory=dict)
    by_module: dict[str, dict[str, Tensor]] = field(default_factory=dict)


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

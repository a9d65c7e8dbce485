"""Which dimension of a unit's output is time: found out by running the model, never guessed from its sizes.

The model is run once more on the same batch with one token less (inrun.shortened). The dimension of a unit's output
that shrank with it is time, and the values say whether it is: in a causal model the shorter run's outputs are the
first of the longer run's; where documents are packed and kept apart by a mask, those of all documents but the
sequences' last are the same.
"""

from dataclasses import dataclass

from torch import Tensor

from inrun.errors import InrunError
from inrun.rows import Rows, same


@dataclass(frozen=True)
class Time:
    """Where the tokens stand in the entries of one example: [entries that are merged with the examples, *others].

    `dim` counts these dimensions. Where it holds more than time, time changes slowest there (`outer`) or fastest.
    """

    dim: int
    outer: bool = True

    def per_token(self, x: Tensor, rows: Rows, examples: int, time: int) -> Tensor:
        """The tensor as [examples, time, everything else]."""
        x = rows.split(x, examples)
        d, entries = self.dim + 1, x.shape[self.dim + 1] // time
        sizes = (time, entries) if self.outer else (entries, time)
        x = x.reshape(*x.shape[:d], *sizes, *x.shape[d + 1 :])
        return x.movedim(d if self.outer else d + 1, 1).flatten(2)

    def fits(self, x: Tensor, rows: Rows, examples: int, time: int) -> bool:
        """Whether the tensor can hold so many tokens so."""
        entries: int = rows.split(x, examples).shape[self.dim + 1]
        return entries > 0 and entries % time == 0


def find_time(
    longer: Tensor, shorter: Tensor, rows: Rows, examples: int, time: int, documents: Tensor | None, where: str
) -> Time | None:
    """Where the tokens stand in a unit's output, from its values on all tokens and on one less; None if no dimension
    shrank with it.

    Args:
        longer, shorter: the output, with an example dimension. rows: whose rows they are.
        time: the number of tokens in the longer run.
        documents: whose every token is, of packed documents.
        where: the unit, for the error.

    Raises:
        InrunError: another number of entries than the tokens have, or other values for one token less.
    """
    x, y = rows.split(longer, examples), rows.split(shorter, examples)
    shrunk = [d for d in range(1, x.ndim) if x.shape[d] != y.shape[d]]
    if not shrunk:
        return None
    sizes = f"of shape {tuple(longer.shape)} for {time} tokens and {tuple(shorter.shape)} for one less"
    if len(shrunk) > 1:
        raise InrunError(
            f"{where}: cannot tell which dimension of its output is time: {sizes}. An output for pairs of tokens "
            f"belongs to no token. {INSTEAD}"
        )
    (d,) = shrunk
    if x.shape[d] * (time - 1) != y.shape[d] * time:
        raise InrunError(
            f"{where}: cannot tell which entries of its output belong to which token: {sizes}, which is not a whole "
            f"number for every token. {INSTEAD}"
        )
    ways = [Time(d - 1)] if x.shape[d] == time else [Time(d - 1), Time(d - 1, outer=False)]
    found = []
    for way in ways:
        a = way.per_token(longer, rows, examples, time)[:, :-1]
        b = way.per_token(shorter, rows, examples, time - 1)
        if same(a, b) or _same_but_last(a, b, documents):
            found.append(way)
    if len(found) > 1:
        raise InrunError(
            f"{where}: its output merges time with another dimension, {sizes}, and its values do not tell in which "
            "order (they are constant). Attach after the first update, or initialise the module with other than "
            "constants."
        )
    if not found:
        raise InrunError(
            f"{where}: its output for one token less is not that of before for the tokens that stayed, {sizes}. Its "
            "rows belong to tokens only where no token sees a later one: in a causal model, or, for packed documents, "
            "where a mask keeps the documents apart, which a batch shows that has a sequence of two or more. "
            f"{INSTEAD}"
        )
    return found[0]


def _same_but_last(a: Tensor, b: Tensor, documents: Tensor | None) -> bool:
    """Whether the tokens of all documents but the sequences' last have the same entries."""
    if documents is None:
        return False
    others = (documents != documents[:, -1:])[:, :-1].to(a.device)
    return bool(others.any()) and same(a[others], b[others])


INSTEAD = (
    "Ask for values by example alone (without token_values=, ids of one dimension), or freeze the module "
    "(requires_grad_(False))."
)

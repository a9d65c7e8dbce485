"""Which dimension of a unit's output is time: found out by running the model, never guessed from its sizes.

The model is run once more on the same batch with fewer tokens (inrun.shortened). The dimension of a unit's output that
shrank with them is time, and the values say whether it is: in a causal model the shorter run's outputs are the first of
the longer run's; where documents are packed and kept apart by a mask, those of all documents that were left whole are
the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inrun.errors import InrunError
from inrun.rows import Rows, same

INSTEAD = (
    "Ask for values by example alone (without token_values=, ids of one dimension), or freeze the module "
    "(requires_grad_(False))."
)


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
    longer: Tensor,
    shorter: Tensor,
    rows: Rows,
    examples: int,
    times: tuple[int, int],
    documents: Tensor | None,
    where: str,
) -> Time | None:
    """Where the tokens stand in a unit's output, from its values on all tokens and on fewer; None if no dimension
    shrank with them.

    Args:
        longer, shorter: the output, with an example dimension. rows: whose rows they are.
        times: the number of tokens in the longer and in the shorter run.
        documents: whose every token is, [examples, time], where documents are packed.
        where: the unit, for the error.

    Raises:
        InrunError: another number of entries than the tokens have, or other values for fewer tokens.
    """
    time, fewer = times
    x, y = rows.split(longer, examples), rows.split(shorter, examples)
    shrunk = [d for d in range(1, x.ndim) if x.shape[d] != y.shape[d]]
    if not shrunk:
        return None
    sizes = f"of shape {tuple(longer.shape)} for {time} tokens and {tuple(shorter.shape)} for {fewer}"
    if len(shrunk) > 1:
        raise InrunError(
            f"{where}: cannot tell which dimension of its output is time: {sizes}. An output for pairs of tokens "
            f"belongs to no token. {INSTEAD}"
        )
    (d,) = shrunk
    if x.shape[d] % time or x.shape[d] * fewer != y.shape[d] * time:
        raise InrunError(
            f"{where}: cannot tell which entries of its output belong to which token: {sizes}, which is not a whole "
            f"number for every token. {INSTEAD}"
        )
    ways = [Time(d - 1)] if x.shape[d] == time else [Time(d - 1), Time(d - 1, outer=False)]
    found = []
    for way in ways:
        a = way.per_token(longer, rows, examples, time)[:, :fewer]
        b = way.per_token(shorter, rows, examples, fewer)
        if same(a, b) or _same_where_whole(a, b, documents):
            found.append(way)
    if len(found) > 1:
        raise InrunError(
            f"{where}: its output merges time with another dimension, {sizes}, and its values do not tell in which "
            "order (they are constant). Attach after the first update, or initialise the module with other than "
            "constants."
        )
    if not found:
        raise InrunError(
            f"{where}: without the last tokens its output is another for those before them, {sizes}. Its rows belong "
            "to tokens only where no token sees a later one: in a causal model, or, for packed documents, where a mask "
            f"keeps the documents apart, which a batch shows that has a sequence of two or more. {INSTEAD}"
        )
    return found[0]


def _same_where_whole(a: Tensor, b: Tensor, documents: Tensor | None) -> bool:
    """Whether the tokens of all documents that lost no token have the same entries."""
    if documents is None:
        return False
    fewer = b.shape[1]
    whole = torch.stack([~torch.isin(row[:fewer], row[fewer:]) for row in documents]).to(a.device)
    return bool(whole.any()) and same(a[whole], b[whole])

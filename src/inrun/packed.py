"""Packed sequences: whose every token is, where ids are [batch, time] and several documents stand in one sequence.

A document's value is the sum of its tokens' values, what went through the output rows of its tokens: the documents of a
sequence add up to the sequence. A document with tokens in several sequences of a batch, or in several places of one, is
one document. Tokens of nobody (padding) have the id -1 or None: what went through them is booked to no id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from inrun.errors import InrunError

Id = int | str
NOBODY = -1


@dataclass(frozen=True, eq=False)
class Packed:
    """The documents of a batch in the order in which they first appear, and of every token which of them it belongs to:
    `documents`, int64 [batch, time], their places in `ids` or NOBODY.
    """

    ids: list[Id]
    documents: Tensor

    def per_document(self, of_tokens: Tensor) -> Tensor:
        """The sums over the documents' tokens: [..., batch, time] to [..., documents]."""
        flat, place = of_tokens.flatten(-2), self.documents.flatten().to(of_tokens.device)
        found = flat.new_zeros(*flat.shape[:-1], len(self.ids) + 1)  # what is nobody's comes last
        return found.index_add_(-1, torch.where(place == NOBODY, len(self.ids), place), flat)[..., :-1]

    def of_each(self, of_tokens: Tensor) -> list[Tensor]:
        """The documents' tokens, sequence by sequence and in their order: [..., batch, time] to [..., tokens] each."""
        flat, place = of_tokens.flatten(-2), self.documents.flatten().to(of_tokens.device)
        order = place.argsort(stable=True)
        counts = torch.bincount(place + 1, minlength=len(self.ids) + 1).tolist()
        return list(torch.split(flat[..., order], counts, dim=-1))[1:]


def as_packed(ids: Any) -> Packed | None:
    """Ids of two dimensions, as a tensor, an array or a sequence of sequences; None if they are not such.

    Raises InrunError for sequences of different lengths, ids that are neither all ints nor all strings, and no ids.
    """
    if getattr(ids, "ndim", 2) != 2 or isinstance(ids, str) or not (isinstance(ids, Sequence) or hasattr(ids, "ndim")):
        return None
    rows = ids.tolist() if hasattr(ids, "tolist") else [x.tolist() if hasattr(x, "tolist") else x for x in ids]
    nested = [isinstance(row, Sequence) and not isinstance(row, str) for row in rows]
    if not rows or not any(nested):
        return None
    lengths = {len(row) if inner else None for row, inner in zip(rows, nested, strict=True)}
    if len(lengths) > 1:
        raise InrunError(
            f"ids of packed documents must be [batch, time], one for every token; got rows of {len(lengths)} different "
            "lengths. Give padding the id -1, or None in a list."
        )
    flat = [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for row in rows for i in row]
    flat = [None if type(i) is int and i == NOBODY else i for i in flat]
    kinds = {type(i) for i in flat if i is not None}
    if len(kinds) != 1 or not kinds <= {int, str}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no document"
        raise InrunError(
            "ids of packed documents must be ints or strings, one for every token and all of one type, with -1 or None "
            f"for tokens of no document; got {names}."
        )
    place: dict[Id, int] = {}
    found = [NOBODY if i is None else place.setdefault(i, len(place)) for i in flat]
    return Packed(list(place), torch.tensor(found, device="cpu").view(len(rows), -1))

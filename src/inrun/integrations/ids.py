"""Ids around a collator: it never sees them, and its batch has them back, one for every example or for every token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inrun.errors import InrunError


class CollateWithIds:
    """The collator that the trainer had, with the ids taken around it.

    Its batch has them in `id_column`: a list with one id for every example; or, where examples have a list of ids, one
    for every token, or where it makes one row of all examples, a list of rows with one id for every token of the batch,
    None for padding.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], id_column: str) -> None:
        self._collate, self._id_column = collate, id_column

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        column = self._id_column
        lacking = next((k for k, example in enumerate(examples) if column not in example), None)
        if lacking is not None:
            raise InrunError(
                f"a training example has no {column!r} column (it has {', '.join(map(str, examples[lacking]))}): add "
                "one, with an int or a string for every example, or name another with id_column=."
            )
        ids = [example[column] for example in examples]
        ids = [i.tolist() if isinstance(i, Tensor) else i for i in ids]
        tokens = [example.get("input_ids") for example in examples]
        batch = self._collate([{k: v for k, v in example.items() if k != column} for example in examples])
        if not hasattr(batch, "__setitem__") or not hasattr(batch, "get"):
            raise InrunError(
                f"the collator makes a {type(batch).__name__} of a batch, which can carry no ids: let it return a dict."
            )
        batch[column] = _placed(ids, tokens, batch)
        return batch


def _placed(ids: list[Any], tokens: list[Any], batch: Mapping[str, Any]) -> list[Any]:
    """The examples' ids, or those of their tokens, as the collator laid their tokens out."""
    made, by_token = batch.get("input_ids"), any(isinstance(i, list) for i in ids)
    if not isinstance(made, Tensor) or made.ndim != 2:
        return ids
    if by_token and not all(isinstance(i, list) for i in ids):
        raise InrunError("some examples of a batch have a list of ids and some have one id: give all of them the same.")
    if len(made) == 1 and len(ids) > 1:
        return [_in_one_row(ids, tokens, made[0])]
    if not by_token or len(made) != len(ids):
        return ids
    return [_in_row(row, made.shape[1], mask) for row, mask in zip(ids, _masks(batch, len(ids)), strict=True)]


def _in_one_row(ids: list[Any], tokens: list[Any], made: Tensor) -> list[Any]:
    """One id for every token of a row of all examples, one after the other."""
    rows = [torch.as_tensor(row).to(made.device) for row in tokens if row is not None]
    whole = torch.cat(rows) if len(rows) == len(ids) else made[:0]
    if not len(whole) or not torch.equal(whole, made[: len(whole)]):
        raise InrunError(
            f"the collator makes one row of {len(made)} tokens of {len(ids)} examples, and not by putting their "
            "input_ids one after the other, so that it cannot be told which tokens are whose."
        )
    found: list[Any] = []
    for i, row in zip(ids, rows, strict=True):
        found += _counted(i, len(row)) if isinstance(i, list) else [i] * len(row)
    return found + [None] * (len(made) - len(found))


def _counted(ids: list[Any], tokens: int) -> list[Any]:
    if len(ids) != tokens:
        raise InrunError(f"an example of {tokens} tokens has a list of {len(ids)} ids: give one for every token.")
    return ids


def _in_row(ids: list[Any], time: int, mask: Tensor | None) -> list[Any]:
    """The tokens' ids where the tokens stand in their padded row, and None elsewhere."""
    if len(ids) == time:
        return ids
    if mask is None or int(mask.sum()) != len(ids):
        real = "no attention_mask" if mask is None else f"an attention_mask with {int(mask.sum())} of them"
        raise InrunError(
            f"an example has a list of {len(ids)} ids, one for every token, and the collator makes a row of {time} "
            f"tokens of it, with {real}, so that padding cannot be told from tokens. Let examples have one length, or "
            "the collator return the mask."
        )
    of_tokens = iter(ids)
    return [next(of_tokens) if real else None for real in mask.tolist()]


def _masks(batch: Mapping[str, Any], examples: int) -> Sequence[Tensor | None]:
    mask = batch.get("attention_mask")
    known = isinstance(mask, Tensor) and mask.ndim == 2
    return [row.bool() for row in mask] if known and mask is not None else [None] * examples

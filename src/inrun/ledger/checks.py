"""What may be booked: each argument of LedgerWriter.book is checked here before anything is buffered."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from inrun.ledger.schema import STEPS_SCHEMA, LedgerError

Floats = np.ndarray[Any, np.dtype[np.float64]]
GivenIds = Sequence[int | str] | np.ndarray[Any, Any]
Ids = np.ndarray[Any, np.dtype[np.int64]] | list[str]


class TokenValues(NamedTuple):
    """A step's values by token, one id after another, and how many tokens each has."""

    values: Floats  # [targets, tokens of all ids]
    counts: np.ndarray[Any, np.dtype[np.int64]]  # [ids]


_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


def check_ids(step: int, ids: GivenIds) -> tuple[Ids, type[pl.DataType] | None]:
    """The ids as an int64 array or plain strings, and their column type (None where there are none).

    Raises LedgerError naming the first id that is neither, or of another type than the first, or too large.
    """
    if isinstance(ids, str | bytes) or (isinstance(ids, np.ndarray) and ids.ndim != 1):
        raise LedgerError(f"step {step}: ids is {ids!r:.80}; give a list with one id (int or str) per example.")
    listed: list[Any] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if not listed:
        return listed, None
    kinds = {_id_kind(kind) for kind in set(map(type, listed))}
    if kinds == {str}:
        at = _position(listed, is_unicode) if not is_unicode("".join(listed)) else None
        if at is not None:
            raise LedgerError(f"step {step}: id {listed[at]!r} (position {at}) is not valid Unicode.")
        return list(map(str, listed)), pl.String
    if kinds == {int}:
        try:
            return np.array(list(map(int, listed)), dtype=np.int64), pl.Int64
        except OverflowError as error:
            at = _position(listed, lambda one: _INT64_MIN <= one <= _INT64_MAX)
            raise LedgerError(
                f"step {step}: id {listed[at]} (position {at}) is beyond 64 bits; give such ids as strings."
            ) from error
    first = _id_kind(type(listed[0]))
    at = _position(listed, lambda one: first is not None and _id_kind(type(one)) is first)
    raise LedgerError(
        f"step {step}: id {listed[at]!r} (position {at}) is a {type(listed[at]).__name__}; "
        "the ids of a run are all int or all str."
    )


def check_values(step: int, ids: Ids, values: Mapping[str, np.ndarray[Any, Any]]) -> Floats:
    """A copy of the values, shape [targets, ids]. Raises LedgerError on a wrong length or one not finite."""
    values_PB = np.empty((len(values), len(ids)))
    for row, (target, given) in enumerate(values.items()):
        if np.shape(given) != (len(ids),):
            raise LedgerError(
                f"step {step}, target {target!r}: values of shape {np.shape(given)} for {len(ids)} ids; "
                "give one value per id."
            )
        try:
            values_PB[row] = given
        except (TypeError, ValueError) as error:
            raise LedgerError(f"step {step}, target {target!r}: values are not numbers ({error}).") from error
    if not np.isfinite(values_PB).all():
        row, at = np.argwhere(~np.isfinite(values_PB))[0]
        raise LedgerError(
            f"step {step}, target {list(values)[row]!r}: the value of id {ids[at]} (position {at}) is "
            f"{values_PB[row, at]}; book such a step as skipped, without values."
        )
    return values_PB


def check_by_module(
    step: int, ids: Ids, targets: Iterable[str], given: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
) -> dict[str, Floats]:
    """A copy of the values by module, [targets, ids] each. Raises LedgerError as `check_values`, and where the targets
    do not have the same modules.
    """
    modules = list(next(iter(given.values()), {}))
    listed = list(targets)
    if given and any(list(given.get(target, {})) != modules for target in listed):
        raise LedgerError(
            f"step {step}: by_module has other modules for one target than for another; give all of each."
        )
    for module in modules:
        if not isinstance(module, str) or not is_unicode(module):
            raise LedgerError(f"step {step}: a module is named {module!r}; give a string.")
    return {module: check_values(step, ids, {target: given[target][module] for target in listed}) for module in modules}


def check_token_values(
    step: int, ids: Ids, targets: Iterable[str], given: Mapping[str, Sequence[np.ndarray[Any, Any]]]
) -> TokenValues | None:
    """A copy of the values by token; None where there are none. Raises LedgerError where a target lacks an id's, where
    they are not one list of numbers, or of another length for another target.
    """
    if not given:
        return None
    of = [[np.asarray(one, dtype=np.float64) for one in given.get(target, ())] for target in targets]
    counts = [[one.size if one.ndim == 1 else 0 for one in row] for row in of]
    if any(len(row) != len(ids) or 0 in row or row != counts[0] for row in counts):
        raise LedgerError(
            f"step {step}: token_values must have for every target and id a list of numbers, one or more and as many "
            "for one target as for another."
        )
    values = np.stack([np.concatenate(row) if row else np.empty(0) for row in of]) if of else np.empty((0, 0))
    if not np.isfinite(values).all():
        raise LedgerError(f"step {step}: a token's value is not finite; book such a step as skipped, without values.")
    return TokenValues(values, np.array(counts[0] if counts else [], dtype=np.int64))


def check_step_row(step: int, examples: int, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """One row of steps/, in the order of STEPS_SCHEMA. Raises LedgerError naming the column that is wrong."""
    if unknown := given.keys() - STEPS_SCHEMA.keys():
        raise LedgerError(
            f"step {step}: steps has the unknown columns {sorted(map(str, unknown))}; "
            f"its columns are {', '.join(STEPS_SCHEMA)}."
        )
    row = {"step": step, "examples": examples, "skipped": False, **given}
    if row["step"] != step:
        raise LedgerError(f"step {step}: steps has a row of step {row['step']!r}; book each step by itself.")
    return tuple([_check_cell(step, column, row.get(column)) for column in STEPS_SCHEMA])


def check_targets(step: int, valued: Iterable[object], listed: Sequence[str]) -> None:
    """Targets with values are named by strings, each with one row of steps/ where there are any such rows."""
    for target in valued:
        if not isinstance(target, str) or not is_unicode(target):
            raise LedgerError(f"step {step}: a target is named {target!r}; give a string.")
        if listed and target not in listed:
            raise LedgerError(f"step {step}: target {target!r} has values but no row in steps; add one.")
    if len(set(listed)) < len(listed):
        raise LedgerError(f"step {step}: steps has two rows of one target ({listed}); give one per target.")


def is_unicode(text: str) -> bool:
    """Whether `text` can be stored: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _id_kind(kind: type) -> type | None:
    if issubclass(kind, str):
        return str
    return int if issubclass(kind, int | np.integer) and kind is not bool else None


def _position(ids: Iterable[Any], good: Any) -> int:
    return next(at for at, one in enumerate(ids) if not good(one))


def _check_cell(step: int, column: str, cell: Any) -> Any:
    kind = STEPS_SCHEMA[column]
    if cell is None and column != "target":
        return None
    if kind is pl.Float64 and not isinstance(cell, str | bytes):
        try:
            return float(cell)
        except (TypeError, ValueError, OverflowError) as error:
            raise LedgerError(f"step {step}: steps has {column}={cell!r}; give a number.") from error
    if kind is pl.Int64 and not isinstance(cell, bool):
        try:
            number = operator.index(cell)
        except TypeError:
            number = -1
        if 0 <= number <= _INT64_MAX:
            return number
    if kind is pl.Boolean and isinstance(cell, bool | np.bool_):
        return bool(cell)
    if kind is pl.String and isinstance(cell, str) and is_unicode(cell):
        return str(cell)
    raise LedgerError(f"step {step}: steps has {column}={cell!r}; that column is {kind.__name__}.")

"""Runs the model on fewer tokens to find where time is in every unit's output (inrun.timeline).

About half of them are left: what a token sees of so many later ones shows in its output beyond rounding.
"""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor

from inrun.errors import InrunError
from inrun.found import Found, expanded
from inrun.inputs import Inputs
from inrun.packed import Packed
from inrun.probe import Probe
from inrun.rows import Rows
from inrun.timeline import INSTEAD, Time, find_time
from inrun.units import Unit

Times = Mapping[tuple[Unit, int], tuple[Time | None, ...]]


def tokens_of(inputs: Inputs, carrying: Sequence[int], packed: Packed | None) -> int:
    """How many tokens an example has: in the inputs, time is the first dimension beside the examples'.

    It is that of the first tensor of integers [batch, time], else of the first tensor that has such a dimension.

    Raises InrunError if there is none, or none of as many tokens as there are ids for.
    """
    d = _time_dim(inputs)
    with_time = [inputs.leaves[k] for k in carrying if inputs.leaves[k].ndim > max(d, inputs.batch_dim)]
    if packed is not None:
        time = packed.documents.shape[1]
        if not any(x.shape[d] == time for x in with_time):
            raise InrunError(
                "ids must be one for every example or, of packed documents, one for every token that the model is "
                f"called with, [batch, time]: got shape {tuple(packed.documents.shape)} for inputs of shape "
                f"{inputs.shapes()}."
            )
        return time
    with_time.sort(key=lambda x: x.ndim > 2 or x.is_floating_point())
    if not with_time:
        raise InrunError(
            f"token values need a model whose inputs have a dimension of time beside the examples': it is called with "
            f"inputs of shape {inputs.shapes()}. Leave token_values= out."
        )
    return int(with_time[0].shape[d])


def find_times(probe: Probe, inputs: Inputs, found: Found, examples: int, time: int, packed: Packed | None) -> Times:
    """Where the tokens stand in every unit's outputs under this structure of inputs, by call and output.

    Raises InrunError where it cannot be told.
    """
    if time < 2:
        raise InrunError(
            "which dimensions hold time is found by running the model on fewer tokens, and this first batch has one: "
            "begin with a longer one."
        )
    documents = None if packed is None else packed.documents
    times = time, _fewer(time, documents)
    plain = probe.outputs(inputs, found.carrying, examples)
    problems = []
    for shorter in _shortened(inputs, found.carrying, times):
        try:
            return _compared(probe, plain, shorter, found, examples, times, documents)
        except InrunError as problem:
            problems.append(problem)
    raise next((problem for problem in problems if problem.__cause__ is None), problems[0])


def _fewer(time: int, documents: Tensor | None) -> int:
    """How many tokens to leave: half of them, or so many that a sequence loses its last document and no other."""
    half = time // 2
    last = [] if documents is None else [int((row == row[-1]).int().argmax()) for row in documents]
    return min((begin for begin in last if begin), key=lambda begin: abs(begin - half), default=half)


def _compared(
    probe: Probe,
    plain: Mapping[tuple[Unit, int], Sequence[object]],
    shorter: Inputs,
    found: Found,
    examples: int,
    times: tuple[int, int],
    documents: Tensor | None,
) -> Times:
    time, fewer = times
    try:
        again = probe.outputs(shorter, found.carrying, examples)
    except InrunError as error:
        raise InrunError(
            f"the model could not be run on {fewer} tokens in place of {time}, to find out which dimensions hold "
            f"time ({error.__cause__ or error}): it was given inputs of shape {shorter.shapes()}. Values by token and "
            "by packed document are for models that take sequences of any length."
        ) from error
    places = {}
    for (unit, index), leaves in plain.items():
        rows, others = found.rows[unit, index], again.get((unit, index), [])
        if len(others) != len(leaves):
            raise InrunError(
                f"{unit.name}: the model calls it another number of times for {time} and for {fewer} tokens, so "
                "that its calls have no tokens of their own. Ask for values by example alone."
            )
        of_leaves: list[Time | None] = []
        for x, y, of in zip(leaves, others, rows, strict=True):
            place = None
            if isinstance(of, Rows) and isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point():
                if not of.fits(y, examples):
                    raise InrunError(
                        f"{unit.name}: its output of shape {tuple(x.shape)} for {time} tokens is laid out otherwise "
                        f"for {fewer}, {tuple(y.shape)}, so that it cannot be told which dimension is time. {INSTEAD}"
                    )
                whole, as_rows = expanded(x, of, examples, unit)
                less, _ = expanded(y, of, examples, unit)
                place = find_time(whole, less, as_rows, examples, times, documents, unit.name)
            of_leaves.append(place)
        places[unit, index] = tuple(of_leaves)
    return places


def _time_dim(inputs: Inputs) -> int:
    return 0 if inputs.batch_dim else 1


def _shortened(inputs: Inputs, carrying: Sequence[int], times: tuple[int, int]) -> list[Inputs]:
    """The inputs without the last tokens, in two ways if they differ.

    Tensors [batch, time, ...] lose them in that dimension, others, such as masks [batch, 1, time, time] or positions
    [time], in all that have as many entries; or all tensors do in all of these, as a mask [batch, time, time] must.
    """
    (time, fewer), d, ways = times, _time_dim(inputs), []
    for alike in (False, True):
        leaves = list(inputs.leaves)
        for k, x in enumerate(leaves):
            if isinstance(x, Tensor):
                dims = [
                    n for n in range(x.ndim) if x.shape[n] == time and not (k in carrying and n == inputs.batch_dim)
                ]
                for n in [d] if k in carrying and d in dims and not alike else dims:
                    leaves[k] = leaves[k].narrow(n, 0, fewer)
        less = copy.copy(inputs)
        less.leaves = leaves
        ways.append(less)
    return ways if ways[0].shapes() != ways[1].shapes() else ways[:1]

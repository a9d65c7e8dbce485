"""Runs the model on one token less to find where time is in every unit's output (inrun.timeline)."""

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor

from inrun.errors import InrunError
from inrun.packed import Packed
from inrun.probe import Found, Inputs, Probe, Unit, expanded
from inrun.timeline import INSTEAD, Time, find_time

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
            "which dimensions hold time is found by running the model on one token less, and this first batch has one: "
            "begin with a longer one."
        )
    plain = probe.outputs(inputs, found.carrying, examples)
    problems = []
    for shorter in _shortened(inputs, found.carrying, time):
        try:
            return _compared(probe, plain, shorter, found, examples, time, packed)
        except InrunError as problem:
            problems.append(problem)
    raise next((problem for problem in problems if problem.__cause__ is None), problems[0])


def _compared(
    probe: Probe,
    plain: Mapping[tuple[Unit, int], Sequence[object]],
    shorter: Inputs,
    found: Found,
    examples: int,
    time: int,
    packed: Packed | None,
) -> Times:
    try:
        again = probe.outputs(shorter, found.carrying, examples)
    except InrunError as error:
        raise InrunError(
            f"the model could not be run on {time - 1} tokens in place of {time}, to find out which dimensions hold "
            f"time ({error.__cause__ or error}): it was given inputs of shape {shorter.shapes()}. Values by token and "
            "by packed document are for models that take sequences of any length."
        ) from error
    times = {}
    for (unit, index), leaves in plain.items():
        rows, others = found.rows[unit, index], again.get((unit, index), [])
        if len(others) != len(leaves):
            raise InrunError(
                f"{unit.name}: the model calls it another number of times for {time} and for {time - 1} tokens, so "
                "that its calls have no tokens of their own. Ask for values by example alone."
            )
        places: list[Time | None] = []
        for x, y, of in zip(leaves, others, rows, strict=True):
            place = None
            if of is not None and isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point():
                if not of.fits(y, examples):
                    raise InrunError(
                        f"{unit.name}: its output of shape {tuple(x.shape)} for {time} tokens is laid out otherwise "
                        f"for one less, {tuple(y.shape)}, so that it cannot be told which dimension is time. {INSTEAD}"
                    )
                whole, as_rows = expanded(x, of, examples, unit)
                less, _ = expanded(y, of, examples, unit)
                documents = None if packed is None else packed.documents
                place = find_time(whole, less, as_rows, examples, time, documents, unit.name)
            places.append(place)
        times[unit, index] = tuple(places)
    return times


def _time_dim(inputs: Inputs) -> int:
    return 0 if inputs.batch_dim else 1


def _shortened(inputs: Inputs, carrying: Sequence[int], time: int) -> list[Inputs]:
    """The inputs without the last token, in two ways if they differ.

    Tensors [batch, time, ...] lose it in that dimension, others, such as masks [batch, 1, time, time] or positions
    [time], in all that have as many entries; or all tensors do in all of these, as a mask [batch, time, time] must.
    """
    d, ways = _time_dim(inputs), []
    for alike in (False, True):
        leaves = list(inputs.leaves)
        for k, x in enumerate(leaves):
            if isinstance(x, Tensor):
                dims = [
                    n for n in range(x.ndim) if x.shape[n] == time and not (k in carrying and n == inputs.batch_dim)
                ]
                for n in [d] if k in carrying and d in dims and not alike else dims:
                    leaves[k] = leaves[k].narrow(n, 0, time - 1)
        less = copy.copy(inputs)
        less.leaves = leaves
        ways.append(less)
    return ways if ways[0].shapes() != ways[1].shapes() else ways[:1]

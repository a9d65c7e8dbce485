"""Runs the model to find out whose rows are whose (inrun.rows) and where parameters are used (inrun.units).

The model is left as it was.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.found import Found
from inrun.inputs import Inputs
from inrun.judges import FindMixed, FindRows, example_dims, mixed_output
from inrun.operations import Operations, Reads, drawn
from inrun.parallel import Processes
from inrun.recording import Comparison, Recording
from inrun.rows import every_other, shuffled, without_last
from inrun.target import Evaluation
from inrun.units import Unit, Units


class Probe:
    """Runs a model to find the rows of every unit's outputs, and which parameters are used where."""

    def __init__(self, processes: Processes, units: Units) -> None:
        self._model, self._units, self._processes = processes.model, units, processes
        self._evaluation, self._as_it_is = Evaluation(processes), Evaluation(processes, evaluate=False)

    def find(self, inputs: Inputs, examples: int) -> Found:
        """The rows under this structure of inputs, with the units that the model's parameters have from now on.

        Raises InrunError where rows cannot be told, of any module that could be the unit of a parameter.
        """
        carrying, order = inputs.carrying(examples), shuffled(examples)
        reads: Reads = defaultdict(dict)  # of all rounds: they do not hang on what the units are
        while True:
            found, problems = self._rows(inputs, carrying, order, None if self._model.training else reads)
            if not problems:
                found, problems = self._expandable(inputs, order, found)
            if problems and self._processes.sharded:  # what else could be their unit cannot be told: nothing is read
                raise _not_lifted(next(iter(problems.values())))
            if not problems and self._model.training:
                found = self._trained(inputs, examples, found, reads)
            if not self._units.settle(reads, problems):
                self._check_valued()
                return found

    def _check_valued(self) -> None:
        """Raise InrunError if weights that are sharded are not where their modules had them."""
        lost = [name for p, name in self._units.trained.items() if p not in self._units.group_of]
        if self._processes.sharded and lost:
            raise InrunError(
                f"{', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}: sharded weights that cannot be valued, as "
                "the model could not be run to find out whose rows are whose. Update torch, or freeze them "
                "(requires_grad_(False))."
            )

    def finish(self, inputs: Inputs, examples: int) -> None:
        """Run the model with the others as long as one of them has something to find, where it takes all of them."""
        while self._processes.sharded and self._processes.any(False):
            with self._evaluation(), torch.no_grad():
                args, kwargs = inputs.reordered([], torch.arange(examples))
                self._model(*args, **kwargs)

    def _rows(
        self, inputs: Inputs, carrying: list[int], order: Tensor, reads: Reads | None
    ) -> tuple[Found, dict[Unit, InrunError]]:
        """The rows of every output, and of which units they cannot be told."""
        examples, counted = len(order) - 1, False
        while True:
            plain = self._run(inputs, carrying, torch.arange(examples), still=True)
            counted |= plain.operations.counted
            judge = FindRows(order, inputs.merges(carrying) if counted else None, self._model, plain.problems)
            comparison = Comparison(plain.seen, judge)
            again = self._run(inputs, carrying, order, reads, still=True, comparison=comparison)
            if counted or not again.operations.counted:
                break
            counted = True
        comparison.finish()
        outputs = example_dims(plain.output, again.output, order)
        mixed = mixed_output(plain.output, again.output, outputs, order)
        written = frozenset(comparison.written)
        found = Found(judge.rows, tuple(carrying), counted, outputs, mixed, written=written, alone=examples == 1)
        return found, judge.problems

    def outputs(self, inputs: Inputs, carrying: Sequence[int], examples: int) -> dict[tuple[Unit, int], list[Any]]:
        """What every unit puts out on these inputs in eval mode, by call."""
        seen = self._run(inputs, list(carrying), torch.arange(examples)).seen
        return {call: of.leaves for call, of in seen.items()}

    def _expandable(self, inputs: Inputs, order: Tensor, found: Found) -> tuple[Found, dict[Unit, InrunError]]:
        """The rows with which batchless outputs can be expanded and the model still computes the same; and the units of
        which they cannot.

        In train mode, with dropout: the same outputs bit for bit, by operations of the same shapes. A leading dimension
        of one may be the examples' to take, as in [1, T, d], or another that happens to be one: what holds is tried.
        """
        batchless = found.batchless()
        if not batchless:
            return found, {}
        plain = self._run(inputs, list(found.carrying), order, train=True)

        def expands(kind: Found) -> str:
            try:
                same = plain.same_as(self._run(inputs, list(found.carrying), order, train=True, expand=kind))
                return "" if same else "changes what the model computes"
            except InrunError as error:
                return f"fails ({error.__cause__ or error})"

        kinds = [found] if found.unled() == found else [found, found.unled()]
        for kind in kinds:
            if not expands(kind):
                return kind, {}
        problems: dict[Unit, InrunError] = {}
        alike: dict[str, list[Unit]] = {}  # but for the numbers of layers: one run for all of them
        for unit in batchless:
            alike.setdefault(re.sub(r"\d+", "#", unit.name), []).append(unit)
        for some in alike.values():
            problem = min(expands(kind.only(some)) for kind in kinds)
            if problem:
                problems |= {
                    unit: InrunError(
                        f"{unit.name}: the output has no example dimension (one for all examples), and giving it one "
                        f"{problem}. Add it to the examples' tensor as it is ([T, d] or [1, T, d]), and apply dropout "
                        "or reshapes after that; or freeze the module (requires_grad_(False))."
                    )
                    for unit in some
                }
        together = InrunError(
            f"{', '.join(unit.name for unit in batchless)}: their outputs have no example dimension (one for all "
            "examples), and giving all of them one changes what the model computes. Freeze one of these modules "
            "(requires_grad_(False))."
        )
        return found, problems or dict.fromkeys(batchless, together)

    def _trained(self, inputs: Inputs, examples: int, found: Found, reads: Reads) -> Found:
        """The same, with what is mixed in train mode: there random numbers are replaced by their mean.

        The uses of parameters are those of the second run: the first may be what changes weights between the modes.
        """
        mixed, plain, again = self._compared(inputs, examples, found, without_last(examples), reads=reads)
        if mixed and (plain.drew or again.drew):
            mixed = self._mixed_in_place(inputs, examples, found)
        return replace(found, moving=plain.moved, mixed=found.mixed or mixed)

    def _mixed_in_place(self, inputs: Inputs, examples: int, found: Found) -> str:
        """Where examples are mixed in a forward that draws numbers: those that stay in their places, with the numbers
        that they had, come out otherwise if others are changed.

        Where other examples make it draw another number of them, it cannot be told.
        """
        order, staying = every_other(examples)
        mixed, plain, again = self._compared(inputs, examples, found, order, only=staying)
        return mixed if again.drawn_to == plain.drawn_to else ""

    def _compared(
        self,
        inputs: Inputs,
        examples: int,
        found: Found,
        order: Tensor,
        *,
        only: Tensor | None = None,
        reads: Reads | None = None,
    ) -> tuple[str, Recording, Recording]:
        """Where the examples (in the places `only`) are mixed in train mode, which shows in the company of the examples
        `order`; and the two runs.
        """
        carrying = list(found.carrying)
        plain = self._run(inputs, carrying, torch.arange(examples), train=True, still=True)
        judge = FindMixed(order, found, only)
        comparison = Comparison(plain.seen, judge)
        again = self._run(inputs, carrying, order, reads, train=True, still=True, comparison=comparison)
        comparison.finish()
        return judge.mixed or mixed_output(plain.output, again.output, found.outputs, order, only), plain, again

    def _run(
        self,
        inputs: Inputs,
        carrying: list[int],
        order: Tensor,
        reads: Reads | None = None,
        *,
        train: bool = False,
        still: bool = False,
        expand: Found | None = None,
        comparison: Comparison | None = None,
    ) -> Recording:
        """One forward on the examples `order`, without gradients; in eval mode unless `train`."""
        sharded = self._processes.sharded
        if sharded:  # the others run theirs with this one
            self._processes.any(True)
            reads = None  # of weights that are there for the moment
        recording = Recording(len(order), expand, comparison, Operations(reads, still))
        before = drawn()
        try:
            args, kwargs = inputs.reordered(carrying, order)
            evaluation = (self._as_it_is if train else self._evaluation)()
            told = warnings.catch_warnings()  # what a forward warns of without gradients is not the user's doing
            with evaluation as state, torch.no_grad(), recording.of(self._units.all), told:
                warnings.simplefilter("ignore")
                kept = [] if sharded else list(self._model.parameters())
                with recording.operations.keeping(kept), recording.operations:
                    recording.output = self._model(*args, **kwargs)
                recording.moved = state.moved()
                recording.random_state = torch.get_rng_state()
                recording.drawn_to = (recording.random_state.tolist(), drawn(), state.drawn())
                recording.drew |= recording.operations.drew or drawn() != before or state.drew()
        except InrunError:
            raise
        except Exception as error:
            self._processes.abandon()
            raise InrunError(
                f"the model could not be run on {len(order)} examples to find out whose rows are whose "
                f"({type(error).__name__}: {error}). Of its inputs of shape {inputs.shapes()}, those with one entry "
                f"per example in dimension {inputs.batch_dim} were taken to hold the examples. If one of them does "
                "not, begin with a batch of another size."
            ) from error
        self._check_written(recording.operations.written, train)
        return recording

    def _check_written(self, written: Sequence[nn.Parameter], train: bool) -> None:
        """Raise InrunError if the forward would write to parameters when it is run for the target, or run again."""
        again = [unit for unit in self._units.all if not unit.closed_form]
        for name, p in self._model.named_parameters():
            if any(p is x for x in written):
                inside = [unit.name for unit in again if any(p is x for x in unit.module.parameters())]
                if inside or (not train and p not in self._units.trained):
                    raise InrunError(
                        f"{name}: the model's forward writes to this parameter, and must be run more often "
                        f"({inside[0] + ' is run again' if inside else 'for the target'}). Do it outside of the "
                        "forward, after optimizer.step(), or only in training mode."
                    )


def _not_lifted(problem: InrunError) -> InrunError:
    return InrunError(
        f"{problem} (Without fully_shard, as in DistributedDataParallel, it would be valued by a module around it.)"
    )

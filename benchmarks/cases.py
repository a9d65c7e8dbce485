"""Which tables there are: the standard set, the quick one, and what the command line asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.models import WORKLOADS, Dtype
from benchmarks.variants import VARIANTS

INRUN = ("first-sgd", "path", "second")
KERNELS = tuple(name for name in VARIANTS if "/" in name)
RIVALS = tuple(name for name, variant in VARIANTS.items() if variant.needs)
SLOW_WAYS = ("naive-sgd", "forward-mode-sgd", "naive", "forward-mode")
SCHEMES = ("first-sgd", "path-sgd", "first", "second", "path", "path-2", "path-adaptive", "path-ledger")


@dataclass(frozen=True)
class Case:
    """One table: variants of a step of one model, measured in alternation.

    seconds: about how long it may take; there are as many rounds as fit, but three at least and `rounds` at most.
    memory: the variants whose peak memory is measured too, each in a process of its own.
    """

    workload: str
    batch: int
    dtype: Dtype
    targets: int
    variants: tuple[str, ...]
    seconds: float
    rounds: int = 8
    memory: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.workload}, batch {self.batch}, {self.dtype}, {self.targets} target{'s' * (self.targets != 1)}"


def _case(
    workload: str, variants: Sequence[str], seconds: float, *, batch: int | None = None, dtype: Dtype = "fp32",
    targets: int = 1, rounds: int = 8, memory: Sequence[str] = (),
) -> Case:  # fmt: skip
    batch = batch or WORKLOADS[workload].batch
    return Case(workload, batch, dtype, targets, tuple(variants), seconds, rounds, tuple(memory))


def standard() -> list[Case]:
    """What `make bench` measures."""
    every = (*SCHEMES, *KERNELS, *SLOW_WAYS, *RIVALS)
    some = ("first-sgd", "path", *SLOW_WAYS)
    return [
        _case("gpt14m", every, 300, memory=(*INRUN, "path/tangent", "path/perexample", *SLOW_WAYS, *RIVALS)),
        _case("gpt14m", some, 90, targets=4, memory=("path",)),
        _case("gpt14m", ("first-sgd", "path", "naive-sgd"), 100, targets=16, memory=("path",)),
        _case("gpt14m", (*INRUN, *SLOW_WAYS), 60, dtype="bf16", memory=("path",)),
        _case("gpt14m", some, 40, batch=4, memory=("path",)),
        _case("gpt14m", some, 75, batch=16, memory=("path",)),
        _case("gpt14m", ("path",), 100, batch=64, memory=("path",)),
        # dattri would hold several gradients of all 64 examples, 2.9 GB each
        _case("resnet18", (*INRUN, *SLOW_WAYS, "opacus", "captum"), 150, memory=(*INRUN, *SLOW_WAYS, "opacus")),
        _case("mlp", every, 20, rounds=30, memory=("first-sgd", "path", "opacus")),
        _case("mlp", some, 10, targets=16, rounds=30),
        _case("mlp", some, 5, batch=4, rounds=30),
        _case("mlp", some, 5, batch=16, rounds=30),
        # one by one: each has a model, an optimizer and gradients of every example of its own
        *(_case("gpt2", (name,), 120, rounds=4, memory=(name,)) for name in INRUN),
        _case("pythia410m", ("path",), 120, rounds=2, memory=("path",)),
    ]


def quick() -> list[Case]:
    """About three minutes on two cores."""
    variants = ("first-sgd", "second", "path", "path-2", *SLOW_WAYS)
    return [
        _case("gpt14m", variants, 80, rounds=4, memory=("first-sgd", "path")),
        _case("mlp", (*variants, *RIVALS), 10, rounds=10, memory=("path",)),
        _case("mlp", variants, 10, rounds=10, targets=4),
    ]


def asked(
    cases: Sequence[Case],
    workloads: Sequence[str] | None,
    variants: Sequence[str] | None,
    dtype: Dtype | None,
    targets: Sequence[int] | None,
    batches: Sequence[int] | None,
    rounds: int | None,
) -> list[Case]:
    """The set of cases, cut to the named models; or, where more is said than the models, all that was said of each.

    A model that the set does not have is measured with everything; what is not said is as in its first case.
    """
    if variants is None and dtype is None and targets is None and batches is None:
        chosen = [case for case in cases if workloads is None or case.workload in workloads]
        missing = [w for w in workloads or () if w not in {case.workload for case in cases}]
        chosen += [_case(w, (*SCHEMES, *KERNELS, *SLOW_WAYS, *RIVALS), 180) for w in missing]
    else:
        chosen = []
        for workload in workloads or list(dict.fromkeys(case.workload for case in cases)):
            like = next((case for case in cases if case.workload == workload), None)
            names = tuple(variants or (like.variants if like else (*SCHEMES, *SLOW_WAYS)))
            for batch in batches or [WORKLOADS[workload].batch]:
                for number in targets or [1]:
                    seconds, most = (like.seconds, like.rounds) if like else (180.0, 8)
                    chosen.append(Case(workload, batch, dtype or "fp32", number, names, seconds, most, names))
    if rounds is not None:
        chosen = [replace(case, rounds=rounds, seconds=float("inf")) for case in chosen]
    return chosen

"""The study's settings, and the pieces that it is computed in."""

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.pieces import file_name
from experiments.study import fingerprint

CLEAN = ("news", "encyclopedia", "parliament", "addresses", "fiction", "ham")
RUBBISH = (  # kinds, and their shares of the training set
    ("spam", 0.06), ("html", 0.04), ("base64", 0.03), ("shuffled", 0.03), ("noise 10%", 0.03), ("noise 30%", 0.03),
    ("misread", 0.03), ("copies", 0.03), ("near copies", 0.02),
)  # fmt: skip
NEGATIVES, SHARE = "negatives", "share"  # what is dropped: all below zero, or as many as `path` has below zero
NOT_HASHED = ("seeds", "wide", "passes", "curations")


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    clean: tuple[str, ...] = CLEAN
    wanted: tuple[str, ...] = ("news", "encyclopedia")  # the sources of the target
    rubbish: tuple[tuple[str, float], ...] = RUBBISH
    characters: int = 500_000  # of each source, at most
    vocabulary: int = 2048
    length: int = 64  # tokens of a block
    width: int = 96
    layers: int = 3
    heads: int = 4
    blocks: int = 3200  # of the training set
    epochs: int = 2
    batch: int = 16
    rate: float = 3e-3
    warmup: int = 40  # steps; then half a cosine to a tenth of the rate
    originals: int = 4  # blocks that the copies are of, and as many others that the near copies are of
    replaced: float = 0.05  # of the tokens of a near copy
    sizes: tuple[int, ...] = (8, 32, 128)  # held-out blocks of a target; the last one is the main one
    at_once: int = 32  # of them in a step; more are batches that take turns
    broad: int = 96  # blocks of a target from all clean sources
    tested: int = 256  # held-out blocks from the wanted sources
    tested_each: int = 96  # and from every clean source by itself
    every: int = 20  # steps from test to test
    damping: float = 0.1  # of the influence function's Hessian
    iterations: int = 10  # of its conjugate gradients
    hessian: int = 128  # training blocks that it is of
    seeds: tuple[int, ...] = (0, 1, 2)
    wide: tuple[int, ...] = (0,)  # the seeds for which the main target is valued with all its blocks in every step, too
    passes: tuple[str, ...] = ("proxy", "influence")
    # what is dropped before training again, by the values of what; `random` and `oracle` are controls, `path, rubbish`
    # and `path, clean` say which part of what `path` has below zero does what
    curations: tuple[tuple[str, str], ...] = (
        (SHARE, "random"), (SHARE, "random again"), (NEGATIVES, "oracle"), (SHARE, "oracle"),
        (NEGATIVES, "path"), (NEGATIVES, "path, one pass"), (NEGATIVES, "path, broad"), (NEGATIVES, "path, 8"),
        (NEGATIVES, "path, rubbish"), (NEGATIVES, "path, clean"), (NEGATIVES, "first"), (NEGATIVES, "sgd-proxy"),
        (SHARE, "path, by step"), (SHARE, "path, broad"), (SHARE, "first"), (SHARE, "sgd-proxy"), (SHARE, "replay"),
        (SHARE, "influence"), (SHARE, "loss"),
    )  # fmt: skip

    @property
    def steps(self) -> int:
        return self.epochs * self.blocks // self.batch

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of blocks: the clean sources, and then the kinds of rubbish."""
        return (*self.clean, *(kind for kind, _ in self.rubbish))

    @property
    def main(self) -> str:
        """The target that all methods are compared by."""
        return str(self.sizes[-1])

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=NOT_HASHED)


QUICK = Study(
    clean=("scripture", "code"), wanted=("scripture",), characters=60_000, vocabulary=400, length=16, width=16,
    layers=1, heads=2, blocks=80, batch=8, warmup=4,
    rubbish=(("shuffled", 0.1), ("noise 30%", 0.1), ("misread", 0.1), ("copies", 0.1), ("near copies", 0.1)),
    rate=5e-3, originals=2, sizes=(2, 8), at_once=4, broad=4, tested=16, tested_each=8,
    every=5, hessian=8, iterations=2, seeds=(0,), wide=(0,), passes=("proxy",),
    curations=(
        (SHARE, "random"), (NEGATIVES, "oracle"), (NEGATIVES, "path"), (NEGATIVES, "first"), (SHARE, "path, by step"),
        (SHARE, "replay"), (SHARE, "loss"), (NEGATIVES, "path, rubbish"), (NEGATIVES, "path, clean"),
    ),
)  # fmt: skip

ALL = "all data"


@dataclass(frozen=True)
class Piece:
    """What is computed and stored at a time, of a seed: a `part` of the values, or a training on what is left."""

    seed: int
    part: str

    @property
    def name(self) -> str:
        return file_name(f"seed{self.seed}", self.part)


def pieces_of(study: Study) -> Iterator[Piece]:
    """The values."""
    for seed in study.seeds:
        for part in ("path", *(("wide",) if seed in study.wide else ()), "first", *study.passes):
            yield Piece(seed, part)


def trainings_of(study: Study) -> Iterator[Piece]:
    """Trainings on what is left, which need the values; and on everything, twice, with other weights to begin with."""
    for seed in study.seeds:
        for part in (ALL, f"{ALL} again", *(f"{rule} {method}" for rule, method in study.curations)):
            yield Piece(seed, part)

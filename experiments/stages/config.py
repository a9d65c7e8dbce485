"""The study's settings, and the pieces that it is computed in."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.pieces import file_name
from experiments.study import fingerprint

SCHEMES: dict[str, dict[str, Any]] = {"path, credit": {"momentum": "credit"}, "path": {}, "first": {"scheme": "first"}}
PROXY = "sgd-proxy"
GENERAL = ("code", "fiction", "news", "encyclopedia")
MIXTURES = {"same": ("mathematics", *GENERAL), "near": ("logic", *GENERAL)}
NOT_HASHED = ("seeds", "schemes", "left_out")


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    mixtures: tuple[tuple[str, tuple[str, ...]], ...] = tuple(MIXTURES.items())
    targets: tuple[str, ...] = ("mathematics", "news")
    characters: int = 800_000  # of each source
    vocabulary: int = 2048
    length: int = 64  # tokens of a block
    width: int = 96
    layers: int = 3
    heads: int = 4
    batch: int = 16
    steps: int = 600
    rate: float = 3e-3
    warmup: int = 50  # steps; then half a cosine to a tenth of the rate
    held_out: int = 64  # blocks of a target
    at_once: int = 16  # of them in a step, which take turns
    stages: int = 12  # of equally many steps; the first is shown in quarters, too
    windows: int = 3  # in which sources are left out
    seeds: tuple[int, ...] = (0, 1, 2)
    # by mixture: what values are had by
    schemes: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("same", ("path, credit", "path", "first", PROXY)),
        ("near", ("path, credit", PROXY)),
    )
    left_out: tuple[str, ...] = ("same", "near")  # mixtures whose sources are left out

    @property
    def blocks(self) -> int:
        """Of the training set: each is used once."""
        return self.steps * self.batch

    @property
    def sources(self) -> tuple[str, ...]:
        """Of all mixtures and targets."""
        return tuple(dict.fromkeys([*(name for _, of in self.mixtures for name in of), *self.targets]))

    def mixture(self, name: str) -> tuple[str, ...]:
        return dict(self.mixtures)[name]

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=NOT_HASHED)


QUICK = Study(
    mixtures=(("all", ("scripture", "code")),), targets=("scripture",), characters=40_000, vocabulary=400, length=16,
    width=16, layers=1, heads=2, batch=8, steps=24, rate=5e-3, warmup=4, held_out=8, at_once=4, stages=4, seeds=(0,),
    schemes=(("all", ("path, credit", "path", "first", PROXY)),), left_out=("all",),
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What is computed and stored at a time: a run of a mixture and a seed, valued by a scheme, or without a source."""

    mixture: str
    seed: int
    part: str

    @property
    def name(self) -> str:
        return file_name(self.mixture, f"seed{self.seed}", self.part)


LEFT_OUT = "left out"
ANY = "any of them"  # is left out: as many blocks as a source has, in the mean


def pieces_of(study: Study) -> Iterator[Piece]:
    for seed in study.seeds:
        for mixture, schemes in study.schemes:
            for scheme in schemes:
                yield Piece(mixture, seed, scheme)
        for mixture in study.left_out:
            yield Piece(mixture, seed, LEFT_OUT)

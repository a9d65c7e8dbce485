"""The study's settings, and the pieces that it is computed in."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.pieces import file_name
from experiments.study import fingerprint

IN_RUN: dict[str, dict[str, Any]] = {  # what the Attributor is told, for a run of each
    "path": {"replayable": True},
    "first": {"scheme": "first"},
    "second": {"scheme": "second"},
    "path, credit": {"momentum": "credit"},
}
EARLY = ", early"  # the sums of the first epochs alone, as many as EL2N is had after
NOT_HASHED = ("sources", "seeds", "in_run", "parts", "selected", "whole", "horizon", "too_far")


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    sources: tuple[str, ...] = ("fashion", "mnist")
    seeds: tuple[int, ...] = (0, 1, 2)
    whole: tuple[str, ...] = ("fashion",)  # the sources for which everything is computed
    in_run: tuple[str, ...] = ("path", "first")  # what is computed for the others
    parts: tuple[str, ...] = ("passes", "early", "trak")
    examples: int = 1000
    wrong: float = 0.1  # the share of the training images whose label is another
    target: int = 512  # images held out, in batches that take turns, one a step
    tested: int = 2000  # other images, which only the accuracy is taken of
    width: int = 8  # channels of the first stage; the last has eight times as many
    batch: int = 64
    epochs: int = 50
    rate: float = 1e-3
    horizon: int = 8  # steps of the replay; what a replay to the end of such a run warns to take
    too_far: tuple[int | None, ...] = (None, 160)  # horizons of replays of one seed: the whole run, ten epochs
    checkpoints: int = 10  # of TracIn, at equal distances
    models: int = 5  # of TRAK, the first of them the run itself
    dimensions: int = 512  # of TRAK's projection
    early: int = 5  # epochs until EL2N and GraNd are had
    inits: int = 10  # models whose mean they are
    damping: float = 0.01  # of the influence function's Hessian
    iterations: int = 20  # of its conjugate gradients
    neighbours: int = 5
    # Data Shapley by really training again: on fewer images, for fewer epochs
    small: int = 100
    small_epochs: int = 20
    small_target: int = 192
    updates: int = 4  # orders of the images
    truncation: float = 0.05
    kept: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    selected: tuple[str, ...] = (
        "path", "path, by step", "path, by step, early", "first", "path, credit", "replay-h8", "sgd-proxy", "loss",
        "EL2N", "KNN, features", "TRAK-many", "influence", "TracIn", "random", "right first",
    )  # fmt: skip

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.examples // self.batch)

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=NOT_HASHED)


QUICK = Study(
    sources=("blobs",), seeds=(0,), whole=("blobs",), parts=("passes", "early"), examples=40, target=16, tested=20,
    width=4, batch=8, epochs=3, horizon=5, too_far=(None,), checkpoints=2, early=1, inits=2, iterations=2, kept=(0.5,),
    selected=("path", "loss", "random"),
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What is computed and stored at a time, of a source and a seed: a `part` of the methods, or trainings on what a
    method selects.
    """

    source: str
    seed: int
    part: str

    @property
    def name(self) -> str:
        return file_name(self.source, f"seed{self.seed}", self.part)


def pieces_of(study: Study) -> Iterator[Piece]:
    """The methods' values."""
    for source in study.sources:
        whole = source in study.whole
        for seed in study.seeds:
            for scheme in IN_RUN if whole else study.in_run:
                yield Piece(source, seed, f"in-run {scheme}")
            for part in study.parts:
                yield Piece(source, seed, part)
            if whole and study.small < study.examples:
                yield Piece(source, seed, "small")
            if whole and seed == study.seeds[0]:
                yield Piece(source, seed, "too far")


def selections_of(study: Study) -> Iterator[Piece]:
    """Trainings on what the methods select, which need the values."""
    for source in study.whole:
        for seed in study.seeds:
            yield Piece(source, seed, "all images")
            for method in study.selected:
                yield Piece(source, seed, f"select {method}")

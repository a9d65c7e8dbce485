"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.counterfactual.config import GAMES, IN_NATS, IN_RUN, METHODS, RANDOM, SIGNED, Model, Piece, Study
from experiments.pieces import load, seconds
from experiments.results import Array, Row, correlation, figure, lds, short, shown, spread, table, versions

OTHERS = "others"  # trainings from other weights in another order
ENDS = ("lowest", "highest")  # values
SHOWN = ("replay", "path", "influence")  # in the figure, beside the truth
TOLD = ("replay", "path", "influence", "TRAK", "random")  # in the project's README


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
        mine = {piece: path for piece, path in paths.items() if (piece.model, piece.seed) == (model, seed)}
        loaded = load(mine, lambda piece: (model.name, seed))
        self.pieces = {f"{piece.part}, {piece.block}": of for piece, of in loaded.items()}

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
    libraries = ["dattri", "traker", "transformers", "peft"]
    libraries += ["scikit-learn"] if any("digits" in model.sources for model in study.models) else []
    return {
        "about": "Changes are of the target's loss in nats, by really training again, against training with all "
        "examples. lds_GAME_SHARE: Spearman correlation over subsets of the change and the sum of the values left out, "
        "[mean over seeds, 95% bootstrap interval of it over subsets]; other numbers in threes: [mean, lowest, "
        "highest] over seeds. slope: of the change on that sum. sign: share whose sign is right. others: trained from "
        "other weights in another order",
        "study": {"characters": study.characters, "models": settings},
        "seconds": short(seconds(paths.values())),
        "seconds_by_model": {m.name: short(seconds(p for q, p in paths.items() if q.model == m)) for m in of_models},
        "versions": versions(*libraries),
        "runs": _even(_run(model, seeds) for model, seeds in of_models.items()),
        "methods": _even(_method(model, seeds, name) for model, seeds in of_models.items() for name in METHODS),
        "removals": _even(row for model, seeds in of_models.items() for row in _removals(model, seeds)),
        "noise": _even(row for model, seeds in of_models.items() for row in _noise(model, seeds)),
        "subsets": _even(row for seeds in of_models.values() for row in _subsets(seeds[0])),
    }


def _even(rows: Iterable[Row]) -> list[Row]:
    """With the same columns, as a table has."""
    listed = list(rows)
    columns = dict.fromkeys(name for row in listed for name in row)
    return [{name: row.get(name) for name in columns} for row in listed]


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
    for share, _ in model.kept:
        truths = [seed.part(f"subsets {share:g}")[GAMES[0]][0] for seed in seeds]
        found[f"change_{share:g}"] = spread([float(truth.mean()) for truth in truths])
        found[f"sd_change_{share:g}"] = spread([float(truth.std()) for truth in truths])
        found[f"harm_{share:g}"] = spread([float((truth > 0).mean()) for truth in truths])
    if model.single:
        found["harm_single"] = spread([float((seed.part("single")["change"] > 0).mean()) for seed in seeds])
    return found


def _method(model: Model, seeds: Sequence[Seed], name: str) -> Row:
    largest = max(dict(model.kept))
    found: Row = {"model": model.name, "method": name}
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
    """Changes without the lowest or the highest values. `beyond_random`: less the mean of those without as many at
    random, which has a row of its own, with the standard deviation over a seed's draws. `beyond_others`: the same in
    trainings from other weights in another order; `survives`: its share of the former.
    """
    for k, share in enumerate(model.removed):
        draws = [_draws(model, seed, k, share) for seed in seeds]
        for name in model.by:
            if name == RANDOM:
                continue
            of = [seed.part(f"remove {name}")["change"][:, k] for seed in seeds]
            row: Row = {"model": model.name, "method": name, "share": share}
            for side, end in enumerate(ENDS):
                row[end] = spread([float(change[0, side]) for change in of])
                beyond = [float(c[0, side] - d[0].mean()) for c, d in zip(of, draws, strict=True)]
                row[f"{end}_beyond_random"] = spread(beyond)
                left = [float((c[1:, side] - d[1:].mean(axis=1)).mean()) for c, d in zip(of, draws, strict=True)
                        if model.others]  # fmt: skip
                row[f"{end}_beyond_{OTHERS}"] = spread(left) if left else None
                row[f"{end}_survives"] = short(float(np.mean(left) / np.mean(beyond))) if left else None
            yield row
        level, deviation = ([float(of(d[0])) for d in draws] for of in (np.mean, np.std))
        yield {"model": model.name, "method": RANDOM, "share": share, "lowest": spread(level), "sd": spread(deviation)}


def _draws(model: Model, seed: Seed, k: int, share: float) -> Array:
    """[1 + others, draws]: changes without as many at random; where none were drawn, those of the subsets."""
    if model.draws:
        return seed.part(f"remove {RANDOM}")["change"][:, k]
    return seed.part(f"subsets {1 - share:g}")[GAMES[0]]


def _noise(model: Model, seeds: Sequence[Seed]) -> Iterator[Row]:
    """How well the truth of the run itself, instead of values, says that of the others."""
    for share, _ in model.kept if model.others else ():
        truths = [seed.part(f"subsets {share:g}")[GAMES[0]] for seed in seeds]
        own = [float(np.mean([correlation(t[0], other) for other in t[1:]])) for t in truths]
        yield {"model": model.name, "kept": share, "own_and_other": spread(own)}


def _subsets(seed: Seed) -> Iterator[Row]:
    """For the figure: what every subset that lacks few really lost, and what the values say."""
    share = max(dict(seed.model.kept))
    change = seed.part(f"subsets {share:g}")[GAMES[0]][0]
    predicted = {name: [short(float(x)) for x in seed.predicted(name, share)] for name in SHOWN}
    yield {"model": seed.model.name, "kept": share, "change": [short(float(x)) for x in change]} | predicted


def headline(result: Row) -> str:
    """For the project's README."""
    (share,) = {max(share for share, _ in model["kept"]) for model in result["study"]["models"]}
    found = []
    for model in dict.fromkeys(row["model"] for row in result["methods"]):
        rows = {row["method"]: row for row in result["methods"] if row["model"] == model}
        named = ", ".join(f"{name} {rows[name][f'lds_{GAMES[0]}_{share:g}'][0]:.2f}" for name in TOLD)
        found.append(f"{model}: {named}")
    return f"LDS at {share:.0%} kept, by removal: " + "; ".join(found)


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    return "\n\n".join(
        [
            "**Predict.** LDS by share kept, mean over seeds (95% bootstrap interval over subsets): `removed`, where a "
            "batch's mean is over those that are left; `weight 0`, where its denominator stays; `others`: removed in "
            "trainings from other weights in another order. `slope`: of the real change on the predicted one, where "
            "that is in nats, mean (lowest to highest) over seeds. `sign`: share of the removals whose sign is right, "
            "of single examples / of random tenths. Seconds: with the run, one thread; of replays, beyond it.",
            _methods_table(result),
            "**Prune and keep.** The target's loss, in thousandths of a nat, after removing the lowest or the highest "
            "values, less that after removing as many at random: mean (lowest to highest) over seeds. Pruning should "
            "lower it, removing what matters raise it. `random`: the change itself against all data, and its standard "
            "deviation over draws.",
            _removals_table(result),
            "**Another seed.** Values of one run, removals in trainings from other weights in another order: the "
            "same numbers, means over seeds, in the run / in the others, and what share of them is left.",
            _others_table(result),
            _noise_line(result),
            "**The runs.** The target's loss before and after; its mean change without random examples, the standard "
            "deviation over subsets, and how often it is a rise; the adjoint's largest norm by that at the end.",
            _runs_table(result),
        ]
    )


def _cell(numbers: Sequence[float] | None, digits: str = ".2f") -> str:
    if numbers is None:
        return "-"
    return format(numbers[0], digits) if numbers[1] == numbers[2] else shown(numbers, digits)


def _methods_table(result: Row) -> str:
    columns = [name for name in result["methods"][0] if name.startswith("lds_")]
    games = {GAMES[0]: "removed", GAMES[1]: "weight 0", OTHERS: "others"}
    heads = [f"{games[name.split('_')[1]]}, {float(name.split('_')[2]):.0%}" for name in columns]
    slopes = [name for name in result["methods"][0] if name.startswith("slope_")]
    heads += [f"slope, {float(name.split('_')[1]):.0%}" for name in slopes]
    rows = []
    for row in result["methods"]:
        cells = [_cell(row[name]) for name in (*columns, *slopes)]
        signs = " / ".join(
            "-" if row[name] is None else f"{row[name][0]:.0%}" for name in ("sign_single", "sign_tenth")
        )
        took = "-" if row["seconds"] is None else f"{row['seconds']:.3g}"
        rows.append([row["model"], row["method"], *cells, signs, took])
    return table(["model", "by", *heads, "sign", "seconds"], rows)


def _removals_table(result: Row) -> str:
    shares = list(dict.fromkeys(row["share"] for row in result["removals"]))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["removals"]:
        cells = rows.setdefault((row["model"], row["method"]), {})
        for end in ENDS:
            numbers = row[f"{end}_beyond_random"]
            cells[f"{end} {row['share']}"] = "-" if numbers is None else _cell([1000 * x for x in numbers], ".1f")
        if row["method"] == RANDOM:
            cells[f"lowest {row['share']}"] = f"{1000 * row['lowest'][0]:.1f}, sd {1000 * row['sd'][0]:.1f}"
    columns = [f"{end} {share}" for end in ENDS for share in shares]
    heads = [f"{end} {share:.0%}" for end in ENDS for share in shares]
    listed = [[*key, *(cells.get(name, "-") for name in columns)] for key, cells in rows.items()]
    return table(["model", "by", *heads], listed)


def _others_table(result: Row) -> str:
    rows = []
    for row in result["removals"]:
        if row["lowest_survives"] is not None:
            cells = [
                f"{1000 * row[f'{end}_beyond_random'][0]:.1f} / {1000 * row[f'{end}_beyond_others'][0]:.1f} / "
                f"{row[f'{end}_survives']:.0%}"
                for end in ENDS
            ]
            rows.append([row["model"], row["method"], f"{row['share']:.0%}", *cells])
    return table(["model", "by", "share", *ENDS], rows)


def _noise_line(result: Row) -> str:
    """What the truth of the run itself has in place of values."""
    parts = [f"{row['model']}, {row['kept']:.0%} kept {_cell(row['own_and_other'])}" for row in result["noise"]]
    return (
        f"The real changes of the run itself, in place of values, predict those of the others by: {'; '.join(parts)}."
    )


def _runs_table(result: Row) -> str:
    shares = [name.removeprefix("change_") for name in result["runs"][0] if name.startswith("change_")]
    rows = []
    for row in result["runs"]:
        ends = f"{row['loss_first'][0]:.2f}; {_cell(row['loss_last'])}"
        cells = [
            "-"
            if row[f"change_{share}"] is None
            else f"{row[f'change_{share}'][0]:.4f}, sd "
            f"{row[f'sd_change_{share}'][0]:.4f}, {row[f'harm_{share}'][0]:.0%}"
            for share in shares
        ]
        single = "-" if row["harm_single"] is None else f"{row['harm_single'][0]:.0%}"
        rows.append([row["model"], str(row["steps"]), ends, *cells, single, _cell(row["adjoint_growth"])])
    heads = [f"{float(share):.0%} kept: change, sd, rises" for share in shares]
    return table(["model", "steps", "loss", *heads, "one less: rises", "adjoint"], rows)


def draw(result: Row, path: Path) -> None:
    """By model: real changes and predicted ones, LDS by method, and what removals do."""
    models = list(dict.fromkeys(row["model"] for row in result["methods"]))
    with figure(path, 3, len(models), (4.2 * len(models), 10.0)) as panels:
        for column, model in enumerate(models):
            _draw_subsets(panels[0][column], next(row for row in result["subsets"] if row["model"] == model))
            _draw_lds(panels[1][column], [row for row in result["methods"] if row["model"] == model])
            _draw_removals(panels[2][column], [row for row in result["removals"] if row["model"] == model])


def _draw_subsets(panel: Any, row: Row) -> None:
    for k, name in enumerate(SHOWN):
        panel.plot(row[name], row["change"], ".", ms=4, color=f"C{k}", alpha=0.7, label=name)
    title = f"{row['model']}: {len(row['change'])} subsets of {row['kept']:.0%}, one seed"
    panel.set(title=title, xlabel="sum of the values left out, nats", ylabel="real change of the target's loss, nats")
    panel.legend()


def _draw_lds(panel: Any, rows: Sequence[Row]) -> None:
    columns = [name for name in rows[0] if name.startswith(f"lds_{GAMES[0]}") and rows[0][name]]
    for k, name in enumerate(columns):
        middle, low, high = np.array([row[name] for row in rows]).T
        heights = np.arange(len(rows)) + 0.4 * k
        panel.barh(heights, middle, 0.38, color=f"C{k + 2}", label=f"{float(name.split('_')[-1]):.0%} kept")
        panel.errorbar(middle, heights, xerr=[middle - low, high - middle], fmt="none", color="0.2", lw=0.7)
    panel.set_yticks(np.arange(len(rows)) + 0.2, [row["method"] for row in rows])
    panel.invert_yaxis()
    panel.axvline(0, color="black", lw=0.5)
    panel.set(xlabel="LDS, by removal")
    panel.legend()


def _draw_removals(panel: Any, rows: Sequence[Row]) -> None:
    """Of the largest share."""
    share = max(row["share"] for row in rows)
    mine = [row for row in rows if row["share"] == share and row["method"] != RANDOM]
    (deviation,) = [row["sd"][0] for row in rows if row["share"] == share and row["method"] == RANDOM]
    for k, end in enumerate(ENDS):
        middle, low, high = np.array([row[f"{end}_beyond_random"] for row in mine]).T
        heights = np.arange(len(mine))
        panel.barh(heights, middle, 0.6, color=f"C{k + 4}", label=f"{end} {share:.0%} removed")
        panel.errorbar(middle, heights, xerr=[middle - low, high - middle], fmt="none", color="0.2", lw=0.7)
    panel.set_yticks(heights, [row["method"] for row in mine])
    panel.invert_yaxis()
    panel.axvspan(-deviation, deviation, color="0.85", lw=0, zorder=0, label="random, sd")
    panel.set(xlabel="change of the target's loss beyond random's, nats")
    panel.legend()

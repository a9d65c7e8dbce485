"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.curation.choice import CONTROLS, ONE_PASS, kind_of, values_of
from experiments.curation.config import ALL, NEGATIVES, SHARE, Piece, Study
from experiments.pieces import load, seconds
from experiments.results import Array, Row, auroc, figure, short, shown, spread, table, versions

ZERO = ("path", ONE_PASS, "path, at once", "path, broad", "first", "sgd-proxy")  # whose zero means something
BINS = 10  # of the run's steps
GROUPS = ("wanted", "other", "rubbish")  # of kinds
Loaded = Mapping[Piece, Mapping[str, Array]]
Masks = Mapping[int, Mapping[str, NDArray[np.bool_]]]  # by seed and group or kind: [N]
Values = Mapping[int, Mapping[str, Array]]  # by seed and method: [N]


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds."""
    loaded = load(paths, lambda piece: piece.seed)
    values = {seed: values_of(study, paths, seed) for seed in study.seeds}
    masks = {seed: masks_of(study, kind_of(paths, seed)) for seed in study.seeds}
    return {
        "about": "negative: shares of the blocks of a kind that have a negative value; auroc: of blocks of a kind by "
        "values lower than those of clean blocks; dropped: shares of a kind; trainings: `difference` and `others` in "
        "nats, less those of all data, `saved` of the steps; [mean, lowest, highest] or means over the seeds",
        "study": asdict(study),
        "steps": study.steps,
        "seconds": short(seconds(paths.values())),
        "versions": versions(*(("dattri",) if "influence" in study.passes else ())),
        "runs": list(_runs(study, loaded, values)),
        "negative": list(_negative(study, values, masks)),
        "auroc": list(_auroc(study, values, masks)),
        "trainings": list(_trainings(study, loaded, masks)),
        "dropped": list(_dropped(study, loaded, masks)),
        "time": list(_time(study, loaded, masks)),
    }


def masks_of(study: Study, kind: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Which blocks are clean and of the target's sources, clean and of others, rubbish, clean, and of every kind."""
    wanted = np.isin(kind, [study.clean.index(source) for source in study.wanted])
    rubbish = kind >= len(study.clean)
    found = {"wanted": wanted, "other": ~wanted & ~rubbish, "rubbish": rubbish, "clean": ~rubbish}
    return found | {name: kind == k for k, name in enumerate(study.kinds)}


def _runs(study: Study, loaded: Loaded, values: Values) -> Iterator[Row]:
    for seed in study.seeds:
        before, after = loaded[Piece(seed, "path")]["target"]
        tests = {name: short(float(loaded[Piece(seed, name)]["curve"][-1])) for name in (ALL, f"{ALL} again")}
        yield {"seed": seed, "before": short(float(before)), "after": short(float(after)),
               "values": short(float(values[seed]["path"].sum())), **tests}  # fmt: skip


def _negative(study: Study, values: Values, masks: Masks) -> Iterator[Row]:
    for method in (*(f"path, {size}" for size in study.sizes[:-1]), *ZERO):
        below = {seed: of[method] < 0 for seed, of in values.items() if method in of}
        if below:
            shares = [float(of.mean()) for of in below.values()]
            yield {"by": method, "all": spread(shares), **_by_kind(below, masks)}


def _by_kind(which: Mapping[int, NDArray[Any]], masks: Masks) -> Row:
    """What share of every group and kind it is, the mean over these seeds."""
    names = next(iter(masks.values()))
    return {name: short(float(np.mean([of[masks[seed][name]].mean() for seed, of in which.items()]))) for name in names}


def _auroc(study: Study, values: Values, masks: Masks) -> Iterator[Row]:
    pairs = {"rubbish": ("rubbish", "clean"), "rubbish, wanted": ("rubbish", "wanted"), "other": ("other", "wanted")}
    sizes = [f"path, {size}" for size in study.sizes[:-1]]
    for method in (*sizes, *ZERO, "path, by step", "first, by step", "replay", "influence", "loss", "random"):
        of = {seed: of[method] for seed, of in values.items() if method in of}
        if of:
            found = {name: [_between(of[seed], masks[seed], *pair) for seed in of] for name, pair in pairs.items()}
            kinds = {kind: [_between(of[seed], masks[seed], kind, "clean") for seed in of] for kind, _ in study.rubbish}
            yield {"by": method, **{name: spread(each) for name, each in found.items()},
                   **{kind: short(float(np.mean(each))) for kind, each in kinds.items()}}  # fmt: skip


def _between(values: Array, masks: Mapping[str, NDArray[np.bool_]], bad: str, good: str) -> float:
    both = masks[bad] | masks[good]
    return auroc(values[both], masks[bad][both])


def parts(study: Study) -> Iterator[tuple[str, str, str]]:
    """Of every training: its rule, its method, and the name of its piece."""
    yield "", ALL, ALL
    yield "", f"{ALL} again", f"{ALL} again"
    for rule, method in study.curations:
        yield rule, method, f"{rule} {method}"


def _trainings(study: Study, loaded: Loaded, masks: Masks) -> Iterator[Row]:
    others = [k for k, source in enumerate(study.clean) if source not in study.wanted]
    for rule, method, part in parts(study):
        found: dict[str, list[float]] = {}
        curves, sources = [], []
        for seed in study.seeds:
            run, plain = loaded[Piece(seed, part)], loaded[Piece(seed, ALL)]
            gone = ~run["kept"]
            numbers = {
                "dropped": gone.mean(), "rubbish": masks[seed]["rubbish"][gone].mean() if gone.any() else 0.0,
                "test": run["curve"][-1], "difference": run["curve"][-1] - plain["curve"][-1],
                "saved": saved(run["curve"], plain["curve"]),
                "others": (run["sources"] - plain["sources"])[others].mean(),
            }  # fmt: skip
            for name, number in numbers.items():
                found.setdefault(name, []).append(float(number))
            curves.append(run["curve"])
            sources.append(run["sources"] - plain["sources"])
        yield {
            "rule": rule, "by": method, **{name: spread(of) for name, of in found.items()},
            "seeds_saved": [short(of) for of in found["saved"]],
            "sources": [short(float(of)) for of in np.mean(sources, axis=0)],
            "curve": [short(float(of)) for of in np.mean(curves, axis=0)],
        }  # fmt: skip


def saved(curve: Array, plain: Array) -> float:
    """The share of the steps that are saved where a curve comes to what the plain one ends with.

    Where it does not come to it, negative: what the plain one would have saved in coming to this one's end.
    """
    if curve.min() <= plain[-1]:
        return 1 - _reached(curve, float(plain[-1]))
    return _reached(plain, float(curve[-1])) - 1


def _reached(curve: Array, level: float) -> float:
    """After what share of the steps a curve is first at this level, straight from test to test."""
    after = int(np.argmax(curve <= level))
    if after == 0:
        return 0.0
    high, low = curve[after - 1], curve[after]
    return float(after - 1 + (high - level) / (high - low)) / (len(curve) - 1)


def _dropped(study: Study, loaded: Loaded, masks: Masks) -> Iterator[Row]:
    for rule, method, part in parts(study):
        if rule:
            gone = {seed: ~loaded[Piece(seed, part)]["kept"] for seed in study.seeds}
            yield {"rule": rule, "by": method, **_by_kind(gone, masks)}


def _time(study: Study, loaded: Loaded, masks: Masks) -> Iterator[Row]:
    """As the run goes by, of the uses in a part of its steps: `path`'s negative share by group, AUROC, and weight."""
    for k in range(BINS):
        row: dict[str, list[float]] = {}
        for seed in study.seeds:
            run = loaded[Piece(seed, "path")]
            values, now = run[f"path, {study.main}"], run["step"] * BINS // study.steps == k
            for group in GROUPS:
                row.setdefault(group, []).append(float((values[now & masks[seed][group]] < 0).mean()))
            both = {name: np.tile(masks[seed][name], (study.epochs, 1))[now] for name in ("rubbish", "clean")}
            row.setdefault("auroc", []).append(_between(values[now], both, "rubbish", "clean"))
            row.setdefault("weight", []).append(float(np.abs(values[now]).sum() / np.abs(values).sum()))
        yield {"until": short((k + 1) / BINS), **{name: short(float(np.mean(of))) for name, of in row.items()}}


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    study = result["study"]
    rubbish = [kind for kind, _ in study["rubbish"]]
    kinds, negative = (*GROUPS, *study["clean"], *rubbish), result["negative"]
    pairs = ("rubbish", "rubbish, wanted", "other")
    sections = [
        f"**Training again**, {result['steps']} steps each; mean (lowest to highest) over the seeds. `dropped`: share "
        "of the blocks, and how much of it is rubbish; `test`: the loss at the end in nats, less that of all data; "
        "`saved`: steps that are saved until the test loss is what all data end with, in percent of all (negative: "
        "it is not reached, and all data need so many fewer to come to this one's end); `others`: the loss on clean "
        "text of the other sources, less that of all data. `all data again`: from other weights, in another order.",
        _trainings_table(result),
        "**Negative values**: percent of the blocks of a group or kind; `wanted` and `other` are the clean text of the "
        "target's sources and of the others. `path, 8` and so on: how many blocks the target has; `one pass`: by the "
        "first use of every block alone; `at once`: all blocks of the target in every step (seed "
        f"{', '.join(map(str, study['wide']))}); `broad`: a target from all clean sources.",
        table(["", *(row["by"] for row in negative)],
              [["all", *(f"{100 * row['all'][0]:.0f}" for row in negative)], *_percent(negative, kinds)]),
        "**What is dropped** where as many are dropped as `path` has below zero: percent of the blocks.",
        _dropped_table(result, kinds),
        "**AUROC** by the lowest values: of rubbish against all clean text, and against that of the target's sources; "
        "of the other sources' clean text against the target's; and of every kind of rubbish against all clean text.",
        table(["by", *pairs, *rubbish],
              [[row["by"], *(shown(row[name]) for name in pairs), *(f"{row[kind]:.2f}" for kind in rubbish)]
               for row in result["auroc"]]),
        "**As the run goes by**: percent of the uses with a negative value by `path`, AUROC of rubbish among them, and "
        "what percent of all absolute values they have.",
        table(["until", *GROUPS, "AUROC", "of all values"],
              [[f"{100 * row['until']:.0f}%", *(f"{100 * row[name]:.0f}" for name in GROUPS), f"{row['auroc']:.2f}",
                f"{100 * row['weight']:.0f}"]
               for row in result["time"]]),
        "**The runs**: the main target's loss before and after, the sum of the values of `path`, and the test loss of "
        "training again on all data, in nats.",
        table(["seed", "before", "after", "values", ALL, f"{ALL} again"],
              [[f"{of:g}" for of in row.values()] for row in result["runs"]]),
    ]  # fmt: skip
    return "\n\n".join(sections)


def _percent(rows: Sequence[Row], names: Sequence[str]) -> list[list[str]]:
    return [[name, *(f"{100 * row[name]:.0f}" for row in rows)] for name in names]


def _trainings_table(result: Row) -> str:
    rows = []
    for row in result["trainings"]:
        cells = [row["rule"], row["by"], f"{100 * row['dropped'][0]:.0f}%", f"{100 * row['rubbish'][0]:.0f}%"]
        percent = [100 * of for of in row["saved"]]
        rows.append([*cells, shown(row["difference"], "+.3f"), shown(percent, ".0f"), shown(row["others"], "+.3f")])
    return table(["drop", "by", "dropped", "rubbish", "test", "saved", "others"], rows)


def _dropped_table(result: Row, kinds: Sequence[str]) -> str:
    of_path = [row for row in result["dropped"] if (row["rule"], row["by"]) == (NEGATIVES, "path")]
    others = [row for row in result["dropped"] if row["rule"] == SHARE and row["by"] not in CONTROLS]
    return table(["", *(row["by"] for row in of_path + others)], _percent(of_path + others, kinds))


def draw(result: Row, path: Path) -> None:
    """The last half of the curves, what is saved, what is negative by kind, and as the run goes by."""
    study = result["study"]
    with figure(path, 2, 2, (10, 8)) as panels:
        (curves, bars), (negative, time) = panels
        every = 100 * study["every"] / result["steps"]
        shown_too = {("", ALL), (SHARE, "random"), (NEGATIVES, "oracle"), (NEGATIVES, "path"), (SHARE, "sgd-proxy"),
                     (SHARE, "replay"), (SHARE, "influence"), (SHARE, "loss")}  # fmt: skip
        for k, row in enumerate(row for row in result["trainings"] if (row["rule"], row["by"]) in shown_too):
            half = len(row["curve"]) // 2
            at = every * np.arange(half, len(row["curve"]))
            curves.plot(at, row["curve"][half:], color=f"C{k}", lw=1, label=f"{row['by']} {row['rule']}")
        curves.set(xlabel="percent of the steps", ylabel="test loss, nats", title="training again")
        curves.legend()
        rows = [row for row in result["trainings"] if row["by"] != ALL][::-1]
        bars.axvline(0, color="grey", lw=0.5)
        for y, row in enumerate(rows):
            bars.plot([100 * of for of in row["seeds_saved"]], [y] * len(row["seeds_saved"]), "o", ms=3, color="C0")
        bars.set_yticks(range(len(rows)), [f"{row['by']} {row['rule']}" for row in rows])
        bars.set(xlabel="steps saved, percent; a dot for a seed", title="steps to what all data end with")
        kinds = (*study["clean"], *(kind for kind, _ in study["rubbish"]))
        for row in result["negative"]:
            negative.plot(range(len(kinds)), [100 * row[kind] for kind in kinds], "o-", lw=0.6, ms=3, label=row["by"])
        negative.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
        negative.set(ylabel="percent of negative value", title="by kind")
        negative.legend()
        middles = [100 * row["until"] - 50 / BINS for row in result["time"]]
        for group in GROUPS:
            time.plot(middles, [100 * row[group] for row in result["time"]], label=f"negative: {group}")
        time.plot(middles, [100 * row["weight"] for row in result["time"]], "--", label="share of all absolute values")
        time.set(xlabel="percent of the steps", ylabel="percent", ylim=(0, None), title="path, as the run goes by")
        time.legend()

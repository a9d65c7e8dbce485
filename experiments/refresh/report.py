"""From finished runs to result.json, the tables of README.md and figure.svg."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.pieces import load
from experiments.refresh.training import MIXED, OTHER, Piece, Study
from experiments.results import NAMES, Array, Row, figure, short, table, versions
from inrun.game import spearman

Run = Mapping[str, Array]
TOP = 0.1  # of the examples


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds: medians over the seeds with their ranges, of runs held against one another."""
    runs = load(paths, lambda piece: (piece.optimizer, piece.rate, piece.seed))
    return {
        "about": "[median, lowest, highest] over the seeds. error: norm of the difference over norm of the truth, "
        "spearman: rank correlation; step_: medians over steps, example_ and source_: of totals over the run, top: "
        f"overlap of the {TOP:.0%} of examples with the largest totals",
        "study": asdict(study),
        "steps": study.steps,
        "versions": versions(),
        "training": [_training(study, optimizer, rate, runs) for optimizer, rate in study.rates],
        "refresh": list(_refresh(study, runs)),
        "ages": list(_ages(study, runs)),
        "rotation": list(_rotation(study, runs)),
        "both": list(_both(study, runs)),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Median, lowest and highest."""
    return [short(float(of(values))) for of in (np.median, np.min, np.max)]


def error(values: Array, truth: Array) -> Any:
    """|values - truth| / |truth|, along the last dimension."""
    return np.linalg.norm(values - truth, axis=-1) / np.linalg.norm(truth, axis=-1)


def correlation(values: Array, truth: Array) -> float:
    """Spearman's, in the last dimension."""
    found = spearman(torch.from_numpy(values), torch.from_numpy(truth))
    return float("nan") if found is None else found


def by_step(values: Array, truth: Array, which: Array) -> dict[str, float]:
    """Medians over these steps."""
    correlations = [correlation(mine, theirs) for mine, theirs in zip(values[which], truth[which], strict=True)]
    return {
        "step_error": float(np.median(error(values[which], truth[which]))),
        "step_spearman": float(np.median(correlations)),
    }


def by_total(run: Run, values: Array, truth: Array) -> dict[str, float]:
    """Of the sums over the run, by example and by source."""
    places, source = run["places"].ravel(), run["source"]
    mine, theirs = (np.bincount(places, of.ravel(), minlength=len(source)) for of in (values, truth))
    most = max(1, round(TOP * len(source)))
    best = [set(np.argsort(-of, kind="stable")[:most]) for of in (mine, theirs)]
    of_sources = [np.bincount(source, of) for of in (mine, theirs)]
    return {
        "example_error": float(error(mine, theirs)),
        "example_spearman": correlation(mine, theirs),
        "top": len(best[0] & best[1]) / most,
        "source_error": float(error(*of_sources)),
        "source_spearman": correlation(*of_sources),
    }


def _over_seeds(study: Study, of_seed: Callable[[int], Mapping[str, float]]) -> Row:
    found = [of_seed(seed) for seed in study.seeds]
    return {name: interval([one[name] for one in found]) for name in found[0]}


def _training(study: Study, optimizer: str, rate: float, runs: Mapping[Piece, Run]) -> Row:
    ends = _over_seeds(
        study,
        lambda seed: dict(zip(("first", "last"), runs[Piece(optimizer, rate, "path", 1, seed)]["loss"], strict=True)),
    )
    return {"optimizer": optimizer, "rate": rate, "loss_first": ends["first"], "loss_last": ends["last"]}


def _refresh(study: Study, runs: Mapping[Piece, Run]) -> Iterator[Row]:
    """`first` with an older gradient against the same without, and against the path."""
    for optimizer, rate in study.rates:
        for refresh in study.refresh:
            piece = Piece(optimizer, rate, "first", refresh, seed=0)
            found = _over_seeds(study, partial(_against_new, study, runs, piece))
            yield {"optimizer": optimizer, "rate": rate, "refresh": refresh, **found}


def _against_new(study: Study, runs: Mapping[Piece, Run], piece: Piece, seed: int) -> dict[str, float]:
    """The piece's values, of another seed."""
    whole = study.whole(MIXED)
    run = runs[replace(piece, seed=seed)]
    first = runs[replace(piece, seed=seed, refresh=1)][f"values-{whole}"]
    path = runs[replace(piece, seed=seed, refresh=1, scheme="path")][f"values-{whole}"]
    values, taken = run[f"values-{whole}"], run[f"taken-{whole}"]
    older = taken == 0 if piece.refresh > 1 else taken == 1
    against_path = by_step(values, path, taken >= 0) | by_total(run, values, path)
    return {
        "taken": int(taken.sum()),
        **by_step(values, first, older),
        **by_total(run, values, first),
        **{f"path_{name}": value for name, value in against_path.items()},
    }


def _ages(study: Study, runs: Mapping[Piece, Run]) -> Iterator[Row]:
    """The longest refresh's error by the gradient's age, after warm-up: median and middle half over steps and seeds."""
    refresh, whole = max(study.refresh), study.whole(MIXED)
    for optimizer, rate in study.rates:
        errors, ages = [], []
        for seed in study.seeds:
            run, first = (runs[Piece(optimizer, rate, "first", k, seed)] for k in (refresh, 1))
            steps = np.arange(len(run["places"]))
            newest = np.maximum.accumulate(np.where(run[f"taken-{whole}"] > 0, steps, 0))
            ages.append((steps - newest)[study.warmup :])
            errors.append(error(run[f"values-{whole}"], first[f"values-{whole}"])[study.warmup :])
        age, of = np.concatenate(ages), np.concatenate(errors)
        for k in range(1, refresh):
            middle = [short(x) for x in np.percentile(of[age == k], [50, 25, 75])]
            yield {"optimizer": optimizer, "rate": rate, "age": k, "error": middle}


def _rotation(study: Study, runs: Mapping[Piece, Run]) -> Iterator[Row]:
    """Rotating batches, a part that does not rotate, and as many other sequences, against all at every step."""
    for one in study.rotations:
        piece = Piece(one.optimizer, one.rate, one.scheme, 1, seed=0)
        # batch, and for how many uses of an example its sequences are drawn anew
        kinds = [(str(size), size, study.epochs) for size in study.sizes]
        kinds += [(f"fixed{size}", size, 1) for size in study.fixed]
        for batch, size, draws in [*kinds, (OTHER, 0, 1)]:
            found = _over_seeds(study, partial(_against_whole, study, runs, piece, one.target, batch))
            expected = {
                "step_expected": short(unrelated(study.target, size, 1)),
                "example_expected": short(unrelated(study.target, size, draws)),
            }
            yield {**asdict(one), "batch": batch, **found, **expected}


def unrelated(sequences: int, size: int, draws: int) -> float:
    """How an example's mean value over `draws` random batches of a target correlates with that over the whole target,
    were its values for the target's sequences independent of one another and equally large.
    """
    return (1 + (sequences / size - 1) / draws) ** -0.5 if size else 0.0


def _both(study: Study, runs: Mapping[Piece, Run]) -> Iterator[Row]:
    """Older gradients of rotating batches: both, and either alone, under `first`."""
    least = min(study.sizes)
    for optimizer, rate in dict.fromkeys((one.optimizer, one.rate) for one in study.rotations):
        for refresh, size in ((study.both, study.target), (1, least), (study.both, least)):
            piece = Piece(optimizer, rate, "first", refresh, seed=0)
            found = _over_seeds(study, partial(_against_whole, study, runs, piece, MIXED, str(size)))
            yield {"optimizer": optimizer, "rate": rate, "refresh": refresh, "batch": size, **found}


def _against_whole(
    study: Study, runs: Mapping[Piece, Run], piece: Piece, target: str, batch: str, seed: int
) -> dict[str, float]:
    """The piece's values, of another seed, by these batches of a target: against a new gradient of all of it."""
    run = runs[replace(piece, seed=seed)]
    truth = runs[replace(piece, seed=seed, refresh=1)][f"values-{study.whole(target)}"]
    values = run[f"values-{target}-{batch}"]
    return by_step(values, truth, np.ones(len(values), dtype=bool)) | by_total(run, values, truth)


def headline(result: Row) -> str:
    """For the project's README."""
    found = {row["refresh"]: row["example_spearman"][0] for row in result["refresh"] if row["optimizer"] == "adamw"}
    shown = ", ".join(f"every {age} steps {of:.2f}" for age, of in found.items() if age > 1)
    return f"AdamW, Spearman of the examples' totals with those of a new gradient every step: {shown}"


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    whole = result["study"]["target"]
    return "\n\n".join(
        [
            f"**`refresh`** with `first`, {result['steps']} steps. `passes`: target gradients taken. Against "
            "`refresh=1`: relative error and Spearman correlation of a step's values, in the steps that use an older "
            "gradient; of the run's totals, by example Spearman and overlap of the "
            f"{TOP:.0%} largest, by source relative error. Then against `path` with one node: a step's error, over all "
            "steps, and the totals.",
            _refresh_table(result),
            f"**Rotation.** A target of {whole} sequences in rotating batches, one a step, against all {whole} at "
            f"every step. `fixedN`: the first N of them at every step; `{OTHER}`: {whole} others. In brackets what the "
            "correlation would be if an example's values for different sequences had nothing to do with one another.",
            _rotation_table(result),
            f"**Both**, under `first`, against all {whole} sequences at every step.",
            _both_table(result),
        ]
    )


def _cell(row: Row, name: str) -> str:
    """The median with its range: correlations as they are, shares in percent."""
    form = "{:.2f}" if name.endswith("spearman") else "{:.1%}" if row[name][0] < 0.0995 else "{:.0%}"
    middle, low, high = (form.format(number) for number in row[name])
    return middle if low == high else f"{middle} ({low} to {high})"


def _of(row: Row) -> str:
    return f"{NAMES[row['optimizer']]}, {row['rate']:g}"


STEP = {"step_error": "step: error", "step_spearman": "Spearman"}
EXAMPLES = {"example_spearman": "examples: Spearman", "top": "largest"}
SOURCES = {"source_error": "sources: error"}
PATH = {
    "path_step_error": "`path`, step: error",
    "path_example_spearman": "examples: Spearman",
    "path_source_error": "sources: error",
}


def _refresh_table(result: Row) -> str:
    rows = []
    for row in result["refresh"]:
        own = ["" if row["refresh"] == 1 else _cell(row, name) for name in (*STEP, *EXAMPLES, *SOURCES)]
        against_path = [_cell(row, name) for name in PATH]
        rows.append([_of(row), str(row["refresh"]), f"{row['taken'][0]:.0f}", *own, *against_path])
    columns = (STEP | EXAMPLES | SOURCES).values()
    return table(["optimizer, rate", "refresh", "passes", *columns, *PATH.values()], rows)


def _rotation_table(result: Row) -> str:
    rows = []
    for row in result["rotation"]:
        step = f"{_cell(row, 'step_spearman')} [{row['step_expected']:.2f}]"
        example = f"{_cell(row, 'example_spearman')} [{row['example_expected']:.2f}]"
        totals = [_cell(row, name) for name in ("top", "source_error", "source_spearman")]
        rows.append([f"{_of(row)}, `{row['scheme']}`", row["target"], row["batch"], step, example, *totals])
    head = ["optimizer, rate, scheme", "target", "batch", "step: Spearman", *EXAMPLES.values(), *SOURCES.values()]
    return table([*head, "Spearman"], rows)


def _both_table(result: Row) -> str:
    columns = STEP | EXAMPLES | SOURCES
    rows = [
        [_of(row), str(row["refresh"]), str(row["batch"]), *(_cell(row, name) for name in columns)]
        for row in result["both"]
    ]
    return table(["optimizer, rate", "refresh", "batch", *columns.values()], rows)


def draw(result: Row, path: Path) -> None:
    """Above: a step's error by the gradient's age, totals by `refresh`. Below: rotation, of a step and of totals."""
    study = result["study"]
    with figure(path, 2, 2, (8.4, 7.0)) as ((ages, refresh), (step, totals)):
        for k, (optimizer, rate) in enumerate(study["rates"]):
            for panel, name, x, y in (
                (ages, "ages", "age", "error"),
                (refresh, "refresh", "refresh", "example_spearman"),
            ):
                rows = [row for row in result[name] if (row["optimizer"], row["rate"]) == (optimizer, rate)]
                _line(panel, [r[x] for r in rows], [r[y] for r in rows], f"C{k}", f"{NAMES[optimizer]}, {rate:g}")
        for panel, name in ((step, "step"), (totals, "example")):
            _draw_rotation(panel, result, name)
        ages.set(xlabel="age of the target's gradient, steps", ylabel="a step's values: relative error", yscale="log")
        ages.set_yticks([0.05, 0.1, 0.2, 0.5, 1])
        refresh.set(xlabel="refresh", ylabel="examples' totals: Spearman with refresh 1")
        for panel in (step, totals):
            panel.set(xlabel="sequences of a step's target batch", ylim=(0, 1.03))
        step.set_ylabel(f"a step's values: Spearman with all {study['target']}")
        totals.set_ylabel(f"examples' totals: Spearman with all {study['target']}")
        for panel, ticks in (
            (ages, study["refresh"][:-1]),
            (refresh, study["refresh"]),
            (step, study["sizes"]),
            (totals, study["sizes"]),
        ):
            panel.set_xscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.3, lw=0.5)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_rotation(panel: Any, result: Row, name: str) -> None:
    """Spearman correlations by the batch's size: rotating, fixed, and what unrelated sequences would show."""
    rows = [row for row in result["rotation"] if row["batch"] != OTHER]
    for k, one in enumerate(result["study"]["rotations"]):
        mine = [row for row in rows if all(row[key] == value for key, value in one.items())]
        rotating = [row for row in mine if row["batch"].isdigit()]
        fixed = [row for row in mine if not row["batch"].isdigit()]
        label = f"{NAMES[one['optimizer']]}, {one['scheme']}, {one['target']}"
        x = [int(row["batch"]) for row in rotating]
        _line(panel, x, [row[f"{name}_spearman"] for row in rotating], f"C{k + 4}", label)
        fixed_sizes = [int(row["batch"].removeprefix("fixed")) for row in fixed]
        heights = [row[f"{name}_spearman"][0] for row in fixed]
        panel.plot(fixed_sizes, heights, "x", color=f"C{k + 4}", label=f"{label}, fixed")
    panel.plot(x, [row[f"{name}_expected"] for row in rotating], "k:", lw=1, label="if sequences were unrelated")


def _line(panel: Any, x: Sequence[int], y: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Medians with their ranges."""
    middle, low, high = zip(*y, strict=True)
    panel.plot(x, middle, color=colour, marker="o", ms=3, label=label)
    panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)

"""From finished runs to result.json, the tables of README.md and figure.svg."""

import importlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.fidelity.report import NAMES, as_text, fill, processor, short
from experiments.refresh.training import OTHER, Piece, Study
from inrun.game import spearman

Row = dict[str, Any]
Array = NDArray[Any]
Run = Mapping[str, Array]
TOP = 0.1  # of the examples


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds: medians over the seeds with their ranges, of runs held against one another."""
    runs: dict[Piece, Run] = {}
    for piece, path in paths.items():
        with np.load(path) as arrays:
            runs[piece] = dict(arrays)
    _check_same_training(runs)
    return {
        "about": "[median, lowest, highest] over the seeds. error: norm of the difference over norm of the truth, "
        "spearman: rank correlation; step_: medians over steps, example_ and source_: of totals over the run, top: "
        f"overlap of the {TOP:.0%} of examples with the largest totals",
        "study": asdict(study),
        "steps": study.steps,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()},
        "training": [_training(study, optimizer, rate, runs) for optimizer, rate in study.rates],
        "refresh": list(_refresh(study, runs)),
        "ages": list(_ages(study, runs)),
        "rotation": list(_rotation(study, runs)),
        "both": list(_both(study, runs)),
    }


def _check_same_training(runs: Mapping[Piece, Run]) -> None:
    """All values of an optimizer, rate and seed are of the same weights."""
    ends: dict[tuple[str, float, int], set[str]] = {}
    for piece, run in runs.items():
        ends.setdefault((piece.optimizer, piece.rate, piece.seed), set()).add(str(run["weights"]))
    for run_of, weights in ends.items():
        assert len(weights) == 1, f"{run_of}: the weights depend on how the values are computed"


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
    whole = str(study.target)
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
    refresh, whole = max(study.refresh), str(study.target)
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
    """Rotating batches, and as many other sequences, against all sequences at every step."""
    for one in study.rotations:
        piece = Piece(one.optimizer, one.rate, one.scheme, 1, seed=0)
        for name in [*map(str, study.sizes), OTHER]:
            found = _over_seeds(study, partial(_against_whole, study, runs, piece, name))
            yield {"optimizer": one.optimizer, "rate": one.rate, "scheme": one.scheme, "batch": name, **found}


def _both(study: Study, runs: Mapping[Piece, Run]) -> Iterator[Row]:
    """Older gradients of rotating batches: both, and either alone, under `first`."""
    least = min(study.sizes)
    for one in study.rotations:
        for refresh, size in ((study.both, study.target), (1, least), (study.both, least)):
            piece = Piece(one.optimizer, one.rate, "first", refresh, seed=0)
            found = _over_seeds(study, partial(_against_whole, study, runs, piece, str(size)))
            yield {"optimizer": one.optimizer, "rate": one.rate, "refresh": refresh, "batch": size, **found}


def _against_whole(study: Study, runs: Mapping[Piece, Run], piece: Piece, name: str, seed: int) -> dict[str, float]:
    """The piece's values, of another seed, for this target: against a new gradient of all sequences."""
    run = runs[replace(piece, seed=seed)]
    truth = runs[replace(piece, seed=seed, refresh=1)][f"values-{study.target}"]
    values = run[f"values-{name}"]
    return by_step(values, truth, np.ones(len(values), dtype=bool)) | by_total(run, values, truth)


def write(result: Row, out: Path, *, figure: bool) -> None:
    """result.json, the tables between the marks of README.md, and figure.svg, in this folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(as_text(result), "utf-8")
    fill(out / "README.md", tables(result))
    if figure:
        draw(result, out / "figure.svg")


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    study = result["study"]
    whole = study["target"]
    return "\n\n".join(
        [
            f"**`refresh`**, {result['steps']} steps. `passes`: target gradients taken. Against `refresh=1`: relative "
            "error and Spearman correlation of a step's values, in the steps that use an older gradient; of the run's "
            f"totals Spearman and overlap of the {TOP:.0%} largest by example, relative error by source. Against "
            "`path` with one node: the same in short, over all steps.",
            _refresh_table(result),
            f"**Rotation**: a target of {whole} sequences in rotating batches, one a step, against all {whole} at "
            f"every step. `{OTHER}`: {whole} other held-out sequences at every step.",
            _rotation_table(result),
            "**Both**, under `first`, against all sequences at every step.",
            _both_table(result),
        ]
    )


TOTALS = ("example_spearman", "top", "source_error", "source_spearman")
TOTALS_HEAD = ("examples: Spearman", "largest", "sources: error", "Spearman")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(name: str, found: Sequence[float]) -> str:
    """The median with its range: correlations as they are, shares in percent."""
    form = "{:.2f}" if name.endswith("spearman") else "{:.0%}" if found[0] >= 0.0995 or name == "top" else "{:.1%}"
    middle, low, high = (form.format(number) for number in found)
    return middle if low == high else f"{middle} ({low} to {high})"


def _of(row: Row) -> str:
    return f"{NAMES[row['optimizer']]}, {row['rate']:g}"


def _refresh_table(result: Row) -> str:
    mine = ("step_error", "step_spearman", "example_spearman", "top", "source_error")
    path = ("path_step_error", "path_example_spearman", "path_source_error")
    rows = []
    for row in result["refresh"]:
        own = [_cell(name, row[name]) if row["refresh"] > 1 else "" for name in mine]
        rows.append(
            [_of(row), str(row["refresh"]), f"{row['taken'][0]:.0f}", *own, *(_cell(name, row[name]) for name in path)]
        )
    head = ["optimizer, rate", "refresh", "passes", "step: error", "Spearman", *TOTALS_HEAD[:3]]
    return _table([*head, "path, step: error", "examples: Spearman", "sources: error"], rows)


def _rotation_table(result: Row) -> str:
    rows = [[f"{_of(row)}, `{row['scheme']}`", row["batch"], *_cells(row)] for row in result["rotation"]]
    return _table(["optimizer, rate, scheme", "batch", "step: error", "Spearman", *TOTALS_HEAD], rows)


def _both_table(result: Row) -> str:
    rows = [[_of(row), str(row["refresh"]), str(row["batch"]), *_cells(row)] for row in result["both"]]
    return _table(["optimizer, rate", "refresh", "batch", "step: error", "Spearman", *TOTALS_HEAD], rows)


def _cells(row: Row) -> list[str]:
    return [_cell(name, row[name]) for name in ("step_error", "step_spearman", *TOTALS)]


def draw(result: Row, path: Path) -> None:
    """A step's error by the gradient's age; totals by `refresh`; steps and totals by the size of a rotating batch."""
    importlib.import_module("matplotlib").use("svg")  # not installed but for the studies
    plt: Any = importlib.import_module("matplotlib.pyplot")
    options = {"svg.hashsalt": "refresh", "svg.fonttype": "none", "font.size": 8, "legend.frameon": False}
    with plt.rc_context(options | {"axes.spines.top": False, "axes.spines.right": False}):
        figure, (ages, refresh, rotation) = plt.subplots(1, 3, figsize=(10.5, 3.9), layout="constrained")
        for k, (optimizer, rate) in enumerate(result["study"]["rates"]):
            label, colour = f"{NAMES[optimizer]}, {rate:g}", f"C{k}"
            mine = [row for row in result["ages"] if (row["optimizer"], row["rate"]) == (optimizer, rate)]
            _line(ages, [row["age"] for row in mine], [row["error"] for row in mine], colour, label)
            mine = [row for row in result["refresh"] if (row["optimizer"], row["rate"]) == (optimizer, rate)]
            _line(refresh, [row["refresh"] for row in mine], [row["example_spearman"] for row in mine], colour, label)
        colours = {tuple(pair): f"C{k}" for k, pair in enumerate(result["study"]["rates"])}
        for one in result["study"]["rotations"]:
            key = (one["optimizer"], one["rate"])
            mine = [row for row in result["rotation"] if (row["optimizer"], row["rate"]) == key]
            sized = [row for row in mine if row["batch"] != OTHER]
            sizes, label = [int(row["batch"]) for row in sized], f"{NAMES[key[0]]}, `{one['scheme']}`"
            (other,) = (row["example_spearman"][0] for row in mine if row["batch"] == OTHER)
            colour = colours[key]
            _line(rotation, sizes, [row["example_spearman"] for row in sized], colour, f"{label}: totals")
            _line(rotation, sizes, [row["step_spearman"] for row in sized], colour, f"{label}: a step's", "--")
            rotation.axhline(other, color=colour, lw=0.8, ls=":", label=f"{label}: totals, other target")
        ages.set(xscale="log", yscale="log", xlabel="age of the target's gradient, steps")
        ages.set_title("Relative error of a step's values")
        refresh.set(xscale="log", xlabel="refresh")
        refresh.set_title("Spearman of the examples' totals")
        rotation.set(xscale="log", xlabel="sequences of a rotating batch", ylim=(0, 1.02))
        rotation.set_title(f"Spearman with all {result['study']['target']} sequences")
        for panel, ticks in (
            (ages, result["study"]["refresh"][:-1]),
            (refresh, result["study"]["refresh"]),
            (rotation, result["study"]["sizes"]),
        ):
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _line(
    panel: Any, x: Sequence[int], y: Sequence[Sequence[float]], colour: str, label: str, style: str = "-"
) -> None:
    """Medians with their ranges."""
    middle, low, high = zip(*y, strict=True)
    panel.plot(x, middle, style, color=colour, marker="o", ms=3, label=label)
    panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)

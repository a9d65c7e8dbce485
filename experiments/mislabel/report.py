"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.mislabel.config import EARLY, Piece, Study, pieces_of
from experiments.pieces import load, seconds
from experiments.results import Array, Row, auroc, figure, short, shown, spread, table, versions
from experiments.values import NORMALISED

IN_RUN = ("path", "first", "second", "path, credit")
ORDER = (
    *(name + of + when for name in IN_RUN for of in ("", NORMALISED) for when in ("", EARLY)), "replay-h8", "sgd-proxy",
    "TracIn", "influence", "gradient", "cosine", "TRAK-1", "TRAK-many", "KNN, features", "KNN, pixels", "loss", "EL2N",
    "GraNd", "random",
)  # fmt: skip
PAPER = {  # AUROC on CIFAR-10 (arXiv 2406.11011); its In-Run values take Adam for SGD, as `sgd-proxy` does
    "sgd-proxy": ".678", "KNN, features": ".76", "influence": ".654", "TRAK-1": ".511", "TRAK-many": ".542",
}  # fmt: skip
SELECTED = {  # its accuracy when trained on the best 20, 40, 60 and 80%
    "random": ".350 .461 .525 .559", "sgd-proxy": ".344 .472 .541 .580", "KNN, features": ".354 .478 .525 .563",
    "influence": ".320 .450 .530 .580",
}  # fmt: skip
TOLD = (
    "path",
    "path, by step",
    "path, credit",
    "replay-h8",
    "sgd-proxy",
    "influence",
    "TRAK-many",
    "KNN, features",
    "loss",
)
NOT_VALUES = ("wrong", "target", "test", "train", "drop", "weights", "seconds", "right first")


def values_of(study: Study, paths: Mapping[Piece, Path], source: str, seed: int) -> dict[str, Array]:
    """Every method's values of the images: [N]."""
    found: dict[str, Array] = {}
    for piece in pieces_of(study):
        if (piece.source, piece.seed) == (source, seed) and piece.part not in ("small", "too far"):
            with np.load(paths[piece]) as arrays:
                known = {name: of for name, of in arrays.items() if name == "right first" or name not in NOT_VALUES}
            found |= {name: np.atleast_2d(of).sum(axis=0) for name, of in known.items()}
            found |= {name + EARLY: of[: study.early].sum(axis=0) for name, of in known.items() if of.ndim == 2}
    return found


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds."""
    loaded = load(paths, lambda piece: (piece.source, piece.seed))
    libraries = () if study.sources == ("blobs",) else ("dattri", "traker", "pydvl", "scikit-learn")
    return {
        "about": "auroc: of wrong labels by the lowest values, [mean, lowest, highest] over the seeds; by_epoch: of "
        "the sums up to an epoch, means over the seeds; accuracy: share right of the test images after training on "
        "what a method values most",
        "study": asdict(study),
        "steps": study.steps,
        "seconds": short(seconds(paths.values())),
        "versions": versions(*libraries),
        "runs": list(_runs(study, loaded)),
        "methods": list(_methods(study, paths, loaded)),
        "epochs": list(_epochs(study, loaded)),
        **({"small": small} if (small := list(_small(study, loaded))) else {}),
        "too_far": list(_too_far(study, loaded)),
        "selection": list(_selection(study, loaded)),
    }


def _runs(study: Study, loaded: Mapping[Piece, Mapping[str, Array]]) -> Iterator[Row]:
    for source in study.sources:
        runs = [loaded[Piece(source, seed, "in-run path")] for seed in study.seeds]
        yield {
            "source": source,
            "target_loss": spread([float(run["target"][0]) for run in runs]),
            "drop": spread([float(run["drop"]) for run in runs]),
            "sum_of_values": spread([float(run["path"].sum()) for run in runs]),
            "right_tested": spread([float(run["test"][1]) for run in runs]),
            "right_trained": spread([float(run["train"][1]) for run in runs]),
        }


def _methods(study: Study, paths: Mapping[Piece, Path], loaded: Mapping[Piece, Mapping[str, Array]]) -> Iterator[Row]:
    for source in study.sources:
        of_seeds = [values_of(study, paths, source, seed) for seed in study.seeds]
        wrong = [loaded[Piece(source, seed, "in-run path")]["wrong"] for seed in study.seeds]
        for method in ORDER:
            if method in of_seeds[0]:
                of = [auroc(values[method], bad) for values, bad in zip(of_seeds, wrong, strict=True)]
                yield {"source": source, "method": method, "auroc": spread(of), "seeds": [short(one) for one in of]}


def _epochs(study: Study, loaded: Mapping[Piece, Mapping[str, Array]]) -> Iterator[Row]:
    for source in study.sources:
        for scheme in IN_RUN:
            for name in (scheme, scheme + NORMALISED):
                runs = [loaded.get(Piece(source, seed, f"in-run {scheme}"), {}) for seed in study.seeds]
                if all(name in run for run in runs):
                    curves = [[auroc(sums, run["wrong"]) for sums in np.cumsum(run[name], axis=0)] for run in runs]
                    yield {"source": source, "method": name, "by_epoch": [short(x) for x in np.mean(curves, axis=0)]}


def _small(study: Study, loaded: Mapping[Piece, Mapping[str, Array]]) -> Iterator[Row]:
    for source in study.whole:
        runs = [loaded[piece] for seed in study.seeds if (piece := Piece(source, seed, "small")) in loaded]
        for method in ("path", "path" + NORMALISED, "replay-h8", "Data Shapley", "KNN, pixels") if runs else ():
            of = [auroc(run[method], run["wrong"]) for run in runs]
            yield {"source": source, "method": method, "auroc": spread(of),
                   "trainings": spread([float(run["trainings"]) for run in runs])}  # fmt: skip


def _too_far(study: Study, loaded: Mapping[Piece, Mapping[str, Array]]) -> Iterator[Row]:
    for source in study.whole:
        run = loaded[Piece(source, study.seeds[0], "too far")]
        wrong = loaded[Piece(source, study.seeds[0], "in-run path")]["wrong"]
        for horizon, growth in zip(study.too_far, run["growth"], strict=True):
            name = "replay" if horizon is None else f"replay-h{horizon}"
            found = short(auroc(run[name], wrong))
            yield {"source": source, "method": name, "growth": short(float(growth)), "auroc": found}


def _selection(study: Study, loaded: Mapping[Piece, Mapping[str, Array]]) -> Iterator[Row]:
    for source in study.whole:
        for method in ("all images", *study.selected):
            part = method if method == "all images" else f"select {method}"
            runs = [loaded[Piece(source, seed, part)] for seed in study.seeds]
            for k, share in enumerate(study.kept if part != method else (1.0,)):
                found = {name: spread([float(run[name][k]) for run in runs]) for name in ("accuracy", "loss", "wrong")}
                yield {"source": source, "method": method, "kept": share, **found}


def headline(result: Row) -> str:
    """For the project's README."""
    found: dict[str, list[str]] = {}
    for row in result["methods"]:
        found.setdefault(row["method"], []).append(f"{row['auroc'][0]:.2f}")
    named = [name for name in TOLD if name in found]
    return f"AUROC on {' / '.join(result['study']['sources'])}: " + ", ".join(
        f"{name} {' / '.join(found[name])}" for name in named
    )


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    study, parts = result["study"], []
    parts += [
        "**AUROC** of the wrong labels by the lowest values, mean (lowest to highest) over the seeds. `paper`: on "
        "CIFAR-10, with a pretrained network.",
        _methods_table(result),
    ]
    if "small" in result:
        small = result["small"]
        parts += [
            f"**By really training again**, for which {study['small']} images and {study['small_epochs']} epochs are "
            f"few enough: {shown(small[0]['trainings'], '.0f')} trainings for Data Shapley. The paper's, of 1,000 "
            "images: .582.",
            table(["by", *study["whole"]], [[row["method"], shown(row["auroc"], ".3f")] for row in small]),
        ]
    far = [[row["method"], row["source"], f"{row['growth']:.0e}", f"{row['auroc']:.3f}"] for row in result["too_far"]]
    parts += [
        f"**Looking too far back**, seed {study['seeds'][0]}: how many times a small change of the weights counts more "
        "at the beginning than at the end of the run (a warning says so), and AUROC.",
        table(["by", "images", "growth", "AUROC"], far),
    ]
    head = ["images", "loss", "drop", "values", "right, test", "right, training"]
    names = ("target_loss", "drop", "sum_of_values", "right_tested", "right_trained")
    parts += [
        "**Accuracy** in percent of the test images after training on the best, mean (lowest to highest) over the "
        f"seeds; and how many wrong labels are among the best {max(study['kept']):.0%}.",
        _selection_table(result),
        "**The runs**: the target's loss at the end, its drop and the sum of the values of `path`, in nats; shares of "
        "the images that the model has right.",
        table(head, [[row["source"], *(shown(row[name]) for name in names)] for row in result["runs"]]),
    ]
    return "\n\n".join(parts)


def _methods_table(result: Row) -> str:
    sources, rows = result["study"]["sources"], dict[str, list[str]]()
    for row in result["methods"]:
        empty = [row["method"], *["-"] * len(sources), PAPER.get(row["method"], "")]
        rows.setdefault(row["method"], empty)[1 + sources.index(row["source"])] = shown(row["auroc"], ".3f")
    return table(["by", *sources, "paper"], rows.values())


def _selection_table(result: Row) -> str:
    kept, rows = result["study"]["kept"], dict[str, list[str]]()
    for row in result["selection"]:
        cells = rows.setdefault(row["method"], [row["method"]])
        cells.append(shown([100 * share for share in row["accuracy"]], ".1f"))
        if row["kept"] == max(kept):
            cells += ["-", shown(row["wrong"], ".0f"), SELECTED.get(row["method"], "")]
    name, accuracy = rows.pop("all images")
    return table(
        ["by", *(f"{share:.0%}" for share in kept), "100%", "wrong", "paper"],
        [*rows.values(), [name, *["-"] * len(kept), accuracy, "", ""]],
    )


def draw(result: Row, path: Path) -> None:
    """AUROC as the epochs go by, for every source; accuracy by share kept."""
    study = result["study"]
    with figure(path, 1, len(study["sources"]) + 1, (3.6 * len(study["sources"]) + 3.6, 3.6)) as panels:
        *curves, selection = panels[0]
        for panel, source in zip(curves, study["sources"], strict=True):
            mine: list[Any] = [row for row in result["epochs"] if row["source"] == source]
            for row in mine:
                k = IN_RUN.index(row["method"].removesuffix(NORMALISED))
                style = "--" if row["method"].endswith(NORMALISED) else "-"
                epochs = 1 + np.arange(len(row["by_epoch"]))
                panel.plot(epochs, row["by_epoch"], style, color=f"C{k}", label=row["method"])
            for k, method in enumerate(("loss", "sgd-proxy", "TracIn")):
                (of,) = [r["auroc"][0] for r in result["methods"] if (r["source"], r["method"]) == (source, method)]
                panel.axhline(of, color=f"C{k + 5}", lw=0.8, label=method)
            panel.set(title=source, xlabel="epochs whose values are summed", ylabel="AUROC of wrong labels")
        for k, method in enumerate(study["selected"]):
            mine = [row for row in result["selection"] if row["method"] == method]
            style = "-" if k < 10 else "--"
            accuracy = [100 * row["accuracy"][0] for row in mine]
            selection.plot([100 * row["kept"] for row in mine], accuracy, style, color=f"C{k % 10}", lw=1, label=method)
        selection.set(title=", ".join(study["whole"]), xlabel="percent of the images kept", ylabel="accuracy, percent")
        for panel in panels[0]:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)

"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pieces import load, seconds
from experiments.replay.training import Piece, Study
from experiments.results import NAMES, Array, Row, auroc, correlation, figure, lds, short, spread, table, versions

Pieces = Mapping[Piece, Mapping[str, Array]]
SHOWN = ("replay", "path")  # in the figure, beside the truth
GAMES = ("weightless", "removed")


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds."""
    pieces = load(paths)
    values = [piece for piece in pieces if piece.part == "values" and piece.seed == study.seeds[0]]
    whole = [piece for piece in values if piece.whole(study)]
    return {
        "about": "lds_: Spearman correlation, over subsets, of the sum of the kept examples' values and minus the "
        "target's real loss at the end, [mean over the seeds, 95% bootstrap interval of it over subsets]; others "
        "[mean, lowest, highest] over the seeds; without: the target's loss after training without the lowest values",
        "study": asdict(study),
        "steps": study.steps,
        "seconds": short(seconds(paths.values())),
        "versions": versions(),
        "runs": [_run(study, pieces, piece) for piece in values],
        "methods": [_method(study, pieces, piece, name, GAMES) for piece in whole for name in study.methods],
        "seeds": [_seed(study, pieces, piece, name, seed) for piece in whole for name in SHOWN for seed in study.seeds],
        "settings": [_method(study, pieces, piece, name, GAMES[:1]) for piece in values for name in study.reduced],
        "sizes": list(_sizes(study, pieces)),
        "subsets": list(_shown(study, pieces, whole)),
    }


def _seeds(study: Study, pieces: Pieces, piece: Piece, part: Any) -> list[Mapping[str, Array]]:
    return [pieces[replace(piece, seed=seed, part=part)] for seed in study.seeds]


def _key(piece: Piece) -> Row:
    schedule = "cosine" if piece.decay else "constant"
    return {"optimizer": piece.optimizer, "rate": piece.rate, "activation": piece.activation, "schedule": schedule}


def _run(study: Study, pieces: Pieces, piece: Piece) -> Row:
    """The training itself; the real effects of single examples, their correlation with the replay's values and how well
    they find wrong labels; how the adjoint grew, as a share of its norm at the end.
    """
    runs, single = (_seeds(study, pieces, piece, part) for part in ("values", "single"))
    both = [(run["replay"], of["change"], run["wrong"]) for run, of in zip(runs, single, strict=True)]
    found = {
        "loss_first": spread([float(of["loss"][0]) for of in runs]),
        "loss_last": spread([float(of["loss"][1]) for of in runs]),
        "right_held_out": spread([float(of["right"][0]) for of in runs]),
        "right_training": spread([float(of["right"][1]) for of in runs]),
        "single_spearman": spread([correlation(values, change) for values, change, _ in both]),
        "single_auroc": spread([auroc(change, wrong) for _, change, wrong in both]),
        "adjoint_growth": spread([float(of["adjoint"].max() / of["adjoint"][-1]) for of in runs]),
    }
    if piece.whole(study):
        found["without_wrong"] = spread([float(of["without_wrong"][0]) for of in runs])
    return _key(piece) | found | ({} if "without_wrong" in found else {"without_wrong": None})


def _method(study: Study, pieces: Pieces, piece: Piece, name: str, games: Sequence[str]) -> Row:
    runs, again = (_seeds(study, pieces, piece, part) for part in ("values", "subsets"))
    found = _key(piece) | {"method": name}
    for game in games:
        for kept in study.kept:
            sums = [of[f"keep-{kept:g}"].astype(float) @ run[name] for run, of in zip(runs, again, strict=True)]
            truth = [-of[f"{game}-{kept:g}"] for of in again]
            found[f"lds_{game}_{kept:g}"] = lds(list(zip(sums, truth, strict=True)))
    found["auroc"] = spread([auroc(run[name], run["wrong"]) for run in runs])
    if len(games) > 1:
        found["without"] = spread([float(run["without"][study.methods.index(name)]) for run in runs])
    return found


def _seed(study: Study, pieces: Pieces, piece: Piece, name: str, seed: int) -> Row:
    """Of one seed what `_method` has the mean of."""
    found = _method(replace(study, seeds=(seed,)), pieces, piece, name, GAMES[:1])
    return {"seed": seed} | {key: of[0] if isinstance(of, list) else of for key, of in found.items()}


def _sizes(study: Study, pieces: Pieces) -> Iterator[Row]:
    """Real changes against those of first order: rank correlation and the real ones' slope."""
    for piece in (p for p in pieces if p.part == "sizes" and p.seed == study.seeds[0]):
        runs = _seeds(study, pieces, piece, "sizes")
        for k, size in enumerate(study.sizes):
            pairs = [(of["first_order"][k], of["real"][k]) for of in runs]
            correlations = [correlation(x, y) for x, y in pairs]
            slopes = [float(np.polyfit(x, y, 1)[0]) for x, y in pairs]
            found = {"spearman": spread(correlations), "slope": spread(slopes)}
            yield _key(piece) | {"size": size} | found


def _shown(study: Study, pieces: Pieces, whole: Sequence[Piece]) -> Iterator[Row]:
    """For the figure, of the first seed: what every subset without few examples really lost, and what values say."""
    kept = max(study.kept)
    for piece in whole:
        run, again = pieces[piece], pieces[replace(piece, part="subsets")]
        left_out = (~again[f"keep-{kept:g}"]).astype(float)
        change = again[f"weightless-{kept:g}"] - float(run["loss"][1])
        rows = {"real": change} | {name: left_out @ run[name] for name in SHOWN}
        yield {"optimizer": piece.optimizer} | {name: [short(float(x)) for x in of] for name, of in rows.items()}


def headline(result: Row) -> str:
    """For the project's README."""
    found = {row["method"]: row for row in result["methods"] if row["optimizer"] == "adamw"}
    shown = "; ".join(
        f"{name} {found[name]['lds_weightless_0.9'][0]:.2f} and {found[name]['auroc'][0]:.2f}"
        for name in ("replay", "path", "sgd-proxy")
    )
    return f"AdamW and GELU, LDS at 90% kept and AUROC of wrong labels: {shown}"


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    study = result["study"]
    activation, schedule = (result["methods"][0][name] for name in ("activation", "schedule"))
    games = "weight 0 in their batches; `removed`: the batch's mean is over those that are left"
    ends = "; ".join(
        f"{NAMES[row['optimizer']]} {row['loss_last'][0]:.3f}, without the wrong labels {row['without_wrong'][0]:.3f}"
        for row in result["runs"]
        if row["without_wrong"]
    )
    return "\n\n".join(
        [
            f"**All methods**, {activation}, rate {schedule} after warm-up. LDS at each share kept, the others having "
            f"{games}. AUROC: of wrong labels by the lowest values. `loss`: the target's after training without the "
            f"{round(study['wrong'] * study['examples'])} lowest values; with all examples it is {ends}.",
            _methods_table(result),
            _seeds_line(result),
            "**Every setting that was tried**: LDS with weight 0 / AUROC, means over the seeds. `single`: every "
            "example left out by itself, Spearman correlation of the real effects with the values of `replay` / AUROC "
            "of these real effects.",
            _settings_table(result),
            "**By size**: a tenth of the examples lose this part of their weight, in float64. Spearman correlation of "
            "the replay's prediction with what training again gives / the latter's slope; means over the seeds.",
            _sizes_table(result),
        ]
    )


def _cell(numbers: Sequence[float], digits: int = 2) -> str:
    middle, low, high = (f"{number:.{digits}f}" for number in numbers)
    return middle if low == high else f"{middle} ({low} to {high})"


def _methods_table(result: Row) -> str:
    kept = result["study"]["kept"]
    columns = {f"lds_{game}_{share:g}": (game, share) for game in GAMES for share in kept}
    heads = [f"{'removed: ' if game == 'removed' else ''}LDS {share:.0%}" for game, share in columns.values()]
    rows = []
    for row in result["methods"]:
        cells = [_cell(row[name]) for name in columns]
        rows.append([NAMES[row["optimizer"]], row["method"], *cells, _cell(row["auroc"]), _cell(row["without"], 3)])
    return table(["optimizer", "by", *heads, "AUROC", "loss"], rows)


def _seeds_line(result: Row) -> str:
    """The replay, seed by seed."""
    kept = max(result["study"]["kept"])
    found: dict[str, list[str]] = {}
    for row in result["seeds"]:
        if row["method"] == "replay":
            cell = f"{row[f'lds_weightless_{kept:g}']:.3f} and {row['auroc']:.3f}"
            found.setdefault(NAMES[row["optimizer"]], []).append(cell)
    listed = "; ".join(f"{name} {', '.join(cells)}" for name, cells in found.items())
    return f"`replay` by seed, LDS at {kept:.0%} and AUROC: {listed}."


def _settings_table(result: Row) -> str:
    study = result["study"]
    rows = []
    for run in result["runs"]:
        mine = [
            row for row in result["settings"] if all(row[k] == run[k] for k in ("optimizer", "activation", "schedule"))
        ]
        cells = [
            " / ".join(f"{row[name][0]:.2f}" for name in (*(f"lds_weightless_{k:g}" for k in study["kept"]), "auroc"))
            for row in mine
        ]
        ends = f"{run['loss_last'][0]:.2f}; {run['right_held_out'][0]:.0%}"
        single = f"{run['single_spearman'][0]:.2f} / {run['single_auroc'][0]:.2f}"
        rows.append([NAMES[run["optimizer"]], run["activation"], run["schedule"], ends, *cells, single])
    kinds = " / ".join([*(f"{k:.0%}" for k in study["kept"]), "AUROC"])
    names = [f"`{name}`: {kinds}" for name in study["reduced"]]
    return table(["optimizer", "activation", "rate", "target: loss; right", *names, "single"], rows)


def _sizes_table(result: Row) -> str:
    sizes = result["study"]["sizes"]
    rows: dict[tuple[str, str], list[str]] = {}
    for row in result["sizes"]:
        cells = rows.setdefault((NAMES[row["optimizer"]], row["activation"]), [])
        cells.append(f"{row['spearman'][0]:.3f} / {row['slope'][0]:.2f}")
    head = ["optimizer", "activation", *(f"{size:g}" for size in sizes)]
    return table(head, [[*key, *cells] for key, cells in rows.items()])


def draw(result: Row, path: Path) -> None:
    """Real losses against predictions, LDS by method, and first order by size."""
    kept = max(result["study"]["kept"])
    with figure(path, 1, 3, (12.0, 4.2)) as ((scatter, bars, sizes),):
        one = result["subsets"][0]
        for k, name in enumerate(SHOWN):
            scatter.plot(one[name], one["real"], ".", ms=4, color=f"C{k}", alpha=0.7, label=name)
        scatter.set(
            title=f"{NAMES[one['optimizer']]}: {len(one['real'])} subsets of {kept:.0%}, one seed",
            xlabel="sum of the values of the examples left out, nats", ylabel="real change of the target's loss, nats",
        )  # fmt: skip
        optimizers = list(dict.fromkeys(row["optimizer"] for row in result["methods"]))
        for k, optimizer in enumerate(optimizers):
            rows = [row for row in result["methods"] if row["optimizer"] == optimizer]
            middle, low, high = np.array([row[f"lds_weightless_{kept:g}"] for row in rows]).T
            heights = np.arange(len(rows)) + 0.4 * k
            bars.barh(heights, middle, 0.38, color=f"C{k + 2}", label=NAMES[optimizer])
            bars.errorbar(middle, heights, xerr=[middle - low, high - middle], fmt="none", color="0.2", lw=0.7)
        bars.set_yticks(np.arange(len(rows)) + 0.2, [row["method"] for row in rows])
        bars.invert_yaxis()
        bars.axvline(0, color="black", lw=0.5)
        bars.set(xlabel=f"LDS at {kept:.0%} kept")
        styles = dict(zip(optimizers, ("o-", "s--"), strict=False))
        for k, activation in enumerate(dict.fromkeys(row["activation"] for row in result["sizes"])):
            for optimizer, style in styles.items():
                rows = [r for r in result["sizes"] if (r["activation"], r["optimizer"]) == (activation, optimizer)]
                label = f"{activation}, {NAMES[optimizer]}"
                y = [row["spearman"][0] for row in rows]
                sizes.plot([row["size"] for row in rows], y, style, ms=3, color=f"C{k + 4}", label=label)
        sizes.set(xscale="log", xlabel="part of their weight that a tenth lose", ylabel="Spearman, prediction and real")
        for panel in (scatter, bars, sizes):
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)

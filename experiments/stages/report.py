"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pieces import load, seconds
from experiments.results import Array, Row, correlation, figure, short, shown, spread, table, versions
from experiments.stages.config import ANY, LEFT_OUT, PROXY, Piece, Study

Pieces = Mapping[Piece, Mapping[str, Array]]
MAIN = "path, credit"
QUARTERS = 4  # of the first stage


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds."""
    loaded = load(paths, lambda piece: (piece.mixture, piece.seed))
    return {
        "about": "nats: the sum of a source's values in a stage; share: the mean over the stage's steps of its sum "
        "over the sum of all absolute values; negative: share of the source's blocks; all [mean, lowest, highest] "
        "over the seeds. worse: how much higher the loss is after a window without the source, beside `value`, the "
        "source's sum less the mean of the sources'",
        "study": asdict(study),
        "seconds": short(seconds(paths.values())),
        "versions": versions("transformers"),
        "books": list(_books(study, loaded)),
        "stages": list(_stages(study, loaded)),
        "nearness": list(_nearness(study, loaded)),
        "windows": list(_windows(study, loaded)),
        "agreement": list(_agreement(study, loaded)),
    }


def _books(study: Study, loaded: Pieces) -> Iterator[Row]:
    """Of whole runs: the drop of each target's loss, and the sum of all values."""
    for mixture, schemes in study.schemes:
        for scheme in schemes:
            for k, target in enumerate(study.targets):
                runs = [loaded[Piece(mixture, seed, scheme)] for seed in study.seeds]
                losses = [loaded[Piece(mixture, seed, MAIN)]["loss"][k] for seed in study.seeds]
                yield {
                    "mixture": mixture, "target": target, "scheme": scheme,
                    "loss_before": spread([float(of[0]) for of in losses]),
                    "drop": spread([float(of[0] - of[-1]) for of in losses]),
                    "sum_of_values": spread([float(run["values"][k].sum()) for run in runs]),
                }  # fmt: skip


def bounds(study: Study) -> list[tuple[str, int, int]]:
    """Stages: name, first step and the one after the last; the first stage in quarters before it as a whole."""
    length = study.steps // study.stages
    finer = [(f"1.{k + 1}", k * length // QUARTERS, (k + 1) * length // QUARTERS) for k in range(QUARTERS)]
    return finer + [(str(k + 1), k * length, (k + 1) * length) for k in range(study.stages)]


def _stages(study: Study, loaded: Pieces) -> Iterator[Row]:
    for mixture, schemes in study.schemes:
        for scheme in schemes:
            runs = [loaded[Piece(mixture, seed, scheme)] for seed in study.seeds]
            for k, target in enumerate(study.targets):
                for stage, first, last in bounds(study):
                    for n, source in enumerate(study.mixture(mixture)):
                        found = [
                            _of_source(run["values"][k, first:last], run["source"][first:last] == n) for run in runs
                        ]
                        numbers = {name: spread([one[name] for one in found]) for name in found[0]}
                        key = {"mixture": mixture, "scheme": scheme, "target": target, "stage": stage}
                        yield {**key, "steps": last - first, "source": source, **numbers}


def _of_source(values: Array, mine: Array) -> dict[str, float]:
    """Of a stage's values [steps, batch] those that are `mine`."""
    sizes = np.abs(values).sum(axis=1)
    return {
        "nats": float(values[mine].sum()),
        "share": float(((values * mine).sum(axis=1) / np.where(sizes, sizes, 1)).mean()),
        "negative": float((values[mine] < 0).mean()),
    }


def _nearness(study: Study, loaded: Pieces) -> Iterator[Row]:
    for mixture in study.left_out:
        for k, target in enumerate(study.targets):
            for n, source in enumerate(study.mixture(mixture)):
                of = [float(loaded[Piece(mixture, seed, LEFT_OUT)]["nearness"][n, k]) for seed in study.seeds]
                yield {"mixture": mixture, "target": target, "source": source, "bigrams": spread(of)}


def _windows(study: Study, loaded: Pieces) -> Iterator[Row]:
    """Really leaving a source out of a window, beside what its values say."""
    for mixture in study.left_out:
        schemes = dict(study.schemes)[mixture]
        for k, target in enumerate(study.targets):
            for window in range(study.windows):
                for n, source in enumerate((*study.mixture(mixture), ANY)):
                    worse = [loaded[Piece(mixture, seed, LEFT_OUT)]["worse"][window, n, k] for seed in study.seeds]
                    values = {
                        f"value, {scheme}": spread([_value(study, loaded, mixture, seed, scheme, k, window)[n]
                                                    for seed in study.seeds]) for scheme in (MAIN, PROXY)
                        if scheme in schemes
                    }  # fmt: skip
                    key = {"mixture": mixture, "target": target, "window": window + 1, "source": source}
                    yield {**key, "worse": spread([float(one) for one in worse]), **values}


def _value(study: Study, loaded: Pieces, mixture: str, seed: int, scheme: str, k: int, window: int) -> Array:
    """Of every source in a window, the sum of its values less the mean of the sources'; at last of none of them."""
    run, length = loaded[Piece(mixture, seed, scheme)], study.steps // study.windows
    steps = slice(window * length, (window + 1) * length)
    sums = np.bincount(run["source"][steps].ravel(), run["values"][k, steps].ravel())
    return np.append(sums - sums.mean(), 0.0)


def _agreement(study: Study, loaded: Pieces) -> Iterator[Row]:
    """Spearman correlations, over sources, of what the values of a window say with what really came of it."""
    for mixture in study.left_out:
        for scheme in dict(study.schemes)[mixture]:
            for k, target in enumerate(study.targets):
                for window in range(study.windows):
                    of = [
                        correlation(_value(study, loaded, mixture, seed, scheme, k, window)[:-1],
                                    loaded[Piece(mixture, seed, LEFT_OUT)]["worse"][window, :-1, k])
                        for seed in study.seeds
                    ]  # fmt: skip
                    key = {"mixture": mixture, "scheme": scheme, "target": target, "window": window + 1}
                    yield {**key, "spearman": spread(of)}


def headline(result: Row) -> str:
    """For the project's README."""
    mixture, target = result["study"]["mixtures"][0][0], result["study"]["targets"][0]
    last = str(result["study"]["stages"])
    found = {
        (row["stage"], row["source"]): row["share"][0]
        for row in result["stages"] if (row["mixture"], row["scheme"], row["target"]) == (mixture, MAIN, target)
    }  # fmt: skip
    told = ", ".join(
        f"{source} {found['1.1', source]:+.0%} to {found[last, source]:+.0%}"
        for source in dict(result["study"]["mixtures"])[mixture]
    )
    return f"for {target}, shares of a step's values in the first steps, and at the end: {told}"


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    parts, study = [], result["study"]
    for mixture, sources in study["mixtures"]:
        for target in study["targets"]:
            parts += [
                f"**Mixture {mixture}, target {target}**, `{MAIN}`: nats / share of a step's absolute values, and "
                "in brackets the share of blocks with a negative value; means over seeds.",
                _stages_table(result, mixture, sources, target, MAIN),
            ]
    if PROXY in dict(study["schemes"])[study["mixtures"][0][0]]:
        mixture, sources = study["mixtures"][0]
        target = study["targets"][0]
        parts += [
            f"**The same as if by SGD** (`{PROXY}`), mixture {mixture}, target {target}.",
            _stages_table(result, mixture, sources, target, PROXY),
        ]
    thirds = [f"third {n + 1}" for n in range(study["windows"])]
    near: dict[tuple[str, str], list[str]] = {}
    for row in result["nearness"]:
        key = (row["mixture"], row["target"])
        near.setdefault(key, list(key)).append(f"{row['source']} {row['bigrams'][0]:.2f}")
    parts += [
        "**How near the sources are**, by no network: nats per token of the target by the pairs of tokens in each.",
        table(["mixture", "target", *[""] * max(len(of) - 2 for of in near.values())], near.values()),
        "**Leaving a source out** of a third of the run: how much higher the target's loss really is at its end / the "
        f"sum of the source's values by `{MAIN}` less the mean of all sources', in nats, means over seeds. `{ANY}`: "
        "without as many random blocks.",
        _windows_table(result),
        "**Agreement**: Spearman correlation over the sources of these two, mean (lowest to highest) over seeds.",
        table(["mixture", "target", "by", *thirds], _agreement_rows(result)),
        "**Books**: each target's loss before training, its drop, and the sum of all values.",
        table(["mixture", "target", "by", "before", "drop", "values"], [
            [row["mixture"], row["target"], row["scheme"], *(shown(row[name]) for name in
             ("loss_before", "drop", "sum_of_values"))] for row in result["books"]
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _stages_table(result: Row, mixture: str, sources: Any, target: str, scheme: str) -> str:
    rows: dict[str, list[str]] = {}
    for row in result["stages"]:
        if (row["mixture"], row["target"], row["scheme"]) == (mixture, target, scheme):
            cell = f"{row['nats'][0]:.3f} / {row['share'][0]:+.2f} ({row['negative'][0]:.0%})"
            rows.setdefault(row["stage"], [row["stage"]]).append(cell)
    return table(["stage", *sources], rows.values())


def _windows_table(result: Row) -> str:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for row in result["windows"]:
        key = (row["mixture"], row["target"], row["source"])
        rows.setdefault(key, list(key)).append(f"{row['worse'][0]:+.3f} / {row[f'value, {MAIN}'][0]:+.3f}")
    head = ["mixture", "target", "without", *(f"third {n + 1}" for n in range(result["study"]["windows"]))]
    return table(head, rows.values())


def _agreement_rows(result: Row) -> list[list[str]]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for row in result["agreement"]:
        key = (row["mixture"], row["target"], row["scheme"])
        rows.setdefault(key, list(key)).append(shown(row["spearman"]))
    return list(rows.values())


def draw(result: Row, path: Path) -> None:
    """For every mixture and target each source's share of a step's values, stage by stage; dashed: as if by SGD."""
    study = result["study"]
    mixtures, targets = dict(study["mixtures"]), study["targets"]
    colors = {name: f"C{k}" for k, name in enumerate(dict.fromkeys(s for of in mixtures.values() for s in of))}
    with figure(path, len(mixtures), len(targets), (4.2 * len(targets), 3.2 * len(mixtures))) as panels:
        for (mixture, sources), row in zip(mixtures.items(), panels, strict=True):
            for target, panel in zip(targets, row, strict=True):
                for source in sources:
                    for scheme, style in ((MAIN, "-"), (PROXY, ":")):
                        of = {
                            r["stage"]: r for r in result["stages"]
                            if (r["mixture"], r["target"]) == (mixture, target)
                            and (r["source"], r["scheme"]) == (source, scheme)
                        }  # fmt: skip
                        whole = [of[str(k + 1)]["share"] for k in range(study["stages"]) if of]
                        if whole:
                            middle, low, high = np.array(whole).T
                            x = np.arange(1, len(whole) + 1)
                            label = source if style == "-" else None
                            panel.plot(x, middle, style, color=colors[source], label=label, lw=1.2)
                        if whole and style == "-":
                            panel.fill_between(x, low, high, color=colors[source], alpha=0.15, lw=0)
                panel.axhline(0, color="black", lw=0.5)
                panel.set(title=f"{mixture}, target {target}", xlabel="stage", ylabel="share of a step's values")
            row[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

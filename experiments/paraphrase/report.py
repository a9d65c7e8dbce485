"""From finished pieces to result.json, the tables of README.md and figure.svg."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.paraphrase.config import FAR, IN_RUN, NEXT, OTHER, RUNGS, UNTRAINED, Piece, Study, Trained
from experiments.paraphrase.texts import Texts, jaccard, shared, texts_of
from experiments.pieces import load, seconds
from experiments.results import Array, Row, figure, short, shown, spread, table, versions
from experiments.values import NORMALISED

RANDOM = "random"
METHODS = (
    "path", "path" + NORMALISED, "first", "first" + NORMALISED, "influence", "gradient", "cosine", "hidden", "BM25",
    "embedding", RANDOM,
)  # fmt: skip
DRAWN = ("path", "path" + NORMALISED, "influence", "cosine", "hidden", "BM25", "embedding")
AMONG = ("all", "verses")  # examples among which the original's rank is taken
PAPER = {"kjv": "1 / 1 / 1", "asv": "1 / 1 / 1", "web": "1 / 1 / 1", FAR: "32.3 / 39.3 / 1.6",
         NEXT: "145.6 / 292 / 20,917"}  # of 320,000: first order / influence function / BM25  # fmt: skip
TOLD = ("path", "path" + NORMALISED, "influence", "BM25", "embedding")
RESAMPLES = 2000


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds."""
    text = next(iter(paths.values())).with_name("text.json")
    likeness: list[Row] = []
    ranks: list[Row] = []
    losses: list[Row] = []
    for model, seeds in zip(study.models, study.seeds, strict=True):
        for seed in seeds:
            texts = texts_of(study, text, model, seed)
            scores, run = _scores(paths, model, seed)
            likeness += _likeness(texts, {"model": model.name, "seed": seed})
            ranks += _ranks(texts, scores, {"model": model.name, "seed": seed})
            losses += _losses(texts, run, {"model": model.name, "seed": seed})
    return {
        "about": "ranks: of the original, 1 for the highest value, among all examples and among the verses alone; of "
        "equal ones the mean; found: over seeds and originals, median [it, 95% bootstrap interval over both], shares "
        "within the first 1, 10 and 1%, mean of 1 / rank, share of the other verses that have a lower value; losses: "
        "in nats per token, means over originals: before training, drop, values of all examples and of the original",
        "study": asdict(study),
        "steps": {model.name: model.steps for model in study.models},
        "seconds": short(seconds(paths.values())),
        "parts": list(_parts(study, paths)),
        "versions": versions(*study.libraries),
        "likeness": list(_by_rung(likeness, ("jaccard", "shared"), ())),
        "losses": list(_by_rung(losses, ("before", "drop", "values", "original", "own", "own_last"), ("model",))),
        "found": list(_found(study, ranks)),
        "ranks": ranks,
    }


def _scores(paths: Mapping[Piece, Path], model: Trained, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every method's scores [T, N], and the rest of what was found."""
    pieces = [piece for part in (*IN_RUN, UNTRAINED) if (piece := Piece(model, seed, part)) in paths]
    runs = load({piece: paths[piece] for piece in pieces}, lambda piece: (model.name, seed))
    found = {name: of for run in reversed(runs.values()) for name, of in run.items()}
    return {name: found[name] for name in METHODS if name in found}, found


def _ranks(texts: Texts, scores: Mapping[str, Array], key: Row) -> Iterator[Row]:
    """A row for every target: where the methods put its original."""
    verse, here = texts.verse, (len(texts.examples), int(texts.verse.sum()))
    for t, (rung, k) in enumerate(targets_of(texts)):
        at = texts.originals[rung][k]
        found: Row = {**key, "rung": rung, "original": k, "of": list(here)}
        for name in METHODS:
            of = scores.get(name)
            found[name] = of if of is None else [rank(of[t], at), rank(of[t][verse], int(verse[:at].sum()))]
        yield found | {RANDOM: [(n + 1) / 2 for n in here]}


def targets_of(texts: Texts) -> Iterator[tuple[str, int]]:
    """Rung and original of every target, in their order."""
    for rung, of in texts.targets.items():
        for k in range(len(of)):
            yield rung, k


def rank(scores: Array, i: int) -> float:
    """1 for the largest; of equal ones, the mean of theirs."""
    return float((scores > scores[i]).sum() + ((scores == scores[i]).sum() + 1) / 2)


def _likeness(texts: Texts, key: Row) -> Iterator[Row]:
    for rung, k in targets_of(texts):
        one, other = texts.targets[rung][k], texts.examples[texts.originals[rung][k]]
        yield {**key, "rung": rung, "jaccard": jaccard(one, other), "shared": shared(one, other)}


def _losses(texts: Texts, run: Mapping[str, Array], key: Row) -> Iterator[Row]:
    before, after = run["loss"]
    for t, (rung, k) in enumerate(targets_of(texts)):
        yield {**key, "rung": rung, "before": before[t], "drop": before[t] - after[t], "values": run["path"][t].sum(),
               "own": run["own"][0], "own_last": run["own"][-max(1, len(run["own"]) // 10) :].mean(),
               "original": run["path"][t, texts.originals[rung][k]]}  # fmt: skip


def _by_rung(rows: Sequence[Row], names: Sequence[str], by: Sequence[str]) -> Iterator[Row]:
    """Means over seeds and originals."""
    for key in dict.fromkeys(tuple(row[of] for of in (*by, "rung")) for row in rows):
        mine = [row for row in rows if tuple(row[of] for of in (*by, "rung")) == key]
        means = {name: short(float(np.mean([row[name] for row in mine]))) for name in names}
        yield dict(zip((*by, "rung"), key, strict=True)) | means


def _parts(study: Study, paths: Mapping[Piece, Path]) -> Iterator[Row]:
    for model in study.models:
        for part in dict.fromkeys(piece.part for piece in paths):
            took = [seconds([path]) for piece, path in paths.items() if (piece.model, piece.part) == (model, part)]
            yield {"model": model.name, "part": part, "seconds": spread(took)}


def _found(study: Study, ranks: Sequence[Row]) -> Iterator[Row]:
    for model in study.models:
        for rung in RUNGS:
            for method in METHODS:
                mine = [row for row in ranks if (row["model"], row["rung"]) == (model.name, rung) and row[method]]
                for n, among in enumerate(AMONG if mine else ()):
                    key = {"model": model.name, "rung": rung, "method": method, "among": among}
                    yield key | _of(mine, method, n, mine[0]["of"][n])


def _of(rows: Sequence[Row], method: str, n: int, size: int) -> Row:
    """Over the rows' ranks by a method, of `size` examples each."""
    of = np.array([row[method][n] for row in rows])
    every = of if method != RANDOM else np.arange(1, size + 1)
    within = [float((every <= most).mean()) for most in (1, 10, max(1, size // 100))]
    seeds = sorted({row["seed"] for row in rows})
    return {
        "of": size,
        "median": median(of),
        "within": [short(share) for share in within],
        "mrr": short(float(np.mean(1 / every))),
        "auroc": short(float(1 - (of.mean() - 1) / (size - 1))),
        "seeds": [float(np.median([row[method][n] for row in rows if row["seed"] == seed])) for seed in seeds],
    }


def median(ranks: Array) -> list[float]:
    """It, and its 95% bootstrap interval over the ranks."""
    drawn = np.random.default_rng(0).choice(ranks, (RESAMPLES, len(ranks)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return [short(float(of)) for of in (np.median(ranks), low, high)]


def headline(result: Row) -> str:
    """For the project's README."""
    models = [model["name"] for model in result["study"]["models"]]
    found = {(r["model"], r["rung"], r["method"]): r["median"][0] for r in result["found"] if r["among"] == "verses"}
    parts = []
    for rung in ("kjv", FAR):
        listed = (f"{name} {' / '.join(f'{found[model, rung, name]:g}' for model in models)}" for name in TOLD)
        parts.append(f"{'verbatim' if rung == 'kjv' else 'far rewording'}: {', '.join(listed)}")
    return f"median rank of the original among verses, {' / '.join(models)}; " + "; ".join(parts)


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    parts = [
        "**The ladder**: words that target and original both have, as a share of those that either has; the share of "
        "the target's 4-grams that the original has; `paper`: its mean ranks of 320,000 at the rung that fits, by "
        "first order / influence function / BM25.",
        _ladder_table(result),
    ]
    for model in result["study"]["models"]:
        name = model["name"]
        size = {row["among"]: row["of"] for row in result["found"] if row["model"] == name}
        parts += [
            f"**{name}, among all {size['all']} examples**: median rank of the original (95% interval); shares of the "
            f"originals within the first 1, 10 and {max(1, size['all'] // 100)} (1%), in percent.",
            _rank_table(result, name),
            f"**{name}, among the {size['verses']} verses alone**: median rank (95% interval); mean of 1 / rank; "
            "AUROC.",
            _verse_table(result, name),
        ]
    parts += [
        "**The targets' loss**, in nats per token, means over seeds and originals: before training, its drop, the sum "
        "of all values of `path`, and the original's value. `training`: the loss of the first batch, and of the last "
        "tenth of the batches.",
        _loss_table(result),
        "**Seconds** of one thread, of a seed: " + "; ".join(
            f"{row['model']}, {row['part']} {shown(row['seconds'], '.0f')}" for row in result["parts"]
        ) + f". In all {result['seconds'] / 60:.0f} minutes.",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _ladder_table(result: Row) -> str:
    rows = ([row["rung"], f"{row['jaccard']:.2f}", f"{row['shared']:.2f}", PAPER.get(row["rung"], "")]
            for row in result["likeness"])  # fmt: skip
    return table(["rung", "words", "4-grams", "paper"], rows)


def _cells(result: Row, model: str, among: str) -> dict[str, list[Row]]:
    """By method: a row for every rung."""
    found: dict[str, list[Row]] = {}
    for row in result["found"]:
        if (row["model"], row["among"]) == (model, among):
            found.setdefault(row["method"], []).append(row)
    return found


def _rank_table(result: Row, model: str) -> str:
    rows = []
    for method, found in _cells(result, model, "all").items():
        shares = ["/".join(f"{100 * share:.3g}" for share in row["within"]) for row in found]
        ranks = [f"{found[0]['median'][0]:g}" if method == RANDOM else shown(row["median"], "g") for row in found]
        rows.append([method, *(f"{a}; {b}" for a, b in zip(ranks, shares, strict=True))])
    return table(["by", *RUNGS], rows)


def _verse_table(result: Row, model: str) -> str:
    rows = []
    for method, found in _cells(result, model, "verses").items():
        ranks = [f"{found[0]['median'][0]:g}" if method == RANDOM else shown(row["median"], "g") for row in found]
        rows.append(
            [method, *(f"{of}; {row['mrr']:.2f}; {row['auroc']:.2f}" for of, row in zip(ranks, found, strict=True))]
        )
    return table(["by", *RUNGS], rows)


def _loss_table(result: Row) -> str:
    rows: dict[str, list[str]] = {}
    for row in result["losses"]:
        cell = " / ".join(f"{row[name]:.2f}" for name in ("before", "drop", "values"))
        own = f"{row['own']:.2f} / {row['own_last']:.2f}"
        rows.setdefault(row["model"], [row["model"], own]).append(f"{cell} / {row['original']:.4f}")
    return table(["model", "training", *RUNGS], rows.values())


def draw(result: Row, path: Path) -> None:
    """Rank against likeness, a line for every method: above among all examples, below among the verses."""
    models = [model["name"] for model in result["study"]["models"]]
    likeness = {row["rung"]: row["jaccard"] for row in result["likeness"]}
    with figure(path, 2, len(models), (4.2 * len(models), 6.4)) as panels:
        for n, among in enumerate(AMONG):
            for panel, model in zip(panels[n], models, strict=True):
                cells = _cells(result, model, among)
                for k, method in enumerate(name for name in DRAWN if name in cells):
                    x = [likeness[row["rung"]] for row in cells[method] if row["rung"] != OTHER]
                    y = [row["median"] for row in cells[method] if row["rung"] != OTHER]
                    middle, low, high = np.array(y).T
                    panel.plot(x, middle, "o-", ms=3, color=f"C{k}", label=method)
                    panel.fill_between(x, low, high, color=f"C{k}", alpha=0.1, lw=0)
                panel.axhline(cells[RANDOM][0]["median"][0], color="grey", ls="--", lw=0.8, label=RANDOM)
                panel.set(yscale="log", xlabel="words in common with the original (Jaccard)", title=model,
                          ylabel=f"median rank among {'all examples' if among == 'all' else 'the verses'}")  # fmt: skip
                panel.invert_yaxis()
                panel.invert_xaxis()
        panels[1][0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)

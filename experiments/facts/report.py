"""From finished runs to result.json, the tables of README.md and figure.svg."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.facts.planted import Fact
from experiments.facts.training import Examples, Piece, Study, bm25, examples_of
from experiments.results import Array, Row, figure, short, table, versions

TOP, NEAR = 0.01, 0.05  # of the examples
BM25, OWN_LOSS, RANDOM = "BM25", "training loss", "random"


def summarise(study: Study, paths: Mapping[Piece, Path]) -> Row:
    """What result.json holds: the rank of every planted example and lure by every method, and the books."""
    text = next(iter(paths.values())).with_name("text.json")
    ranks: list[Row] = []
    books: list[Row] = []
    again: list[Row] = []
    for seed in study.seeds:
        examples = examples_of(study, text, seed)
        runs = {scheme: dict(np.load(paths[Piece(scheme, seed)])) for scheme, seeds in study.schemes if seed in seeds}
        assert len({str(run["weights"]) for run in runs.values()}) == 1, f"seed {seed}: schemes trained differently"
        without = {p.without: dict(np.load(path)) for p, path in paths.items() if p.without and p.seed == seed}
        for k, fact in enumerate(study.facts):
            key = {"seed": seed, "fact": fact.name}
            ranks += _ranks(study, k, examples, runs, key)
            for scheme, run in runs.items():
                books.append(
                    {"scheme": scheme, **key, **_books(fact, examples, run["values"][k], run["target_loss"][:, k])}
                )
                for order, other in without.items():
                    lost = short(float(other["target_loss"][k] - run["target_loss"][1, k]))
                    places = [examples.texts.index(of) for of in fact.planted if fact.order(of) == order]
                    value = short(float(run["values"][k, places].sum()))
                    again.append({"scheme": scheme, **key, "without": order, "lost": lost, "value": value})
    return {
        "about": "rank: 1 for the largest value (or score) of all examples; step: in which the example was used; "
        "books: in nats of the fact's target loss, sums of values over the planted examples, the lures and all others",
        "study": asdict(study),
        "steps": study.steps,
        "versions": versions(),
        "methods": [_method(study, method, ranks) for method in (*dict(study.schemes), BM25, OWN_LOSS, RANDOM)],
        "orders": [_order(study, method, order, ranks) for method in dict(study.schemes) for order in study.left_out],
        "books": books,
        "again": again,
        "ranks": ranks,
    }


def _places(fact: Fact, examples: Examples) -> dict[str, list[int]]:
    """Where the fact's sentences stand in the training set."""
    return {
        "planted": [examples.texts.index(sentence) for sentence in fact.planted],
        "lures": [examples.texts.index(sentence) for sentence in fact.lures],
    }


def _ranks(study: Study, k: int, examples: Examples, runs: Mapping[str, Mapping[str, Array]], key: Row) -> list[Row]:
    """Where every method puts the sentences of the k-th fact."""
    fact = study.facts[k]
    scores = {scheme: run["values"][k] for scheme, run in runs.items()}
    scores[BM25] = bm25(f"{fact.question} {fact.answer}", examples.texts)
    scores[OWN_LOSS] = next(iter(runs.values()))["train_loss"]
    return [
        {"method": method, **key, "kind": kind, "sentence": n,
         "order": fact.order(examples.texts[i]) if kind == "planted" else "", "step": i // study.batch + 1,
         "rank": rank(of, i)}
        for method, of in scores.items() for kind, listed in _places(fact, examples).items()
        for n, i in enumerate(listed)
    ]  # fmt: skip


def _books(fact: Fact, examples: Examples, values: Array, losses: Array) -> Row:
    """The target's loss before training, its drop, and whose values come to how much of it."""
    before, after = losses
    sums = {kind: float(values[of].sum()) for kind, of in _places(fact, examples).items()}
    sums["others"] = float(values.sum()) - sum(sums.values())
    return {"before": short(before), "drop": short(before - after), **{name: short(of) for name, of in sums.items()}}


def rank(scores: Array, i: int) -> int:
    """1 for the largest; of equal ones, the last."""
    return int((scores >= scores[i]).sum())


def _method(study: Study, method: str, ranks: Sequence[Row]) -> Row:
    """Over all seeds and facts: shares of the planted examples, and of the lures, among the largest values."""
    most, near = int(TOP * study.examples), int(NEAR * study.examples)
    mine = [row for row in ranks if row["method"] == method]
    planted, lures = ([row for row in mine if row["kind"] == kind] for kind in ("planted", "lures"))
    if method == RANDOM:
        chance = {"top": most / study.examples, "near": near / study.examples, "median_rank": (study.examples + 1) / 2}
        all_of_a_fact = float(np.prod([(most - k) / (study.examples - k) for k in range(len(study.facts[0].planted))]))
        return {"method": method, **chance, "by_seed": [chance["top"]] * len(study.seeds), "facts": all_of_a_fact,
                "auroc": 0.5, "lures_top": chance["top"]}  # fmt: skip
    seeds = sorted({row["seed"] for row in planted})
    by_fact: dict[tuple[Any, ...], list[int]] = {}
    for row in planted:
        by_fact.setdefault((row["seed"], row["fact"]), []).append(row["rank"])
    of = np.array([row["rank"] for row in planted])
    return {
        "method": method,
        "top": short(float((of <= most).mean())),
        "near": short(float((of <= near).mean())),
        "median_rank": float(np.median(of)),
        "by_seed": [short(float(np.mean([r["rank"] <= most for r in planted if r["seed"] == s]))) for s in seeds],
        "facts": short(float(np.mean([max(listed) <= most for listed in by_fact.values()]))),
        "auroc": short(float(np.mean([_auroc(study.examples, listed) for listed in by_fact.values()]))),
        "lures_top": short(float(np.mean([row["rank"] <= most for row in lures]))),
    }


def _order(study: Study, method: str, order: str, ranks: Sequence[Row]) -> Row:
    """Of the planted sentences in which the name, or the answer, stands first."""
    of = np.array([r["rank"] for r in ranks if (r["method"], r["order"]) == (method, order)])
    top, near = (float((of <= int(share * study.examples)).mean()) for share in (TOP, NEAR))
    return {"method": method, "order": order, "examples": len(of), "top": short(top), "near": short(near),
            "median_rank": float(np.median(of))}  # fmt: skip


def _auroc(examples: int, ranks: Sequence[int]) -> float:
    """How often a planted example stands above another one that is not of its fact's planted ones."""
    others = examples - len(ranks)
    above = sum(examples - r - (len(ranks) - n) for n, r in enumerate(sorted(ranks), start=1))
    return above / (others * len(ranks))


def headline(result: Row) -> str:
    """For the project's README."""
    top = {row["method"]: row["top"] for row in result["methods"]}
    shares = ", ".join(f"{name} {top[name]:.0%}" for name in (*dict(result["study"]["schemes"]), BM25, OWN_LOSS))
    return f"in the top 1%, of the sentences that teach a fact: {shares}"


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    study, schemes = result["study"], dict(result["study"]["schemes"])
    most, near = int(TOP * study["examples"]), int(NEAR * study["examples"])
    return "\n\n".join(
        [
            f"**Among the largest values.** Of {study['examples']} examples the top 1% are {most}, the top 5% {near}. "
            "`in the top 1%`: share of the planted examples, over facts and seeds, and for each seed; `facts`: share "
            "of those all of whose planted examples are; `AUROC`: of planted against all other examples; `lures`: "
            "share of the lures in the top 1%.",
            _methods_table(result),
            "**The target's loss**, in nats per token of the answer, medians over seeds: before training, its drop, "
            "and the share of the drop that values of the planted examples, of the lures and of all other examples "
            "come to. What is left to 100% belongs to no example: momentum, weight decay, and what is unexplained.",
            _books_table(result),
            "**By what stands first** in a planted sentence, the name that the question has or the answer: how many "
            "there are over all seeds, and where their values are. Then what leaving them out of training did: the "
            "target's final loss without them, less that with them, beside the sum of their values: means over facts, "
            f"in nats, of seed {', '.join(map(str, study['again']))}.",
            _orders_table(result),
            f"**Every planted example**: its step, then its rank by {', '.join(f'`{s}`' for s in schemes)} and BM25.",
            _ranks_table(result),
        ]
    )


def _methods_table(result: Row) -> str:
    rows = []
    for m in result["methods"]:
        seeds = ", ".join(f"{share:.0%}" for share in m["by_seed"])
        top = f"{m['top']:.1%}" if m["method"] == RANDOM else f"{m['top']:.0%} ({seeds})"
        rows.append([m["method"], top, f"{m['near']:.0%}", f"{m['median_rank']:g}", f"{m['facts']:.0%}",
                     f"{m['auroc']:.3f}", f"{m['lures_top']:.0%}"])  # fmt: skip
    head = ["by", "in the top 1%", "in the top 5%", "median rank", "facts", "AUROC", "lures"]
    return table(head, rows)


def _books_table(result: Row) -> str:
    rows = []
    for fact in dict.fromkeys(book["fact"] for book in result["books"]):
        mine = [book for book in result["books"] if book["fact"] == fact]
        cells = [fact, *(f"{np.median([book[name] for book in mine]):.2f}" for name in ("before", "drop"))]
        for scheme in dict(result["study"]["schemes"]):
            shares = _shares([book for book in mine if book["scheme"] == scheme])
            cells.append(" / ".join(f"{share:.0%}" for share in np.median(shares, axis=0)))
        rows.append(cells)
    head = [f"`{scheme}`: planted / lures / others" for scheme in dict(result["study"]["schemes"])]
    return table(["fact", "before", "drop", *head], rows)


def _shares(books: Sequence[Row]) -> Array:
    """Of the drop: planted, lures, others, by book."""
    return np.array([[book[name] / book["drop"] for name in ("planted", "lures", "others")] for book in books])


def _orders_table(result: Row) -> str:
    rows = []
    for row in result["orders"]:
        key = (row["method"], row["order"])
        mine = [one for one in result["again"] if (one["scheme"], one["without"]) == key]
        cells = [f"{np.mean([one[name] for one in mine]):.2f}" for name in ("lost", "value")]
        shares = [f"{row['top']:.0%}", f"{row['near']:.0%}", f"{row['median_rank']:g}"]
        rows.append([row["method"], row["order"], str(row["examples"]), *shares, *cells])
    head = ["by", "first", "examples", "in the top 1%", "in the top 5%", "median rank", "lost without", "sum of values"]
    return table(head, rows)


def _ranks_table(result: Row) -> str:
    study = result["study"]
    methods = [*dict(study["schemes"]), BM25]
    found = {(r["method"], r["seed"], r["fact"], r["sentence"]): r for r in result["ranks"] if r["kind"] == "planted"}
    rows = []
    for fact in study["facts"]:
        for n, sentence in enumerate(fact["planted"]):
            cells = [sentence]
            for seed in study["seeds"]:
                of = [found.get((method, seed, fact["name"], n)) for method in methods]
                step = found[BM25, seed, fact["name"], n]["step"]
                cells.append(f"{step}: " + " / ".join("-" if r is None else str(r["rank"]) for r in of))
            rows.append(cells)
    return table(["planted", *(f"seed {seed}" for seed in study["seeds"])], rows)


def draw(result: Row, path: Path) -> None:
    """Left: every planted example's and lure's rank by every method. Right: whose values the target's loss drop is."""
    study, random = result["study"], np.random.default_rng(0)
    schemes = list(dict(study["schemes"]))
    with figure(path, 1, 2, (8.4, 3.4)) as ((ranks, books),):
        methods = [*schemes, BM25, OWN_LOSS]
        for k, method in enumerate(methods):
            for n, kind in enumerate((*study["left_out"], "lures")):
                mine = [r for r in result["ranks"] if r["method"] == method and kind in (r["order"], r["kind"])]
                x = k + 0.25 * (n - 1) + random.uniform(-0.06, 0.06, len(mine))
                name = None if k else kind if kind == "lures" else f"planted, {kind}"
                ranks.plot(x, [r["rank"] for r in mine], ".", color=f"C{n}", markersize=4, alpha=0.7, label=name)
        ranks.axhline(int(TOP * study["examples"]) + 0.5, color="grey", linewidth=0.8, linestyle="--")
        ranks.set(yscale="log", ylabel=f"rank among {study['examples']}, dashed: 1%")
        ranks.invert_yaxis()
        ranks.set_xticks(range(len(methods)), methods)
        ranks.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        below = np.zeros(len(schemes))
        means = [_shares([b for b in result["books"] if b["scheme"] == s]).mean(axis=0) for s in schemes]
        for n, (name, color) in enumerate((("planted", "C0"), ("lures", "C2"), ("others", "C7"))):
            heights = np.array([mean[n] for mean in means])
            books.bar(schemes, heights, 0.6, bottom=below, color=color, label=name)
            below = below + heights
        books.axhline(1, color="grey", linewidth=0.8, linestyle="--")
        books.set_ylabel("share of the target's loss drop, mean")
        books.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

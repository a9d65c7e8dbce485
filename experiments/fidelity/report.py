"""From finished games and runs to result.json, the tables of README.md and figure.svg."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fidelity.training import Study
from experiments.results import NAMES, Row, figure, short, table, versions

METRICS = ("relative", "rmse", "spearman", "total")
ACCOUNTS = ("value", "momentum", "decay", "unexplained")
TABLED = ("sgd-proxy", "past", "first", "second", "path 1", "path 2", "path 4", "adaptive")
DRAWS = 2000  # of the bootstrap
CURVE_EVERY = 5  # steps between two points of a curve
CURVED = ("path 1", "credit")


def interval(values: Sequence[float]) -> list[float]:
    """The median, and the percentile bootstrap's 95% interval of it over the games: median, low, high."""
    found = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(found), size=(DRAWS, len(found)))
    low, high = np.percentile(np.median(found[draws], axis=1), [2.5, 97.5])
    return [short(np.median(found)), short(low), short(high)]


def summarise(study: Study, games: Sequence[Row], booked: Sequence[Row]) -> Row:
    """What result.json holds: medians with intervals over the games of an optimizer, rate and moment, and the books."""
    after = study.moments[1:]
    later = f"{min(after)}-{max(after)}" if len(after) > 1 else str(*after)
    moments: dict[str, set[int]] = {str(step): {step} for step in study.moments}
    moments[later] = set(after)
    cells, truth = [], []
    for optimizer, rates in study.rates:
        for rate in rates:
            for moment, steps in moments.items():
                mine = [g for g in games if (g["optimizer"], g["rate"]) == (optimizer, rate) and g["step"] in steps]
                if not mine:
                    continue
                key = {"optimizer": optimizer, "rate": rate, "step": moment}
                truth.append(key | {"games": len(mine)} | _truth(mine))
                for scheme in study.schemes:
                    of = [g["schemes"][scheme] | {"total": abs(g["schemes"][scheme]["total"])} for g in mine]
                    metrics = {name: interval([one[name] for one in of]) for name in METRICS}
                    cost = {
                        "target_gradients": short(np.mean([one["target_gradients"] for one in of])),
                        "time": short(np.median([one["time"] for one in of])),
                    }
                    cells.append(key | {"scheme": scheme} | metrics | cost)
    return {
        "about": "schemes: medians and 95% bootstrap intervals over games; books: medians over seeds; in nats",
        "study": asdict(study),
        "versions": versions(),
        "later": later,
        "truth": truth,
        "schemes": cells,
        "books": [_books(key, _booked(key, booked)) for key in _book_keys(study)],
        "curves": [key | _curve(_booked(key, booked)[0]) for key in _book_keys(study) if key["scheme"] in CURVED],
    }


def _truth(games: Sequence[Row]) -> Row:
    """Of the Shapley values: their root mean square and standard error, and what that leaves to a perfect scheme."""
    return {
        "shapley_rms": short(np.median([np.sqrt(np.mean(np.square(g["shapley"]))) for g in games])),
        "drop": short(np.median([g["drop"] for g in games])),
        "standard_error": short(np.median([np.sqrt(np.mean(np.square(g["error"]))) for g in games])),
        "noise_rmse": short(np.median([g["noise"]["rmse"] for g in games])),
        "noise_spearman": short(np.median([g["noise"]["spearman"] for g in games])),
    }


def _book_keys(study: Study) -> Iterable[Row]:
    for optimizer, rates in study.books:
        for rate in rates:
            for warmup in (True, False):
                for scheme in study.accounts:
                    yield {"optimizer": optimizer, "rate": rate, "warmup": warmup, "scheme": scheme}


def _booked(key: Row, booked: Sequence[Row]) -> list[dict[str, list[float]]]:
    """The accounts, step by step, of every seed's run with this key."""
    return [run["accounts"] for run in booked if all(run[name] == value for name, value in key.items())]


def _books(key: Row, runs: Sequence[Mapping[str, list[float]]]) -> Row:
    """The accounts of a run as sums over its steps, and their medians over the seeds; the share with its range."""
    sums = [{name: float(np.sum(run[name])) for name in ("drop", *ACCOUNTS)} for run in runs]
    found: Row = {name: short(np.median([one[name] for one in sums])) for name in ("drop", *ACCOUNTS)}
    shares = [one["unexplained"] / one["drop"] for one in sums]
    return key | found | {"unexplained_share": [short(np.median(shares)), short(min(shares)), short(max(shares))]}


def _curve(run: Mapping[str, list[float]]) -> Row:
    """The accounts of one run as they grow."""
    curves = {name: np.cumsum(run[name])[::CURVE_EVERY] for name in ("drop", *ACCOUNTS)}
    return {name: [short(value) for value in curve] for name, curve in curves.items()}


def short_table(result: Row) -> str:
    """For the project's README: relative error with its interval / Spearman at the largest rate that all share."""
    later = result["later"]
    tabled = [scheme for scheme in TABLED if scheme in result["study"]["schemes"]]
    rows = []
    for optimizer, rates in result["study"]["rates"]:
        rate = max(rate for rate in rates if rate < 0.1)
        cells = _cells(result, optimizer, rate, later)
        shown = []
        for scheme in tabled:
            middle, low, high = cells[scheme]["relative"]
            shown.append(f"{middle:.2g} ({low:.2g} to {high:.2g}) / {cells[scheme]['spearman'][0]:.3f}")
        rows.append([f"{NAMES[optimizer]}, {rate:g}", *shown])
    return table(["optimizer, rate", *tabled], rows)


def tables(result: Row) -> str:
    """The study's tables in Markdown."""
    study = result["study"]
    first, later = str(min(study["moments"])), result["later"]
    return "\n\n".join(
        [
            f"**Steps {later}**: RMSE in 1e-6 nats / Spearman, medians over games. `size`: root mean square of the "
            "Shapley values; `noise`: what a perfect scheme would show, as the Shapley values are sampled.",
            _fidelity_table(result, later),
            f"**Step {first}**, the same, at 1/{study['warmup']} of the rate, since this is in warm-up.",
            _fidelity_table(result, first),
            "**Cost of a step** in target gradients, by processor time; in brackets the number of target gradients "
            "that were taken; then the median error of the values' sum as a share of the step's real drop, "
            f"steps {later}.",
            _cost_table(result, later),
            "**The whole run**: loss drop, momentum and decay in nats, then for every scheme the sum of its values and "
            "what it leaves unexplained as a share of the drop; medians over seeds. `credit` is `path 1` with "
            '`momentum="credit"`, which has no account for momentum.',
            _books_table(result),
        ]
    )


def _micro(nats: float) -> str:
    """In 1e-6 nats, three digits."""
    number = nats * 1e6
    return f"{number:.3g}" if number < 1e4 else f"{number:.0e}"


def _fidelity_table(result: Row, step: str) -> str:
    tabled = [scheme for scheme in TABLED if scheme in result["study"]["schemes"]]
    rows = []
    for truth in result["truth"]:
        if truth["step"] == step:
            cells = _cells(result, truth["optimizer"], truth["rate"], step)
            noise = f"{_micro(truth['noise_rmse'])} / {truth['noise_spearman']:.3f}"
            shown = [f"{_micro(cells[s]['rmse'][0])} / {cells[s]['spearman'][0]:.3f}" for s in tabled]
            rows.append([NAMES[truth["optimizer"]], f"{truth['rate']:g}", _micro(truth["shapley_rms"]), noise, *shown])
    return table(["optimizer", "rate", "size", "noise", *tabled], rows)


def _cost_table(result: Row, step: str) -> str:
    rows = []
    for optimizer, rates in result["study"]["rates"]:
        rate = max(r for r in rates if r < 0.1) if len(rates) > 1 else rates[0]
        cells = _cells(result, optimizer, rate, step)
        shown = [f"{c['time']:.1f} ({c['target_gradients']:.3g}); {c['total'][0]:.1%}" for c in cells.values()]
        rows.append([NAMES[optimizer], f"{rate:g}", *shown])
    return table(["optimizer", "rate", *result["study"]["schemes"]], rows)


def _cells(result: Row, optimizer: str, rate: float, step: str) -> dict[str, Row]:
    """By scheme."""
    key = (optimizer, rate, step)
    return {c["scheme"]: c for c in result["schemes"] if (c["optimizer"], c["rate"], c["step"]) == key}


def _books_table(result: Row) -> str:
    accounts = result["study"]["accounts"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for book in result["books"]:
        key = (NAMES[book["optimizer"]], f"{book['rate']:g}", "yes" if book["warmup"] else "no")
        shared = [
            f"{book[name]:.4f}" for name in ("drop", "momentum", "decay")
        ]  # of the first scheme: all but `credit`
        cells = rows.setdefault(key, shared)
        cells.append(f"{book['value']:.4f}; {book['unexplained_share'][0]:.2%}")
    head = ["optimizer", "rate", "warm-up", "drop", "momentum", "decay", *accounts]
    return table(head, [[*key, *cells] for key, cells in rows.items()])


MARKERS = {
    "sgd-proxy": "x", "past": "+", "first": "v", "second": "D", "path 1": "o", "path 2": "o", "path 4": "o",
    "gauss 2": "s", "gauss 4": "s", "adaptive": "*",
}  # fmt: skip


def draw(result: Row, path: Path) -> None:
    """Above: error against cost, a panel for every optimizer. Below: the whole run's accounts as they grow."""
    study = result["study"]
    curves = [c for c in result["curves"] if c["scheme"] == "path 1"]
    curves = [c for c in curves if c["optimizer"] != "momentum" or c["rate"] > 0.01]
    columns = max(len(study["rates"]), len(curves))
    with figure(path, 2, columns, (3.3 * columns, 6.4)) as panels:
        for panel, (optimizer, rates) in zip(panels[0], study["rates"], strict=False):
            _draw_errors(panel, result, optimizer, rates)
        for panel, curve in zip(panels[1], curves, strict=False):
            _draw_curves(panel, result, curve)
        for panel in [*panels[0][len(study["rates"]) :], *panels[1][len(curves) :]]:
            panel.set_axis_off()
        panels[0][0].set_ylabel(f"relative error of the values, steps {result['later']}")
        panels[1][0].set_ylabel("nats of target loss, summed")
        panels[1][0].legend()
        kinds = {MARKERS[s]: ", ".join(t for t in MARKERS if MARKERS[t] == MARKERS[s]) for s in study["schemes"]}
        lines: Any = importlib.import_module("matplotlib.lines")
        marks = [lines.Line2D([], [], color="0.3", marker=m, linestyle="", label=s) for m, s in kinds.items()]
        panels[0][0].figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))


def _draw_errors(panel: Any, result: Row, optimizer: str, rates: Sequence[float]) -> None:
    for k, rate in enumerate(rates):
        cells = _cells(result, optimizer, rate, result["later"])
        cost = {scheme: cell["target_gradients"] for scheme, cell in cells.items()}
        # a double backward counts by its time: what `second` takes longer than `first`
        cost["second"] = 1 + cells["second"]["time"] - cells["first"]["time"]
        for scheme, cell in cells.items():
            middle, low, high = cell["relative"]
            bars = [[middle - low], [high - middle]]
            panel.errorbar([cost[scheme]], [middle], bars, color=f"C{k}", marker=MARKERS[scheme], ms=5, lw=0.6)
        path = [scheme for scheme in cells if scheme.startswith("path")]
        errors = [cells[scheme]["relative"][0] for scheme in path]
        panel.plot([cost[scheme] for scheme in path], errors, color=f"C{k}", label=f"{rate:g}")
    panel.set(xscale="log", yscale="log", title=NAMES[optimizer], xlabel="cost in target gradients a step")
    panel.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    panel.minorticks_off()
    panel.legend(title="learning rate")


def _draw_curves(panel: Any, result: Row, of: Row) -> None:
    same = [c for c in result["curves"] if all(c[name] == of[name] for name in ("optimizer", "rate", "warmup"))]
    for curve in same:
        steps = 1 + CURVE_EVERY * np.arange(len(curve["drop"]))
        if curve["scheme"] == "credit":
            panel.plot(steps, curve["value"], "C0--", label='values, momentum="credit"')
        else:
            panel.plot(steps, curve["drop"], color="black", label="loss drop")
            for k, name in enumerate(ACCOUNTS):
                panel.plot(steps, curve[name], f"C{k}", label="values, path 1" if name == "value" else name)
    warm = "warm-up" if of["warmup"] else "no warm-up"
    panel.set(title=f"{NAMES[of['optimizer']]}, {of['rate']:g}, {warm}", xlabel="step")

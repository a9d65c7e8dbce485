"""Cost against accuracy: what a step takes, and how far its values are from the Shapley values of the step's game.

The cost is what was measured here, the accuracy is that of the fidelity study (experiments/fidelity/result.json): the
median relative error under AdamW, with its interval, at every rate of the study. The other libraries compute gradient
products, so they stand at the error of `sgd-proxy`. The naive loop and forward mode can take any direction, so they
stand, hollow, at the best there is: path's, with the work of finding its direction left out.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row

FIDELITY = Path(__file__).parents[1] / "experiments" / "fidelity" / "result.json"
SCHEMES = {  # variant -> scheme of the study
    "first": "first", "second": "second", "path": "path 1", "path-2": "path 2", "path-adaptive": "adaptive",
    "naive": "path 1", "forward-mode": "path 1", "opacus": "sgd-proxy", "captum": "sgd-proxy", "dattri": "sgd-proxy",
    "bergson": "sgd-proxy",
}  # fmt: skip
HOLLOW = ("naive", "forward-mode")
MARKERS = "os^Dv<>Pp*Xh"


def errors(path: Path = FIDELITY) -> dict[float, dict[str, list[float]]]:
    """Learning rate -> scheme -> relative error under AdamW: median, low, high. Empty without the study."""
    if not path.exists():
        return {}
    study = json.loads(path.read_text("utf-8"))
    columns = study["schemes"]["columns"]
    found: dict[float, dict[str, list[float]]] = {}
    for values in study["schemes"]["rows"]:
        row = dict(zip(columns, values, strict=True))
        if row["optimizer"] == "adamw" and row["step"] == study["later"]:
            found.setdefault(row["rate"], {})[row["scheme"]] = row["relative"]
    return found


def panels(cases: Sequence[Row]) -> list[Row]:
    """The first case of every workload that has something to show."""
    found: dict[str, Row] = {}
    for case in cases:
        shown = [row for row in case["rows"] if row["variant"] in SCHEMES and row["ratio"]]
        if shown and case["dtype"] == "fp32":
            found.setdefault(case["workload"], case)
    return list(found.values())


def draw(cases: Sequence[Row], accuracy: Mapping[float, Mapping[str, Sequence[float]]], path: Path) -> bool:
    """Write the figure; False if there is nothing to draw."""
    importlib.import_module("matplotlib").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    shown = panels(cases)
    if not shown or not accuracy:
        return False
    markers = dict(zip(SCHEMES, MARKERS, strict=False))
    with plt.rc_context({"svg.hashsalt": "benchmarks", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        figure, axes = plt.subplots(
            1, len(shown), figsize=(3.4 * len(shown) + 0.6, 3.8), sharey=True, squeeze=False, layout="constrained"
        )
        for panel, case in zip(axes[0], shown, strict=True):
            _draw(panel, case, accuracy, markers)
        axes[0][0].set_ylabel("relative error of a step's values, AdamW")
        used = [
            name for name in SCHEMES if any(row["variant"] == name and row["ratio"] for c in shown for row in c["rows"])
        ]
        marks = [_mark(plt, markers[name], name) for name in used]
        colours = [plt.Line2D([], [], color=f"C{k}", label=f"rate {rate:g}") for k, rate in enumerate(sorted(accuracy))]
        figure.legend(handles=marks + colours, loc="outside lower center", ncols=6)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True


def _mark(plt: Any, marker: str, name: str) -> Any:
    face = "none" if name in HOLLOW else "0.3"
    return plt.Line2D([], [], color="0.3", marker=marker, markerfacecolor=face, linestyle="", label=name)


def _draw(
    panel: Any, case: Row, accuracy: Mapping[float, Mapping[str, Sequence[float]]], markers: Mapping[str, str]
) -> None:
    for row in case["rows"]:
        name = row["variant"]
        if name not in SCHEMES or not row["ratio"]:
            continue
        cost, low, high = row["ratio"]
        for k, rate in enumerate(sorted(accuracy)):
            if SCHEMES[name] not in accuracy[rate]:
                continue
            error, best, worst = accuracy[rate][SCHEMES[name]]
            panel.errorbar(
                [cost], [error], yerr=[[error - best], [worst - error]], xerr=[[cost - low], [high - cost]], lw=0.6,
                color=f"C{k}", marker=markers[name], ms=5, markerfacecolor="none" if name in HOLLOW else f"C{k}",
            )  # fmt: skip
    most = max(row["ratio"][2] for row in case["rows"] if row["variant"] in SCHEMES and row["ratio"])
    panel.set_xlim(0.95, max(2.1, 1.15 * most))
    panel.axvline(1, color="0.5", lw=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="time of a step, plain training = 1", title=case["title"])
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= max(2.1, 1.15 * most)]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()

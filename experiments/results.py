"""What the studies' reports share: numbers, tables and figures, and where they are written.

A study's result.json holds lists of rows as tables, its README.md has the same in Markdown between two marks, and
figure.svg draws it.
"""

import importlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inrun.game import spearman

Row = dict[str, Any]
Array = NDArray[Any]
BEGIN, END = "<!-- written by the run: begin -->", "<!-- written by the run: end -->"
DRAWS = 1000  # of the bootstrap
NAMES = {"sgd": "SGD", "momentum": "SGD, momentum 0.9", "adamw": "AdamW", "muon": "Muon and AdamW"}


def short(number: float) -> float:
    """Four digits."""
    return float(f"{number:.4g}")


def spread(values: Sequence[float]) -> list[float]:
    """Mean, lowest and highest."""
    return [short(float(of(values))) for of in (np.mean, np.min, np.max)]


def shown(spread: Sequence[float], digits: str = ".2f") -> str:
    """Mean (lowest to highest), or what an interval is."""
    middle, low, high = (format(value, digits) for value in spread)
    return f"{middle} ({low} to {high})"


def correlation(values: Array, truth: Array) -> float:
    """Spearman's; nan where all are equal."""
    found = spearman(torch.from_numpy(values), torch.from_numpy(truth))
    return float("nan") if found is None else found


def auroc(values: Array, bad: Array) -> float:
    """How often a bad example has a lower value than a good one; equal ones count half."""
    below, good = values[bad][:, None], values[~bad][None]
    return float((below < good).mean() + 0.5 * (below == good).mean())


def spearmans(values: Array, truth: Array, counts: Array) -> Array:
    """Of resamples: counts [draws, S] say how often each has every subset, values and truth [S]. Ties within a resample
    are a subset's copies, which share the mean of their ranks.
    """
    ranks = []
    for of in (values, truth):
        order = np.argsort(of)
        times = counts[:, order]
        rank = np.empty(counts.shape)
        rank[:, order] = np.cumsum(times, axis=1) - times / 2
        ranks.append(rank - counts.shape[1] / 2)
    x, y = ranks
    products = [(counts * of).sum(axis=1) for of in (x * y, x * x, y * y)]
    found: Array = products[0] / np.sqrt(products[1] * products[2])
    return found


def lds(of_seeds: Sequence[tuple[Array, Array]]) -> list[float]:
    """From predictions and truth of every seed's subsets: the mean correlation, and its bootstrap interval."""
    random, found, drawn = np.random.default_rng(0), [], []
    for values, truth in of_seeds:
        found.append(correlation(values, truth))
        counts = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)
        drawn.append(spearmans(values, truth, counts.astype(float)))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return [short(x) for x in (float(np.mean(found)), low, high)]


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*packages: str) -> Row:
    """Of torch, Python, the processor, and of these packages."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()}
    return found | {name: metadata.version(name) for name in packages}


def write(result: Row, out: Path, text: str, draw: Callable[[Row, Path], None] | None) -> None:
    """A study's result.json, its tables between the marks of README.md, and its figure.svg, in this folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(as_text(result), "utf-8")
    fill(out / "README.md", text)
    if draw is not None:
        draw(result, out / "figure.svg")


def fill(page: Path, text: str) -> None:
    """Put the text between the marks of a page; begin the page if there is none."""
    before = page.read_text("utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    head, _, rest = before.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


def as_text(result: Mapping[str, Any]) -> str:
    """JSON in which a list of rows is {"columns": names, "rows": one line for each}."""
    lines = []
    for name, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(list(row.values())) for row in value)
            text = f'{{"columns": {json.dumps(list(value[0]))}, "rows": [\n  {rows}\n ]}}'
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table_rows(table: Mapping[str, Any]) -> list[Row]:
    """What `as_text` wrote of a list of rows."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float], **settings: Any) -> Iterator[Any]:
    """The panels [rows, columns] of a figure, which is written as SVG at the end, the same for the same numbers."""
    importlib.import_module("matplotlib").use("svg")  # not installed but for the studies
    plt: Any = importlib.import_module("matplotlib.pyplot")
    options = {"svg.hashsalt": path.parent.name, "svg.fonttype": "none", "font.size": 8, "legend.frameon": False}
    with plt.rc_context(options | {"axes.spines.top": False, "axes.spines.right": False}):
        drawn, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **settings)
        yield panels
        drawn.savefig(path, metadata={"Date": None})
        plt.close(drawn)

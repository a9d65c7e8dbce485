"""One HTML page about a run: reads a ledger, asks `figures` for pictures, fills page.html.j2.

The page holds everything it shows, plotly.js included, and forbids itself any other source: it asks nothing
of the network and runs no script that an example's text might carry.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, StrictUndefined
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from inrun.ledger import Ledger
from inrun.ledger.checks import Floats
from inrun.report import (
    TOKENS_COLUMN,
    ReportError,
    figures,
    group_columns,
    has_token_texts,
    one_line,
    printable,
    ranked,
    text_column,
)
from inrun.report.schemes import compare, scheme_label, scheme_meaning, scheme_name

BEST = 10
TEXT_LENGTH, TEXT_LINES = 360, 8
MOST_TOKENS = 256
ALL = "all targets together"


def write_report(folder: Path, out: Path | None, *, group: str | None, scheme: str | None) -> Path:
    """See `inrun.report.write_report`."""
    ledger = Ledger(folder, scheme)
    out = out or folder / ("report.html" if ledger.scheme is None else f"report-{ledger.scheme}.html")
    if out.exists() and not out.is_file():  # a device would be replaced by the page
        raise ReportError(f"the report could not be written to {out}: it is there and not a plain file. Name another.")
    page = render(ledger, folder.resolve().name, group)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(page.encode())
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(
            f"the report could not be written to {out}: {error.strerror or error}. "
            "Name another file (out=..., on the command line --out FILE)."
        ) from error
    return out


def render(ledger: Ledger, name: str, group: str | None = None) -> str:
    """The page's HTML about `ledger`, titled `name`; `group` as in `write_report`."""
    chosen = group or next(iter(group_columns(ledger)), None)
    steps = ledger.steps()
    targets = ledger.targets
    summary = _summary(ledger, steps, targets)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(nats=figures.nats, line=one_line, share=share, figure=_figure_json, hash=_csp_hash)
    template = resources.files("inrun.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=printable(name),
        in_run=ledger.scheme is None,
        scheme={"name": scheme_name(ledger), "meaning": scheme_meaning(ledger)},
        version=metadata.version("inrun"),
        plotly=get_plotlyjs(),
        facts=facts(ledger.run),
        run_json=printable(json.dumps(ledger.run, indent=2, ensure_ascii=False, default=str)),
        targets=targets,
        group=chosen,
        has_examples=ledger.examples() is not None,
        summary=summary,
        loss=figures.loss_figure(steps, targets),
        errors=figures.error_figure(steps, targets),
        **_by_group(ledger, chosen, targets),
        tables=_examples(ledger, chosen, {row["target"]: row["examples"] for row in summary}),
        text=text_column(ledger),
        token_texts=has_token_texts(ledger),
        books=books(steps),
        horizons=_horizons(ledger, chosen),
        adjoint=_adjoint(steps, targets),
    )


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran, as (name, text) pairs to show: the run's identity first, then its other short entries."""
    entries = {**dict(run.get("identity") or {}), **{k: v for k, v in run.items() if k != "identity"}}
    entries.pop("format", None)
    shown = []
    for key, value in entries.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, Mapping | list))
        elif isinstance(value, list | tuple):
            text = ", ".join(str(item) for item in value)
        else:
            text = "none" if value is None else str(value)
        if text and len(text) <= 300:
            shown.append((one_line(str(key).replace("_", " ")), one_line(text, 300)))
    return shown


def books(steps: pl.DataFrame) -> dict[str, Any]:
    """Per target the accounts of the audited steps and the games; the largest conservation error; the steps skipped.

    Per target: audited (steps), drop, value, momentum, decay, unexplained (nats, summed over the audited
    steps) and unexplained_share (of |drop|; None where the drop is zero); of the games, see `_games`.
    """
    audited = steps.filter(pl.col("loss_before").is_finite() & pl.col("loss_after").is_finite())
    accounts = audited.group_by("target").agg(
        pl.len().alias("audited"),
        (pl.col("loss_before") - pl.col("loss_after")).sum().alias("drop"),
        pl.col("value", "momentum", "decay", "unexplained").sum(),
    )
    rows = []
    for row in accounts.iter_rows(named=True):
        part = abs(row["unexplained"]) / abs(row["drop"]) if row["drop"] else None
        rows.append({**row, "unexplained_share": part})
    worst = steps.filter(pl.col("conservation").is_finite()).sort("conservation", descending=True).head(1)
    skipped = steps.filter("skipped")["step"].unique().sort().to_list()
    return {
        "rows": sorted(rows, key=lambda row: str(row["target"])),
        "games": _games(steps),
        "gradients": _by_target(steps, pl.col("target_gradients").mean().alias("mean")),
        "conservation": worst.row(0, named=True) if worst.height else None,
        "skipped": skipped,
        "steps": steps["step"].n_unique(),
    }


def _games(steps: pl.DataFrame) -> list[dict[str, Any]]:
    """Per target: games, in_full (those played in full), error, rmse (nats), spearman (medians), noise (largest, nats).

    A game with a loss that was not finite is left out.
    """
    played = steps.filter(pl.col("game_error").is_not_nan())
    return _by_target(
        played,
        pl.len().alias("games"),
        (pl.col("game_noise") == 0).sum().alias("in_full"),
        *[pl.col(f"game_{name}").median().alias(name) for name in ("error", "rmse", "spearman")],
        pl.col("game_noise").max().alias("noise"),
    )


def _by_target(steps: pl.DataFrame, *columns: pl.Expr) -> list[dict[str, Any]]:
    """A row per target with these columns, those with nothing in the first left out."""
    found = steps.group_by("target").agg(*columns).sort("target")
    return found.filter(pl.nth(1).is_not_null()).to_dicts()


def share(part: float | None) -> str:
    """A share as a percentage for people."""
    if part is None:
        return "undefined"
    return f"{part:.1%}" if 0 < part < 0.1 else f"{part:.0%}"


def _summary(ledger: Ledger, steps: pl.DataFrame, targets: list[str]) -> list[dict[str, Any]]:
    rows = []
    for target in targets:
        values = ledger.values(target)
        loss = steps.filter((pl.col("target") == target) & pl.col("loss").is_finite()).sort("step")["loss"]
        below = int((values["value"] < 0).sum())
        rows.append(
            {
                "target": target,
                "first": loss[0] if len(loss) else None,
                "last": loss[-1] if len(loss) else None,
                "value": float(values["value"].sum()),
                "examples": values.height,
                "uses": int(values["count"].sum()),
                "below": below,
                "share": below / values.height if values.height else None,
                "median": values["value"].median(),
                "distribution": figures.distribution_figure(ledger.distribution(target)) if values.height else None,
            }
        )
    return rows


def _by_group(ledger: Ledger, column: str | None, targets: list[str]) -> dict[str, Any]:
    if column is None or not targets:
        return {"heat": None, "heat_rows": None, "heat_width": 0, "timeline": None}
    rows = figures.heat_rows(ledger.by(column), column, targets)
    longest = max((len(figures.label(name)) for name in rows["group"]), default=0)
    return {
        "heat_width": 50 + 7 * longest + 72 * len(targets),  # pixels below which the numbers would shrink
        "heat": figures.heat_figure(rows, column, targets) if rows.height else None,
        "heat_rows": rows.to_dicts(),
        "timeline": figures.timeline_figure(ledger.timeline(column), column, targets) if rows.height else None,
    }


def _horizons(ledger: Ledger, column: str | None) -> dict[str, Any] | None:
    """The run's schemes side by side; None where there is but the in-run one."""
    names = ledger.schemes
    if not names:
        return None
    ledgers = [Ledger(ledger.home), *(Ledger(ledger.home, name) for name in names)]
    labels, comparisons = [scheme_label(one) for one in ledgers], compare(ledgers, column)
    return {
        "labels": labels,
        "names": names,
        "figure": figures.horizon_figure(comparisons, labels),
        "targets": [
            {"target": one.target, "rows": rows, "correlations": one.correlations}
            for one, rows in zip(comparisons, figures.horizon_rows(comparisons), strict=True)
        ],
    }


def _adjoint(steps: pl.DataFrame, targets: list[str]) -> dict[str, Any] | None:
    """A replay's adjoint over the steps, and the row of the largest Hessian error; None of steps without an adjoint."""
    figure, window = figures.adjoint_figure(steps, targets)
    worst = steps.filter(pl.col("hessian_error").is_finite()).sort("hessian_error", descending=True).head(1)
    error = worst.row(0, named=True) if worst.height else None
    return {"figure": figure, "window": window, "error": error} if figure.data else None


def _examples(ledger: Ledger, group: str | None, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """The best and worst examples for each target, and for their sum where there are several.

    `counts` is the number of examples per target; no example is shown as best and as worst, if there are two.
    """
    text, shaded = text_column(ledger), has_token_texts(ledger)
    choices: list[tuple[str, str | None]] = [(target, target) for target, count in counts.items() if count]
    if len(choices) > 1:
        choices.append((ALL, None))
    tables = []
    n = min(BEST, max(max(counts.values(), default=0) // 2, 1))
    for title, target in choices:
        frames = [ranked(ledger, n, target), ranked(ledger, n, target, worst=True)]
        ids = {i for frame in frames for i in frame["id"]} if shaded and target is not None else set()
        of_tokens = ledger.values_by_token(ids, target or "")
        best, worst = (
            [
                _example(row, group, text) | {"tokens": _shaded(row.get(TOKENS_COLUMN), of_tokens.get(row["id"]))}
                for row in frame.iter_rows(named=True)
            ]
            for frame in frames
        )
        tables.append({"target": title, "best": best, "worst": worst, "hurt": worst[0]["value"] < 0})
    return tables


def _example(row: Mapping[str, Any], group: str | None, text: str | None) -> dict[str, Any]:
    return {
        "id": one_line(row["id"], 80),
        "value": row["value"],
        "count": row["count"],
        "group": None if group is None or row[group] is None else one_line(row[group], 40),
        "text": None if text is None or row[text] is None else excerpt(row[text]),
    }


def _shaded(texts: Sequence[str | None] | None, values: Floats | None) -> list[dict[str, Any]] | None:
    """The example's tokens with their values, and those as shares of the largest; None where one of them is lacking."""
    if texts is None or values is None or len(texts) != len(values):
        return None
    largest = float(np.abs(values).max()) or 1.0
    shown = [
        {"text": printable(token or ""), "value": float(value), "share": abs(float(value)) / largest}
        for token, value in zip(texts[:MOST_TOKENS], values, strict=False)
    ]
    if len(texts) > MOST_TOKENS:
        shown.append({"text": "…", "value": 0.0, "share": 0.0})
    return shown


def excerpt(text: str) -> str:
    """The start of an example's text: its lines but the blank ones, with an ellipsis where it was cut."""
    lines = [line.rstrip() for line in printable(text).strip().splitlines() if line.strip()]
    kept = "\n".join(lines[:TEXT_LINES])
    cut = len(lines) > TEXT_LINES or len(kept) > TEXT_LENGTH
    return kept[:TEXT_LENGTH].rstrip() + "…" if cut else kept


def _figure_json(figure: Figure) -> str:
    # inside <script> only "</" could end the data early; "<" as an escape is the same JSON
    return str(figure.to_json()).replace("<", "\\u003c")


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

"""Frames of a ledger to plotly figures: pure functions, no reading, no page.

Values are in nats of a target's loss; positive = helped, lowered the target's loss. Colours of axes and text
are the page's business, so that one figure serves light and dark.
"""

import html
import math
from collections.abc import Sequence

import polars as pl
from plotly.graph_objects import Bar, Figure, Heatmap, Scatter

from inrun.report import group_order, one_line
from inrun.report.schemes import EVERY, Comparison

# Told apart by colour-blind readers, visible on white and on black.
PALETTE = ("#3b82d0", "#e08e0b", "#0f9d76", "#c561a8", "#56b4e9", "#d9542b", "#9a7b2f", "#8a63d2")
HURT, HELPED, ZERO = "#d9542b", "#3b82d0", "#8c8c8c"
DIVERGING = [[0.0, "#c2410c"], [0.25, "#f0a27c"], [0.5, "#f7f7f7"], [0.75, "#83b2e0"], [1.0, "#1d5fa8"]]
MOST_POINTS = 600
MOST_ROWS = 40
MOST_LINES = len(PALETTE)
_NONE = "(none)"

HorizonRows = list[tuple[str | None, list[float | None]]]


def label(name: object, length: int = 28) -> str:
    """A user's name as plotly text: one line, at most `length` characters, its markup shown, not obeyed."""
    return _NONE if name is None else html.escape(one_line(name, length), quote=False)


def thin(curve: pl.DataFrame, most: int = MOST_POINTS) -> tuple[pl.DataFrame, int]:
    """A curve (columns step and y) as at most `most` points, and how many rows each point is the mean of.

    Rows whose y is null, NaN or infinite are left out first.
    """
    kept = curve.filter(pl.col("y").is_finite()).sort("step")
    window = -(-kept.height // most) if kept.height else 1
    if window == 1:
        return kept, 1
    points = kept.with_row_index("point").with_columns(pl.col("point") // window)
    return points.group_by("point", maintain_order=True).mean().drop("point"), window


def loss_figure(steps: pl.DataFrame, targets: Sequence[str]) -> tuple[Figure, int]:
    """Loss over steps: the training loss and each target's; and the number of steps a point is the mean of.

    `steps` has the ledger's columns step, target, loss and train_loss.
    """
    training = steps.group_by("step").agg(pl.col("train_loss").first().alias("y"))
    figure, hover = Figure(), "step %{x:.0f}<br>%{y:.4f} nats"
    widest = _curve(figure, training, "training loss", {"color": ZERO, "width": 1, "dash": "dot"}, hover)
    for position, name in enumerate(targets):
        curve = steps.filter(target=name).select("step", y="loss")
        widest = max(widest, _curve(figure, curve, label(name), _line(position), hover))
    return _finish(figure, x="training step", y="loss (nats)", height=380), widest


def error_figure(steps: pl.DataFrame, targets: Sequence[str]) -> tuple[Figure, int]:
    """The relative error of the values against each step's real game, by target, on a logarithmic scale; and the number
    of games a point is the mean of.

    `steps` has the ledger's columns step, target and game_error.
    """
    return _logarithmic(steps, targets, "game_error", "relative error")


def adjoint_figure(steps: pl.DataFrame, targets: Sequence[str]) -> tuple[Figure, int]:
    """The norm of a replay's adjoint after each step, by target, on a logarithmic scale; and the number of steps that a
    point is the mean of.

    `steps` has the ledger's columns step, target and adjoint.
    """
    return _logarithmic(steps, targets, "adjoint", "adjoint's norm")


def _logarithmic(steps: pl.DataFrame, targets: Sequence[str], column: str, what: str) -> tuple[Figure, int]:
    figure, widest = Figure(), 1
    for position, name in enumerate(targets):
        curve = steps.filter((pl.col("target") == name) & (pl.col(column) > 0)).select("step", y=column)
        window = _curve(figure, curve, label(name), _line(position), f"step %{{x:.0f}}<br>{what} %{{y:.3g}}")
        widest = max(widest, window)
    _finish(figure, x="training step", y=f"{what} (log scale)", height=260)
    return figure.update_yaxes(type="log"), widest


def _curve(figure: Figure, curve: pl.DataFrame, name: str, line: dict[str, object], hover: str) -> int:
    """Add a curve (columns step and y) to the figure, thinned; and how many rows each point is the mean of."""
    points, window = thin(curve)
    if points.height:
        figure.add_trace(
            Scatter(
                x=points["step"].to_list(),
                y=points["y"].to_list(),
                name=name,
                mode="lines" if points.height > 1 else "markers",
                line=line,
                hovertemplate=hover,
            )
        )
    return window


def heat_rows(by: pl.DataFrame, column: str, targets: Sequence[str]) -> pl.DataFrame:
    """`Ledger.by` as a row per group, in display order: group, examples, uses, value:TARGET of each (nats).

    Past 40 groups, those of the smallest total |value| are added up in one last row.
    """
    groups = (
        by.with_columns(group=pl.col(column).cast(pl.String))
        .group_by("group")
        .agg(
            pl.col("examples").max(),
            pl.col("count").max().alias("uses"),
            pl.col("value").abs().sum().alias("weight"),
            pl.col("value").sum().alias("total"),
            *[pl.col("value").filter(pl.col("target") == t).sum().alias(f"value:{t}") for t in targets],
        )
        .sort("weight", "group", descending=[True, False])
    )
    if groups.height > MOST_ROWS:
        rest = groups[MOST_ROWS - 1 :]
        added = rest.select(pl.lit(f"{rest.height} smaller groups").alias("group"), pl.exclude("group").sum())
        groups = groups[: MOST_ROWS - 1]
    else:
        added = groups.clear()
    order = group_order(groups["group"].to_list(), groups["total"].to_list(), targets)
    return pl.concat([groups[order], added]).drop("weight", "total")


def heat_figure(rows: pl.DataFrame, column: str, targets: Sequence[str]) -> Figure:
    """Value by group (down) and target (across), the numbers written in; colour centred at zero.

    `rows` comes from `heat_rows`. The best group of each target is set in bold.
    """
    table = [rows[f"value:{name}"].to_list() for name in targets]
    most = max((abs(value) for cells in table for value in cells), default=0.0) or 1.0
    best = [max(cells, default=None) for cells in table]
    shown = [
        [
            f"<b>{nats(table[t][g])}</b>" if table[t][g] == best[t] and rows.height > 1 else nats(table[t][g])
            for t in range(len(targets))
        ]
        for g in range(rows.height)
    ]
    names = [label(name) for name in rows["group"]]
    figure = Figure(
        Heatmap(
            z=[[cells[g] for cells in table] for g in range(rows.height)],
            text=shown,
            texttemplate="%{text}",
            hovertext=[[f"{name}, target {label(t)}" for t in targets] for name in names],
            hovertemplate="%{hovertext}<br>%{z:+.5g} nats<extra></extra>",
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            xgap=2,
            ygap=2,
            showscale=False,  # the numbers are in the cells
        )
    )
    _finish(figure, x="", y="", height=130 + 34 * max(rows.height, 1))
    # positions, not names, on the axes: two long names that are cut alike must stay two rows
    ticks = {"tickmode": "array", "showgrid": False, "zeroline": False, "ticks": ""}
    places = list(range(len(targets)))
    figure.update_xaxes(
        tickvals=places, ticktext=[label(t, 18) for t in targets], side="top", title_text="target", **ticks
    )
    figure.update_yaxes(
        tickvals=list(range(rows.height)),
        ticktext=names,
        autorange="reversed",
        title_text=label(column),
        **ticks,
    )
    return figure


def distribution_figure(bins: pl.DataFrame) -> Figure:
    """How many examples have which total value; `bins` is one target's: left, right (nats), count."""
    left, right = bins["left"].to_list(), bins["right"].to_list()
    middle = [(a + b) / 2 for a, b in zip(left, right, strict=True)]
    colours = [HURT if b <= 0 else HELPED if a >= 0 else ZERO for a, b in zip(left, right, strict=True)]
    figure = Figure(
        Bar(
            x=middle,
            y=bins["count"].to_list(),
            width=[(b - a) or max(abs(a) / 10, 1e-9) for a, b in zip(left, right, strict=True)],
            marker={"color": colours, "line": {"width": 0}},
            customdata=[[nats(a), nats(b)] for a, b in zip(left, right, strict=True)],
            hovertemplate="%{customdata[0]} to %{customdata[1]} nats<br>%{y:,} examples<extra></extra>",
        )
    )
    _finish(figure, x="value of an example (nats)", y="examples (log scale)", height=260)
    # a bar of one example would end on the floor of a scale that starts at one
    top = math.log10(max(bins["count"].to_list(), default=1) or 1)
    figure.update_yaxes(type="log", range=[-0.3, top + 0.15], dtick=1)
    figure.update_xaxes(zeroline=True)
    return figure.update_layout(bargap=0, showlegend=False)


def timeline_figure(timeline: pl.DataFrame, column: str, targets: Sequence[str]) -> tuple[Figure, int]:
    """Value by group over training, per step and as a running total; and how many groups became one line.

    `timeline` is that of `Ledger.timeline`. Traces carry meta {target, view: "rate" or "total"} for the
    page's switches; those of the first target's running total are visible. Where there are more than eight
    groups, all but the seven of the largest |value| are one line.
    """
    frame = timeline.with_columns(group=pl.col(column).cast(pl.String))
    weights = frame.group_by("group").agg(pl.col("value").abs().sum()).sort("value", "group", descending=True)
    names = weights["group"].to_list()
    shown = names if len(names) <= MOST_LINES else names[: MOST_LINES - 1]
    rest = len(names) - len(shown)
    small = pl.lit(f"{rest} smaller groups")
    kept = pl.col("group").is_in(shown, nulls_equal=True)
    frame = frame.with_columns(group=pl.when(kept).then("group").otherwise(small))
    lines = [*shown, f"{rest} smaller groups"] if rest else shown
    spans = frame.select("bin", "first_step", "last_step").unique("bin").sort("bin")
    figure = Figure()
    for target in targets:
        of_target = frame.filter(target=target)
        for position, name in enumerate(lines):
            values = of_target.filter(pl.col("group").eq_missing(name)).group_by("bin").agg(pl.col("value").sum())
            line = spans.join(values, on="bin", how="left").sort("bin").with_columns(pl.col("value").fill_null(0.0))
            for view, y, unit in (
                ("total", pl.col("value").cum_sum(), "nats so far"),
                ("rate", pl.col("value") / (pl.col("last_step") - pl.col("first_step") + 1), "nats per step"),
            ):
                figure.add_trace(
                    Scatter(
                        x=line["last_step"].to_list(),
                        y=line.select(y).to_series().to_list(),
                        customdata=line["first_step"].to_list(),
                        name=label(name),
                        mode="lines+markers" if line.height <= 60 else "lines",
                        marker={"size": 4},
                        line=_line(position),
                        visible=target == targets[0] and view == "total",
                        meta={"target": target, "view": view},
                        hovertemplate=f"steps %{{customdata}} to %{{x}}<br>%{{y:+.4g}} {unit}",
                    )
                )
    return _finish(figure, x="training step", y="value (nats)", height=400), rest


def horizon_figure(comparisons: Sequence[Comparison], labels: Sequence[str]) -> Figure:
    """The total value by scheme, a line for each group and one for all examples; `labels` name the schemes.

    Traces carry meta {target} for the page's switch; those of the first target are visible. Where there are more than
    eight groups, all but the seven of the largest |value| are one line.
    """
    figure, names = Figure(), [label(name) for name in labels]
    for comparison, rows in zip(comparisons, horizon_rows(comparisons), strict=True):
        for position, (name, values) in enumerate(rows):
            figure.add_trace(
                Scatter(
                    x=list(range(len(names))),  # positions: they stay apart where two schemes are labelled alike
                    y=values,
                    name=label(name),
                    mode="lines+markers",
                    marker={"size": 7},
                    line={"color": ZERO, "width": 2, "dash": "dash"} if position == 0 else _line(position - 1),
                    connectgaps=True,
                    visible=comparison is comparisons[0],
                    meta={"target": comparison.target},
                    customdata=names,
                    hovertemplate="%{customdata}<br>%{y:+.4g} nats",
                )
            )
    _finish(figure, x="scheme, by how far it looks ahead", y="total value (nats)", height=380)
    lines = [name.replace(" ", "<br>") for name in names]  # a telephone has room for a word
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": lines}
    figure.update_xaxes(range=[-0.25, len(names) - 0.75], **ticks)
    return figure.update_yaxes(zeroline=True)


def horizon_rows(comparisons: Sequence[Comparison]) -> list[HorizonRows]:
    """Of each target its lines, with a value (nats, or None) by scheme: all examples; then the groups, the same for
    each target, by |value| over all of them, the smallest of more than eight added up.
    """
    weights: dict[str | None, float] = {}
    for comparison in comparisons:
        for name, values in comparison.groups.items():
            weights[name] = weights.get(name, 0.0) + sum(abs(value or 0.0) for value in values)
    names = sorted(weights, key=lambda name: (-weights[name], str(name)))
    kept = names if len(names) <= MOST_LINES else names[: MOST_LINES - 1]
    found: list[HorizonRows] = []
    for every, groups in ((of.every, of.groups) for of in comparisons):
        nothing = [None if value is None else 0.0 for value in every]
        rows: HorizonRows = [(EVERY, every), *((name, groups.get(name, nothing)) for name in kept)]
        if rest := names[len(kept) :]:
            columns = zip(nothing, *(groups.get(name, nothing) for name in rest), strict=True)
            added = [None if column[0] is None else sum(value or 0.0 for value in column) for column in columns]
            rows.append((f"{len(rest)} smaller groups", added))
        found.append(rows)
    return found


def nats(value: float) -> str:
    """A value in nats for people: signed, three significant digits."""
    return "0" if value == 0 else f"{value:+#.3g}" if abs(value) < 100 else f"{value:+,.0f}"


def _line(position: int) -> dict[str, object]:
    dash = ("solid", "dash", "dot")[position // len(PALETTE) % 3]
    return {"color": PALETTE[position % len(PALETTE)], "width": 2, "dash": dash}


def _finish(figure: Figure, *, x: str, y: str, height: int) -> Figure:
    """The look that all figures share; no colour of paper, axes or text."""
    figure.update_xaxes(title={"text": x, "standoff": 12}, automargin=True, zeroline=False)
    figure.update_yaxes(title={"text": y, "standoff": 12}, automargin=True)
    return figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )

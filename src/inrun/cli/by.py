"""`inrun by`: the value of each group of examples for each target."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from inrun.cli.top import nats, output_console
from inrun.ledger import Ledger
from inrun.report import group_order, one_line
from inrun.report.schemes import scheme_name, scheme_unit

_LONGEST_NAME = 30
_TARGET_WIDTH = 19  # of a target's two columns, with their borders, unless its name is longer


@dataclass(frozen=True)
class By:
    """Print what each group of examples was worth to each target, and its share of examples below zero.

    Values are in nats of the target's loss, summed over the run; positive = helped, lowered the loss.
    With --scheme of a replay, nats of its loss later: at the end of the run, to first order.

    Example: inrun by runs/demo domain --target math
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder, the one that holds run.json."""
    column: Annotated[Positional[str], arg(metavar="COLUMN")]
    """The column of the examples table to group by."""
    target: Annotated[str | None, arg(metavar="NAME")] = None
    """Only this target; by default every target."""
    scheme: Annotated[str | None, arg(metavar="NAME")] = None
    """Values of this scheme, such as replay or replay-h10; by default those of the run itself."""
    json: bool = False
    """Print JSON rows, one per group and target, instead of a table."""


def run(config: By) -> int:
    """Print the table or the JSON rows."""
    ledger = Ledger(config.run, config.scheme)
    if config.json:
        rows = ledger.by(config.column, config.target)
        if config.target is not None:
            rows = rows.with_columns(target=pl.lit(config.target))
        print(rows.write_json())
    else:
        print_by(ledger, config.column, target=config.target)
    return 0


def print_by(ledger: Ledger, column: str, *, target: str | None = None, console: Console | None = None) -> None:
    """Print groups x targets: total value in nats, share of examples below zero; * = best of its target.

    Examples of no group, or absent from the examples table, are a row of their own, so totals add up. Targets
    that do not fit the console's width go to a further table. LedgerError: unknown column or target.
    """
    console = console or output_console()
    targets = ledger.targets if target is None else [target]
    rows = ledger.by(column, target)
    if target is not None:
        rows = rows.with_columns(target=pl.lit(target))
    groups = rows.group_by(column).agg(pl.col("examples").max(), pl.col("count").max(), pl.col("value").sum())
    order = group_order(groups[column].to_list(), groups["value"].to_list(), targets)
    groups = groups[order]
    cells = {(row[column], row["target"]): (row["value"], row["negative"]) for row in rows.iter_rows(named=True)}
    best = {name: max((c[0] for (_, t), c in cells.items() if t == name), default=0.0) for name in targets}
    names = ["(none)" if name is None else one_line(name, _LONGEST_NAME) for name in groups[column]]
    room = console.width - max([len(name) for name in [*names, column]], default=0) - 28
    for chunk in _chunks(targets, room):
        table = Table(
            title=Text(f"value by {one_line(column, _LONGEST_NAME)} and target; {scheme_name(ledger)}"),
            title_justify="left",
            caption=Text(
                f"{scheme_unit(ledger)}; positive = helped, lowered the loss; "
                "* = the target's best; <0 = share of examples with a value below zero"
            ),
            caption_justify="left",
        )
        table.add_column(Text(one_line(column, _LONGEST_NAME)), no_wrap=True)
        table.add_column("examples", justify="right", no_wrap=True)
        table.add_column("uses", justify="right", no_wrap=True)
        for name in chunk:
            table.add_column(Text(one_line(name, _LONGEST_NAME)), justify="right", no_wrap=True)
            table.add_column("<0", justify="right", no_wrap=True)
        for label, (group, examples, uses, _) in zip(names, groups.iter_rows(), strict=True):
            row = [label, f"{examples:,}", f"{uses:,}"]
            for name in chunk:
                value, negative = cells.get((group, name), (None, None))
                mark = "*" if value is not None and value == best[name] and len(names) > 1 else " "
                row += [
                    "-" if value is None else nats(value) + mark,
                    "-" if negative is None else f"{negative:.0%}",
                ]
            table.add_row(*[Text(cell) for cell in row])
        console.print(table)


def _chunks(targets: list[str], room: int) -> list[list[str]]:
    """Targets in runs that fit `room` columns each; at least one a run."""
    chunks: list[list[str]] = [[]]
    used = 0
    for name in targets:
        width = max(_TARGET_WIDTH, len(one_line(name, _LONGEST_NAME)) + 10)
        if chunks[-1] and used + width > room:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += width
    return chunks

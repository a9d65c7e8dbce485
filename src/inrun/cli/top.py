"""`inrun top`: the examples that helped a target most, or least."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from inrun.ledger import Ledger
from inrun.report import group_columns, one_line, ranked, text_column
from inrun.report.schemes import scheme_name, scheme_unit

_PIPED_WIDTH = 120
_LONGEST_CELL = 40


@dataclass(frozen=True)
class Top:
    """Print the examples that helped a target most; with --worst, those that hurt it most.

    Values are in nats of the target's loss, summed over the run; positive = helped, lowered the loss.
    With --scheme of a replay, nats of its loss later: at the end of the run, to first order.

    Example: inrun top runs/demo --target math -n 10 --worst
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder, the one that holds run.json."""
    target: Annotated[str | None, arg(metavar="NAME")] = None
    """Value for this target; by default the sum over all targets."""
    scheme: Annotated[str | None, arg(metavar="NAME")] = None
    """Values of this scheme, such as replay or replay-h10; by default those of the run itself."""
    n: Annotated[int, arg(aliases=["-n"], metavar="N")] = 20
    """How many examples."""
    worst: bool = False
    """The least valuable instead, worst first."""
    json: bool = False
    """Print JSON rows with every column instead of a table."""


def run(config: Top) -> int:
    """Print the table or the JSON rows."""
    ledger = Ledger(config.run, config.scheme)
    if config.json:
        print(ranked(ledger, config.n, config.target, worst=config.worst).write_json())
    else:
        print_top(ledger, config.n, target=config.target, worst=config.worst)
    return 0


def print_top(
    ledger: Ledger,
    n: int = 20,
    *,
    target: str | None = None,
    worst: bool = False,
    console: Console | None = None,
) -> None:
    """Print the `n` most helpful (`worst`: most harmful) examples, one line each, cut to the console's width.

    `target` None means the sum over all targets. Raises LedgerError for an unknown target.
    """
    console = console or output_console()
    rows = ranked(ledger, n, target, worst=worst)
    # one group column, and another for every 20 columns beyond 80: the text needs room too
    groups = group_columns(ledger)[: 1 + max(console.width - 80, 0) // 20]
    preview = text_column(ledger)
    which = "most harmful (or least helpful)" if worst else "most helpful"
    goal = f"target {target}" if target is not None else f"the sum of targets {', '.join(ledger.targets)}"
    table = Table(
        title=Text(f"{len(rows)} {which} examples for {one_line(goal)}; {scheme_name(ledger)}"),
        title_justify="left",
        caption=Text(f"{scheme_unit(ledger)}; positive = helped, lowered the loss"),
        caption_justify="left",
        expand=preview is not None,
    )
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("id", overflow="ellipsis", no_wrap=True, max_width=_LONGEST_CELL)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("uses", justify="right", no_wrap=True)
    for name in groups:
        table.add_column(Text(one_line(name, 20)), overflow="ellipsis", no_wrap=True, max_width=24)
    if preview is not None:
        table.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)
    for rank, row in enumerate(rows.iter_rows(named=True), start=1):
        table.add_row(*_cells(rank, row, groups, preview, console.width))
    console.print(table)


def _cells(rank: int, row: dict[str, Any], groups: list[str], preview: str | None, width: int) -> list[Text]:
    # Text, never str: what an example says is not markup
    cells = [str(rank), one_line(row["id"], _LONGEST_CELL), nats(row["value"]), f"{row['count']:,}"]
    cells += ["-" if row[name] is None else one_line(row[name], _LONGEST_CELL) for name in groups]
    if preview is not None:
        cells.append("" if row[preview] is None else one_line(row[preview], width))
    return [Text(cell) for cell in cells]


def nats(value: float) -> str:
    """A value as shown in tables, in nats: signed, four significant digits."""
    return f"{value:+.4g}" if 0 < abs(value) < 1e-3 else f"{value + 0.0:+.4f}"  # + 0.0: no "-0.0000"


def output_console() -> Console:
    """The console of standard output; what is piped is 120 columns wide unless COLUMNS says otherwise."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console

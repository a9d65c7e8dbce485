"""Seeing the values: which columns describe an example, how to show its text, and the page.

Figures and page are loaded only when a page is written: `inrun top` needs none of it.
"""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from inrun.errors import InrunError
from inrun.ledger import Ledger

__all__ = [
    "ReportError",
    "group_columns",
    "group_order",
    "one_line",
    "printable",
    "text_column",
    "write_report",
]

TEXT_COLUMNS = ("preview", "text")
TOKENS_COLUMN = "token_texts"
FAVOURITE_GROUPS = ("domain", "source")
MOST_GROUPS = 50


class ReportError(InrunError):
    """A page that could not be written; the message names the file and what to do."""


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    group: str | None = None,
    scheme: str | None = None,
) -> Path:
    """Write one self-contained HTML page about the run in `folder` and return its path.

    `out` is the page's file, `folder`/report.html by default, `folder`/report-SCHEME.html for a scheme other
    than the in-run one; it is replaced whole or not at all. `scheme` is whose values are shown, as for `inrun.Ledger`.
    `group` is the column of the examples table to group by: by default "domain", else "source", else the
    first text column of at most 50 distinct values; without any, the sections by group are left out.
    Values on the page are in nats of a target's loss, which the page says more about; positive = helped, lowered it.
    Raises LedgerError for a folder, scheme, column or part that cannot be read, ReportError where the page cannot go.
    """
    from inrun.report import page  # plotly and jinja2 are extras, loaded where they are used

    return page.write_report(Path(folder), None if out is None else Path(out), group=group, scheme=scheme)


def group_columns(ledger: Ledger) -> list[str]:
    """The columns of the examples table worth grouping by, best first: text of 1 to 50 distinct values.

    "domain" and "source" come first whatever their number of values. Empty without an examples table.
    """
    examples = ledger.examples()
    if examples is None:
        return []
    schema = examples.collect_schema()
    favourites = [name for name in FAVOURITE_GROUPS if name in schema]
    kinds = (pl.String, pl.Categorical, pl.Enum)
    asked = [
        name for name, kind in schema.items() if kind in kinds and name not in ("id", *TEXT_COLUMNS, *FAVOURITE_GROUPS)
    ]
    if not asked:
        return favourites
    counts = examples.select(pl.len().alias("id"), pl.col(asked).n_unique()).collect(engine="streaming").row(0)
    # a column with a value of its own for every example names examples, it does not group them
    most = min(MOST_GROUPS, max(counts[0] - 1, 1))
    return favourites + [name for name, count in zip(asked, counts[1:], strict=True) if count <= most]


def ranked(ledger: Ledger, n: int, target: str | None, *, worst: bool = False) -> pl.DataFrame:
    """The `n` most helpful (`worst`: most harmful) examples, as `Ledger.top`, count always being uses.

    Without a target the value is the sum over all targets, and a use is counted once, not once per target.
    """
    rows = ledger.bottom(n, target) if worst else ledger.top(n, target)
    if target is not None or not rows.height:
        return rows
    found = ledger.scan().filter(pl.col("id").is_in(rows["id"].to_list()))
    uses = found.group_by("id", "target").len("uses").group_by("id").agg(pl.col("uses").max().cast(pl.Int64))
    counts = dict(uses.collect(engine="streaming").iter_rows())
    return rows.with_columns(count=pl.Series([counts[one] for one in rows["id"]], dtype=pl.Int64))


def text_column(ledger: Ledger) -> str | None:
    """The column of the examples table that shows an example's text: "preview", else "text", else None."""
    examples = ledger.examples()
    if examples is None:
        return None
    schema = examples.collect_schema()
    return next((name for name in TEXT_COLUMNS if schema.get(name) == pl.String), None)


def has_token_texts(ledger: Ledger) -> bool:
    """Whether the examples table has the texts of the examples' tokens: a column "token_texts", lists of strings."""
    examples = ledger.examples()
    return examples is not None and examples.collect_schema().get(TOKENS_COLUMN) == pl.List(pl.String)


def group_order(names: Sequence[object], totals: Sequence[float], targets: Sequence[str]) -> list[int]:
    """The order to show groups in, as positions: those named like a target in its place, then by total value.

    So a source and the target drawn from it meet on the diagonal of a table.
    """
    place = {target: position for position, target in enumerate(targets)}
    return sorted(range(len(names)), key=lambda i: (place.get(str(names[i]), len(place)), -totals[i], str(names[i])))


def printable(text: object) -> str:
    """`text` with what could steer a terminal or a page (control, direction characters) as spaces."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in _UNSEEN else " "
        for character in str(text)
    )


_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def one_line(text: object, length: int = 200) -> str:
    """`text` on one line of at most `length` characters, ending in an ellipsis where it was cut."""
    line = " ".join(printable(text).split())
    return line if len(line) <= length else line[: max(length - 1, 0)].rstrip() + "…"

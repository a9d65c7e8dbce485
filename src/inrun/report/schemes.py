"""Which scheme's values are shown, in words; and how the schemes of a run compare, by group and by example."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from inrun.ledger import Ledger
from inrun.ledger.schemes import in_run_scheme
from inrun.report import one_line

EVERY = "all examples"


def scheme_name(ledger: Ledger) -> str:
    """For titles: "scheme path (in-run)", "scheme replay-h10"."""
    if ledger.scheme is not None:
        return f"scheme {one_line(ledger.scheme, 40)}"
    name = in_run_scheme(ledger.run)
    return f"scheme {one_line(name, 40)} (in-run)" if name else "in-run"


def scheme_unit(ledger: Ledger) -> str:
    """What the values are numbers of, without the sign."""
    if not _is_replay(ledger):
        return "nats of target loss over the run"
    return f"nats of the target's loss {_when(ledger)}, to first order"


def scheme_meaning(ledger: Ledger) -> str:
    """One sentence: what a use of an example is worth."""
    if not _is_replay(ledger):
        what = "In-run: " if ledger.scheme is None else ""
        return f"{what}a use of an example is worth what it did to the target's loss in its own step."
    return (
        f"Replay: a use of an example is worth what it did to the target's loss {_when(ledger)}, to first order, "
        "as found by going back through the recorded run."
    )


def scheme_label(ledger: Ledger) -> str:
    """For an axis: "in-run", "h10", "full replay"."""
    if not _is_replay(ledger):
        return "in-run" if ledger.scheme is None else one_line(ledger.scheme, 20)
    horizon = ledger.run.get("horizon")
    return "full replay" if horizon is None else f"h{horizon:g}"


def _is_replay(ledger: Ledger) -> bool:
    return ledger.scheme is not None and ledger.run.get("scheme") == "replay"


def _when(ledger: Ledger) -> str:
    horizon = ledger.run.get("horizon")
    if horizon is None:
        return "at the end of the run"
    if horizon == 0:
        return "at the end of each use's step"
    return f"{horizon:g} step{'' if horizon == 1 else 's'} after each use, on average (a geometric horizon)"


class Comparison(NamedTuple):
    """The values for one target by the schemes that were compared."""

    target: str
    every: list[float | None]  # the sum over all examples by each scheme (nats); None where it has none for the target
    groups: dict[str | None, list[float | None]]  # the same of each group; None: the examples of no group
    correlations: list[list[float | None]]  # of each scheme with those before it, see `rank_correlation`


def compare(ledgers: Sequence[Ledger], column: str | None) -> list[Comparison]:
    """How the schemes of one run, each opened as a ledger, value the examples for each target that any of them has.

    `column` groups the examples; without it, no groups are compared.
    """
    known = [ledger.targets for ledger in ledgers]
    found = []
    for target in dict.fromkeys(name for names in known for name in names):
        having = [ledger if target in names else None for ledger, names in zip(ledgers, known, strict=True)]
        found.append(_compare(having, column, target))
    return found


def _compare(ledgers: Sequence[Ledger | None], column: str | None, target: str) -> Comparison:
    """`ledgers` has None for a scheme that has not the target."""
    values = [pl.DataFrame() if of is None else of.values(target).select("id", "value") for of in ledgers]
    every = [float(of["value"].sum()) if of.height else None for of in values]
    groups: dict[str | None, list[float | None]] = {}
    for at, ledger in enumerate(ledgers):
        if column is not None and ledger is not None and values[at].height:
            for group, value in ledger.by(column, target).select(pl.col(column).cast(pl.String), "value").iter_rows():
                found = groups.setdefault(group, [None if of is None else 0.0 for of in every])
                found[at] = value
    correlations = [
        [rank_correlation(values[a], values[b]) if values[a].height and values[b].height else None for b in range(a)]
        for a in range(len(values))
    ]
    return Comparison(target, every, groups, correlations)


def rank_correlation(a: pl.DataFrame, b: pl.DataFrame) -> float | None:
    """Spearman's correlation of two tables of id and value, over the ids of both; equal values share their mean rank.

    None where it is not defined: fewer than two such ids, or one side's values all equal.
    """
    both = a.join(b, on="id", suffix="_b").select(pl.col("value", "value_b").rank("average"))
    x, y = (both[name].to_numpy() - (both.height + 1) / 2 for name in both.columns)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return max(-1.0, min(1.0, float(x @ y) / size)) if size > 0 else None

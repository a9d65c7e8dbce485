"""Reading a ledger: totals per example, group, step and time.

Values are in nats of target loss, positive = helped. Nothing here loads a run into memory: the parts are
scanned and aggregated in a stream, so what is held is one row per example or per group. Of large ledgers the examples'
totals are kept (`inrun.ledger.totals`) and gone through in spans of ids. A ledger can be read while it is written.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from inrun.ledger.checks import Floats
from inrun.ledger.ranked import ranked
from inrun.ledger.schema import (
    EXAMPLES,
    KINDS,
    MODULES,
    STEPS,
    STEPS_SCHEMA,
    TOKENS,
    UNREADABLE,
    VALUES,
    LedgerError,
    Part,
    corrupt,
    first_corrupt,
    id_type_in,
    id_type_of,
    list_parts,
    modules_schema,
    read_run,
    scan,
    scan_steps,
    values_schema,
)
from inrun.ledger.schemes import list_schemes, scheme_folder
from inrun.ledger.totals import Totals, compact, later_parts, to_stderr, usable

# Bytes of parts from which on it pays to keep their totals: some 270 million values, that a query adds up in seconds.
_WORTH_KEEPING = 2**31
_MANY = 2**20  # groups that may wait to be added up

# Columns of the answers: a column of the examples table with such a name reads as example_NAME.
_TAKEN = (
    "step",
    "target",
    "value",
    "count",
    "examples",
    "mean",
    "negative",
    "bin",
    "first_step",
    "last_step",
    "module",
)


class Ledger:
    """The ledger in a folder, of the run's own scheme or of another (`schemes`) by its name: then every method answers
    with that scheme's values, by the run's table of examples.

    `run` is the scheme's run.json, `scheme` its name (None for the in-run one, by whichever name it was asked for),
    `folder` where its rows are, `home` the run's folder.

    Raises LedgerError where there is no run.json or not a readable one, or no such scheme. Every method raises
    LedgerError naming the file where a part is corrupt, and one naming what there is where a target or column is
    unknown.
    """

    run: dict[str, Any]

    def __init__(self, folder: str | os.PathLike[str], scheme: str | None = None) -> None:
        self.home = self.folder = Path(folder)
        self.run = read_run(self.home)
        self.scheme: str | None = None
        if scheme is not None and (place := scheme_folder(self.home, self.run, scheme)):
            self.folder, self.scheme, self.run = place, scheme, read_run(place)
        # Parts whose columns were looked at, and the type of their ids.
        self._seen: dict[Path, type[pl.DataType]] = {}

    @property
    def targets(self) -> list[str]:
        """Names of the targets: as run.json lists them, then any others that were booked."""
        declared = [name for name in self.run.get("targets") or [] if isinstance(name, str)]
        booked = self._scan_steps() if list_parts(self.folder, STEPS) else self.scan()
        found = self._collect(booked.select(pl.col("target").unique().sort()))["target"]
        return list(dict.fromkeys([*declared, *found]))

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes that the run has values of beside its own, by horizon: the full replay is the last."""
        return list_schemes(self.home)

    def scan(self) -> pl.LazyFrame:
        """Every use of an example, lazily: step, id, target, value."""
        return self._scan_values(list_parts(self.folder, VALUES))

    def _scan_values(self, parts: list[Part], id_type: type[pl.DataType] | None = None) -> pl.LazyFrame:
        """The rows of these parts. Raises LedgerError where their ids are of several types, or not of `id_type`."""
        paths = [part.path for part in parts]
        if not paths:
            return pl.LazyFrame(schema=values_schema(id_type or self._examples_id_type() or pl.Int64))
        for path in paths:
            if path not in self._seen:
                self._seen[path] = id_type_of(path)
            if self._seen[path] is not (id_type or self._seen[paths[0]]):
                raise LedgerError(
                    f"{path} has ids of another type than {'others' if id_type else paths[0].name}: its rank booked "
                    "them otherwise. Run it again with ids of one type."
                )
        return scan(paths)

    def values(self, target: str | None = None) -> pl.DataFrame:
        """One row per example (and target, where None is given), the most helpful first.

        Columns: id, [target,] value (sum over its uses), count (uses).
        """
        frames = list(self._totals(target))
        if target is None or len(frames) == 1:
            return pl.concat(frames).sort("value", "id", descending=[True, False])
        return ranked(frames)

    def compact(self) -> None:
        """Bring the totals of the examples up to date, which queries of a large ledger are answered from.

        A query does so by itself when more than 2 GB of parts are in no totals (and the folder can be written to), and
        tells so on stderr. It takes a minute or two for 400 million values, in 1.5 GB of memory, and as much disk
        again as the values take, twice that while it works (docs/scale.md). Raises LedgerError where the disk refuses.
        """
        compact(self.folder, to_stderr)

    def steps(self, target: str | None = None) -> pl.DataFrame:
        """One row per step and target, sorted so, with the columns of steps/ (`inrun.ledger.schema`)."""
        steps = self._of_target(self._scan_steps(), target)
        return self._collect(steps.sort("step", "target"))

    def modules(self, target: str | None = None, by: str | None = None) -> pl.DataFrame:
        """One row per example and module (and target, where None is given), the most helpful first: what of its value
        came through the module. They add up to the values.

        Columns: id, [target,] module, value (sum over its uses). With `by`, a column of the examples table, one row
        per group and module, with the group in place of the id. Empty where the run kept no values by module.
        """
        groups = None if by is None else self._groups(by)
        paths = [part.path for part in list_parts(self.folder, MODULES)]
        id_type = id_type_in(self.scan().collect_schema())
        rows = scan(paths) if paths else pl.LazyFrame(schema=modules_schema(id_type))
        keys = ["id" if by is None else by, *(["target"] if target is None else []), "module"]
        rows = self._of_target(rows, target)
        if groups is not None:
            rows = rows.join(groups, on="id", how="left")
        totals = rows.group_by(keys).agg(pl.col("value").sum())
        return self._collect(totals.sort("value", *keys, descending=[True] + [False] * len(keys)))

    def token_values(self, id: int | str, target: str) -> Floats | None:
        """The example's values by token: float64 [tokens], in nats, the sum over its uses.

        None where the run kept none of it, or where its uses had different numbers of tokens.
        """
        return self.values_by_token([id], target).get(id)

    def values_by_token(self, ids: Iterable[int | str], target: str) -> dict[int | str, Floats]:
        """`token_values` of several examples, of those that have some."""
        paths, wanted = [part.path for part in list_parts(self.folder, TOKENS)], list(ids)
        if not paths or not wanted:
            return {}
        rows = self._of_target(scan(paths), target).filter(pl.col("id").is_in(wanted))
        found: dict[int | str, list[Floats]] = {}
        for one, values in self._collect(rows.sort("step").select("id", "token_values")).iter_rows():
            found.setdefault(one, []).append(np.array(values))
        return {one: np.sum(uses, axis=0) for one, uses in found.items() if len({len(use) for use in uses}) == 1}

    def examples(self) -> pl.LazyFrame | None:
        """The examples table, lazily: id and the user's columns; None where none was written.

        A column with the name of a ledger's own (value, count, target, ...) reads as example_NAME.
        """
        path = self.home / EXAMPLES
        if not path.exists():
            return None
        examples = scan(path)
        try:
            names = examples.collect_schema().names()
        except UNREADABLE as error:
            raise corrupt(path, error) from error
        return examples.rename({name: f"example_{name}" for name in names if name in _TAKEN})

    def top(self, n: int = 20, target: str | None = None) -> pl.DataFrame:
        """The n most helpful examples: id, value, count, the examples' columns. No target: the sum of all."""
        return self._extreme(n, target, best=True)

    def bottom(self, n: int = 20, target: str | None = None) -> pl.DataFrame:
        """The n most harmful examples, the worst first; else as `top`."""
        return self._extreme(n, target, best=False)

    def by(self, column: str, target: str | None = None) -> pl.DataFrame:
        """One row per group of examples (and target, where None is given), the most helpful group first.

        Columns: the group, [target,] value (sum), count (uses), examples (distinct ids used), mean (value per
        use), negative (share of those examples whose value is below 0). Ids absent from the examples table
        are the group null, so that the groups add up to the run.
        """
        groups = self._groups(column)
        keys = [column, "target"] if target is None else [column]
        if self._stored() and not self._collect(groups.select((pl.col("id") > pl.col("id").shift()).all())).item():
            groups = self._collect(groups).lazy()  # each span's would be looked for in all of the file
        partial: list[pl.DataFrame] = []
        for totals in self._totals(target):
            ends = pl.lit(totals["id"].min()), pl.lit(totals["id"].max())
            of_span = self._collect(groups.filter(pl.col("id").is_between(*ends)))
            if of_span["id"].equals(totals["id"]):  # as where all of a sorted table was used: that takes no join
                joined = totals.with_columns(of_span[column])
            else:
                joined = self._collect(totals.lazy().join(of_span.lazy(), on="id", how="left"))
            partial.append(
                joined.group_by(keys).agg(
                    pl.col("value").sum(),
                    pl.col("count").sum(),
                    pl.len().cast(pl.Int64).alias("examples"),
                    (pl.col("value") < 0).sum().cast(pl.Int64).alias("negative"),
                )
            )
            if sum(frame.height for frame in partial) > 2 * partial[0].height + _MANY:
                partial = [pl.concat(partial).group_by(keys).agg(pl.all().sum())]
        grouped = pl.concat(partial).group_by(keys).agg(pl.all().sum())
        shares = grouped.with_columns(
            mean=pl.col("value") / pl.col("count"), negative=pl.col("negative") / pl.col("examples")
        )
        columns = [*keys, "value", "count", "examples", "mean", "negative"]
        return shares.select(columns).sort("value", *keys, descending=[True] + [False] * len(keys))

    def timeline(self, column: str, bins: int = 40, target: str | None = None) -> pl.DataFrame:
        """The value of each group over the run, in at most `bins` spans of about as many steps each.

        Columns: the group, target, bin (from 0), first_step, last_step (both inclusive), value, count. A
        group that was not used in a span has no row there. The spans are the same for every target.
        """
        _at_least_one("bins", bins)
        groups = self._groups(column)
        rows = self.scan()
        used = self._of_target(rows, target)
        first, last = self._collect(rows.select(low=pl.col("step").min(), high=pl.col("step").max())).row(0)
        first, last = first or 0, last or 0
        span = last - first + 1
        bins = min(bins, span)
        # Integer arithmetic: step s is in bin b where b = (s - first) * bins // span.
        edge = pl.col("bin") * span + bins - 1
        lined = (
            used.join(groups, on="id", how="left")
            .with_columns(bin=(pl.col("step") - first) * bins // span)
            .group_by(column, "target", "bin")
            .agg(pl.col("value").sum(), pl.len().cast(pl.Int64).alias("count"))
            .with_columns(first_step=edge // bins + first, last_step=(edge + span) // bins + first - 1)
            .select(column, "target", "bin", "first_step", "last_step", "value", "count")
            .sort("target", column, "bin")
        )
        return self._collect(lined)

    def distribution(self, target: str, bins: int = 60) -> pl.DataFrame:
        """Histogram of the examples' values: left, right (edges, in nats), count. Without values: no rows."""
        _at_least_one("bins", bins)
        totals = pl.concat([frame["value"] for frame in self._totals(target)]).to_numpy()
        if len(totals) == 0 or totals.min() == totals.max():
            edges, counts = np.repeat(totals[:1], 2), np.full(len(totals[:1]), len(totals))
        else:
            counts, edges = np.histogram(totals, bins)
        return pl.DataFrame(
            {"left": edges[:-1], "right": edges[1:], "count": counts},
            schema={"left": pl.Float64, "right": pl.Float64, "count": pl.Int64},
        )

    def _scan_steps(self) -> pl.LazyFrame:
        paths = [part.path for part in list_parts(self.folder, STEPS)]
        return scan_steps(paths) if paths else pl.LazyFrame(schema=STEPS_SCHEMA)

    def _of_target(self, rows: pl.LazyFrame, target: str | None) -> pl.LazyFrame:
        if target is None:
            return rows
        targets = self.targets
        if target not in targets:
            known = ", ".join(targets) or "none yet"
            raise LedgerError(f"{self.folder}: there is no target {target!r}; the targets are: {known}.")
        return rows.filter(pl.col("target") == target)

    def _totals(self, target: str | None) -> Iterator[pl.DataFrame]:
        """The examples' totals: id, [target,] value, count. In several frames where totals are kept: then each is
        sorted by id, and none has an id that is below one of an earlier frame. There is always one.
        """
        keys = ["id", "target"] if target is None else ["id"]
        stored = self._stored()
        parts = self._scan_values(later_parts(self.folder, stored), None if stored is None else stored.id_type)
        rows = self._of_target(parts, target)
        added = pl.col("value").sum(), pl.len().cast(pl.Int64).alias("count")
        later = self._collect(rows.group_by(keys).agg(*added).select(*keys, "value", "count"))
        none = True
        if stored is not None:
            later = later.sort("id")
            for frame in stored.frames(target):
                until = later["id"].search_sorted(frame["id"][-1], side="right") if frame.height else 0
                if until:
                    both = pl.concat([frame, later.head(until)])
                    frame = both.group_by(keys).agg(pl.all().sum()).sort("id")
                    later = later.slice(until)
                if frame.height:
                    yield frame
                    none = False
        if none or later.height:
            yield later

    def _stored(self) -> Totals | None:
        """The totals that are kept, made first where there is much that they do not cover."""
        stored = usable(self.folder)
        waiting = sum(part.path.stat().st_size for part in later_parts(self.folder, stored))
        if waiting > _WORTH_KEEPING and os.access(self.folder, os.W_OK):
            self.compact()
            stored = usable(self.folder)
        return stored

    def _extreme(self, n: int, target: str | None, best: bool) -> pl.DataFrame:
        _at_least_one("n", n)
        found: pl.DataFrame | None = None
        for totals in self._totals(target):
            if target is None:
                # Every use has a value for each target: the uses are not added up.
                totals = totals.group_by("id").agg(pl.col("value").sum(), pl.col("count").max())
            among = totals if found is None else pl.concat([found, totals])
            found = self._collect(among.lazy().sort("value", "id", descending=[best, False]).head(n))
        assert found is not None
        examples = self._examples_to_join()
        if examples is None:
            return found
        shown = self._collect(examples.filter(pl.col("id").is_in(found["id"].to_list())))
        return found.join(shown, on="id", how="left", maintain_order="left")

    def _groups(self, column: str) -> pl.LazyFrame:
        """id and `column` of the examples table."""
        examples = self._examples_to_join()
        if examples is None:
            raise LedgerError(
                f"{self.home}: the values cannot be grouped by {column!r} without an examples table; "
                "write one with inrun.write_examples(folder, frame): a column id and those to group by."
            )
        columns = [name for name in examples.collect_schema().names() if name != "id"]
        if column not in columns:
            raise LedgerError(
                f"{self.home}: the examples have no column {column!r} to group by; "
                f"there are: {', '.join(columns) or 'none'}."
            )
        return examples.select("id", column)

    def _examples_id_type(self) -> type[pl.DataType] | None:
        examples = self.examples()
        if examples is None:
            return None
        return pl.String if examples.collect_schema().get("id") == pl.String else pl.Int64

    def _examples_to_join(self) -> pl.LazyFrame | None:
        """The examples table, its ids known to be of the type that the run booked."""
        examples = self.examples()
        if examples is None:
            return None
        stored = usable(self.folder)
        booked = self.scan().collect_schema()["id"] if stored is None else stored.id_type
        given = examples.collect_schema().get("id")
        if given != booked:
            raise LedgerError(
                f"{self.home / EXAMPLES}: its ids are {given}, but the run booked {booked}; "
                "write it again with the ids as they were booked."
            )
        return examples

    def _collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        try:
            return frame.collect(engine="streaming")
        except UNREADABLE as error:
            raise self._blame(error) from error

    def _blame(self, error: BaseException) -> LedgerError:
        paths = [part.path for kind in KINDS for part in list_parts(self.folder, kind)]
        return first_corrupt([*paths, self.home / EXAMPLES]) or LedgerError(
            f"{self.folder} could not be read ({error}). If its run is being resumed, read it again."
        )


def _at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise LedgerError(f"{name} is {number}; give 1 or more.")

"""The schemes of a run: the in-run one, whose rows are the run's own, and those that were computed of it later.

    RUN/schemes/NAME/   laid out as a ledger, without examples: they are those of RUN

A replay's run.json has "scheme": "replay" and "horizon": how many steps after its use, on average, an example's effect
is looked at (a geometric horizon; 0: at the end of the step itself; null: at the end of the run).
"""

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from inrun.ledger.schema import RUN, LedgerError, read_run

SCHEMES = "schemes"


def in_run_scheme(run: Mapping[str, Any]) -> str | None:
    """The name of the scheme of RUN/run.json, where it says it."""
    name = run.get("scheme", (run.get("identity") or {}).get("scheme"))
    return name if isinstance(name, str) else None


def list_schemes(folder: Path) -> list[str]:
    """Names of the schemes of the run in `folder` beside its own, by horizon: the full replay, without one, is last.

    Raises LedgerError where the run.json of one of them cannot be read.
    """
    found = []
    if (folder / SCHEMES).is_dir():
        for place in (folder / SCHEMES).iterdir():
            if not place.name.startswith(".") and (place / RUN).exists():
                horizon = read_run(place).get("horizon")
                found.append((inf if horizon is None else float(horizon), place.name))
    return [name for _, name in sorted(found)]


def scheme_folder(folder: Path, run: Mapping[str, Any], name: str) -> Path | None:
    """Where the rows of the scheme are; None where it is the in-run one. `run`: RUN/run.json.

    Raises LedgerError naming the schemes that there are, where there is none of that name.
    """
    in_run = in_run_scheme(run)
    if name == in_run:
        return None
    names = list_schemes(folder)
    if name in names:  # so it is a folder's name, not a path that leads elsewhere
        return folder / SCHEMES / name
    known = [f"{in_run} (in-run)" if in_run else "the in-run one, which needs no name", *names]
    hint = "" if names else f"; `inrun replay {folder}` writes one"
    raise LedgerError(f"{folder}: there is no scheme {name!r}; the schemes are: {', '.join(known)}{hint}.")

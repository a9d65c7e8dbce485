"""`inrun report`: one HTML page about a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from inrun.report import write_report


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run: curves, values by group, best and worst examples, the books.

    Example: inrun report runs/demo --group domain --out values.html
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder, the one that holds run.json."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """The page's file; RUN/report.html by default, RUN/report-NAME.html for a scheme."""
    group: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Column of the examples table to group by; by default domain, source or another with few values."""
    scheme: Annotated[str | None, arg(metavar="NAME")] = None
    """Values of this scheme, such as replay or replay-h10; by default those of the run itself."""


def run(config: Report) -> int:
    """Write the page and print where it is."""
    print(write_report(config.run, config.out, group=config.group, scheme=config.scheme))
    return 0

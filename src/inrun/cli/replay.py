"""`inrun replay`: what every example did to a target's loss at the end of a run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from tyro.conf import Positional, arg

from inrun.errors import InrunError
from inrun.lm.config import BYTES
from inrun.lm.replay import replay_run
from inrun.replaying.face import Clock

_LINE_EVERY = 15.0  # seconds between two lines of a log


@dataclass(frozen=True)
class Replay:
    """Go back through a run of `inrun train --replayable`, and value every use of every example by what it did to the
    targets' losses at the run's end. One that is stopped goes on when the command is given again.

    Example: inrun replay runs/first --target law=law.jsonl
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run's folder."""
    target: Annotated[tuple[str, ...], arg(metavar="NAME=FILE")] = ()
    """A target and the text that it is, which may be others than the run's; by default the run's own targets."""
    horizon: Annotated[float | None, arg(metavar="STEPS")] = None
    """Look ahead by so many steps on average (0: to the step's end); by default to the end of the run."""
    hessian: Literal["auto", "double", "difference"] = "auto"
    """How the Hessian of a batch's loss is multiplied with: by a double backward pass or a difference of gradients."""
    memory: Annotated[int | Literal["auto"], BYTES] = "auto"
    """Host memory for the repeated steps, as 8GiB; auto is half of what is free."""


def run(config: Replay) -> int:
    """Carry out the replay, or the rest of one."""
    targets: dict[str, str] = {}
    for given in config.target:
        name, sign, path = given.partition("=")
        if not (name and sign and path) or name in targets:
            raise InrunError(f"--target {given!r}: give each target once, as NAME=FILE.")
        targets[name] = path
    console = Console()
    bar = _Bar(console)
    try:
        ledger = replay_run(
            config.run,
            targets or None,
            horizon=config.horizon,
            hessian=config.hessian,
            memory=config.memory,
            progress=bar,
        )
    finally:
        bar.stop()
    where = f"{shlex.quote(str(config.run))} --scheme {ledger.scheme}"
    console.print(f"see the values with: inrun top {where}, inrun report {where}", highlight=False, soft_wrap=True)
    return 0


class _Bar:
    """Where the replay is, as a bar in a terminal and as lines in a log."""

    def __init__(self, console: Console) -> None:
        self._console, self._clock, self._said = console, Clock(), 0.0
        self._bar = Progress(
            TextColumn("replay {task.completed:.0f}/{task.total}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __call__(self, done: float, steps: int, loss: float | None) -> None:
        text = self._clock.text(done, steps, loss)
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, total=steps, completed=done, description=text)
        elif self._clock.seconds - self._said >= _LINE_EVERY or done == steps:
            self._said = self._clock.seconds
            self._console.print(f"replay {done:.0f}/{steps} steps  {text}", highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._console.is_terminal:
            self._bar.stop()

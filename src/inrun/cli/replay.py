"""`inrun replay`: what every example did to a target's loss at the end of a run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from inrun.errors import InrunError
from inrun.lm.bar import Bar
from inrun.lm.config import BYTES
from inrun.lm.replay import replay_run
from inrun.replaying.face import Clock


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
    console, clock = Console(), Clock()
    bar = Bar(console, "replay {task.completed:.0f}/{task.total}")

    def progress(done: float, steps: int, loss: float | None) -> None:
        text = clock.text(done, steps, loss)
        bar.show(done, steps, text, f"replay {done:.0f}/{steps} steps  {text}")

    try:
        ledger = replay_run(
            config.run,
            targets or None,
            horizon=config.horizon,
            hessian=config.hessian,
            memory=config.memory,
            progress=progress,
        )
    finally:
        bar.stop()
    where = f"{shlex.quote(str(config.run))} --scheme {ledger.scheme}"
    console.print(f"see the values with: inrun top {where}, inrun report {where}", highlight=False, soft_wrap=True)
    return 0

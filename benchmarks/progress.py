"""How far the benchmarks are: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import Case

LINE_EVERY = 30.0  # seconds between two lines of a log
MEMORY = 12.0  # about how many seconds one line's memory takes
UNKNOWN = 60.0  # and a case that may take as long as it likes


class Shown:
    """What is measured now, and about how long the rest will take."""

    def __init__(self, console: Console, cases: Sequence[Case], with_memory: bool) -> None:
        self._console, self._with_memory = console, with_memory
        times = [case.seconds if case.seconds < float("inf") else UNKNOWN for case in cases]
        self._to_come = [
            seconds + with_memory * MEMORY * len(case.memory) for seconds, case in zip(times, cases, strict=True)
        ]
        self._title, self._left = "", 0.0
        self._begun = self._said = time.monotonic()
        self._bar = Progress(
            BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False), console=console
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Shown":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def case(self, title: str) -> None:
        """The next case begins."""
        self._title, self._left = title, self._to_come.pop(0)

    def left(self, seconds: float, memory: int) -> None:
        """What this case will still take: seconds of steps, and so many lines' memory."""
        self._left = seconds + self._with_memory * MEMORY * memory

    def tell(self, what: str) -> None:
        """What is measured."""
        now, left = time.monotonic(), self._left + sum(self._to_come)
        text = f"{self._title}, {what}  {left / 60:.0f} min left"
        self._bar.update(self._task, completed=now - self._begun, total=now - self._begun + left, description=text)
        if not self._console.is_terminal and now - self._said >= LINE_EVERY:
            self._said = now
            self._console.print(text)

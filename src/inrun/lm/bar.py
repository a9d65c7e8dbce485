"""Where long work is: a bar in a terminal, and now and then a line in a log."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

LINE_EVERY = 15.0  # seconds between two lines of a log


class Bar:
    """Shows `head` ahead of the bar, of {task.completed} and {task.total}, and a text that changes behind it."""

    def __init__(self, console: Console, head: str) -> None:
        self._console, self._said = console, time.monotonic()
        self._bar = Progress(
            # never wrapped, so that a narrow terminal takes room from the bar and not from the count
            TextColumn(head),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None)

    def begin(self, done: float, total: int) -> None:
        """Show the bar before there is anything to say; the first line of a log comes with what is said first."""
        self._said = -math.inf
        self._bar.update(self._task, total=total, completed=done)
        if self._console.is_terminal:
            self._bar.start()

    def show(self, done: float, total: int, text: str, line: str) -> None:
        """`text`: behind the bar. `line`: instead of all of it in a log, the last one and others at times."""
        now = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, total=total, completed=done, description=text)
        elif now - self._said >= LINE_EVERY or done == total:
            self._said = now
            self._console.print(line, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._console.is_terminal:  # elsewhere it never began, and stopping it would print an empty line
            self._bar.stop()

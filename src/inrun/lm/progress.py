"""Progress of a training run: loss, values booked, rate and time left, as a bar in a terminal and as lines in a log."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inrun.integrations.transformers import InrunCallback

LINE_EVERY = 15.0  # seconds between two lines of a log


class ProgressCallback(TrainerCallback):
    """Shows where the run is. The rate and the time left are of this process: a resumed run starts its clock anew."""

    def __init__(self, attached: InrunCallback, console: Console) -> None:
        self._attached, self._console = attached, console
        self._begun_at, self._begun, self._said, self._loss = 0, 0.0, 0.0, 0.0
        self._bar = Progress(
            # never wrapped, so that a narrow terminal takes room from the bar and not from the count
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun_at, self._begun, self._said = state.global_step, time.monotonic(), 0.0
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        if self._console.is_terminal:
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        attributor = self._attached.attributor
        if attributor is None:
            return
        done = state.global_step - self._begun_at
        share = 0.05 if done > 20 else 1 / max(done, 1)
        self._loss += share * ((attributor.train_loss or 0.0) - self._loss)
        now = time.monotonic()
        rate = done / (now - self._begun)
        left = (state.max_steps - state.global_step) / rate
        text = f"loss {self._loss:.3f}  values {attributor.total:+.3f} nats  {rate:.2f} steps/s  {clock(left)} left"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif now - self._said >= LINE_EVERY or state.global_step == state.max_steps:
            self._said = now
            self._console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._console.is_terminal:  # elsewhere it never began, and stopping it would print an empty line
            self._bar.stop()


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Progress of a training run: loss, values booked, rate and time left, as a bar in a terminal and as lines in a log."""

import time
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inrun.integrations.transformers import InrunCallback
from inrun.lm.bar import Bar


class ProgressCallback(TrainerCallback):
    """Shows where the run is. The rate and the time left are of this process: a resumed run starts its clock anew."""

    def __init__(self, attached: InrunCallback, console: Console) -> None:
        self._begun_at, self._begun, self._loss = 0, 0.0, 0.0
        self._attached, self._bar = attached, Bar(console, "step {task.completed}/{task.total}")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun_at, self._begun = state.global_step, time.monotonic()
        self._bar.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        attributor = self._attached.attributor
        if attributor is None:
            return
        done = state.global_step - self._begun_at
        share = 0.05 if done > 20 else 1 / max(done, 1)
        self._loss += share * ((attributor.train_loss or 0.0) - self._loss)
        rate = done / (time.monotonic() - self._begun)
        left = (state.max_steps - state.global_step) / rate
        text = f"loss {self._loss:.3f}  values {attributor.total:+.3f} nats  {rate:.2f} steps/s  {clock(left)} left"
        line = f"step {state.global_step}/{state.max_steps}  {text}"
        self._bar.show(state.global_step, state.max_steps, text, line)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        self._bar.stop()


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

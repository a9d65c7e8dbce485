"""Progress: what a terminal of 80 columns shows of it."""

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from inrun.lm.progress import ProgressCallback


def after_two_steps(console: Console) -> None:
    attributor = SimpleNamespace(train_loss=5.25, total=0.0)
    attached: Any = SimpleNamespace(attributor=attributor)
    shown = ProgressCallback(attached, console)
    arguments: TrainingArguments = SimpleNamespace()  # type: ignore[assignment]
    state, control = TrainerState(max_steps=20_000), TrainerControl()
    shown.on_train_begin(arguments, state, control)
    for step in (1, 2):
        state.global_step = step
        attributor.total += 0.25
        shown.on_step_end(arguments, state, control)
    shown.stop()
    shown.stop()


def test_a_terminal_of_80_columns_shows_count_loss_values_rate_and_time_left() -> None:
    out = io.StringIO()
    after_two_steps(Console(file=out, force_terminal=True, width=80, color_system=None))
    line = out.getvalue().rpartition("step ")[2]
    assert line.startswith("2/20000 ")
    assert "loss 5.250  values +0.500 nats" in line
    assert "steps/s" in line
    assert "left" in line
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is given back


def test_a_log_gets_lines_and_nothing_else() -> None:
    out = io.StringIO()
    after_two_steps(Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 1/20000  loss 5.250  values +0.250 nats")

"""A Trainer's own settings: autocast, activation checkpointing, torch.compile, accumulation, clipping, loss scaling."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import Trainer, TrainerCallback

from inrun import Ledger
from inrun.integrations.transformers import attach, last_checkpoint
from inrun.kernels import Kernel
from inrun.lm.tokens import Collate
from tests.integrations.trainers import Texts, trainer_of, without_dropout

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

PLAIN: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
ACCUMULATED: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
REENTRANT: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
CHECKPOINTED = REENTRANT | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
COMPILED: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
BFLOAT16: dict[str, Any] = {"bf16": True, "use_cpu": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulated": ACCUMULATED,
    "reentrant": REENTRANT,
    "checkpointed": CHECKPOINTED,
    "compiled": COMPILED | {"eval_strategy": "steps", "eval_steps": 1},
    "compiled-eager": COMPILED | {"torch_compile_backend": "eager"},
    "bfloat16": BFLOAT16,
    "bfloat16-checkpointed": ACCUMULATED | BFLOAT16 | CHECKPOINTED,
    "bfloat16-reentrant-compiled": ACCUMULATED | BFLOAT16 | REENTRANT | COMPILED | {"torch_compile_backend": "eager"},
}


@dataclass
class Run:
    """What a Trainer's run left: by step and id the values, the books, and how an activation of the model was run."""

    trainer: Trainer
    values: pl.DataFrame
    steps: pl.DataFrame
    in_backward: bool = False
    dtypes: dict[bool, set[torch.dtype]] = field(default_factory=lambda: {True: set(), False: set()})  # by training

    def of(self, step: int) -> Tensor:
        return self.values.filter(pl.col("step") == step)["value"].to_torch().double()


def run(folder: Path, kernel: Kernel, scheme: Literal["path", "first"] = "path", **arguments: Any) -> Run:
    """Three clipped steps."""
    settings = PLAIN | {
        # with this epsilon Adam's first step is no sign, which would make noise of any rounding
        "adam_epsilon": 1e-2, "learning_rate": 3e-3, "warmup_steps": 0, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.1, "max_steps": 3,
    }  # fmt: skip
    trainer = trainer_of(folder, Texts(20), **(settings | arguments))
    found = Run(trainer, pl.DataFrame(), pl.DataFrame())

    def watch(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if not torch.compiler.is_compiling():
            found.in_backward |= torch._C._current_graph_task_id() != -1
            found.dtypes[module.training].add(output.dtype)

    without_dropout(trainer.model).get_submodule("transformer.h.0.mlp.act").register_forward_hook(watch)
    target = Collate(pad=0)(Texts(3, seed=7, ids=False).rows)
    attach(trainer, {"t": target}, ledger=folder / "run", kernel=kernel, scheme=scheme, audit_every=1)
    trainer.train()
    ledger = Ledger(folder / "run")
    found.values, found.steps = ledger.scan().collect().sort("step", "id"), ledger.steps()
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("plain"), "tangent")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it, for every later Trainer
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_of_a_plain_run(plain: Run, name: str, kernel: Kernel, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    found = run(tmp_path, kernel, **settings)
    casts = torch.bfloat16 if "bf16" in settings else torch.float32
    assert found.dtypes == {True: {casts}, False: {casts}}  # the target is evaluated as the batches are
    assert found.in_backward == ("gradient_checkpointing" in settings)
    assert isinstance(found.trainer.model_wrapped, OptimizedModule) == ("torch_compile" in settings)
    assert found.values["id"].equals(plain.values["id"])
    for step in (1, 2, 3):
        error = (found.of(step) - plain.of(step)).norm() / plain.of(step).norm()
        assert float(error) < (3e-2 if "bf16" in settings else 1e-4)
    dropped, unexplained = (
        found.steps.select(loss=pl.col("loss_before") - pl.col("loss_after"), left=pl.col("unexplained"))
        .to_torch()
        .abs()
        .sum(dim=0)
    )
    assert unexplained < 0.1 * dropped


def norms(trainer: Trainer) -> list[float]:
    return [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("kernel", ["tangent", "perexample", "ghost"])
def test_a_clipped_step_has_clipped_values(kernel: Kernel, tmp_path: Path) -> None:
    """Under SGD the scheme `first` is linear: the values are scaled as the gradient is."""
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    whole = run(tmp_path / "whole", kernel, "first", **settings, max_grad_norm=0)
    clipped = run(tmp_path / "clipped", kernel, "first", **settings, max_grad_norm=0.1)
    (norm,) = norms(clipped.trainer)
    assert norm > 0.5
    torch.testing.assert_close(clipped.of(1), whole.of(1) * 0.1 / norm, rtol=1e-4, atol=1e-9)


def test_steps_that_a_gradient_scaler_leaves_out_are_nobodys(tmp_path: Path) -> None:
    """Nothing is booked for them, and a resumed run's ledger is that of the run in one piece."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    def scaled(name: str, **arguments: Any) -> Trainer:
        trainer = trainer_of(tmp_path / name, Texts(20), optim="adamw_torch", max_grad_norm=0.0, **arguments)
        # its first step overflows
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
        attach(trainer, {"t": Texts(5, seed=8)}, ledger=tmp_path / f"run-{name}", scheme="first", refresh=2)
        return trainer

    scaled("whole").train()
    first = scaled("part", save_strategy="steps", save_steps=1, save_total_limit=2)
    first.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    checkpoint = last_checkpoint(tmp_path / "part")
    assert checkpoint == tmp_path / "part" / "checkpoint-3"
    scaled("part").train(resume_from_checkpoint=str(checkpoint))
    whole, part = Ledger(tmp_path / "run-whole"), Ledger(tmp_path / "run-part")
    assert whole.steps("t")["step"].to_list() == [1, 2, 3, 4, 5]
    assert part.scan().collect().equals(whole.scan().collect())
    assert part.steps("t").equals(whole.steps("t"))

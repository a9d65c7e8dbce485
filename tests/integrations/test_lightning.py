"""Lightning's real Trainer: values are the plain loop's, and training is what it was."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from inrun import Attributor, InrunError, Ledger
from inrun.integrations.lightning import InrunCallback
from inrun.step import Step
from tests.integrations.lightnings import (
    EXAMPLES,
    TARGET,
    FrozenInOptimizer,
    FrozenPart,
    Lit,
    Parts,
    loader,
    loss,
    trainer_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


class Spy(Callback):
    """The values of every step, as the callback before it has them."""

    def __init__(self, callback: InrunCallback) -> None:
        self.callback = callback
        self.steps: dict[int, Step] = {}

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        assert self.callback.attributor is not None
        last = self.callback.attributor.last
        if last is not None:
            self.steps[last.step] = last


def callback_of(ledger: Path | None = None, **settings: Any) -> InrunCallback:
    return InrunCallback({"t": TARGET}, loss, ledger=ledger, **settings)


def by_hand(module: Lit, accumulate: int, clip: Callable[[list[nn.Parameter]], Any], bf16: bool) -> list[Step]:
    """Two epochs of the same batches in a plain loop: every step."""
    found = []
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    model = module if isinstance(module, Parts) else module.model
    attributor = Attributor(model, optimizer, {"t": TARGET}, lambda _, batch: loss(module, batch))
    for _ in range(2):
        batches = list(loader())
        for k, batch in enumerate(batches):
            with attributor.batch(batch["id"]) as microbatch:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                    output = loss(module, batch) / accumulate
                output.backward()
                microbatch.loss = output.detach()
            if (k + 1) % accumulate == 0 or k + 1 == len(batches):
                clip(list(module.parameters()))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                assert attributor.last is not None
                found.append(attributor.last)
    attributor.close()
    return found


@pytest.mark.parametrize(
    ("kind", "settings", "clip"),
    [
        (Lit, {}, lambda _: None),
        (Parts, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, lambda p: nn.utils.clip_grad_norm_(p, 0.1)),
        (
            Lit,
            {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            lambda p: nn.utils.clip_grad_value_(p, 0.01),
        ),
        (Lit, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, lambda _: None),
    ],
)
def test_values_are_those_of_the_plain_loop(kind: type[Lit], settings: dict[str, Any], clip: Any) -> None:
    torch.manual_seed(1)
    module = kind()
    torch.manual_seed(1)
    expected = by_hand(kind(), settings.get("accumulate_grad_batches", 1), clip, "precision" in settings)
    callback = callback_of()
    spy = Spy(callback)
    trainer_of(callback, spy, **settings).fit(module, loader())
    assert len(spy.steps) == len(expected)
    for step, other in zip(spy.steps.values(), expected, strict=True):
        assert step.ids == other.ids
        assert torch.equal(step.values["t"], other.values["t"])
        assert step.values["t"].abs().max() > 1e-5
        assert step.train_loss == pytest.approx(other.train_loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore::inrun.MixedExamplesWarning")  # statistics in a frozen part
@pytest.mark.parametrize("kind", [lambda: Lit(dropout=0.2), Parts, FrozenPart, FrozenInOptimizer])
def test_training_is_bit_identical_and_nothing_stays(kind: Callable[[], Lit], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "val_check_interval": 3, "num_sanity_val_steps": 1,
    }  # fmt: skip
    results: list[tuple[list[Tensor], Any, Tensor]] = []
    for callbacks in ([], [callback_of(tmp_path / "run", kernel="tangent", audit_every=2)]):
        torch.manual_seed(1)
        module = kind()
        of_module = set(vars(module))
        trainer = trainer_of(*callbacks, **settings)
        trainer.fit(module, loader(shuffle=True), loader())
        results.append(([*module.parameters(), *module.buffers()], trainer.logged_metrics, torch.get_rng_state()))
        assert set(vars(module)) - {"_hparams"} == of_module  # Lightning's own
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        (optimizer,) = trainer.optimizers
        assert not optimizer._optimizer_step_pre_hooks
        assert optimizer.step.__name__ == "step"
    (weights, logged, random), (other_weights, other_logged, other_random) = results
    assert all(map(torch.equal, weights, other_weights))
    assert logged == other_logged
    assert torch.equal(random, other_random)
    ledger = Ledger(tmp_path / "run")
    assert ledger.steps("t")["examples"].to_list() == [8, 8, 4] * 2
    assert ledger.values("t")["count"].to_list() == [2] * 20
    assert ledger.steps("t")["train_loss"].null_count() == 0


@pytest.mark.parametrize("momentum", ["account", "credit"])
def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_ledger(momentum: str, tmp_path: Path) -> None:
    class Kill(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 8:
                raise KeyError("killed")

    def run(folder: Path, *more: Callback, **settings: Any) -> Lit:
        torch.manual_seed(1)
        module = Lit()
        callback = callback_of(folder / "ledger", momentum=momentum)
        saving = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
        trainer = trainer_of(
            callback, saving, *more, max_epochs=4, accumulate_grad_batches=2, enable_checkpointing=True
        )
        trainer.fit(module, loader(), **settings)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError, match="killed"):
        run(tmp_path / "parts", Kill())
    assert Ledger(tmp_path / "parts" / "ledger").steps("t")["step"].max() == 8
    continued = run(tmp_path / "parts", ckpt_path=tmp_path / "parts" / "epoch=1.ckpt")
    assert all(map(torch.equal, whole.parameters(), continued.parameters()))
    ledgers = [Ledger(tmp_path / name / "ledger") for name in ("whole", "parts")]
    assert ledgers[0].steps("t").equals(ledgers[1].steps("t"))
    assert ledgers[0].steps("t").height == 12
    assert ledgers[0].values("t").equals(ledgers[1].values("t"))


def test_fit_again_continues_the_ledger(tmp_path: Path) -> None:
    callback = callback_of(tmp_path / "run")
    trainer = trainer_of(callback, max_epochs=1)
    module = Lit()
    trainer.fit(module, loader())
    assert trainer.fit_loop.max_epochs == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert Ledger(tmp_path / "run").steps("t")["step"].to_list() == list(range(1, 11))


def test_what_the_loggers_get(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    callback = callback_of(tmp_path / "run", audit_every=2)
    trainer_of(callback, logger=logger, log_every_n_steps=5, accumulate_grad_batches=1).fit(Lit(), loader())
    steps = Ledger(tmp_path / "run").steps("t")
    rows = [row for row in logger.experiment.metrics if "inrun/t/value" in row]
    saved = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert rows == []  # written out
    names = saved[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in saved[1:]]
    rows = [row for row in rows if row["inrun/t/value"]]
    assert [row["step"] for row in rows] == ["4", "9"]
    for k, row in enumerate(rows):
        of = steps[5 * k : 5 * k + 5]
        assert float(row["inrun/t/value"]) == pytest.approx(of["value"].sum())
        assert float(row["inrun/t/loss"]) == pytest.approx(of["loss"][-1])
        assert float(row["inrun/conservation"]) == pytest.approx(of["conservation"].max())
        for column in ("unexplained", "momentum", "decay"):
            assert float(row[f"inrun/t/{column}"]) == pytest.approx(of[column].sum())


@pytest.mark.parametrize(
    ("id_key", "batch_of", "left"),
    [
        ("id", lambda e: e, lambda b: set(b) == {"x", "y"}),
        (2, lambda e: (e["x"], e["y"], e["id"]), lambda b: len(b) == 2),
        (-1, lambda e: (e["x"], e["y"], int(e["id"][4:])), lambda b: len(b) == 2),
        (lambda batch: batch["id"], lambda e: e, lambda b: set(b) == {"x", "y", "id"}),
    ],
)
def test_ids_are_taken_out_of_the_batch(id_key: Any, batch_of: Any, left: Any) -> None:
    class AsGiven(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch)
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            return cross_entropy(self(x), y)

    callback, module = callback_of(id_key=id_key), AsGiven()
    spy = Spy(callback)
    trainer_of(callback, spy, max_epochs=1).fit(module, loader(examples=[batch_of(e) for e in EXAMPLES]))
    assert len(module.seen) == 5
    assert all(map(left, module.seen))
    expected = list(range(16, 20)) if id_key == -1 else [f"row-{k}" for k in range(16, 20)]
    assert spy.steps[5].ids == expected


def test_steps_without_a_loss_and_accumulation_that_is_cut_short(tmp_path: Path) -> None:
    class Leaves(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned `None`"):
        trainer_of(callback_of(tmp_path / "run"), max_epochs=1, accumulate_grad_batches=2).fit(Leaves(), loader())
    steps = Ledger(tmp_path / "run").steps("t")
    assert steps["examples"].to_list() == [4, 4]  # the first batch without the second, and the last

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            trainer.should_stop = trainer.fit_loop.epoch_loop.batch_idx == 2

    trainer_of(callback_of(tmp_path / "short"), Stop(), accumulate_grad_batches=2).fit(Lit(), loader())
    assert Ledger(tmp_path / "short").steps("t")["examples"].to_list() == [8]


def test_a_checkpoint_within_an_accumulation_leaves_its_batches_out(tmp_path: Path) -> None:
    states = []

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "some.ckpt")
                states.append(torch.load(tmp_path / "some.ckpt", weights_only=False)["callbacks"]["InrunCallback"])

    callback = callback_of(tmp_path / "run")
    trainer_of(callback, Save(), max_epochs=1, accumulate_grad_batches=2).fit(Lit(), loader())
    assert [state["step"] for state in states] == [1]
    assert Ledger(tmp_path / "run").steps("t")["examples"].to_list() == [8, 8, 4]


def test_manual_optimization_marks_its_own_batches(tmp_path: Path) -> None:
    class Manual(Lit):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            with callback.batch(batch["id"]):
                self.manual_backward(cross_entropy(self(batch["x"]), batch["y"]))
            optimizer.step()
            optimizer.zero_grad()

    callback = callback_of(tmp_path / "run")
    trainer_of(callback).fit(Manual(), loader())
    assert Ledger(tmp_path / "run").values("t")["count"].to_list() == [2] * 20


def test_fast_dev_run_writes_no_ledger(tmp_path: Path) -> None:
    callback = callback_of(tmp_path / "run")
    trainer_of(callback, fast_dev_run=2).fit(Lit(), loader(), loader())
    assert callback.attributor is not None
    assert callback.attributor.step == 2
    assert not (tmp_path / "run").exists()


class PartOfTheChild(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        h = batch["x"]
        for layer in self.model:
            h = layer(h)
        return cross_entropy(h, batch["y"])


class Children(Parts):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        h = self.model(batch["x"])
        return cross_entropy(self.head(h) * self.scale(h), batch["y"])


class Forward(Parts):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self.forward(batch["x"]), batch["y"])


@pytest.mark.parametrize("kind", [PartOfTheChild, Children, Forward])
def test_a_training_step_that_calls_parts_is_told_what_to_call(kind: type[Lit]) -> None:
    module = kind()
    trainer = trainer_of(callback_of())
    name = r"self\.model\(" if not isinstance(module, Parts) else r"self\("
    with pytest.raises(InrunError, match=rf"training_step of .* did not call the model.*{name}"):
        trainer.fit(module, loader())
    assert "training_step" not in vars(module)
    assert trainer.optimizers[0].step.__name__ == "step"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_another_module_can_be_named() -> None:
    class Nested(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"net": self.model})  # type: ignore[assignment]
            self.box = nn.Sequential(self.model["net"])  # type: ignore[index]

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model["net"](x)  # type: ignore[index]
            return logits

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss(self, batch)

    models: list[Any] = ["model.net", lambda module: module.model["net"]]
    for model in models:
        callback = callback_of(model=model)
        trainer_of(callback, max_epochs=1).fit(Nested(), loader())
        assert callback.attributor is not None
        assert callback.attributor.step == 5


def test_errors() -> None:
    for id_key, what in (("name", "keys x, y, id"), (3, "it is a dict")):
        with pytest.raises(InrunError, match=f"id_key=.*{what}"):
            trainer_of(callback_of(id_key=id_key)).fit(Lit(), loader())
    with pytest.raises(InrunError, match="when training begins"):
        callback_of().batch([1])
    lit = Lit()
    replicas: Any = DistributedDataParallel.__new__(DistributedDataParallel)
    several: Any = SimpleNamespace(strategy=SimpleNamespace(model=replicas), optimizers=[])
    with pytest.raises(InrunError, match=r"the examples must go through a module in the LightningModule"):
        callback_of(model=lambda module: module).on_train_start(several, lit)

"""trl's SFTTrainer: every way of preparing and packing its data, its fused head, and adapters."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars

from inrun import Attributor, InrunError, Ledger
from inrun.integrations.transformers import attach, last_checkpoint, model_loss
from tests.integrations.sft import IDS, TEXTS, questions, sft_trainer, texts, true_values
from tests.integrations.trainers import losses

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),  # trl's and peft's own uses
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
disable_progress_bars()

CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "tied": {"tied": True},
    "lora": {"lora": True, "gradient_checkpointing": True},
    "completion-only": {"completion_only_loss": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free-lora": {"padding_free": True, "max_length": None, "lora": True},
    "packed": {"packing": True, "max_length": 24},
    "packed-lora": {"packing": True, "max_length": 24, "lora": True},
    "packed-multiple": {"packing": True, "max_length": 24, "pad_to_multiple_of": 16},
    "split": {"packing": True, "max_length": 8, "packing_strategy": "bfd_split"},
    "packed-bfloat16": {"packing": True, "max_length": 24, "bf16": True, "gradient_checkpointing": True},
    "wrapped": {"packing": True, "max_length": 10, "packing_strategy": "wrapped", "tied": True},
}


@pytest.fixture(autouse=True)
def without_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # trl sends none then


def data_of(name: str) -> Dataset:
    return questions(0, 40) if name == "completion-only" else texts(0, 40)


def packed_data(settings: dict[str, Any], data: Dataset) -> dict[str, Any]:
    return {"train_dataset": data} if settings.get("packing") else {}


def same_weights(a: Any, b: Any) -> bool:
    pairs = zip(a.model.named_parameters(), b.model.named_parameters(), strict=True)
    return all(x == y and torch.equal(p, q) for (x, p), (y, q) in pairs)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("padding-free-lora", "packed-multiple")])
def test_training_is_bit_identical_and_documents_are_valued(name: str, tmp_path: Path) -> None:
    data, settings = data_of(name), CASES[name]
    plain = sft_trainer(tmp_path / "plain", data, **settings)
    plain.train()
    trainer = sft_trainer(tmp_path / "attached", data, **settings)
    attach(
        trainer, {"t": data.select(range(5))}, ledger=tmp_path / "run", kernel="tangent", **packed_data(settings, data)
    )
    trainer.train()
    logged = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "train_loss")
    found = [{k: entry[k] for k in logged if k in entry} for entry in trainer.state.log_history]
    assert found == [{k: entry[k] for k in logged if k in entry} for entry in plain.state.log_history]
    assert same_weights(trainer, plain)
    assert set(vars(trainer)) == set(vars(plain))
    assert type(trainer.model.get_output_embeddings()) is torch.nn.Linear
    ledger = Ledger(tmp_path / "run")
    values = ledger.values("t")
    assert set(values["id"]) <= set(IDS[:40])
    if not settings.get("packing"):
        assert values["count"].sum() == 12  # three steps of four examples
    assert values["value"].sum() == pytest.approx(ledger.steps("t")["value"].sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, "auto") for name in CASES if name not in ("split", "wrapped", "packed-bfloat16")]
    + [("tied", "tangent"), ("tied", "perexample")],
)
def test_values_are_those_of_the_documents_run_one_by_one(name: str, kernel: Any, tmp_path: Path) -> None:
    data, settings = data_of(name), {**CASES[name], "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    one = sft_trainer(tmp_path, data, **{**settings, "packing": False, "max_length": None})
    rows = {row["id"]: row for row in one.train_dataset}
    trainer = sft_trainer(tmp_path, data, **settings, max_steps=1, gradient_accumulation_steps=2)
    model = one.model.eval()
    callback = attach(
        trainer, {"t": data.select(range(5))}, scheme="first", kernel=kernel, **packed_data(settings, data)
    )
    trainer.train()
    assert callback.attributor is not None
    step = callback.attributor.last
    assert step is not None
    assert len(set(step.ids)) == len(step.ids) >= 8
    expected = true_values(model, [rows[i] for i in step.ids], [rows[i] for i in IDS[:5]], 0.1)
    torch.testing.assert_close(step.values["t"], torch.tensor(expected).double(), rtol=1e-3, atol=1e-8)


def test_documents_that_see_one_another_are_valued_as_by_a_plain_loop(tmp_path: Path) -> None:
    data = texts(0, 40)
    settings = {**CASES["wrapped"], "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    trainer = sft_trainer(tmp_path, data, **settings)
    model, seen = sft_trainer(tmp_path, data, **settings).model, []
    inner = trainer.training_step

    def watched(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        seen.append({k: inputs[k].clone() for k in ("input_ids", "labels", "attention_mask")})
        return inner(model, inputs, *args)

    trainer.training_step = watched
    target = {"input_ids": torch.arange(5, 15)[None], "labels": torch.arange(5, 15)[None]}
    callback = attach(trainer, {"t": target}, train_dataset=data)
    packed = trainer.train_dataset
    trainer.train()
    assert trainer.training_step is watched
    assert trainer.train_dataset.column_names == ["input_ids", "labels"]
    (batch,) = seen
    of = {tuple(row["input_ids"]): row["id"] for row in packed}
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    ids = [
        of[tuple(row[:n].tolist())] + [None] * (len(row) - n)
        for row, n in zip(batch["input_ids"], lengths, strict=True)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    with Attributor(model, optimizer, {"t": target}, model_loss) as attributor:
        with attributor.batch(ids):
            model(**batch).loss.backward()
        optimizer.step()
    assert callback.attributor is not None
    mine, its = callback.attributor.last, attributor.last
    assert mine is not None
    assert its is not None
    assert mine.ids == its.ids
    torch.testing.assert_close(mine.values["t"], its.values["t"], rtol=1e-4, atol=1e-9)


def test_a_stream_is_packed_too(tmp_path: Path) -> None:
    data = texts(0, 40).to_iterable_dataset()
    settings: dict[str, Any] = {"packing": True, "max_length": 24}
    plain = sft_trainer(tmp_path, data, **settings)
    plain.train()
    trainer = sft_trainer(tmp_path, data, **settings)
    attach(
        trainer, {"t": texts(0, 5).to_iterable_dataset()}, ledger=tmp_path / "run", kernel="tangent", train_dataset=data
    )
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert same_weights(trainer, plain)
    assert set(Ledger(tmp_path / "run").values("t")["id"]) <= set(IDS[:40])


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' ' + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def chats(begin: int, end: int) -> Dataset:
    rows = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in questions(begin, end)
    ]
    return Dataset.from_dict({"messages": rows, "id": IDS[begin:end]})


@pytest.mark.parametrize("kind", ["text", "question", "chat", "tokens"])
def test_targets_are_prepared_as_the_trainers_own_data(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.integrations.sft import tokenizer

    monkeypatch.setattr(tokenizer(), "chat_template", TEMPLATE, raising=False)
    of = {"text": texts, "question": questions, "chat": chats, "tokens": texts}[kind]
    settings: dict[str, Any] = {"max_steps": 1, "assistant_only_loss": kind == "chat"}
    trainer = sft_trainer(tmp_path, of(0, 20), **settings)
    before = trainer.evaluate(of(20, 26))["eval_loss"]
    target = trainer.train_dataset.select(range(3)) if kind == "tokens" else of(20, 26)
    if kind == "tokens":
        before = trainer.evaluate(target)["eval_loss"]
    callback = attach(trainer, {"t": target}, scheme="first")
    trainer.train()
    assert callback.attributor is not None
    assert callback.attributor.last is not None
    assert callback.attributor.last.losses["t"] == pytest.approx(before, rel=1e-5)


def test_a_resumed_run_has_the_same_ledger(tmp_path: Path) -> None:
    data = texts(0, 40)

    def run(folder: str, ledger: str, checkpoint: Path | None = None, **arguments: Any) -> Any:
        trainer = sft_trainer(
            tmp_path / folder, data, packing=True, max_length=24, max_steps=4, save_strategy="steps", save_steps=2,
            **arguments,
        )  # fmt: skip
        attach(trainer, {"t": texts(40, 44)}, ledger=tmp_path / ledger, kernel="tangent", train_dataset=data)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer

    whole = run("whole", "run-whole")
    run("part", "run-part")
    assert last_checkpoint(tmp_path / "part") == tmp_path / "part" / "checkpoint-4"
    resumed = run("part", "run-part", tmp_path / "part" / "checkpoint-2")
    assert same_weights(resumed, whole)
    mine, its = Ledger(tmp_path / "run-part"), Ledger(tmp_path / "run-whole")
    assert mine.scan().collect().equals(its.scan().collect())
    assert mine.steps("t").equals(its.steps("t"))


def test_token_values_with_the_fused_head(tmp_path: Path) -> None:
    """Every token has its own; what the head adds to a token is of the row that predicts, as without the fusing."""
    trainer = sft_trainer(tmp_path, texts(0, 8), max_steps=1)
    callback = attach(trainer, {"t": texts(8, 12)}, token_values=True)
    trainer.train()
    assert callback.attributor is not None
    step = callback.attributor.last
    assert step is not None
    tokens = step.token_values["t"]
    assert tokens.shape[0] == 4
    torch.testing.assert_close(tokens.sum(dim=1), step.values["t"], rtol=1e-9, atol=1e-12)


def refusal(trainer: Any, message: str, **arguments: Any) -> None:
    with pytest.raises(InrunError, match=message):
        attach(trainer, {"t": texts(0, 2)}, **arguments)
    assert "training_step" not in vars(trainer)


def test_what_cannot_work_is_refused_when_it_is_attached(tmp_path: Path) -> None:
    data = texts(0, 20)
    packing = sft_trainer(tmp_path, data, packing=True, max_length=24)
    refusal(packing, "packing dropped the 'id' column.*train_dataset=")
    refusal(packing, "not what the trainer packed", train_dataset=texts(1, 21))
    refusal(packing, "not what the trainer packed", train_dataset=texts(0, 19))
    refusal(packing, re.escape("train_dataset= has no 'name' column"), train_dataset=data, id_column="name")
    packing.model.config._attn_implementation = "flash_attention_2"
    refusal(packing, "cu_seq_lens alone.*sdpa", train_dataset=data)
    plain = sft_trainer(tmp_path, data)
    refusal(plain, "leave it out", train_dataset=data)
    refusal(plain, r"no 'name' column \(it has .*id", id_column="name")
    without = Dataset.from_dict({"text": TEXTS[:8]})
    refusal(sft_trainer(tmp_path, without), r"no 'id' column \(it has text")

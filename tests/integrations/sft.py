"""Small SFTTrainers of a Llama for the tests, and the slow truth about their first step."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from inrun.lm.tokens import train_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
PROMPTS = [f"{a} and {b}" for a in WORDS for b in WORDS]
TEXTS = [f"{prompt} make {' '.join(WORDS[: k % 5 + 1])}" for k, prompt in enumerate(PROMPTS)]
IDS = [f"text-{k}" for k in range(len(TEXTS))]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 280)


def texts(begin: int, end: int) -> Dataset:
    return Dataset.from_dict({"text": TEXTS[begin:end], "id": IDS[begin:end], "source": WORDS[:1] * (end - begin)})


def questions(begin: int, end: int) -> Dataset:
    rows = [(text[: len(prompt)], text[len(prompt) :]) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    prompts, completions = zip(*rows[begin:end], strict=True)
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(completions), "id": IDS[begin:end]})


def sft_trainer(folder: Path, data: Any, *, tied: bool = False, lora: bool = False, **arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2, "warmup_steps": 0, "lr_scheduler_type": "constant", "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "report_to": [], "use_cpu": True, "seed": 3,
        "gradient_checkpointing": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    adapter = None
    if lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(**(settings | arguments)),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def gradient(model: Any, loss: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def summed_loss(model: Any, tokens: list[int], labels: list[int]) -> Tensor:
    """Of one document alone, by its logits."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")


def true_values(model: Any, documents: list[dict[str, Any]], target: list[dict[str, Any]], rate: float) -> list[float]:
    """rate * <g_i, grad L> of one step of SGD that is nothing but these documents, each run by itself, in nats."""

    def predictions(rows: list[dict[str, Any]]) -> int:
        return sum(label != -100 for row in rows for label in row["labels"][1:])

    whole = torch.stack([summed_loss(model, row["input_ids"], row["labels"]) for row in target]).sum()
    towards = gradient(model, whole / predictions(target))
    found = []
    for row in documents:
        mine = gradient(model, summed_loss(model, row["input_ids"], row["labels"]) / predictions(documents))
        found.append(rate * float(sum((g * q).sum() for g, q in zip(mine, towards, strict=True))))
    return found

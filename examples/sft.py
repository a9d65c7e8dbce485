"""trl's SFTTrainer on packed questions and answers, each of which has a value of its own, with one line of inrun.

    python examples/sft.py [--out RUN] [--steps N]

The questions are about functions of Python's own library, and the target asks about some of `math` that are held out.
The model is small and made here, so that nothing is downloaded. What is valued goes into the trainer's log, too.
"""

import argparse
import importlib
import inspect
from pathlib import Path

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import inrun
from inrun.integrations.transformers import attach
from inrun.lm.tokens import train_tokenizer


def questions(name: str) -> list[dict[str, str]]:
    """What the functions of a module do, by the first lines of their documentation."""
    functions = inspect.getmembers(importlib.import_module(name), inspect.isroutine)
    lines = {f: (inspect.getdoc(function) or "").partition("\n")[0] for f, function in functions if f[0] != "_"}
    return [
        {"id": f"{name}.{f}", "module": name, "prompt": f"What does {f} do?", "completion": f" {line}"}
        for f, line in lines.items()
        if line
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/sft"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    found = [row for name in ("math", "operator", "os", "random", "shutil", "statistics") for row in questions(name)]
    target, rows = found[:8], found[8:]
    dataset = Dataset.from_list(rows)

    tokenizer = train_tokenizer((row["prompt"] + row["completion"] for row in rows), vocab_size=800)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    arguments = SFTConfig(
        str(options.out / "checkpoints"), max_steps=options.steps, per_device_train_batch_size=4, packing=True,
        max_length=128, learning_rate=3e-3, warmup_steps=3, logging_steps=3, report_to=[], save_strategy="no",
        bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(LlamaForCausalLM(config), args=arguments, train_dataset=dataset, processing_class=tokenizer)
    attach(trainer, {"math": Dataset.from_list(target)}, ledger=options.out / "values", train_dataset=dataset)
    trainer.train()

    inrun.write_examples(options.out / "values", dataset.to_polars())
    print(inrun.Ledger(options.out / "values").top(10))


if __name__ == "__main__":
    main()

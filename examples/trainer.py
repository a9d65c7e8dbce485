"""An existing Hugging Face Trainer, with one line of inrun before `trainer.train()`.

python examples/trainer.py [--out RUN] [--steps N]
"""

import argparse
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import inrun
from inrun.integrations.transformers import attach
from inrun.lm.documents import read_documents
from inrun.lm.tokens import Collate, build, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    documents = list(read_documents(str(Path(inrun.__file__).parent / "lm")))
    tokenizer = train_tokenizer((document.text for document in documents), vocab_size=600)
    dataset = build(documents[2:], tokenizer, options.out / "tokens", sequence=64)
    target = build(documents[:2], tokenizer, options.out / "target", sequence=64)

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=2)
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            str(options.out / "checkpoints"), max_steps=options.steps, per_device_train_batch_size=8,
            learning_rate=1e-3, report_to=[], logging_steps=10,
        ),
        train_dataset=dataset,
        data_collator=Collate(dataset.pad),
    )  # fmt: skip
    attach(trainer, targets={"first two files": target}, id_column="id", ledger=options.out / "values")
    trainer.train()

    print(inrun.Ledger(options.out / "values").top(10))


if __name__ == "__main__":
    main()

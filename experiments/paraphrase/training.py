"""A run with its values, and the methods that look at its last weights.

Tensors carry their shape in their name: N training examples, T targets, B of a batch, L tokens, D of a hidden state.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.facts.training import pretrained
from experiments.paraphrase.config import Piece, Study, Trained
from experiments.paraphrase.texts import Texts, texts_of
from experiments.pieces import hash_of
from experiments.results import Array
from experiments.values import NORMALISED
from inrun import Attributor, Ledger

Batch = dict[str, Tensor]  # inputs [B, L], or [B, L, D] of the lower blocks, and labels [B, L]
BELOW = 2  # blocks under the trained ones, of a model with LoRA and without a base
ROOM = 3e9  # bytes that gradients of all examples may take at a time
AT_ONCE = 32  # rows that go through the lower blocks together
IGNORED = -100


@dataclass
class Run:
    """A model as it begins, its examples' rows and its targets' rows."""

    model: nn.Module
    train: list[Batch]  # of one example each
    targets: list[Batch]


def run_of(study: Study, trained: Trained, texts: Texts, seed: int) -> Run:
    """Everything that a seed decides, but the order of the examples."""
    torch.manual_seed(seed)
    base, tokenizer = base_of(trained, texts)
    listed = [text for of in texts.targets.values() for text in of]
    ids = [row[: study.tokens] for row in tokenizer([*texts.examples, *listed])["input_ids"]]
    rows = [torch.tensor([row]) for row in ids]
    inputs, model = (rows, base) if not trained.rank else upper(trained, base, rows)
    single = [{"inputs": x, "labels": row} for x, row in zip(inputs, rows, strict=True)]
    return Run(model.train(), single[: len(texts.examples)], single[len(texts.examples) :])


def base_of(trained: Trained, texts: Texts) -> tuple[Any, Any]:
    """A causal language model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from inrun.lm.tokens import train_tokenizer

    if trained.base:
        path = pretrained()
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32), tokenizer
    tokenizer = train_tokenizer(texts.examples, trained.vocabulary)
    sizes = {
        "vocab_size": trained.vocabulary, "hidden_size": trained.width, "intermediate_size": 3 * trained.width,
        "num_hidden_layers": trained.blocks + (BELOW if trained.rank else 0), "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig.from_dict(sizes)), tokenizer


def upper(trained: Trained, base: Any, rows: Sequence[Tensor]) -> tuple[list[Tensor], nn.Module]:
    """The upper blocks and the head as a model of its own, with LoRA, and the lower blocks' outputs [1, L, D] for every
    row: as nothing below is trained, they are the same at every step.
    """
    from peft import LoraConfig, get_peft_model

    body, below = base.model, len(base.model.layers) - trained.blocks
    with torch.no_grad():
        whole = base(rows[0], use_cache=False).logits
        layers, norm = body.layers, body.norm
        body.layers, body.norm = layers[:below], nn.Identity()
        inputs = []
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            padded = nn.utils.rnn.pad_sequence([row[0] for row in part], batch_first=True)
            outputs = body(padded, use_cache=False).last_hidden_state
            inputs += [of[None, : row.shape[1]] for of, row in zip(outputs, part, strict=True)]
        body.layers, body.norm = layers[below:], norm
        base.config.num_hidden_layers = trained.blocks
        torch.testing.assert_close(base(inputs_embeds=inputs[0], use_cache=False).logits, whole, rtol=1e-4, atol=1e-3)
    lora = LoraConfig(r=trained.rank, lora_alpha=2 * trained.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return inputs, get_peft_model(base, lora)


def together(rows: Sequence[Batch]) -> Batch:
    """One batch, padded at the end, where a causal model's earlier tokens do not see it and no loss is taken."""
    longest = max(row["labels"].shape[1] for row in rows)
    inputs, labels = [], []
    for row in rows:
        x, left = row["inputs"], longest - row["labels"].shape[1]
        inputs.append(F.pad(x, (0, 0, 0, left) if x.is_floating_point() else (0, left)))
        labels.append(F.pad(row["labels"], (0, left), value=IGNORED))
    return {"inputs": torch.cat(inputs), "labels": torch.cat(labels)}


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of every example's tokens, in nats: [B]."""
    x, labels = batch["inputs"], batch["labels"][:, 1:]
    given = {"inputs_embeds" if x.is_floating_point() else "input_ids": x}
    logits = model(**given, use_cache=False).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(dim=1) / (labels != IGNORED).sum(dim=1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return losses(model, batch).mean()


def orders(trained: Trained, seed: int) -> Iterator[tuple[int, Array]]:
    """Every step and the examples [B] that it uses: each once an epoch, in another order."""
    random = np.random.default_rng((1, seed))
    per_epoch = trained.examples // trained.batch
    for step in range(trained.steps):
        if step % per_epoch == 0:
            order = random.permutation(trained.examples)
        yield step, order[step % per_epoch * trained.batch :][: trained.batch]


def valued(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """A run with an Attributor, as in a user's loop; for `path` also what methods say of its last weights.

    Returns:
        `NAME` [T, N], in nats of the target's loss, and normalised by step; of the last weights `influence`,
        `gradient`, `cosine`, `hidden` [T, N]; `loss` [2, T]: the targets' before and after; `own`
        [steps]: the batches'; `weights`: their hash at the end.
    """
    trained, texts = piece.model, texts_of(study, text, piece.model, piece.seed)
    run = run_of(study, trained, texts, piece.seed)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trained.rate)
    targets = {str(k): row for k, row in enumerate(run.targets)}
    settings: Any = {"scheme": piece.part}
    ends, own = [evaluated(run.model, run.targets)], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ledger"
        with Attributor(run.model, optimizer, targets, loss, ledger=folder, **settings) as attributor:
            for step, places in orders(trained, piece.seed):
                for group in optimizer.param_groups:
                    group["lr"] = trained.rate * min(1.0, (step + 1) / (0.1 * trained.steps))
                with attributor.batch(places):
                    mean = loss(run.model, together([run.train[i] for i in places]))
                    mean.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                own.append(float(mean.detach()))
        values = Ledger(folder).scan().collect()
    run.model.eval()
    ends.append(evaluated(run.model, run.targets))
    found = by_target(values, len(run.targets), trained.examples, piece.part) | {
        "loss": np.array(ends), "weights": hash_of(run.model),
        "own": np.array(own),
    }  # fmt: skip
    return found if piece.part != "path" else found | at_the_end(study, run)


def by_target(values: pl.DataFrame, targets: int, examples: int, name: str) -> dict[str, Array]:
    """Sums over the run of every example's values, and of its shares in its steps: [T, N] each."""
    share = pl.col("value") / pl.col("value").abs().sum().over("step", "target")
    sums = values.with_columns(share=share).group_by("target", "id").agg(pl.col("value").sum(), pl.col("share").sum())
    at = sums["target"].cast(pl.String).cast(pl.Int64).to_numpy(), sums["id"].to_numpy()
    found = {}
    for column, of in (("value", name), ("share", name + NORMALISED)):
        found[of] = np.full((targets, examples), np.nan)
        found[of][at] = sums[column].to_numpy()
        assert np.isfinite(found[of]).all()
    return found


def evaluated(model: nn.Module, rows: Sequence[Batch]) -> list[float]:
    """Every row's loss, in nats."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = [float(loss(model, row)) for row in rows]
    model.train(was)
    return found


def at_the_end(study: Study, run: Run) -> dict[str, Array]:
    """What the last weights say of every target and example: [T, N]."""
    products, n = gram(run.model, [*run.train, *run.targets]), len(run.train)
    between, lengths = products[n:, :n], np.sqrt(np.diag(products))
    return {
        "gradient": between,
        "cosine": between / np.outer(lengths[n:], lengths[:n]),
        "influence": influence(products[:n, :n], between, study.damping),
        "hidden": alike(hidden(run.model, run.targets), hidden(run.model, run.train)),
    }


def gram(model: nn.Module, rows: Sequence[Batch], room: float = ROOM) -> Array:
    """<g_i, g_j> of every two rows' gradients: [rows, rows]. Not all parameters at once, for want of memory."""
    found = np.zeros((len(rows), len(rows)))
    for group in groups([p for p in model.parameters() if p.requires_grad], int(room / 4 / len(rows))):
        gradients = torch.empty(len(rows), sum(p.numel() for p in group))
        for row, into in zip(rows, gradients, strict=True):
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, row), group)], out=into)
        found += (gradients @ gradients.T).double().numpy()
    return found


def groups(parameters: Sequence[nn.Parameter], room: int) -> Iterator[list[nn.Parameter]]:
    """Of `room` numbers at most, or of one parameter."""
    held: list[nn.Parameter] = []
    for parameter in parameters:
        if held and sum(p.numel() for p in held) + parameter.numel() > room:
            yield held
            held = []
        held.append(parameter)
    yield held


def influence(among: Array, between: Array, share: float) -> Array:
    """Influence functions <g_i, (C + damping)^-1 g_target> [T, N], C the mean over training examples of g_i g_i'.

    C is the curvature that the likelihood has in the mean (the empirical Fisher matrix), and `damping` a share of its
    mean eigenvalue other than zero. By the Woodbury identity the examples' products are all that it takes, `among`
    [N, N], and `between` [T, N] those with the targets' gradients.
    """
    n = len(among)
    damping = share * np.trace(among) / n**2
    rest = np.linalg.solve(among + n * damping * np.eye(n), between.T).T
    return np.asarray((between - rest @ among) / damping)


def hidden(model: Any, rows: Sequence[Batch]) -> Array:
    """The mean over a row's tokens of the last block's outputs: [rows, D]."""
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    found = []
    with torch.no_grad():
        for row in rows:
            x = row["inputs"]
            given = {"inputs_embeds" if x.is_floating_point() else "input_ids": x}
            found.append(body(**given, use_cache=False).last_hidden_state.mean(dim=1))
    return torch.cat(found).double().numpy()


def alike(targets: Array, train: Array) -> Array:
    """Cosines [T, N] of vectors from which the training examples' mean is taken."""
    a, b = (of - train.mean(axis=0) for of in (targets, train))
    return np.asarray(a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)))

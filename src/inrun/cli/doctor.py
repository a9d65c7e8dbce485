"""`inrun doctor`: whether a model's values will be right, and what they will cost, before it is trained with."""

import json
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tyro.conf import Positional, arg

from inrun.doctor import Diagnosis, Losses, diagnose
from inrun.errors import InrunError


@dataclass(frozen=True)
class Doctor:
    """Look at a model before it is trained: which module's calls each parameter is valued by, and by which kernel; what
    is lifted to the module around it; what mixes the examples of a batch; the extra time and memory; and at last the
    values of a batch against per-example autograd. The exit status is 0 if they agree, 1 if not.

    Example: inrun doctor ./my-model --data corpus.jsonl

    Example: inrun doctor my_package.my_module:my_function
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder of a Hugging Face model, or its name on the hub; or `module:function`, where function() returns the
    model, a batch, and losses(model, batch) -> one loss per example; and, if you like, the optimizer."""
    data: Annotated[str | None, arg(metavar="PATH")] = None
    """Text for the batch of a Hugging Face model, as `inrun train` reads it; by default random tokens."""
    examples: int = 4
    """How many examples the batch of a Hugging Face model has."""
    tokens: int = 64
    """How many tokens of each."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What the cost is predicted for."""
    double: bool = False
    """In double precision, where a difference cannot be rounding."""
    every: bool = False
    """One line for every parameter, not for each kind of module."""
    json: bool = False
    """Print JSON instead."""


def run(config: Doctor) -> int:
    """Print what was found; 1 if the values are wrong or refused."""
    model, batch, losses, optimizer = _given(config) if ":" in config.model else _hugging_face(config)
    if config.double:
        model, batch = model.double(), _doubled(batch)
    if optimizer is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise InrunError(f"{config.model}: no parameter has requires_grad, so no example can have a value.")
        optimizer = AdamW(trained, lr=1e-4) if config.optimizer == "adamw" else SGD(trained, lr=1e-3)
    found = diagnose(model, optimizer, batch, losses)
    if config.json:
        rows = asdict(found) | {"passed": found.passed}
        print(json.dumps(rows, indent=2))
    else:
        show(found, Console(soft_wrap=True), every=config.every)
    return 0 if found.passed else 1


def show(found: Diagnosis, console: Console, *, every: bool = False) -> None:
    """Print a diagnosis; parameters of one kind in one line unless `every`."""
    if found.covered:
        table = Table(
            "parameters", "entries", "valued by the calls of", "kernel", title="coverage", title_justify="left"
        )
        table.columns[1].justify = "right"
        for names, entries, unit, kernel in _lines(found, every):
            table.add_row(*map(Text, (names, f"{entries:,}", unit, kernel)))
        console.print(table)
    if found.frozen:
        console.print(f"frozen: {found.frozen:,} entries, which cost nothing", highlight=False)
    lifted = [c for c in found.covered if c.lifted]
    if lifted and found.plan is not None:
        units = {c.unit for c in lifted}
        seconds = sum(row.seconds for row in found.plan.rows if row.name in units)
        console.print(
            f"lifted: {len(lifted)} parameters, to {len(units)} modules that are run again: {_ms(seconds)} a step",
            highlight=False,
        )
    console.print(f"mixed: {found.mixed or 'nothing: an example depends on no other'}", highlight=False)
    if found.plan is not None:
        more = found.plan.seconds / found.seconds
        console.print(
            f"extra: {_ms(found.plan.seconds)} a step, {more:.0%} of a plain forward and backward pass "
            f"({_ms(found.seconds)}), beside the target's own pass; {found.plan.bytes / 2**20:,.0f} MiB",
            highlight=False,
        )
    if found.problem:
        console.print(Text(f"refused: {found.problem}"))
    for kernel, error in found.errors.items():
        console.print(
            f"check: values by kernel {kernel!r} against per-example autograd: largest error {error:.1e} of the "
            f"largest value (allowed {found.tolerance:.0e})",
            highlight=False,
        )
    console.print("pass" if found.passed else "FAIL", style="bold green" if found.passed else "bold red")


def _lines(found: Diagnosis, every: bool) -> list[tuple[str, int, str, str]]:
    """Parameters, entries, unit and kernel; by the name without its numbers unless `every`."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for c in found.covered:
        name = c.parameter
        its_own = c.unit == name.rpartition(".")[0]
        unit = c.module if its_own else f"{c.unit}, a {c.module}{', run again' if c.lifted else ''}"
        if not every:
            name, unit = (".".join("*" if part.isdigit() else part for part in x.split(".")) for x in (name, unit))
        rows.setdefault((name, unit, c.kernel or "not used"), []).append(c.entries)
    return [
        (name if len(sizes) == 1 else f"{name} x {len(sizes)}", sum(sizes), unit, kernel)
        for (name, unit, kernel), sizes in rows.items()
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _doubled(batch: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)


Setting = tuple[nn.Module, Any, Losses, Optimizer | None]


def _given(config: Doctor) -> Setting:
    """What the user's function returns."""
    where, _, name = config.model.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise InrunError(f"{config.model}: there is no module {error.name!r} here or installed.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InrunError(f"{config.model}: the module {where} has no function {name!r}.")
    given = function()
    if not isinstance(given, tuple) or len(given) not in (3, 4) or not isinstance(given[0], nn.Module):
        raise InrunError(
            f"{config.model}: it must return (model, batch, losses) or (model, batch, losses, optimizer), with "
            "losses(model, batch) -> one loss per example."
        )
    return given if len(given) == 4 else (*given, None)


def _hugging_face(config: Doctor) -> Setting:
    """The model as it was saved, and a batch of text."""
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InrunError(
            f"{config.model}: no Hugging Face model is there ({first}). Other models: module:function."
        ) from error
    (kind,) = (settings.architectures or ["none"])[:1]
    way = next(
        (way for way in ("CausalLM", "LMHeadModel", "MaskedLM", "ConditionalGeneration") if kind.endswith(way)), ""
    )
    if not way:
        raise InrunError(
            f"{config.model} is a {kind}, and only the losses of language models are known here. Write a function that "
            "returns the model, a batch and its losses, and give it as module:function."
        )
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_pretrained(config.model).train()
    ids, mask = _tokens(config, model)
    losses = {"MaskedLM": _same_tokens, "ConditionalGeneration": _other_text}.get(way, _next_tokens)
    return model, {"input_ids": ids, "attention_mask": mask}, losses, None


def _tokens(config: Doctor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, [examples, tokens]."""
    shape = (config.examples, config.tokens)
    if config.data is None:
        size: Any = model.config
        return torch.randint(0, size.get_text_config().vocab_size, shape), torch.ones(shape, dtype=torch.long)
    from transformers import AutoTokenizer

    from inrun.lm.documents import read_documents

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    texts = [document.text for document in islice(read_documents(config.data), config.examples)]
    if len(texts) < config.examples:
        raise InrunError(f"{config.data} has {len(texts)} documents: give --examples {len(texts)}, or more text.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = tokenizer(texts, truncation=True, max_length=config.tokens, padding=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def _mean(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The mean cross entropy of each example's unmasked tokens: [examples]."""
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def _next_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch, use_cache=False).logits
    return _mean(logits[:, :-1], batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:])


def _same_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return _mean(model(**batch).logits, batch["input_ids"], batch["attention_mask"])


def _other_text(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The text itself, to be written by the decoder."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(**batch, decoder_input_ids=ids[:, :-1], use_cache=False).logits
    return _mean(logits, ids[:, 1:], mask[:, 1:])

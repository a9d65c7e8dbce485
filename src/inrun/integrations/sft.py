"""What trl's SFTTrainer needs: ids through its packing, targets prepared as its own data, its fused head as a unit.

It prepares its data when it is built, and packing keeps nothing but tokens and labels. So `packed_with_ids` does the
trainer's preparation once more, with one id for every token beside them, and holds the outcome against the trainer's.

Its loss reads the head's weight without calling the head. `head_called` has the model call it, to the same numbers.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from inrun.errors import InrunError

_IGNORED = -100  # labels that have no loss
_ROWS = 1000  # compared at once


def is_sft(trainer: Any) -> bool:
    """Whether the trainer is trl's SFTTrainer or a subclass (trl is not imported)."""
    return any(kind.__module__.startswith("trl.") and kind.__name__ == "SFTTrainer" for kind in type(trainer).__mro__)


def packs(trainer: Any) -> bool:
    """Whether the trainer packed its training data when it was built."""
    prepared = is_sft(trainer) and not trainer._skip_prepare_dataset
    return prepared and bool(trainer.args.packing)


def check_attention(trainer: Any) -> None:
    """Raise InrunError for rows of several examples with an attention that takes their bounds from elsewhere.

    What the rows of a batch are is found out by running the model on other batches, whose bounds these are not.
    """
    attention = str(getattr(getattr(trainer.model, "config", None), "_attn_implementation", None))
    if is_sft(trainer) and trainer.padding_free and "flash" in attention:
        raise InrunError(
            f"attn_implementation={attention!r} with padding_free or packed examples cannot be attributed: it keeps "
            "documents apart by cu_seq_lens alone. Load the model with attn_implementation='sdpa'."
        )


def prepared_target(trainer: Any, dataset: Any, name: str) -> Any:
    """A target's dataset as SFTTrainer prepares its own (a conversational, prompt-completion or text one is tokenized
    and cut, one with input_ids kept), never packed.
    """
    columns = getattr(dataset, "column_names", None)
    if not is_sft(trainer) or trainer._skip_prepare_dataset or not hasattr(dataset, "map") or columns == []:
        return dataset
    return _prepared(trainer, dataset, trainer.args, name)


def _prepared(trainer: Any, dataset: Any, args: Any, name: str) -> Any:
    return trainer._prepare_dataset(dataset, trainer.processing_class, args, False, trainer._formatting_func, name)


def packed_with_ids(trainer: Any, dataset: Any, id_column: str) -> Any:
    """The trainer's packed data with a list in `id_column`: for every token the id of the document that it is of.

    Args:
        dataset: the dataset that the trainer was given, with an id for every document.

    Raises:
        InrunError: the dataset has no such column, or is not what the trainer packed.
    """
    from trl.data_utils import pack_dataset

    args = trainer.args
    whole = copy.copy(args)  # packing cuts: the trainer's preparation does not when it packs
    whole.max_length, whole.shuffle_dataset = None, False
    documents = _prepared(trainer, dataset, whole, "train")
    first = next(iter(documents))
    if id_column not in first:
        raise InrunError(f"train_dataset= has no {id_column!r} column (it has {', '.join(first)}): add one with ids.")

    def by_token(document: dict[str, Any]) -> dict[str, Any]:
        i, tokens = document[id_column], document["input_ids"]
        return {
            "input_ids": tokens,
            "labels": document["labels"],
            id_column: i if isinstance(i, list) else [i] * len(tokens),
        }

    documents = documents.map(by_token, remove_columns=list(first))
    if args.shuffle_dataset:
        documents = documents.shuffle(seed=args.seed)
    packed = pack_dataset(documents, args.max_length, args.packing_strategy)
    if args.shuffle_dataset:
        packed = packed.shuffle(seed=args.seed)
    _check_same(packed, trainer.train_dataset)
    return packed


def _check_same(ours: Any, theirs: Any) -> None:
    """Raise InrunError unless both hold the same tokens and labels, row by row; of a stream, the first rows."""
    streams = not hasattr(theirs, "__len__")
    parts = [islice(x.iter(_ROWS), 1 if streams else None) for x in (ours, theirs)]
    columns = ("input_ids", "labels")
    same = streams or len(ours) == len(theirs)
    if not same or not all(_lists(a[c]) == _lists(b[c]) for a, b in zip(*parts, strict=True) for c in columns):
        raise InrunError(
            "train_dataset= is not what the trainer packed: packing it in the same way gives other rows. Give attach() "
            "the very dataset that the trainer was built with, before any change of the trainer's arguments."
        )


def _lists(column: Any) -> list[list[int]]:
    return [row.tolist() if hasattr(row, "tolist") else row for row in column]


@contextmanager
def head_called(trainer: Any) -> Iterator[bool]:
    """Inside the block, the model of an SFTTrainer calls its head to have the loss's log-probabilities of it.

    They are computed by the trainer's own fused forward, inside of the head's call and to the same bits; only a head
    that is run again in forward mode (inrun.tangent.generic) computes them by way of all logits. Nothing is done, and
    False is given, where the head is not trained or is not a layer that owns its weight: then no use of a weight is
    hidden, or the whole model is run again to find what it did.
    """
    model = trainer.model
    forward = vars(model).get("forward")
    unwrapped = vars(model).get("_original_forward", forward)  # accelerate's, under mixed precision
    fused: Any = getattr(unwrapped, "__func__", None)
    settings = dict(inspect.getclosurevars(fused).nonlocals) if inspect.isfunction(fused) else {}
    head = model.get_output_embeddings() if is_sft(trainer) and "original_forward" in settings else None
    weight = None if head is None else head._parameters.get("weight")
    mixture = getattr(settings.get("text_config"), "output_router_logits", False)
    by_logits = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    if head is None or weight is None or not weight.requires_grad or mixture or by_logits:
        yield False
        return
    kind = type(head)
    head.__class__ = _head_of(kind, _Fused(fused, settings))
    calling = _calling(unwrapped)
    if unwrapped is not forward:
        accelerator = trainer.accelerator
        mixed = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        calling = convert_outputs_to_fp32(mixed(calling))
    model.forward = MethodType(calling, model)
    try:
        yield True
    finally:
        head.__class__, model.forward = kind, forward


def shifted(labels: Tensor) -> Tensor:
    """Of every token the label of the next, [batch, time]. A batch without its last tokens has them without its last:
    by that it is found out which outputs are of which token (inrun.shortened).
    """
    return F.pad(labels[..., 1:], (0, 1), value=_IGNORED)


def _calling(fused: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, with its head called."""

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or (labels is None and shift_labels is None):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs |= {name: x for name, x in given.items() if x is not None}
            return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = shifted(labels)
        found = self.get_output_embeddings()(hidden, shift_labels)
        if labels is not None:  # the fused forward leaves the last token out, and sums are to have the same order
            found = type(found)(**{name: x[:, :-1].contiguous() for name, x in found.items()})
        items = found.label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        found.loss = -found.log_probs.sum() / items
        return found

    forward.__signature__ = inspect.signature(fused.__func__)  # type: ignore[attr-defined]
    return forward


def _head_of(kind: type[nn.Module], fused: "_Fused") -> type[nn.Module]:
    """The head's type, whose call with the next tokens' labels returns what the fused forward does, [batch, time]."""

    class Head(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Tensor, next_labels: Tensor | None = None) -> Any:
            if next_labels is None:
                return super().forward(hidden)
            weight, along = forward_ad.unpack_dual(self.weight)  # type: ignore[no-untyped-call]
            bias = None if self.bias is None else forward_ad.unpack_dual(self.bias).primal  # type: ignore[no-untyped-call]
            found = fused(hidden, SimpleNamespace(weight=weight, bias=bias), next_labels)
            if along is not None:
                logits = super().forward(hidden)
                found = type(found)(**{**found, **_by_logits(logits, next_labels, fused.settings)})
            return found

    Head.__name__, Head.__qualname__ = kind.__name__, kind.__qualname__
    return Head


@dataclass(frozen=True)
class _Fused:
    """The trainer's fused forward, and the settings that it was made with, for hidden states that are there."""

    forward: Callable[..., Any]
    settings: dict[str, Any]

    def __call__(self, hidden: Tensor, head: SimpleNamespace, next_labels: Tensor) -> Any:
        """Its output with an entry for every token; its loss left out."""
        # as it is called in training: the last token predicts nothing
        found = self._run(hidden, head, labels=F.pad(next_labels[:, :-1], (1, 0), value=_IGNORED))
        leaves = {name: F.pad(x, (0, 1)) for name, x in found.items()}
        if bool((next_labels[:, -1] != _IGNORED).any()):  # but for tokens that were cut off
            last = self._run(hidden[:, -1:], head, shift_labels=next_labels[:, -1:])
            leaves = {name: torch.cat([x[:, :-1], last[name]], dim=1) for name, x in leaves.items()}
        return type(found)(**leaves)

    def _run(self, hidden: Tensor, head: SimpleNamespace, **labels: Tensor) -> Any:
        rest = SimpleNamespace(
            base_model=lambda **_: SimpleNamespace(last_hidden_state=hidden), get_output_embeddings=lambda: head
        )
        found = self.forward(rest, fused_lm_head=True, **labels)
        return type(found)(**{name: x for name, x in found.items() if name != "loss"})


def _by_logits(logits: Tensor, labels: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """What of the fused head's outputs can have a gradient, in operations that have a forward mode."""
    z, cap = logits.float() * settings["logit_scale"], settings["final_logit_softcapping"]
    z = (z if cap is None else cap * torch.tanh(z / cap)) / settings["temperature"]
    of_all, left_out = F.log_softmax(z, dim=-1), labels == _IGNORED
    log_probs = of_all.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(of_all.exp() * of_all).sum(dim=-1)
    return {"log_probs": log_probs.masked_fill(left_out, 0), "entropy": entropy.masked_fill(left_out, 0)}

"""The truth: really training again, from the same weights on the same batches in the same order, without some examples.

Trainings on many subsets go at once, with a leading dimension of subsets (S) on the weights; torch's own optimizer
moves them all, as what AdamW and SGD do to a number depends on nothing but that number and its gradients. Some of the
subsets are trained again by themselves. N are the training examples, B those of a batch.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer

Batch = tuple[Tensor, ...]  # tensors with the examples in dimension 0
CHUNK = 50  # subsets at once
CHECKED = 2  # subsets trained by themselves
TOLERANCE = 1e-3  # nats, for those: float32, with sums in another order at every step


class Training(Protocol):
    """One that can be done again: the same weights to begin with, batches and rates."""

    @property
    def target(self) -> Batch: ...

    def make(self) -> tuple[nn.Module, Optimizer]:
        """The model as it begins, and its optimizer."""
        ...

    def optimizer(self, weights: Iterable[Tensor]) -> Optimizer:
        """The same optimizer for other weights."""
        ...

    def batches(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Batch]]:
        """By step the examples' places [B] and the batch, the rate having been set."""
        ...

    def losses(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """By example, in nats: [B]."""
        ...


def random_subsets(subsets: int, examples: int, kept: float, seed: int) -> Tensor:
    """Which examples each keeps: [S, N]."""
    random = np.random.default_rng([seed, round(1000 * kept)])
    places = np.argsort(random.random((subsets, examples)), axis=1)
    keep = torch.zeros(places.shape, dtype=torch.bool)
    return keep.scatter_(1, torch.from_numpy(places[:, : round(kept * examples)]), True)


def weights_in_batch(weights: Tensor, removed: bool, dtype: torch.dtype) -> Tensor:
    """What each loss of a batch is multiplied with, by the weights of its examples [..., B]: the mean of the batch is
    over those that are left if the others are `removed`, and over all if they have no weight.
    """
    given = weights.to(dtype)
    return given / (given.sum(dim=-1, keepdim=True).clamp(min=1) if removed else given.shape[-1])


def losses_at_end(run: Training, keep: Tensor, removed: bool, at_once: int = CHUNK) -> Tensor:
    """The target's loss after training on each subset, or with each set of weights [S, N]: float64 [S]."""
    if at_once == 1:
        return torch.tensor([loss_alone(run, one, removed) for one in keep], dtype=torch.float64)
    return torch.cat([_together(run, chunk, removed) for chunk in torch.split(keep, at_once)])


def _together(run: Training, keep: Tensor, removed: bool) -> Tensor:
    model, _ = run.make()
    weights = {
        name: p.detach().expand(len(keep), *p.shape).clone().requires_grad_() for name, p in model.named_parameters()
    }
    optimizer, dtype = run.optimizer(weights.values()), next(iter(weights.values())).dtype
    model.requires_grad_(False)

    def of_subset(weights: dict[str, Tensor], in_batch: Tensor, batch: Batch) -> Tensor:
        return (run.losses(lambda *given: functional_call(model, weights, given), batch) * in_batch).sum()

    of_all = vmap(of_subset, in_dims=(0, 0, None))
    for places, batch in run.batches(optimizer):
        of_all(weights, weights_in_batch(keep[:, places], removed, dtype), batch).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    count = len(run.target[0])
    with torch.no_grad():
        found: Tensor = of_all(weights, torch.full((len(keep), count), 1 / count, dtype=dtype), run.target)
    return found.double()


def loss_alone(run: Training, keep: Tensor, removed: bool) -> float:
    """The target's loss after one training, as anybody would write it."""
    model, optimizer = run.make()
    for places, batch in run.batches(optimizer):
        each = run.losses(model, batch)
        (each * weights_in_batch(keep[places], removed, each.dtype)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(run.losses(model, run.target).mean())


def check(run: Training, name: str, keep: Tensor, ends: Tensor, removed: bool) -> None:
    """That the first subsets end the same if they are trained by themselves; an AssertionError otherwise."""
    for row, one in enumerate(keep[:CHECKED]):
        alone = loss_alone(run, one, removed)
        if abs(alone - float(ends[row])) > TOLERANCE:
            raise AssertionError(
                f"{name}: subset {row} ends at {alone:.6f} nats if it is trained by itself, and at "
                f"{float(ends[row]):.6f} among others"
            )

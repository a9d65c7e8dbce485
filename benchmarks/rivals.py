"""What else a user could take for a gradient product per example, each library by its own interface.

Every function here gives a step that trains as `plain` does and returns <g_i, grad L of target k>: [targets, examples].
All of them are first order and know nothing of the optimizer. Each library is used in the cheapest way that it offers
for these numbers: without random projections, without files, on the batch that is trained on anyway.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from benchmarks.models import Batch, Setting

Step = Callable[[Batch], Tensor]
Make = Callable[[Setting, nn.Module, Optimizer, Sequence[Batch]], AbstractContextManager[Step]]


def installed(name: str) -> str | None:
    """The distribution's version, or None."""
    try:
        return version(name) if find_spec(name) is not None else None
    except PackageNotFoundError:
        return None


@contextmanager
def opacus(setting: Setting, model: nn.Module, optimizer: Optimizer, targets: Sequence[Batch]) -> Iterator[Step]:
    """The training step's backward pass under opacus's hooks leaves a gradient per example on every parameter."""
    grad_sample = import_module("opacus.grad_sample")
    parameters = list(model.parameters())
    sampled = grad_sample.GradSampleModule(model, loss_reduction="mean", strict=False)

    def outputs(inputs: Tensor) -> object:
        if inputs.is_floating_point():
            return sampled(inputs)
        # GPT-2 broadcasts its position embeddings over the batch, where opacus takes them for those of one example
        return sampled(inputs, position_ids=torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs))

    def step(batch: Batch) -> Tensor:
        sampled.disable_hooks()
        directions = [torch.autograd.grad(setting.loss(model, one), parameters) for one in targets]
        sampled.enable_hooks()
        setting.loss(outputs, batch).backward()
        values = torch.zeros(len(targets), len(batch[0]), device=batch[0].device)
        for p, *along in zip(parameters, *directions, strict=True):
            q_KP = torch.stack([q.reshape(-1) for q in along])
            values += q_KP @ p.grad_sample.flatten(1).T
            p.grad_sample = None
        optimizer.step()
        optimizer.zero_grad()
        return values / len(batch[0])

    try:
        yield step
    finally:
        sampled.remove_hooks()


class Outputs(nn.Module):
    """A model as function of its inputs alone, also of several batches at once: [batches, examples, ...]."""

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        super().__init__()
        self.setting, self.model = setting, model
        self._dims = setting.draw(1, 0)[0].ndim

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim == self._dims:
            return self.setting.workload.outputs(self.model, inputs)
        outputs: Tensor = self.setting.workload.outputs(self.model, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return outputs


@contextmanager
def captum(setting: Setting, model: nn.Module, optimizer: Optimizer, targets: Sequence[Batch]) -> Iterator[Step]:
    """TracInCP with the present weights for its only checkpoint.

    By a backward pass per example; where all layers are linear or convolutions, in one, as captum then offers.
    """
    influence = import_module("captum.influence")
    outputs = Outputs(setting, model)
    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    in_one = all(isinstance(module, nn.Linear | nn.Conv2d) for module in owners)
    gather = torch.cat if in_one else torch.stack  # in one, an example of a target counts by itself
    queries = tuple(gather(part) for part in zip(*targets, strict=True))
    labels_ndim = setting.draw(1, 0)[1].ndim

    def losses(found: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim == labels_ndim:
            return setting.workload.each(found, labels)
        each: Tensor = setting.workload.each(found.flatten(0, 1), labels.flatten(0, 1)).unflatten(0, labels.shape[:2])
        return each.mean(dim=1)

    def step(batch: Batch) -> Tensor:
        loader = DataLoader(TensorDataset(*batch), batch_size=len(batch[0]))
        loss = nn.CrossEntropyLoss(reduction="sum") if in_one else losses
        tracin = influence.TracInCP(
            outputs, loader, ["now"], lambda *_: 1.0, loss_fn=loss, batch_size=None, sample_wise_grads_per_batch=in_one
        )
        values: Tensor = tracin.influence(queries)
        if in_one:
            values = values.unflatten(0, (len(targets), -1)).mean(dim=1)
        setting.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return values / len(batch[0])

    yield step


@contextmanager
def dattri(setting: Setting, model: nn.Module, optimizer: Optimizer, targets: Sequence[Batch]) -> Iterator[Step]:
    """TracIn with the present weights for its only checkpoint: gradients by torch.func, a vector per example."""
    tasks, algorithms = import_module("dattri.task"), import_module("dattri.algorithm")

    def loss(parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        return setting.loss(lambda inputs: functional_call(model, parameters, (inputs,)), batch)

    def example(parameters: dict[str, Tensor], one: Batch) -> Tensor:
        return loss(parameters, (one[0].unsqueeze(0), one[1].unsqueeze(0)))

    queries = [torch.stack(part) for part in zip(*targets, strict=True)]

    def keep(same: nn.Module, _: object) -> nn.Module:
        return same

    task = tasks.AttributionTask(example, model, [{}], target_func=loss, checkpoints_load_func=keep)
    tracin = algorithms.TracInAttributor(task, torch.ones(1), normalized_grad=False, device=setting.device)
    tracin.projector_kwargs = None  # whole gradients, which the constructor has no argument for

    def step(batch: Batch) -> Tensor:
        train = DataLoader(TensorDataset(*batch), batch_size=len(batch[0]))
        values: Tensor = tracin.attribute(train, DataLoader(TensorDataset(*queries), batch_size=len(targets)))
        setting.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return values.T / len(batch[0])

    yield step


@contextmanager
def bergson(setting: Setting, model: nn.Module, optimizer: Optimizer, targets: Sequence[Batch]) -> Iterator[Step]:
    """The collector scores every linear layer's gradient per example in the training step's own backward pass.

    Embeddings and norms are left out: the values are of the other parameters.
    """
    library, kept = import_module("bergson"), import_module("bergson.gradients")
    writers = import_module("bergson.score.score_writer")
    if not isinstance(model, PreTrainedModel):
        raise NotImplementedError("models of transformers only, whose linear layers see [examples, tokens, features]")
    processor = kept.GradientProcessor(include_bias=True)
    parameters = list(model.parameters())
    indices = list(range(setting.batch))

    def collector_of(gradients: Sequence[Sequence[Tensor]]) -> Any:
        by_parameter = dict(zip(parameters, zip(*gradients, strict=True), strict=True))
        queries = {}
        for name in library.InMemoryCollector.discover_targets(model, include_bias=True):
            layer = model.get_submodule(name)
            rows = torch.stack(by_parameter[layer.get_parameter("weight")])  # [targets, outer, inner]
            rows = rows.mT if kept.LayerAdapter.weight_transposed(layer) else rows
            if layer.bias is not None:
                rows = torch.cat([rows, torch.stack(by_parameter[layer.get_parameter("bias")]).unsqueeze(-1)], dim=-1)
            queries[name] = rows.flatten(1)
        writer = writers.InMemorySequenceScoreWriter(len(indices), len(targets))
        scorer = library.Scorer(queries, list(queries), writer, torch.device(setting.device), torch.float32)
        config = library.IndexConfig(run_path="", include_bias=True)
        return library.InMemoryCollector(model=model, data=indices, cfg=config, scorer=scorer, processor=processor)

    def step(batch: Batch) -> Tensor:
        collector = collector_of([torch.autograd.grad(setting.loss(model, one), parameters) for one in targets])
        with collector:
            losses = setting.losses(model, batch)
            losses.mean().backward()
        collector.process_batch(indices, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        values: Tensor = collector.scorer.writer.scores.T
        return values

    yield step

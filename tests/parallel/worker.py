"""Trainings that torchrun runs on several processes, and one process alone on the same batches.

    torchrun --nproc-per-node 2 -m tests.parallel.worker RUNS.json

A file holds a list of `Run`s. Each leaves its ledger in a folder of its own, and rank 0 the final weights. Alone, a
process makes the gradient of several from the same batches: the mean over the ranks of the mean over the accumulation.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import inrun
from tests.models import CASES, VOCABULARY, Case, token_losses, tokens


class Branching(nn.Module):
    """With a second input, it reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor, scale_BT: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens_BT)
        y = self.layer(x)
        if scale_BT is not None:
            y = y + nn.functional.linear(x, self.layer.weight) * scale_BT[..., None]
        return torch.as_tensor(self.head(torch.tanh(y)))


class Unexpandable(nn.Module):
    """An embedding that all examples share, in a way that leaves no room for an example dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.shared = nn.Embedding(VOCABULARY, 8), nn.Embedding(1, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        shared_TD = self.shared(torch.zeros(1, dtype=torch.long)).expand(tokens_BT.shape[1], 8)
        return torch.as_tensor(self.head(torch.tanh(self.embedding(tokens_BT) + shared_TD)))


def branching_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """Of batches of eight tokens with the second input, of others without it."""
    inputs = batch[:, :-1]
    scale = [torch.ones(inputs.shape)] if batch.shape[1] == 8 else []
    return nn.functional.cross_entropy(model(inputs, *scale).transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


REFUSED = {
    "branching": Case(Branching, lambda n, seed: tokens(n, seed, 7 + seed % 2), branching_losses),
    "unexpandable": Case(Unexpandable, tokens, token_losses),
}
CASES = {**CASES, **REFUSED}

OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "muon": torch.optim.Muon}


@dataclass(frozen=True)
class Run:
    """A training. `ranks` is how many processes share a step's batches, whoever runs it."""

    folder: str
    ranks: int
    wrap: str = "ddp"  # or "fsdp"; of several processes
    case: str = "gpt"
    optimizer: str = "adamw"
    rate: float = 3e-2
    dtype: str = "float64"
    mixed: bool = False  # bfloat16 in the forward
    replicas: bool = False  # of every piece, on all processes
    attached: bool = True  # an Attributor
    summed: bool = False  # gradients are added up, not averaged
    steps: int = 3
    batch: int = 3
    accumulation: int = 1
    no_sync: bool = True
    uneven: bool = False  # the later ranks have fewer examples in the last step
    clip: float = 0.0
    clip_value: float = 0.0
    settings: dict[str, Any] | None = None  # of the Attributor
    targets: tuple[int, ...] = (1, 2)  # batches of each
    audit_every: int = 2
    others_seed: int = 0  # of the targets' batches
    keep: int = 0  # the step after which a checkpoint is written
    checkpoint: str = ""  # the one to begin with
    stop: int = 0  # the step at which a process ends or hangs
    stop_rank: int = 1
    stop_where: str = "backward"  # before its forward and backward; or "step": after them; or "hang"
    patience: float = 300.0  # seconds that processes wait for one another
    poison: int = 0  # the step in which one number of the last rank's gradient is not finite
    overflow: int = 0  # the step that a gradient scaler leaves out, for what the first rank holds of a gradient
    looks: bool = False  # runs the model without gradients between backward and step
    kept_whole: bool = False  # weights stay whole after a forward, those of all children
    refused: bool = False  # what it is refused with goes to a file

    def sizes(self, step: int) -> list[int]:
        return [self.batch - (self.uneven and step == self.steps) * min(r, self.batch - 1) for r in range(self.ranks)]


def wrapped(run: Run, model: nn.Module) -> nn.Module:
    if dist.get_world_size() == 1 and not run.mixed:
        return model
    if run.wrap == "ddp":
        return DistributedDataParallel(model)
    size = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicas", "pieces"))
        if run.replicas
        else init_device_mesh("cpu", (size,))
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if run.mixed else MixedPrecisionPolicy()
    children = model.get_submodule("h").children() if run.case.startswith("gpt") else []
    for block in model.children() if run.kept_whole else children:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not run.kept_whole)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for m in model.modules():
        if run.summed and isinstance(m, FSDPModule):
            m.set_gradient_divide_factor(1.0)
    return model


def microbatch(run: Run, step: int, k: int, rank: int) -> tuple[list[str], Any]:
    """The ids and the batch of one rank."""
    n = run.sizes(step)[rank]
    return [f"{step}-{k}-{rank}-{i}" for i in range(n)], CASES[run.case].batch(n, 1000 * step + 10 * k + rank)


def train(run: Run) -> None:
    torch.set_default_dtype(getattr(torch, run.dtype))
    torch.manual_seed(0)
    case, alone, rank = CASES[run.case], dist.get_world_size() == 1, dist.get_rank()
    inner = case.build()
    model = wrapped(run, inner)
    if run.optimizer == "muon":
        matrices = [p for p in inner.parameters() if p.ndim == 2]
        rest = [p for p in inner.parameters() if p.ndim != 2]
        optimizers = [torch.optim.Muon(matrices, lr=run.rate), torch.optim.AdamW(rest, lr=run.rate)]
    else:
        optimizers = [OPTIMIZERS[run.optimizer](inner.parameters(), lr=run.rate)]
        if run.optimizer == "adamw":
            optimizers[0].param_groups[0]["eps"] = 1e-3
    targets = {f"t{n}": [case.batch(3, 90 + run.others_seed + 10 * n + k) for k in range(n)] for n in run.targets}
    first = 1
    attributor = inrun.Attributor(
        model, optimizers, targets, case.loss, ledger=run.folder, resume=bool(run.checkpoint),
        audit_every=run.audit_every, **(run.settings or {}),
    )  # fmt: skip
    if not run.attached:
        attributor.close()
    if run.checkpoint:
        first = 1 + load(run, inner, optimizers[0], attributor)
    weights = get_model_state_dict(inner, options=WHOLE) if run.poison else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=run.overflow > 0)
    for step in range(first, run.steps + 1):
        leaving = step == run.stop and rank == run.stop_rank
        if leaving and run.stop_where == "backward":
            os._exit(9)
        if leaving and run.stop_where == "hang":
            time.sleep(2 * run.patience)
        for k in range(run.accumulation):
            last = k == run.accumulation - 1
            if run.wrap == "fsdp" and inner is model and isinstance(inner, FSDPModule):
                inner.set_requires_gradient_sync(last or not run.no_sync)
            quiet = isinstance(model, DistributedDataParallel) and run.no_sync and not last
            with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
                for r in range(run.ranks) if alone else [rank]:
                    if alone and isinstance(inner, FSDPModule):
                        inner.set_requires_gradient_sync(last and r == run.ranks - 1)
                    ids, batch = microbatch(run, step, k, r)
                    share = run.accumulation * (run.ranks if alone or run.summed else 1)
                    with attributor.batch(ids) if run.attached else nullcontext() as block:
                        with overflowing(inner) if step == run.overflow else nullcontext():
                            loss = case.loss(model, batch) / share
                        scaler.scale(loss).backward()
                        if block is not None:
                            block.loss = loss.detach() * (run.ranks if run.summed and not alone else 1)
        if run.clip:
            nn.utils.clip_grad_norm_(inner.parameters(), run.clip)
        if run.clip_value:
            for p in inner.parameters():
                g = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                assert g is not None
                g.clamp_(-run.clip_value, run.clip_value)
        if leaving:
            os._exit(9)
        if step == run.poison and rank == run.ranks - 1:
            poisoned = next(inner.parameters()).grad
            assert isinstance(poisoned, DTensor)
            poisoned.to_local()[0, 0] = torch.nan
        if run.looks:
            with torch.no_grad():
                case.loss(model, microbatch(run, step, 0, rank)[1])
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if step == run.poison:
            set_model_state_dict(inner, weights, options=WHOLE)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step == run.keep:
            save(run, inner, optimizers[0], attributor)
    attributor.close()
    weights = get_model_state_dict(inner, options=WHOLE)
    if rank == 0:  # whole there
        save_file(
            {n: x.clone() for n, x in weights.items() if isinstance(x, Tensor)},
            Path(run.folder) / "weights.safetensors",
        )


WHOLE = StateDictOptions(full_state_dict=True)


@contextmanager
def overflowing(model: nn.Module) -> Iterator[None]:
    """Of a forward inside the block, the first rows of the first layer's weight get a gradient that is not finite."""

    def on(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            first = torch.arange(output.shape[1]) == 0
            output.register_hook(lambda g: torch.where(first, torch.inf, g))

    handle = next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(on)
    try:
        yield
    finally:
        handle.remove()


def save(run: Run, model: nn.Module, optimizer: Any, attributor: inrun.Attributor) -> None:
    """Whole, so that another number of processes can go on."""
    state = {
        "model": get_model_state_dict(model, options=WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
        "attributor": attributor.state_dict(),
    }
    if dist.get_rank() == 0:
        torch.save(state, Path(run.folder) / "checkpoint.pt")
    dist.barrier()


def load(run: Run, model: nn.Module, optimizer: Any, attributor: inrun.Attributor) -> int:
    state = torch.load(run.checkpoint, weights_only=True)
    set_model_state_dict(model, state["model"], options=WHOLE)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    attributor.load_state_dict(state["attributor"])
    return attributor.step


def stored(runs: list[Run], place: Path) -> Path:
    place.write_text(json.dumps([asdict(run) for run in runs]))
    return place


def weights_of(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "weights.safetensors")


def main() -> None:
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    runs = [Run(**one) for one in json.loads(Path(sys.argv[1]).read_text())]
    dist.init_process_group("gloo", timeout=timedelta(seconds=runs[0].patience))
    for run in runs:
        try:
            train(run)
        except inrun.InrunError as error:
            if not run.refused:
                raise
            place = Path(run.folder).parent / f"REFUSED-{Path(run.folder).name}-{dist.get_rank()}.txt"
            place.write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

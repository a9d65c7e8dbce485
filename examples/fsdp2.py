"""A small Llama whose weights, gradients and optimizer state are sharded over the processes by `fully_shard` (FSDP2).

    torchrun --nproc-per-node 2 examples/fsdp2.py [--out RUN] [--steps N] [--resume]

A checkpoint is written at the end; --resume goes on from it to --steps, with any number of processes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import inrun


def rows(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode())[: len(text) // 48 * 48]).reshape(-1, 48)


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model(input_ids=tokens, labels=tokens).loss)


def main(out: Path, steps: int, resume: bool) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    prose, code = rows(Path("LICENSE").read_text() * 8), rows(Path(json.__file__).read_text())
    train = torch.cat([prose[8:], code[8:]])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    targets = {"prose": prose[:8], "code": code[:8]}
    with inrun.Attributor(model, optimizer, targets, loss, ledger=out, resume=resume) as attributor:
        if resume:
            weights, moments = get_state_dict(model, optimizer)
            state: dict[str, Any] = {"model": weights, "optimizer": moments, "attributor": attributor.state_dict()}
            state_dict_loader.load(state, checkpoint_id=out / "checkpoint")
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            attributor.load_state_dict(state["attributor"])
        for step in range(attributor.step, steps):
            chosen = torch.randint(len(train), (8,), generator=torch.Generator().manual_seed(step))
            mine = chosen.tensor_split(dist.get_world_size())[dist.get_rank()]
            with attributor.batch(mine):
                loss(model, train[mine]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "attributor": attributor.state_dict()}
        state_dict_saver.save(state, checkpoint_id=out / "checkpoint")
    dist.barrier()  # all have written
    if dist.get_rank() == 0:
        print(inrun.Ledger(out).values("code").head(5))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--resume", action="store_true")
    main(**vars(parser.parse_args()))

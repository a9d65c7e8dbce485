"""A small Llama on English and Python text, with DistributedDataParallel: every process values its own examples.

    torchrun --nproc-per-node 2 examples/ddp.py [--out RUN] [--steps N]

Targets are the same on every process, and shared out: of `target_batches` at a step, each process passes over some.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import inrun


def rows(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode())[: len(text) // 48 * 48]).reshape(-1, 48)


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model(input_ids=tokens, labels=tokens).loss)


def main(out: str, steps: int) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    prose, code = rows(Path("LICENSE").read_text() * 8), rows(Path(json.__file__).read_text())
    train = torch.cat([prose[16:], code[16:]])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = DistributedDataParallel(LlamaForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = TensorDataset(torch.arange(len(train)), train)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, drop_last=True))
    batches = iter([batch for _ in range(1 + steps // 8) for batch in loader])
    targets = {"prose": list(prose[:16].split(4)), "code": list(code[:16].split(4))}
    with inrun.Attributor(model, optimizer, targets, loss, target_batches=2, ledger=out) as attributor:
        for k in range(2 * steps):  # two batches a step; gradients are exchanged with the second
            ids, tokens = next(batches)
            with model.no_sync() if k % 2 == 0 else nullcontext(), attributor.batch(ids):
                (loss(model, tokens) / 2).backward()
            if k % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    dist.barrier()  # all have written
    if dist.get_rank() == 0:
        print(inrun.Ledger(out).values("code").head(5))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/ddp")
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))

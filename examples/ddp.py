"""A small Llama on English and Python text, with DistributedDataParallel: every process values its own examples.

    torchrun --nproc-per-node 2 examples/ddp.py [--out RUN] [--steps N]

The target's batches are the same on every process, and shared out: with `target_batches` of them at a step, each of as
many processes passes over one. Values and books are those of one process with the whole batch.
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


def rows(text: str, length: int = 48) -> torch.Tensor:
    """The text cut into rows of bytes."""
    codes = torch.tensor(list(text.encode()))
    return codes[: len(codes) // length * length].reshape(-1, length)


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model(input_ids=tokens, labels=tokens).loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    prose, code = rows(Path("LICENSE").read_text() * 8), rows(Path(json.__file__).read_text())
    train = torch.cat([prose[16:], code[16:]])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = DistributedDataParallel(LlamaForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dataset = TensorDataset(torch.arange(len(train)), train)
    loader = DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, drop_last=True))
    batches = iter([batch for _ in range(1 + options.steps // 8) for batch in loader])
    targets = {"prose": list(prose[:16].split(4)), "code": list(code[:16].split(4))}
    with inrun.Attributor(model, optimizer, targets, loss, target_batches=2, ledger=options.out) as attributor:
        for _ in range(options.steps):
            for last in (False, True):  # two batches a step; gradients are exchanged with the last
                ids, tokens = next(batches)
                with nullcontext() if last else model.no_sync(), attributor.batch(ids):
                    (loss(model, tokens) / 2).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    dist.barrier()  # all have written
    if dist.get_rank() == 0:
        print(inrun.Ledger(options.out).values("code").head(5))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

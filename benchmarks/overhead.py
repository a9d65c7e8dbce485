"""What attribution costs: the time of an attributed step over that of a plain one, taken in alternation in one process.

    python benchmarks/overhead.py [--rounds N]

The model is a GPT of 14 million parameters (GPT-2's architecture: 6 layers of 384, a vocabulary of 8,192), batch 8 of
256 tokens, AdamW, float32; a target batch is one sequence of 256 tokens. Beside plain training stands plain training
with the target's own forward and backward pass, which no scheme can do without. Each round times every variant once, in
a turning order; printed are the median over the rounds with the range of its middle half, and the most memory that a
process of its own came to hold.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from inrun import Attributor

BATCH, LENGTH, VOCABULARY = 8, 256, 8192


def build() -> nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=384, n_layer=6, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.loss_type = "ForCausalLM"
    return model


def tokens(n: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(input_ids=batch, labels=batch).loss
    return found


def plain(targets: int = 0) -> Callable[[int], None]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(t: int) -> None:
        loss(model, tokens(BATCH, t)).backward()
        for k in range(targets):
            torch.autograd.grad(loss(model, tokens(1, 1000 + k)), list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def attributed(scheme: str, targets: int = 1, nodes: int | str = 1) -> Callable[[int], None]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = {f"target-{k}": tokens(1, 1000 + k) for k in range(targets)}
    attributor = Attributor(model, optimizer, batches, loss, scheme=scheme, nodes=nodes)  # type: ignore[arg-type]

    def step(t: int) -> None:
        with attributor.batch(range(BATCH)):
            loss(model, tokens(BATCH, t)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


VARIANTS: dict[str, Callable[[], Callable[[int], None]]] = {
    "plain": plain,
    "plain + 1 target pass": lambda: plain(1),
    "first, 1 target": lambda: attributed("first"),
    "second, 1 target": lambda: attributed("second"),
    "path, 1 target": lambda: attributed("path"),
    "path, adaptive, 1 target": lambda: attributed("path", nodes="adaptive"),
    "path, 3 nodes, 1 target": lambda: attributed("path", nodes=3),
    "plain + 3 target passes": lambda: plain(3),
    "path, 3 targets": lambda: attributed("path", targets=3),
}


def times(rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of every variant, one a round; the first round of each is not counted."""
    steps = {name: build() for name, build in VARIANTS.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for t in range(rounds + 1):
        names = list(steps)[t % len(steps) :] + list(steps)[: t % len(steps)]
        for name in names:
            begun = time.perf_counter()
            steps[name](t)
            found[name].append(time.perf_counter() - begun)
    return {name: of[1:] for name, of in found.items()}


def peak(name: str) -> float:
    """The most memory, in GiB, of a process that takes four steps of a variant."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import overhead; overhead.run_alone({name!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def run_alone(name: str) -> None:
    step = VARIANTS[name]()
    for t in range(4):
        step(t)
    with open("/proc/self/status", encoding="utf-8") as status:
        print(next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM")))


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=14)
    rounds = parser.parse_args().rounds
    found = times(rounds)
    base = found["plain"]
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds")
    print(f"{'':26}{'s/step':>8}  {'ratio to plain (middle half)':32}{'peak GiB':>8}")
    for name, of in found.items():
        ratios = [mine / plain for mine, plain in zip(of, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = f"{middle:.2f}  ({low:.2f} to {high:.2f})"
        print(f"{name:26}{statistics.median(of):8.2f}  {spread:32}{peak(name):8.2f}", flush=True)


if __name__ == "__main__":
    main()

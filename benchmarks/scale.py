"""What attribution costs large runs, computed and not measured: time, network and memory of a step, by formula.

python -m benchmarks.scale

prints the tables and writes them into docs/scale.md, which states the formulas and what is assumed. Training is in bf16
with float32 weights, gradients and AdamW moments, values by scheme path with one node, every target one batch of a
sequence. Operations and bytes of a kernel are `inrun.kernels.work`'s.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inrun.kernels import Shape, work

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- written by benchmarks.scale: begin -->", "<!-- written by benchmarks.scale: end -->"

# An H100, as sold, in a second: bf16 operations, bytes of memory, bytes each way by NVLink and to other nodes
PEAK, HBM, NVLINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9
ATTAINED = 0.4  # of the peak, by training and by attribution alike
ROOM, HOST = 80e9, 50e9  # bytes of its memory; a second to the host's and back
NODE = 8  # GPUs that NVLink connects
SEQUENCE, BATCH = 4096, 2**22  # tokens
MICROBATCH = 4  # sequences at most
GPUS, TARGETS = (8, 64, 256, 1024), (1, 4)
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Model:
    """A decoder as Llama's: no biases, gated feed-forward, the head apart from the embedding."""

    name: str
    layers: int
    d: int
    ff: int
    kv: int  # features of keys, and of values
    vocabulary: int = 32_000
    rank: int = 0  # of LoRA on every linear layer of the blocks; 0: all is trained

    @property
    def linear(self) -> list[tuple[int, int, int]]:
        """Of the linear layers: features in and out, and how many such layers there are."""
        d, n = self.d, self.layers
        return [
            (d, d, 2 * n),
            (d, self.kv, 2 * n),
            (d, self.ff, 2 * n),
            (self.ff, d, n),
            (d, self.vocabulary, 1),
        ]

    @property
    def trained(self) -> list[tuple[int, int, int]]:
        """Of the linear layers that are trained: those, or their adapters."""
        if not self.rank:
            return self.linear
        blocks = self.linear[:-1]
        return [(i, self.rank, n) for i, _, n in blocks] + [(self.rank, o, n) for _, o, n in blocks]

    @property
    def products(self) -> int:
        """Weights that are multiplied with every token."""
        return sum(i * o * n for i, o, n in self.linear)

    @property
    def parameters(self) -> int:
        return self.products + self.vocabulary * self.d + (2 * self.layers + 1) * self.d

    @property
    def moved(self) -> int:
        """Parameters that are trained."""
        return sum(i * o * n for i, o, n in self.trained) if self.rank else self.parameters

    def operations(self, tokens: float) -> float:
        """Of a forward and backward pass over so many tokens, causal attention included."""
        adapters = self.moved if self.rank else 0
        backward = 1 if self.rank else 2  # a frozen weight has no gradient
        weights = 2 * self.products * (1 + backward) + 6 * adapters
        return tokens * (weights + 6 * self.layers * self.d * SEQUENCE)

    def shapes(self, sequences: float) -> list[tuple[Shape, int]]:
        """The calls of the trained layers on so many sequences, as one call each."""
        found = []
        for i, o, n in self.trained:
            rows = round(sequences * SEQUENCE)
            found.append((Shape(round(sequences), SEQUENCE, i, o, HALF, rows * (i + o) * HALF), n))
        return found


@dataclass(frozen=True)
class Cost:
    """What a GPU does in a step: operations, bytes through its memory, bytes it sends; and bytes it keeps."""

    operations: float = 0
    memory: float = 0
    network: float = 0
    captured: float = 0  # of examples, until the step
    state: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, of) + getattr(other, of) for of in self.__dataclass_fields__))

    def seconds(self, gpus: int) -> float:
        """The network works while the GPU computes."""
        computing = self.operations / (ATTAINED * PEAK) + self.memory / HBM
        return max(computing, self.network / (NVLINK if gpus <= NODE else NETWORK))


def plain(model: Model, gpus: int, sharded: bool) -> Cost:
    """A training step: under FSDP2 every microbatch gathers weights and scatters gradients, under DDP the step does."""
    sequences, others = BATCH / SEQUENCE / gpus, (gpus - 1) / gpus
    state = (4 * SINGLE * model.moved + (HALF * model.parameters if model.rank else 0)) / (gpus if sharded else 1)
    passes = _gathered(model) * max(sequences / MICROBATCH, 1) if sharded else 2 * SINGLE * model.moved
    return Cost(model.operations(sequences * SEQUENCE), 0, passes * others, 0, state)


def sharded(model: Model, gpus: int, targets: int) -> Cost:
    """What attribution adds under FSDP2: kernel `tangent`."""
    sequences, others = BATCH / SEQUENCE / gpus, (gpus - 1) / gpus
    contracted = _contracted(model, sequences, targets, ["tangent"])
    return contracted + Cost(
        operations=targets * model.operations(SEQUENCE),  # every process runs the one batch of each target
        memory=_streams(targets) * model.moved / gpus,
        network=targets * (_gathered(model) + HALF * model.moved) * others,
        # displaced weights, chord, the gradient as backward made it, and one for every target
        state=(3 + targets) * SINGLE * model.moved / gpus,
    )


def replicated(model: Model, gpus: int, targets: int, hows: Sequence[str] = ("fused", "late", "tangent")) -> Cost:
    """What attribution adds under DDP: targets are shared out, `kernel="auto"`."""
    sequences, others = BATCH / SEQUENCE / gpus, (gpus - 1) / gpus
    rounds = -(-targets // gpus)
    return _contracted(model, sequences, targets, hows) + Cost(
        operations=rounds * model.operations(SEQUENCE),
        memory=_streams(targets) * model.moved,
        network=targets * 2 * SINGLE * model.moved * others,
        state=(3 + targets) * SINGLE * model.moved,
    )


def refreshed(model: Model, gpus: int, targets: int, every: int) -> Cost:
    """`sharded` with scheme first, whose targets' passes are made every so many steps."""
    whole, others = sharded(model, gpus, targets), (gpus - 1) / gpus
    saved = 1 - 1 / every
    return replace(
        whole,
        operations=whole.operations - saved * targets * model.operations(SEQUENCE),
        network=whole.network - saved * targets * _gathered(model) * others,
        state=whole.state - 2 * SINGLE * model.moved / gpus,  # nothing is displaced
    )


def _gathered(model: Model) -> float:
    """Bytes of a microbatch under FSDP2: weights for forward and backward, and the gradient in float32."""
    return 2 * HALF * model.parameters + SINGLE * model.moved


def _streams(targets: int) -> float:
    """Bytes of memory a parameter: the optimizer's move and the books, as `inrun.plan` counts them."""
    return SINGLE * (6 + 1 + 3.5 * targets)


def _contracted(model: Model, sequences: float, targets: int, hows: Sequence[str]) -> Cost:
    """The contraction by the quickest of these kernels, layer by layer, and what it keeps until the step."""
    total = Cost()
    for shape, count in model.shapes(sequences):
        ways = []
        for how in hows:
            operations, traffic = work(how, shape, targets, (), at_once=False)  # type: ignore[arg-type]
            kept = shape.formed if how == "fused" else shape.pair
            if how != "fused" or shape.formed <= 4 * shape.pair:
                ways.append(Cost(count * operations, count * traffic, captured=count * kept))
        total += min(ways, key=lambda way: way.seconds(1))
    return total


LLAMA_1B = Model("1B", 22, 2048, 5632, 256)
LLAMA_7B = Model("7B", 32, 4096, 11008, 4096)
LLAMA_70B = Model("70B", 80, 8192, 28672, 1024)


def tables() -> str:
    """What the page shows between its markers, in Markdown."""
    parts = []
    for model in (LLAMA_7B, LLAMA_70B):
        parts += [f"### {model.name} under FSDP2 ({model.parameters / 1e9:.1f} billion parameters)", _of_sharded(model)]
    parts += ["### Under DDP", _of_replicated(), "### What changes it", _ways_out()]
    return "\n\n".join(parts) + "\n"


def _of_sharded(model: Model) -> str:
    time, memory = [], []
    for gpus in GPUS:
        base, costs = plain(model, gpus, True), [sharded(model, gpus, targets) for targets in TARGETS]
        first = [f"{gpus}", f"{BATCH / SEQUENCE / gpus:g}"]
        time.append([*first, _seconds(base, gpus), f"{base.network / 1e9:.0f}"])
        for cost in costs:
            time[-1] += [
                _share(cost, base, gpus),
                f"{cost.operations / base.operations:.0%}",
                f"{cost.network / 1e9:.0f}",
            ]
        kept = costs[0].captured
        memory.append([*first, f"{base.state / 1e9:.1f}", *(f"{cost.state / 1e9:.1f}" for cost in costs)])
        memory[-1] += [f"{kept / 1e9:.0f}", _fits(base.state + costs[-1].state + kept), f"{2 * kept / HOST:.1f}"]
    head = ["GPUs", "sequences a GPU", "plain step, s", "GB sent"]
    for targets in TARGETS:
        head += [f"{targets} target{'s' * (targets > 1)} add", "operations", "GB sent"]
    of = [
        "GPUs",
        "sequences a GPU",
        "training, GB",
        "shards, 1 target",
        "4 targets",
        "captured, GB",
        "all fit in 80 GB",
    ]
    return f"{_table(head, time)}\n\n{_table([*of, 'captured: s to the host and back'], memory)}"


def _of_replicated() -> str:
    rows = []
    for model in (LLAMA_1B, LLAMA_7B, replace(LLAMA_7B, name="7B, LoRA of rank 16", rank=16)):
        for gpus in GPUS:
            base = plain(model, gpus, False)
            row = [model.name, f"{gpus}", f"{BATCH / SEQUENCE / gpus:g}", _seconds(base, gpus)]
            row += [f"{base.network / 1e9:.1f}"]
            for targets in TARGETS:
                more = replicated(model, gpus, targets)
                row += [_share(more, base, gpus), f"{more.network / 1e9:.1f}"]
            more = replicated(model, gpus, TARGETS[-1])
            row += [f"{base.state / 1e9:.0f}", f"{more.state / 1e9:.1f}"]
            row += [f"{more.captured / 1e9:.3g}", _fits(base.state + more.state + more.captured)]
            rows.append(row)
    head = ["model", "GPUs", "sequences a GPU", "plain step, s", "GB sent", "1 target adds", "GB sent", "4 targets add"]
    head += ["GB sent", "training, GB", "4 targets, GB", "kept of examples, GB", "all fit in 80 GB"]
    return _table(head, rows)


def _ways_out() -> str:
    rows = []
    for gpus in (64, 1024):
        for model in (LLAMA_7B, LLAMA_70B):
            base = plain(model, gpus, True)
            ways = {
                "path, 4 targets": sharded(model, gpus, 4),
                "path, 1 target": sharded(model, gpus, 1),
                "first, refresh=10, 4 targets": refreshed(model, gpus, 4, 10),
                "first, refresh=10, 1 target": refreshed(model, gpus, 1, 10),
            }
            for name, cost in ways.items():
                rows.append([model.name, f"{gpus}", name, _share(cost, base, gpus), f"{cost.captured / 1e9:.0f}"])
        adapted = replace(LLAMA_7B, rank=16)
        base, cost = plain(adapted, gpus, False), replicated(adapted, gpus, 4)
        name = "LoRA of rank 16, not sharded: path, 4 targets"
        rows.append(["7B", f"{gpus}", name, _share(cost, base, gpus), f"{cost.captured / 1e9:.2f}"])
    return _table(["model", "GPUs", "way", "adds", "kept of examples, GB a GPU"], rows)


def _seconds(cost: Cost, gpus: int) -> str:
    waits = cost.network / (NVLINK if gpus <= NODE else NETWORK) >= cost.seconds(gpus)
    return f"{cost.seconds(gpus):.2f}{' (network)' if waits else ''}"


def _share(more: Cost, base: Cost, gpus: int) -> str:
    return f"{more.seconds(gpus):.2f} s, {more.seconds(gpus) / base.seconds(gpus):.0%}"


def _fits(needed: float) -> str:
    return "yes" if needed < ROOM else f"no: {needed / ROOM:.1f} x"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def written(page: str) -> str:
    """The page with today's tables between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}{END}{rest.split(END)[1]}"


def main() -> int:
    print(tables())
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

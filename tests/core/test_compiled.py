"""Models that torch.compile compiled, before or after the Attributor was attached: they stay compiled."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from inrun import Attributor, InrunError
from inrun.kernels import Kernel
from inrun.oracle import per_example_gradients
from tests.models import CASES, GPT, VOCABULARY, Case, class_losses, convolutional, images, token_losses, tokens
from tests.reference import contracted, reference_direction

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # what torch warns of as it compiles, and as its reentrant checkpoint runs without gradients
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
CASE = CASES["gpt"]
Compile = Callable[[nn.Module, Any], nn.Module]


def wrapped(model: nn.Module, backend: Any) -> nn.Module:
    found: nn.Module = torch.compile(model, backend=backend)  # type: ignore[assignment]
    return found


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def blocks(model: nn.Module, backend: Any) -> nn.Module:
    parts: Any = model.h if isinstance(model, GPT) else model.transformer.h  # type: ignore[union-attr]
    for block in parts:
        block.compile(backend=backend)
    return model


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def check(
    case: Case,
    compiled: Compile,
    backend: Any,
    kernel: Kernel = "auto",
    scheme: Any = "path",
    steps: int = 2,
    after: bool = False,
    sizes: tuple[int, ...] = (4,),
    tolerance: float = 1e-9,
    train: bool = True,
) -> nn.Module:
    """Train some steps, whose values are to be the oracle's on the plain model (in eval mode unless `train`)."""
    torch.manual_seed(0)
    plain = case.build()
    optimizer: Optimizer = (SGD if scheme == "first" else AdamW)(plain.parameters(), lr=1e-3)
    target: Any = case.batch(3, 90)
    model = plain if after else compiled(plain, backend)
    with Attributor(model, optimizer, {"t": target}, case.loss, kernel=kernel, scheme=scheme) as attributor:
        model = compiled(plain, backend) if after else model
        for step in range(steps):
            n = sizes[step % len(sizes)]
            batch = case.batch(n, step)
            random_state = torch.get_rng_state()
            plain.train(train)
            g = per_example_gradients(plain, case.parts(batch, n))
            torch.set_rng_state(random_state)
            plain.train()
            with attributor.batch(range(n)):
                case.loss(model, batch).backward()
            with torch.compiler.set_stance("force_eager"):
                q = reference_direction(plain, optimizer, case.at(target), scheme, 1)
            optimizer.step()
            optimizer.zero_grad()
            wanted = contracted(plain, g, q)
            assert attributor.last is not None
            found = attributor.last.values["t"]
            assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max()), step
    return plain


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def breaks() -> int:
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
@pytest.mark.parametrize("compiled", [wrapped, in_place, blocks])
@pytest.mark.parametrize("after", [False, True])
def test_values_are_the_oracles(after: bool, compiled: Compile, kernel: Kernel) -> None:
    counter = CompileCounter()
    check(CASE, compiled, counter, kernel, after=after)
    assert counter.frame_count > 0
    assert breaks() == 0


@pytest.mark.parametrize("kernel", ["auto", "tangent", "perexample", "ghost"])
def test_first_under_sgd(kernel: Kernel) -> None:
    check(CASE, wrapped, "aot_eager", kernel, "first")
    assert graphs() > 0


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("hugging-face-gpt2", "tangent"),
        ("hugging-face-llama", "perexample"),
        ("repeated", "tangent"),
        ("repeated", "perexample"),
    ],
)
def test_models(name: str, kernel: Kernel) -> None:
    """Tied weights, position embeddings without batch, a module called three times, one that merges dimensions."""
    check(CASES[name], wrapped, "aot_eager", kernel)
    assert graphs() > 0


class Scaled(GPT):
    """Has a unit without a closed form: itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(VOCABULARY))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.mul(super().forward(tokens_BT), self.scale)


@pytest.mark.parametrize("case", [CASES["mlp"], CASES["convolutional"], Case(Scaled, tokens, token_losses)])
def test_what_cannot_be_in_a_graph_runs_uncompiled(case: Case) -> None:
    """A model whose own forward is torch's, or a unit without a closed form: no break, so that fullgraph does."""
    check(case, wrapped_whole, "aot_eager")
    assert breaks() == 0


def wrapped_whole(model: nn.Module, backend: Any) -> nn.Module:
    found: nn.Module = torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[assignment]
    return found


def test_inductor() -> None:
    """Whose graphs use the memory of inputs and gradients again: of embeddings they are kept until the step."""
    check(CASES["hugging-face-gpt2"], wrapped, "inductor", "perexample")


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = convolutional()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x))


def test_convolutions() -> None:
    check(Case(Convolving, images, class_losses), wrapped, "aot_eager", "perexample")
    assert graphs() > 0


def test_batches_of_other_sizes() -> None:
    check(CASE, wrapped, "aot_eager", "perexample", steps=5, sizes=(4, 4, 6, 1, 4))


class Dropping(GPT):
    def __init__(self) -> None:
        super().__init__(dropout=0.2)


@pytest.mark.parametrize("kernel", ["tangent", "perexample"])
def test_dropout(kernel: Kernel) -> None:
    check(Case(Dropping, tokens, token_losses), wrapped, "aot_eager", kernel)


@pytest.mark.parametrize(("compiled", "kernel"), [(wrapped, "tangent"), (blocks, "perexample")])
def test_autocast(compiled: Compile, kernel: Kernel) -> None:
    case = CASES["hugging-face-gpt2"]

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.losses(model, batch).float()

    torch.set_default_dtype(torch.float32)
    check(Case(case.build, case.batch, losses), compiled, "aot_eager", kernel, tolerance=0.05)


class Checkpointed(GPT):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1]))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        return torch.as_tensor(self.lm_head(self.ln_f(x)))


class CheckpointedTwice(Checkpointed):
    """Its blocks are one module."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(reentrant)
        self.h[1] = self.h[0]


@pytest.mark.parametrize("compiled", [wrapped, blocks])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("build", "kernel"), [(Checkpointed, "tangent"), (CheckpointedTwice, "perexample")])
def test_checkpointed(build: Any, reentrant: bool, compiled: Compile, kernel: Kernel) -> None:
    check(Case(partial(build, reentrant), tokens, token_losses), compiled, "aot_eager", kernel, train=False)


def test_no_breaks_and_no_recompilation() -> None:
    """One graph to train and one for the target, whatever the number of steps, layers and units."""
    case = CASES["hugging-face-gpt2"]
    check(case, wrapped, "aot_eager", "perexample", steps=5)
    assert graphs() == 2
    assert breaks() == 0


def test_blocks_of_one_class_share_a_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    for layers in (1, 5):
        case = Case(partial(hugging_face_gpt2_of, layers), tokens, token_losses)
        check(case, blocks, counter, "perexample")
    assert counter.frame_count == 4
    assert breaks() == 0


def hugging_face_gpt2_of(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=12, n_embd=16, n_layer=layers, n_head=2,
                   use_cache=False, bos_token_id=0, eos_token_id=0,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def test_outside_of_batches_graphs_hold_nothing() -> None:
    """Nor after detaching: as many operations as without an Attributor."""
    plain, counter = CASE.build(), CompileCounter()
    model, batch = wrapped(plain, counter), CASE.batch(4, 1)
    optimizer = AdamW(plain.parameters(), lr=1e-3)

    def run() -> int:
        before, frames = counter.op_count, counter.frame_count
        for _ in range(2):
            CASE.loss(model, batch).backward()
        optimizer.zero_grad()
        assert counter.frame_count <= frames + 1
        return counter.op_count - before

    alone = run()
    attributor = Attributor(model, optimizer, {"t": CASE.batch(3, 90)}, CASE.loss)
    assert run() == alone
    for step in range(3):
        with attributor.batch(range(4)):
            CASE.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert run() == 0, step
    attributor.close()
    assert run() in (0, alone)
    assert breaks() == 0


def test_a_compiled_function_around_the_model_breaks_at_it() -> None:
    torch.manual_seed(0)
    plain = CASE.build()
    optimizer = AdamW(plain.parameters(), lr=1e-3)
    attributor = Attributor(plain, optimizer, {"t": CASE.batch(3, 90)}, CASE.loss)
    loss: Any = torch.compile(CASE.loss, backend="aot_eager")
    for step in range(3):
        batch = CASE.batch(4, step)
        g = per_example_gradients(plain, CASE.parts(batch, 4))
        with attributor.batch(range(4)):
            loss(plain, batch).backward()
        q = reference_direction(plain, optimizer, CASE.at(CASE.batch(3, 90)), "path", 1)
        optimizer.step()
        optimizer.zero_grad()
        assert attributor.last is not None
        torch.testing.assert_close(attributor.last.values["t"], contracted(plain, g, q), rtol=1e-9, atol=1e-12)
    assert breaks() > 0


def test_another_model_of_the_class_that_is_compiled_without() -> None:
    """Its graph has no hooks in it, and is not to be taken for this one's."""
    other = wrapped(CASE.build(), "aot_eager")

    def losses(model: nn.Module, batch: Any) -> Tensor:
        CASE.loss(other, batch).backward()
        return CASE.losses(model, batch)

    check(Case(CASE.build, CASE.batch, losses), wrapped, "aot_eager", train=False)
    assert graphs() > 2


def attached(steps: int = 2) -> tuple[Any, nn.Module, Optimizer, Attributor]:
    """A compiled model that trained some steps."""
    torch.manual_seed(0)
    plain: Any = CASE.build()
    model, optimizer = wrapped(plain, "aot_eager"), SGD(plain.parameters(), lr=0.1)
    attributor = Attributor(model, optimizer, {"t": CASE.batch(3, 90)}, CASE.loss)
    for step in range(steps):
        with attributor.batch(range(4)):
            CASE.loss(model, CASE.batch(4, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain, model, optimizer, attributor


def test_a_compiled_part_called_outside_of_the_forward_is_refused() -> None:
    plain, model, _, attributor = attached()
    block: Any = torch.compile(plain.h[0], backend="aot_eager")
    with attributor.batch(range(4)):
        CASE.loss(model, CASE.batch(4, 1)).backward()
        with pytest.raises(InrunError, match=r"outside of the model's own forward"):
            block(torch.randn(4, 5, 16))


def test_a_layer_changed_after_it_was_compiled_is_refused() -> None:
    plain, model, _, attributor = attached()
    plain.h[0].mlp[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(InrunError, match=r"changed after it was compiled"), attributor.batch(range(4)):
        CASE.loss(model, CASE.batch(4, 1)).backward()


def test_a_backward_pass_after_the_batch_or_the_attributor_is_refused() -> None:
    _, model, _, attributor = attached()
    with attributor.batch(range(4)):
        late = CASE.loss(model, CASE.batch(4, 1))
        CASE.loss(model, CASE.batch(4, 1)).backward()
    attributor.discard()
    with pytest.raises(InrunError, match=r"a batch that is closed"):
        late.backward()
    with attributor.batch(range(4)):
        late = CASE.loss(model, CASE.batch(4, 1))
        CASE.loss(model, CASE.batch(4, 1)).backward()
    attributor.discard()
    attributor.close()
    del attributor
    with pytest.raises(InrunError, match=r"closed|detached"):
        late.backward()


def test_a_forward_without_gradients_inside_of_a_batch() -> None:
    _, model, optimizer, attributor = attached()
    seen = []
    for _ in range(3):
        with attributor.batch(range(4)):
            with torch.no_grad():
                CASE.loss(model, CASE.batch(2, 5))
            CASE.loss(model, CASE.batch(4, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(graphs())
    assert seen[0] == seen[2]


def test_two_forwards_in_a_batch() -> None:
    plain, model, optimizer, attributor = attached()
    batches = [CASE.batch(4, 7), CASE.batch(4, 8)[:, :5]]
    g = [per_example_gradients(plain, CASE.parts(batch, 4)) for batch in batches]
    with attributor.batch(range(4)):
        sum(CASE.loss(model, batch) for batch in batches).backward()  # type: ignore[union-attr]
    q = reference_direction(plain, optimizer, CASE.at(CASE.batch(3, 90)), "path", 1)
    optimizer.step()
    assert attributor.last is not None
    wanted = contracted(plain, {name: g[0][name] + g[1][name] for name in g[0]}, q)
    torch.testing.assert_close(attributor.last.values["t"], wanted, rtol=1e-9, atol=1e-12)


def test_another_attributor_on_a_compiled_model() -> None:
    """While there are two, the model runs uncompiled in a batch; before and after, compiled."""
    torch.manual_seed(0)
    model = CASE.build()
    optimizer, target = SGD(model.parameters(), lr=0.1), CASE.batch(3, 90)
    model.compile(backend="aot_eager")

    def step(k: int, *attributors: Attributor) -> int:
        with torch.compiler.set_stance("force_eager"):
            g = per_example_gradients(model, CASE.parts(CASE.batch(4, k), 4))
        counters.clear()
        with ExitStack() as stack:
            for attributor in attributors:
                stack.enter_context(attributor.batch(range(4)))
            CASE.loss(model, CASE.batch(4, k)).backward()
            made = graphs()
        with torch.compiler.set_stance("force_eager"):
            q = reference_direction(model, optimizer, CASE.at(target), "first", 1)
        optimizer.step()
        optimizer.zero_grad()
        for attributor in attributors:
            assert attributor.last is not None
            torch.testing.assert_close(attributor.last.values["t"], contracted(model, g, q), rtol=1e-8, atol=1e-13)
        return made

    first = Attributor(model, optimizer, {"t": target}, CASE.loss, scheme="first", kernel="perexample")
    assert [step(k, first) > 0 for k in range(2)] == [False, True]
    second = Attributor(model, optimizer, {"t": target}, CASE.loss, scheme="first", kernel="tangent")
    assert [step(k, first, second) for k in range(2, 4)] == [0, 0]
    second.detach()
    assert [step(k, first) > 0 for k in range(4, 6)] == [True, False]
    first.detach()

"""Packed documents against the same documents run one by one: the same weights, optimizer state and total loss."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from inrun import Attributor, InrunError, Ledger, audit
from inrun.packed import as_packed
from tests.models import CASES, VOCABULARY, Block, PackedGPT, mlp, vectors

pytestmark = pytest.mark.usefixtures("float64")

Batch = tuple[Tensor, Tensor, Tensor]  # tokens, positions in their documents, and who may see whom
OPTIMIZERS: dict[str, tuple[Literal["first", "path"], Callable[[Any], Optimizer]]] = {
    "sgd": ("first", lambda p: SGD(p, lr=0.1)),
    "adamw": ("path", lambda p: AdamW(p, lr=1e-2, weight_decay=0.1)),
}
DOCUMENTS = {"a": 4, "b": 3, "c": 7, "d": 2, "e": 2, "f": 3}
ROWS = [["a", "b"], ["c"], ["d", "e", "f"]]


def texts(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randint(0, VOCABULARY, (n,), generator=generator) for i, n in DOCUMENTS.items()}


def packed(documents: dict[str, Tensor], rows: Sequence[Sequence[str]], causal: bool = True) -> tuple[Batch, list[Any]]:
    """The documents in rows of one length, padded with token 0; and the ids of the tokens."""
    ids: list[list[Any]] = [[i for i in row for _ in documents[i]] for row in rows]
    time = max(map(len, ids))
    tokens_BT, positions_BT = torch.zeros(2, len(rows), time, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(ids[b])] = torch.cat([documents[i] for i in row])
        positions_BT[b, : len(ids[b])] = torch.cat([torch.arange(len(documents[i])) for i in row])
    all_ids = [row + [None] * (time - len(row)) for row in ids]
    same = torch.tensor([[[i == j for j in row] for i in row] for row in all_ids])
    seen = same & torch.ones(time, time, dtype=torch.bool).tril() if causal else same
    return (tokens_BT, positions_BT, seen[:, None]), all_ids


def alone(document: Tensor, causal: bool = True) -> Batch:
    batch, _ = packed({"x": document}, [["x"]], causal)
    return batch


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Of the test's GPT, or of a Hugging Face model, called by names."""
    tokens_BT, positions_BT, seen_B1TT = batch
    if not hasattr(model, "config"):
        return torch.as_tensor(model(tokens_BT, positions_BT, seen_B1TT))
    hidden = torch.where(seen_B1TT, 0.0, torch.finfo(torch.float64).min)
    output = model(input_ids=tokens_BT, attention_mask=hidden, position_ids=positions_BT, use_cache=False)
    return torch.as_tensor(output.logits)


def summed(model: nn.Module, batch: Batch, ids: Sequence[Sequence[Any]]) -> Tensor:
    """The sum of the losses of all tokens that have one before them in their document."""
    tokens_BT = batch[0]
    losses_BT = F.cross_entropy(logits_of(model, batch)[:, :-1].transpose(1, 2), tokens_BT[:, 1:], reduction="none")
    counts = torch.tensor([[i == j and i is not None for i, j in pairwise(row)] for row in ids])
    return (losses_BT * counts).sum()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return summed(model, batch, [[0] * batch[0].shape[1]] * len(batch[0])) / 5


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=12,
                    bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=12, bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


class Encoder(nn.Module):
    """Sees the whole document: not causal, but its documents are kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PackedGPT()

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, seen_B1TT: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(tokens_BT, positions_BT, seen_B1TT))


BUILDS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "gpt": (PackedGPT, True),
    "llama": (llama, True),
    "gpt_neox": (neox, True),
    "encoder": (Encoder, False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", BUILDS)
def test_packed_documents_have_the_values_they_have_one_by_one(name: str, kind: str) -> None:
    build, causal = BUILDS[name]
    scheme, optimizer_of = OPTIMIZERS[kind]
    target = alone(torch.arange(6), causal)
    total = sum(n - 1 for n in DOCUMENTS.values())
    values: dict[str, list[Tensor]] = {}
    for how in ("packed", "one by one"):
        torch.manual_seed(0)
        model = build()
        optimizer = optimizer_of(model.parameters())
        found = values.setdefault(how, [])
        with Attributor(model, optimizer, {"t": target}, loss, scheme=scheme) as attributor:
            for step in range(2):
                documents = texts(step)
                optimizer.zero_grad()
                if how == "packed":
                    batch, ids = packed(documents, ROWS, causal)
                    with attributor.batch(ids):
                        (summed(model, batch, ids) / total).backward()
                else:
                    for i, document in documents.items():
                        with attributor.batch([i]):
                            one = [[i] * len(document)]
                            (summed(model, alone(document, causal), one) / total).backward()
                optimizer.step()
                assert attributor.last is not None
                assert attributor.last.ids == list(DOCUMENTS)
                found.append(attributor.last.values["t"])
    for a, b in zip(values["packed"], values["one by one"], strict=True):
        assert float(((a - b) / b).abs().max()) < 1e-9


@pytest.mark.parametrize("kernel", ["auto", "tangent"])
def test_the_documents_of_a_sequence_add_up_to_it(kernel: Any) -> None:
    """One with tokens in two sequences, and twice in one, has one value; what is nobody's is in no value."""
    batch, _ = packed(texts(0), ROWS)
    of = torch.tensor([[7, 7, 3, 3, 7, 7, 7], [3, 3, 3, 3, 9, 9, 9], [5, 5, -1, -1, 5, 5, 5]])
    found = []
    for ids in (of, range(3)):
        torch.manual_seed(0)
        model = PackedGPT()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        target = {"t": alone(torch.arange(6)), "u": alone(torch.arange(4, 9))}
        with Attributor(
            model, optimizer, target, loss, kernel=kernel, token_values=kernel == "tangent", audit_every=1
        ) as attributor:
            with attributor.batch(ids):
                (summed(model, batch, of.tolist()) / 9).backward()
            optimizer.step()
            assert attributor.last is not None
            found.append(attributor.last)
    by_document, by_sequence = found
    assert by_document.ids == [7, 3, 9, 5]
    for name, values in by_document.values.items():
        whole = by_sequence.values[name]
        assert values.shape == (4,)
        if kernel == "tangent":
            tokens_BT = by_sequence.token_values[name]
            torch.testing.assert_close(by_document.token_values[name], tokens_BT, rtol=1e-9, atol=1e-14)
            wanted = torch.stack([tokens_BT[of == i].sum() for i in (7, 3, 9, 5)])
            torch.testing.assert_close(values, wanted, rtol=1e-9, atol=1e-14)
            assert float(tokens_BT[2, 2]) != 0
        else:
            torch.testing.assert_close(values[:3].sum(), whole[:2].sum(), rtol=1e-9, atol=1e-14)
            assert float((values[3] - whole[2]).abs()) > 1e-6


def test_what_is_nobodys_is_unexplained(tmp_path: Any) -> None:
    """Padding that has a share of the loss: values and unexplained together are what they are without ids for it."""
    batch, _ = packed(texts(0), ROWS)
    rows = {}
    for name, last in (("all", 5), ("some", -1)):
        of = torch.tensor([[7, 7, 7, 3, 3, 3, 3], [9] * 7, [5, 5, 5, 5, last, last, last]])
        torch.manual_seed(0)
        model = PackedGPT()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        target = {"t": alone(torch.arange(6))}
        with Attributor(model, optimizer, target, loss, ledger=tmp_path / name, audit_every=1) as attributor:
            with attributor.batch(of):
                summed(model, batch, [[0] * 7] * 3).backward()
            optimizer.step()
        rows[name] = Ledger(tmp_path / name).steps("t").row(0, named=True)
    every, some = rows["all"], rows["some"]
    assert every["examples"] == some["examples"] == 4
    assert abs(every["value"] - some["value"]) > 1e-3
    assert every["value"] + every["unexplained"] == pytest.approx(some["value"] + some["unexplained"], rel=1e-9)


def test_accumulation_over_packed_and_unpacked_batches_of_other_lengths() -> None:
    """In one step under `first` with SGD, where unpacked batches are contracted on the spot."""
    documents = texts(3)
    wanted = {}
    for how in ("mixed", "one by one"):
        torch.manual_seed(0)
        model = PackedGPT()
        optimizer = SGD(model.parameters(), lr=0.1)
        with Attributor(model, optimizer, {"t": alone(torch.arange(6))}, loss, scheme="first") as attributor:
            blocks = [[["a", "b"]], [["d", "e"], ["f"]]] if how == "mixed" else [[[i]] for i in "abdef"]
            for rows in blocks:
                batch, ids = packed(documents, rows)
                with attributor.batch(ids if how == "mixed" else rows[0]):
                    summed(model, batch, ids).backward()
            with attributor.batch(["c"]):
                summed(model, alone(documents["c"]), [["c"] * 7]).backward()
            optimizer.step()
            assert attributor.last is not None
            assert attributor.last.ids == ["a", "b", "d", "e", "f", "c"]
            wanted[how] = attributor.last.values["t"]
    torch.testing.assert_close(wanted["mixed"], wanted["one by one"], rtol=1e-9, atol=0)


def test_a_resumed_run_has_the_same_ledger(tmp_path: Any) -> None:
    def train(folder: Any, steps: range, state: Any = None) -> dict[str, Any]:
        torch.manual_seed(0)
        model = PackedGPT()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        kept: dict[str, Any] = {}
        asked: Any = {"token_values": True, "by_module": ["h.*"]}
        with Attributor(
            model, optimizer, {"t": alone(torch.arange(6))}, loss, ledger=folder, resume=state is not None, **asked
        ) as attributor:
            if state is not None:
                attributor.load_state_dict(state["attributor"])
            for step in steps:
                batch, ids = packed(texts(step), ROWS)
                optimizer.zero_grad()
                with attributor.batch(ids):
                    summed(model, batch, ids).backward()
                optimizer.step()
                if step == 1:
                    of: dict[str, Any] = {"model": model, "optimizer": optimizer, "attributor": attributor}
                    kept = copy.deepcopy({name: one.state_dict() for name, one in of.items()})
        return kept

    train(tmp_path / "whole", range(4))
    state = train(tmp_path / "resumed", range(3))
    train(tmp_path / "resumed", range(2, 4), state)
    for kind, rows in (("values", 1), ("modules", 2), ("token_values", 1)):
        whole, resumed = (pl.read_parquet(tmp_path / run / kind / "*.parquet") for run in ("whole", "resumed"))
        assert whole["step"].to_list() == [step for step in (1, 2, 3, 4) for _ in range(rows * len(DOCUMENTS))]
        assert resumed.equals(whole)
    ledger = Ledger(tmp_path / "resumed")
    values = dict(ledger.values("t").select("id", "value").iter_rows())
    parts = ledger.modules("t")
    assert set(parts["module"]) == {"h.*", "other"}
    for i, n in DOCUMENTS.items():
        tokens = ledger.token_values(i, "t")
        assert tokens is not None
        assert tokens.shape == (n,)
        assert float(tokens.sum()) == pytest.approx(values[i], rel=1e-12)
        assert parts.filter(id=i)["value"].sum() == pytest.approx(values[i], rel=1e-12)
    with pytest.raises(InrunError, match="token_values: True then, None now"):
        Attributor(
            m := PackedGPT(),
            SGD(m.parameters(), lr=0.1),
            {"t": alone(torch.arange(6))},
            loss,
            ledger=ledger.folder,
            resume=True,
            by_module=["h.*"],
        )


class Part(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        run = partial(checkpoint, self.inner, use_reentrant=self.reentrant) if self.training else self.inner
        return torch.as_tensor(run(x))


class Checkpointed(PackedGPT):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        for block in self.h:
            assert isinstance(block, Block)
            block.mlp = nn.Sequential(Part(block.mlp, reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_parts(reentrant: bool) -> None:
    batch, ids = packed(texts(0), ROWS)
    found = []
    for build in (PackedGPT, partial(Checkpointed, reentrant)):
        torch.manual_seed(0)
        model = build()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        with Attributor(model, optimizer, {"t": alone(torch.arange(6))}, loss) as attributor:
            with attributor.batch(ids):
                summed(model, batch, ids).backward()
            optimizer.step()
            assert attributor.last is not None
            found.append(attributor.last.values["t"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_runs_uncompiled() -> None:
    """A batch without documents in between uses its graphs as ever."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = PackedGPT(layers=1)
        called: Any = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = AdamW(model.parameters(), lr=1e-2)
        with Attributor(called, optimizer, {"t": alone(torch.arange(6))}, loss) as attributor:
            for step in range(4):
                batch, ids = packed(texts(step), ROWS)
                optimizer.zero_grad()
                with attributor.batch(["x", "y", "z"] if step % 2 else ids):
                    summed(called, batch, ids).backward()
                optimizer.step()
                assert attributor.last is not None
                found.append(attributor.last.values["t"])
    torch.compiler.reset()
    for plain, values in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(values, plain, rtol=1e-9, atol=0)


def backward(model: nn.Module, attributor: Attributor, ids: Any) -> None:
    batch, _ = packed(texts(0), ROWS)
    with attributor.batch(ids):
        loss(model, batch).backward()


def attached(build: Callable[[], nn.Module] = PackedGPT, **settings: Any) -> tuple[nn.Module, Optimizer, Attributor]:
    torch.manual_seed(0)
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, Attributor(model, optimizer, {"t": alone(torch.arange(6))}, loss, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": "credit"}, "momentum='credit' has no values of packed documents"),
        ({"audit_every": 1, "audit_permutations": 2}, "plays with whole examples"),
        ({"kernel": "perexample"}, "kernel='perexample' has no values of packed documents"),
        ({"kernel": "ghost", "scheme": "first"}, "kernel='ghost' has no values of packed documents"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    model, _, attributor = attached(**settings)
    with pytest.raises(InrunError, match=message):
        backward(model, attributor, [["a"] * 7] * 3)


def test_a_game_of_packed_documents_is_refused() -> None:
    model, _, attributor = attached()
    backward(model, attributor, [["a"] * 7] * 3)
    with pytest.raises(InrunError, match="plays with whole examples"):
        audit(attributor)


def test_ids_of_other_sizes_than_the_models_tokens_are_refused() -> None:
    model, _, attributor = attached()
    for ids, message in (
        ([["a"] * 7] * 2, "2 ids were given"),
        ([["a"] * 6] * 3, r"ids must be .*one for every token.*\(3, 6\).*\(3, 7\)"),
    ):
        with pytest.raises(InrunError, match=message):
            backward(model, attributor, ids)
    attributor = Attributor(m := mlp(), SGD(m.parameters(), lr=0.1), {"t": vectors(3, 1)}, CASES["mlp"].loss)
    with (
        pytest.raises(InrunError, match="could not be run on 3 tokens in place of 6"),
        attributor.batch([["a"] * 6] * 4),
    ):
        CASES["mlp"].loss(m, vectors(4, 0)).backward()


def test_documents_that_see_one_another_in_a_model_that_is_not_causal_are_refused() -> None:
    batch, ids = packed(texts(0), ROWS)
    everyone = (batch[0], batch[1], torch.ones_like(batch[2]))
    model, _, attributor = attached(Encoder)
    with pytest.raises(InrunError, match="a mask keeps the documents apart"), attributor.batch(ids):
        loss(model, everyone).backward()


@pytest.mark.parametrize(
    ("given", "ids", "places"),
    [
        (torch.tensor([[5, 5, 2], [2, -1, 0]]), [5, 2, 0], [[0, 0, 1], [1, -1, 2]]),
        (np.array([[5, 5], [2, -1]]), [5, 2], [[0, 0], [1, -1]]),
        ([["b", None], ["a", "b"]], ["b", "a"], [[0, -1], [1, 0]]),
        ([torch.tensor([4, -1]), torch.tensor([3, 4])], [4, 3], [[0, -1], [1, 0]]),
        ((np.array(["x", "y"]), ["x", None]), ["x", "y"], [[0, 1], [0, -1]]),
    ],
)
def test_ids_of_documents(given: Any, ids: list[Any], places: list[list[int]]) -> None:
    found = as_packed(given)
    assert found is not None
    assert found.ids == ids
    assert found.documents.tolist() == places


@pytest.mark.parametrize("given", [[1, 2], ["ab", "cd"], torch.arange(3), np.array(["ab", "cd"]), "ab", [], None, 3])
def test_ids_of_one_dimension_are_no_documents(given: Any) -> None:
    assert as_packed(given) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([["a"], ["a", "b"]], "2 different lengths"),
        ([["a"], "b"], "2 different lengths"),
        ([["a", 1]], "got int, str"),
        ([[0.5, 1.5]], "got float"),
        ([[True, False]], "got bool"),
        ([[-1, None]], "got no document"),
        ([[], []], "got no document"),
    ],
)
def test_ids_that_are_no_documents(given: Any, message: str) -> None:
    with pytest.raises(InrunError, match=message):
        as_packed(given)


def test_values_are_gathered_by_document() -> None:
    found = as_packed([["a", "b", None], ["b", "b", "a"]])
    assert found is not None
    values = torch.arange(12, dtype=torch.float64).view(2, 2, 3)
    torch.testing.assert_close(found.per_document(values), torch.tensor([[5.0, 8.0], [17.0, 26.0]]))
    assert [x.tolist() for x in found.of_each(values)] == [[[0, 5], [6, 11]], [[1, 3, 4], [7, 9, 10]]]

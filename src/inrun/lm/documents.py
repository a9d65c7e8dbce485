"""The user's text, one document at a time: JSON Lines, Parquet, CSV, folders, `datasets`.

| input | a document is | its id when there is no id column |
|---|---|---|
| `.jsonl`, `.ndjson`, `.json` | a line | `<file stem>:<line>` |
| `.parquet`, `.csv`, `.tsv` | a row | `<file stem>:<row>`, from 1 |
| a folder with text files (`TEXT_SUFFIXES`, at any depth, none hidden) | a file | its path in the folder |
| a folder with tables of the kinds above and no text files | a row | `<path in the folder>:<row>` |
| any other file | the file | its name |
| a folder by `save_to_disk`, or `name` or `name:config` of `datasets` | a row | `<name>:<row>` |

Files of a folder are read in the order of their paths, and get a column `folder`: the first part of the path,
"." for a file at the top. A folder of both text files and tables is read for its text files, unless the
tables are the larger part: then it is an error. Columns that hold no scalar are left out; dates and times
become ISO strings, durations seconds, integers beyond 64 bits strings. A blank document (white space only, or
null) is left out and counted in a log message; when there is nothing else it is an error. Text is never
changed, save that a byte order mark at the head of a file is not part of it.
"""

import importlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from inrun.errors import InrunError

log = logging.getLogger("inrun")

Scalar = str | int | float | bool | None
Row = tuple[int, dict[str, Any]]

TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp"))
TEXT_SUFFIXES |= {".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh", ".sql", ".jl", ".r"}
LINES_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json"))
TABLE_SUFFIXES = LINES_SUFFIXES | {".parquet", ".csv", ".tsv"}
SAVED_DATASET = ("dataset_dict.json", "dataset_info.json", "state.json")
DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
ROWS_AT_ONCE = 1000


class TextError(InrunError):
    """Text, tokens or their files cannot be used: the message says which, where and what to do."""


@dataclass(frozen=True)
class Document:
    """One document: its id (unique in what is trained on), its text, and the user's other scalar columns."""

    id: str
    text: str
    columns: dict[str, Scalar]


@dataclass(frozen=True)
class Rows:
    """Where the rows of one table come from and how their documents are named."""

    place: str  # what an error calls the table, e.g. "corpus.jsonl"
    unit: str  # "line" or "row"
    stem: str  # the head of an id made from the row's number
    text_column: str
    id_column: str | None
    extra: dict[str, Scalar]  # columns that the row itself does not have

    def document(self, number: int, row: dict[str, Any]) -> Document | None:
        """The row's document, or None when it is blank; TextError names the row."""
        where = f"{self.place}, {self.unit} {number}"
        if self.text_column not in row:
            raise TextError(missing_column(where, "text", self.text_column, row))
        text = row[self.text_column]
        if text is not None and not isinstance(text, str):
            raise TextError(f"{where}: column {self.text_column!r} holds {a(text)}, not text (a string)")
        key = self.id_column or "id"
        if self.id_column is not None and key not in row:
            raise TextError(missing_column(where, "id", key, row))
        name = row.get(key)
        if name is None and self.id_column is None:
            name = f"{self.stem}:{number}"
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise TextError(f"{where}: the id in column {key!r} is {name!r}; an id is a string or an integer")
        if not text or text.isspace():
            return None
        others = {k: plain(v) for k, v in row.items() if k not in (key, self.text_column)}
        columns = {k: v for k, v in others.items() if v is None or isinstance(v, str | int | float)}
        for value in (str(name), text, *columns, *columns.values()):
            check_encodable(value, where)
        return Document(str(name), text, {**self.extra, **columns})


def read_documents(
    path: str, *, text_column: str = "text", id_column: str | None = None, split: str = "train"
) -> Iterator[Document]:
    """The documents at `path`, in the order of the input (the head of this file says what may be read).

    `id_column` None: the column "id" where there is one (a null in it gets the row's number), otherwise the
    row's number. `split` is for `datasets` only. Raises TextError: at once for a path that cannot be opened,
    while iterating for what is wrong inside, with the file and the line or row. Ids are not compared with
    each other here: see `check_ids`.
    """
    if not path:
        raise TextError("an empty path was given as text to read")
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            if any((place / name).is_file() for name in SAVED_DATASET):
                return not_blank(path, dataset_rows(path, text_column, id_column, split))
            return not_blank(path, folder_documents(place, text_column, id_column))
        if place.exists():
            return not_blank(path, file_documents(place, place.stem, text_column, id_column, {}))
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror or error})") from error
    suffixes = TEXT_SUFFIXES | TABLE_SUFFIXES
    if not DATASET_NAME.fullmatch(path) or Path(path.partition(":")[0]).suffix.lower() in suffixes:
        raise TextError(
            f"{path}: there is no such file or folder (looked in {str(place.parent)!r}), and it does not "
            "look like a `datasets` name (`name`, `owner/name`, `name:config`)"
        )
    return not_blank(path, dataset_rows(path, text_column, id_column, split))


def check_ids(documents: Iterable[Document]) -> Iterator[Document]:
    """The same documents; TextError when an id comes a second time, with both places in the reading order."""
    seen: dict[str, int] = {}
    for number, document in enumerate(documents, start=1):
        first = seen.setdefault(document.id, number)
        if first != number:
            raise TextError(
                f"document id {document.id!r} comes twice: documents {first} and {number} of those read. "
                "Ids must differ: name another id column, or rename one of the files"
            )
        yield document


def not_blank(path: str, documents: Iterator[Document | None]) -> Iterator[Document]:
    kept = blank = 0
    for document in documents:
        if document is None:
            blank += 1
        else:
            kept += 1
            yield document
    if not kept:
        raise TextError(f"{path}: " + (f"all {blank} documents are blank" if blank else "holds no documents"))
    if blank:
        log.warning("%s: left out %d blank documents of %d", path, blank, blank + kept)


def file_documents(
    file: Path, stem: str, text_column: str, id_column: str | None, extra: dict[str, Scalar]
) -> Iterator[Document | None]:
    suffix = file.suffix.lower()
    try:
        if suffix not in TABLE_SUFFIXES:
            text = whole_text(file)
            name = f"{stem}{file.suffix}"
            check_encodable(name, str(file))
            yield Document(name, text, dict(extra)) if text.strip() else None
            return
        unit = "line" if suffix in LINES_SUFFIXES else "row"
        rows = Rows(str(file), unit, stem, text_column, id_column, extra)
        read = lines_rows if suffix in LINES_SUFFIXES else table_rows
        for number, row in read(file, text_column, id_column):
            yield rows.document(number, row)
    except OSError as error:
        raise TextError(f"{file}: cannot be read ({error.strerror or error})") from error


def folder_documents(folder: Path, text_column: str, id_column: str | None) -> Iterator[Document | None]:
    found = sorted(files_below(folder))
    texts = [p for p in found if p.suffix.lower() in TEXT_SUFFIXES]
    tables = [p for p in found if p.suffix.lower() in TABLE_SUFFIXES]
    if texts and tables and size(folder, tables) > size(folder, texts):
        raise TextError(
            f"{folder}: holds text files ({len(texts)}, e.g. {texts[0]}) and larger tables ({len(tables)}, "
            f"e.g. {tables[0]}); give the one or the other, as a file or a folder of its own"
        )
    chosen = texts or tables
    if not chosen:
        there = ", ".join(sorted({p.suffix or p.name for p in found})[:20]) or "nothing"
        wanted = " ".join(sorted(TEXT_SUFFIXES | TABLE_SUFFIXES))
        raise TextError(f"{folder}: no file with text in this folder (it holds {there}; read are {wanted})")
    if len(chosen) < len(found):
        log.warning("%s: read %d of %d files; the others are of other kinds", folder, len(chosen), len(found))
    for path in chosen:
        top = path.parts[0] if len(path.parts) > 1 else "."
        yield from file_documents(
            folder / path, path.with_suffix("").as_posix(), text_column, id_column, {"folder": top}
        )


def size(folder: Path, files: Iterable[Path]) -> int:
    return sum((folder / file).stat().st_size for file in files)


def files_below(folder: Path) -> Iterator[Path]:
    """Paths relative to the folder; a folder that cannot be listed is an error, not a gap in the data."""

    def refuse(error: OSError) -> None:
        raise TextError(f"{error.filename}: cannot be listed ({error.strerror or error})") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name).relative_to(folder) for name in files if not name.startswith("."))


def lines_rows(file: Path, text_column: str, id_column: str | None) -> Iterator[Row]:
    """Rows of a JSON Lines file, read line by line; empty lines are passed over but counted."""
    for number, line in text_lines(file):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TextError(f"{where}: broken JSON ({error}); one object on each line is read") from error
        if not isinstance(row, dict):
            raise TextError(f"{where}: {a(row)}, not a JSON object like {{{json.dumps(text_column)}: ...}}")
        yield number, row


def table_rows(file: Path, text_column: str, id_column: str | None) -> Iterator[Row]:
    """Rows of a Parquet or CSV file, read in pieces."""
    try:
        if file.suffix.lower() == ".parquet":
            frame = pl.scan_parquet(file)
        else:
            if not sum(bool(line.strip()) for _, line in text_lines(file)):  # polars does not say which byte
                return
            separator = "\t" if file.suffix.lower() == ".tsv" else ","
            head = pl.read_csv(file, separator=separator, n_rows=0, infer_schema=False).columns
            as_text = {c: pl.String for c in (text_column, id_column or "id") if c in head}  # "007" is not 7
            frame = pl.scan_csv(file, separator=separator, schema_overrides=as_text, infer_schema_length=None)
        schema = frame.collect_schema()
        check_columns(str(file), text_column, id_column, schema)
        columns = [n for n, kind in schema.items() if n in (text_column, id_column) or not kind.is_nested()]
        number = 0
        for piece in frame.select(columns).collect_batches(chunk_size=ROWS_AT_ONCE, maintain_order=True):
            for row in piece.iter_rows(named=True):
                number += 1
                yield number, row
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise TextError(f"{file}: not a readable {file.suffix[1:]} file ({reason})") from error


def dataset_rows(path: str, text_column: str, id_column: str | None, split: str) -> Iterator[Document | None]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise TextError(f"{path}: to read a `datasets` name or folder, pip install datasets") from error
    try:
        if Path(path).expanduser().is_dir():
            name, data = Path(path).name, datasets.load_from_disk(Path(path).expanduser())
        else:
            name, _, config = path.partition(":")
            data = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise TextError(f"{path}: `datasets` cannot load it, split {split!r}: {reason}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise TextError(f"{path}: no split {split!r}; there are {', '.join(map(repr, data))}")
        data = data[split]
    check_columns(path, text_column, id_column, data.features)
    labels = {k: f for k, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    scalars = [k for k, f in data.features.items() if isinstance(f, datasets.Value | datasets.ClassLabel)]
    rows = Rows(path, "row", name, text_column, id_column, {})
    for number, row in enumerate(data.select_columns(list(dict.fromkeys([text_column, *scalars]))), start=1):
        for column, feature in labels.items():
            if row[column] is not None and row[column] >= 0:  # -1 is how `datasets` writes "no label"
                row[column] = feature.int2str(row[column])
        yield rows.document(number, row)


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1; TextError names the line and byte that are not UTF-8."""
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TextError(not_utf8(file, number, offset + error.start)) from error
            offset += len(line)


def whole_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(not_utf8(file, line, error.start)) from error


def not_utf8(file: Path, line: int, offset: int) -> str:
    return f"{file}, line {line}: not UTF-8 (byte {offset} of the file); convert it, e.g. with iconv -t utf-8"


def missing_column(where: str, what: str, column: str, there: Iterable[str]) -> str:
    names = ", ".join(map(repr, there)) or "none"
    return f"{where}: no {what} column {column!r}; the columns there are: {names}"


def check_columns(where: str, text_column: str, id_column: str | None, there: Iterable[str]) -> None:
    names = list(there)
    for what, column in (("text", text_column), ("id", id_column)):
        if column is not None and column not in names:
            raise TextError(missing_column(where, what, column, names))


def check_encodable(value: object, where: str) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(f"{where}: holds half a character (a lone surrogate): repair it") from error


def plain(value: object) -> object:
    """Values of a column as scalars that any table holds; what cannot be one is handed back as it is."""
    match value:
        case date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return float(value)
        case int() if abs(value) >= 2**63:
            return str(value)
    return value


def a(value: object) -> str:
    names = {
        "dict": "an object",
        "list": "a list",
        "str": "a string",
        "bool": "a boolean",
        "NoneType": "null",
    }
    return names.get(type(value).__name__, f"a value of type {type(value).__name__}")

"""Reading the user's text: every format gives the same documents, and bad input says where it is bad."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inrun.lm.documents import Document, TextError, check_ids, read_documents

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "first, of two\nlines", "domain": "news", "score": 0.5, "year": 2001},
    {"id": "b", "text": "sécond “quoted”", "domain": "code", "score": -1.25, "year": None},
    {"id": "007", "text": "third", "domain": None, "score": 3.0, "year": 1999},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    pl.DataFrame(rows).write_csv(path, separator="\t")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "corpus.jsonl": write_lines,
    "corpus.json": write_lines,
    "corpus.ndjson": write_lines,
    "corpus.parquet": lambda path, rows: pl.DataFrame(rows).write_parquet(path),
    "corpus.csv": lambda path, rows: pl.DataFrame(rows).write_csv(path),
    "corpus.tsv": write_tsv,
    "corpus": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_table_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    expected = [Document(row["id"], row["text"], {k: row[k] for k in ("domain", "score", "year")}) for row in ROWS]
    assert list(read_documents(str(tmp_path / name))) == expected


@pytest.mark.parametrize("name", WRITERS)
def test_without_an_id_column_the_row_names_the_document(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"body": row["text"], "n": i} for i, row in enumerate(ROWS)])
    read = list(read_documents(str(tmp_path / name), text_column="body"))
    assert [d.id for d in read] == ["corpus:1", "corpus:2", "corpus:3"]
    assert [d.columns for d in read] == [{"n": 0}, {"n": 1}, {"n": 2}]


@pytest.mark.parametrize("name", WRITERS)
def test_another_id_column_and_integer_ids(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"text": row["text"], "key": 10 + i, "id": "x"} for i, row in enumerate(ROWS)])
    read = list(read_documents(str(tmp_path / name), id_column="key"))
    assert [d.id for d in read] == ["10", "11", "12"]
    assert read[0].columns == {"id": "x"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_column_is_named_with_those_there(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"body": "words", "n": 1}])
    with pytest.raises(TextError, match=r"corpus.*no text column 'text'; the columns there are: 'body', 'n'"):
        list(read_documents(str(tmp_path / name)))
    with pytest.raises(TextError, match=r"no id column 'key'; the columns there are: 'body', 'n'"):
        list(read_documents(str(tmp_path / name), text_column="body", id_column="key"))


@pytest.mark.parametrize("name", WRITERS)
def test_blank_documents_are_left_out_and_counted(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    WRITERS[name](tmp_path / name, [{"text": " \t"}, {"text": "words"}, {"text": None}, {"text": ""}])
    with caplog.at_level(logging.WARNING, "inrun"):
        assert [d.id for d in read_documents(str(tmp_path / name))] == ["corpus:2"]
    assert "left out 3 blank documents of 4" in caplog.text
    other = tmp_path / "other" / name
    other.parent.mkdir()
    WRITERS[name](other, [{"text": " "}, {"text": "\t"}])
    with pytest.raises(TextError, match="all 2 documents are blank"):
        list(read_documents(str(other)))


@given(texts=st.lists(st.text(min_size=1).filter(lambda text: bool(text.strip())), min_size=1))
def test_any_text_comes_through_json_lines_unchanged(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    write_lines(path, [{"text": text} for text in texts])
    assert [d.text for d in read_documents(str(path))] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3: broken JSON"),
        ("[1, 2]", r"line 3: a list, not a JSON object like \{\"text\": ...\}"),
        ("null", "line 3: null, not a JSON object"),
        ('{"id": 1}', "line 3: no text column 'text'; the columns there are: 'id'"),
        ('{"text": 5}', "line 3: column 'text' holds a value of type int, not text"),
        ('{"text": ["words"]}', "line 3: column 'text' holds a list, not text"),
        ('{"text": "x", "id": 1.5}', "line 3: the id in column 'id' is 1.5; an id is a string or an integer"),
        ('{"text": "x", "id": true}', "line 3: the id in column 'id' is True"),
        ('{"text": "x", "id": ""}', "line 3: the id in column 'id' is ''"),
        (r'{"text": "\ud800"}', "line 3: holds half a character"),
        (r'{"text": "x", "note": "\udfff"}', "line 3: holds half a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n', "utf-8")
    with pytest.raises(TextError, match=rf"bad\.jsonl, {message}"):
        list(read_documents(str(path)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv", "x.txt", "x"])
def test_what_is_not_utf8_is_found(tmp_path: Path, name: str) -> None:
    head = b'{"text": "good"}\n' if name == "x.jsonl" else b"text\ngood words\n"
    (tmp_path / name).write_bytes(head + b"caf\xe9\n")
    line = head.count(b"\n") + 1
    with pytest.raises(TextError, match=rf"line {line}: not UTF-8 \(byte {len(head) + 3} of the file\)"):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"x.jsonl": '{"text": "words"}', "x.csv": "text\nwords", "x.txt": "words"}[name]
    (tmp_path / name).write_text(content, "utf-8-sig")
    assert [d.text for d in read_documents(str(tmp_path / name))] == ["words"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(TextError, match=f"{name}: holds no documents"):
        list(read_documents(str(tmp_path / name)))


def test_broken_tables(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(TextError, match=r"x\.parquet: not a readable parquet file"):
        list(read_documents(str(tmp_path / "x.parquet")))
    (tmp_path / "x.csv").write_text("text,n\nwords,1\nwords,1,2,3\n")
    with pytest.raises(TextError, match=r"x\.csv: not a readable csv file"):
        list(read_documents(str(tmp_path / "x.csv")))
    pl.DataFrame({"text": [["a", "list"]]}).write_parquet(tmp_path / "nested.parquet")
    with pytest.raises(TextError, match=r"nested\.parquet, row 1: column 'text' holds a list"):
        list(read_documents(str(tmp_path / "nested.parquet")))


def test_columns_become_scalars(tmp_path: Path) -> None:
    row = {
        "text": "words",
        "day": date(2020, 1, 31),
        "lasted": timedelta(minutes=2),
        "price": Decimal("1.5"),
        "kind": True,
        "tags": ["left", "out"],
        "raw": b"left out",
    }
    pl.DataFrame([row]).write_parquet(tmp_path / "x.parquet")
    (document,) = read_documents(str(tmp_path / "x.parquet"))
    assert document.columns == {"day": "2020-01-31", "lasted": 120.0, "price": 1.5, "kind": True}
    write_lines(tmp_path / "x.jsonl", [{"text": "words", "big": 2**64, "small": 3, "nested": {"left": "out"}}])
    (document,) = read_documents(str(tmp_path / "x.jsonl"))
    assert document.columns == {"big": str(2**64), "small": 3}


def test_late_rows_do_not_surprise_the_csv_reader(tmp_path: Path) -> None:
    rows = [f"words,{i}" for i in range(3000)] + ["words,many"]
    (tmp_path / "x.csv").write_text("text,n\n" + "\n".join(rows))
    read = list(read_documents(str(tmp_path / "x.csv")))
    assert (len(read), read[0].columns, read[-1].columns) == (3001, {"n": "0"}, {"n": "many"})


def test_a_folder_of_text_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"b/two.md": "2", "b/deep/three.py": "3", "a/one.txt": "1", "top.txt": "0", ".git/no.txt": "no"}
    for name, text in {**files, "a/picture.png": "-", "a/.hidden.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with caplog.at_level(logging.WARNING, "inrun"):
        read = list(read_documents(str(tmp_path)))
    assert [(d.id, d.text, d.columns) for d in read] == [
        ("a/one.txt", "1", {"folder": "a"}),
        ("b/deep/three.py", "3", {"folder": "b"}),
        ("b/two.md", "2", {"folder": "b"}),
        ("top.txt", "0", {"folder": "."}),
    ]
    assert "read 4 of 5 files" in caplog.text


def test_a_folder_of_tables(tmp_path: Path) -> None:
    for name in ("part-0.jsonl", "part-1.jsonl", "more/part-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [{"text": name, "folder": "own"}] if name == "part-1.jsonl" else [{"text": name}])
    read = list(read_documents(str(tmp_path)))
    assert [d.id for d in read] == ["more/part-0:1", "part-0:1", "part-1:1"]
    assert [d.columns["folder"] for d in read] == ["more", ".", "own"]


def test_a_folder_that_holds_no_text_or_two_kinds(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"-")
    with pytest.raises(TextError, match=r"no file with text in this folder \(it holds \.png; read are \.c "):
        list(read_documents(str(tmp_path)))
    (tmp_path / "README.md").write_text("what this is")
    write_lines(tmp_path / "data.jsonl", [{"text": "word " * 20}])
    with pytest.raises(TextError, match=r"holds text files \(1, e.g. README.md\) and larger tables \(1, e.g. data"):
        list(read_documents(str(tmp_path)))


def test_any_other_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("all:\n")
    assert list(read_documents(str(tmp_path / "Makefile"))) == [Document("Makefile", "all:\n", {})]


@pytest.mark.parametrize("path", ["gone.jsonl", "gone/deeper/x", "./gone", "what is this?"])
def test_a_path_that_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"no such file or folder .* does not look like a `datasets` name"):
        read_documents(path)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="empty path"):
        read_documents("")
    with pytest.raises(TextError, match="cannot be read"):
        read_documents("x" * 5000 + ".jsonl")


def test_no_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked.jsonl"
    write_lines(locked, ROWS)
    locked.chmod(0)
    root = os.geteuid() == 0
    if root:  # root reads everything
        os.seteuid(65534)
    try:
        with pytest.raises(TextError, match=r"locked\.jsonl: cannot be read \(Permission denied\)"):
            list(read_documents(str(locked)))
    finally:
        if root:
            os.seteuid(0)


def test_a_datasets_folder_with_splits_and_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_list([{"text": "x", "label": 1}, {"text": "y", "label": None}], features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "both")
    assert [d.columns for d in read_documents(str(tmp_path / "both"))] == [{"label": "good"}, {"label": None}]
    assert [d.id for d in read_documents(str(tmp_path / "both"), split="test")] == ["both:1"]
    with pytest.raises(TextError, match="no split 'dev'; there are 'train', 'test'"):
        list(read_documents(str(tmp_path / "both"), split="dev"))
    next((tmp_path / "both" / "train").glob("*.arrow")).write_bytes(b"not arrow")
    with pytest.raises(TextError, match="both: `datasets` cannot load it, split 'train'"):
        list(read_documents(str(tmp_path / "both")))


def test_a_datasets_name_that_cannot_be_loaded(tmp_path: Path) -> None:
    code = "from inrun.lm.documents import read_documents; list(read_documents('nobody/nothing:plain'))"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TextError: nobody/nothing:plain: `datasets` cannot load it, split 'train'" in done.stderr


def test_repeated_ids_are_named_with_both_places() -> None:
    documents = [Document(name, "text", {}) for name in ("a", "b", "c", "b")]
    with pytest.raises(TextError, match="document id 'b' comes twice: documents 2 and 4"):
        list(check_ids(documents))
    assert list(check_ids(documents[:3])) == documents[:3]

"""Files that are there whole or not at all: written hidden, synced, renamed, the folder synced."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import polars as pl

if os.name != "nt":
    import fcntl

_TEMP_NAME = re.compile(r"\.(?:run\.json|examples\.parquet|\d+-\d+-r\d+\.parquet)\.r(\d+)\.tmp")


def temp_path(path: Path, rank: int) -> Path:
    """Where `path` is written before it is renamed: hidden, so that no `*.parquet` pattern matches it."""
    return path.with_name(f".{path.name}.r{rank}.tmp")


def list_temps(folder: Path) -> list[tuple[Path, int]]:
    """Files of `folder` that a killed writer left half-written, each with its rank."""
    return [(path, int(match[1])) for path in folder.iterdir() if (match := _TEMP_NAME.fullmatch(path.name))]


def write_whole(path: Path, rank: int, content: bytes | memoryview) -> None:
    """Write or replace `path`, durable on return. Raises OSError, leaving what was there."""
    temp = temp_path(path, rank)
    try:
        with open_temp(temp) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def open_temp(path: Path) -> BinaryIO:
    """The one place where a file of rows is opened for writing."""
    return open(path, "wb")


def parquet(frame: pl.DataFrame) -> memoryview:
    """`frame` as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    return buffer.getbuffer()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows cannot open one, and keeps a journal of renames."""
    if os.name != "nt":
        sync(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block; the system frees the lock of one that is killed. (Not on Windows.)"""
    with open(path, "wb") as file:
        if os.name != "nt":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_at_once(path: Path) -> BinaryIO:
    """A lock that is held until the file is closed. Raises BlockingIOError if another has it. (None on Windows.)"""
    file = open(path, "wb")  # noqa: SIM115 - it is given back
    try:
        if os.name != "nt":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file

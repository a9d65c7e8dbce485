"""What is booked is on disk once, whatever the disk or the process does."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from inrun.ledger import LedgerError, LedgerWriter, files
from tests.ledger.rows import RUN, assert_holds, book, book_unasked, names, rows_in, rows_of


class Killed(BaseException):
    """Stands for the process that ends here."""


class Killer:
    """Ends the process at its n-th change to the disk: that one and all later ones do not happen."""

    def __init__(self, patch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        for name in ("replace", "unlink", "fsync"):
            patch.setattr(os, name, self.mortal(getattr(os, name)))

    def mortal(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return call(*arguments, **named)

        return change


def kill_everywhere(
    tmp_path: Path, prepare: Callable[[LedgerWriter], None], act: str, checkpoint: int, parts: bool
) -> int:
    """Kill `act` at each change to the disk, then resume at `checkpoint`; returns the number of kills."""
    for moment in range(1000):
        folder = tmp_path / str(moment)
        writer = LedgerWriter(folder, RUN)
        prepare(writer)
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, moment)
            try:
                writer.flush() if act == "flush" else writer.cut(checkpoint)
                return moment
            except Killed:
                pass
        found = rows_in(folder)
        assert len(set(found)) == len(found)
        reached = {row[0] for row in found}
        assert reached == set(range(1, len(reached) + 1)), "a hole in the run"
        assert set(found) >= {row for step in range(1, checkpoint + 1) for row in rows_of(step)}
        with LedgerWriter(folder, RUN, resume=True) as resumed:
            kinds = ("values", "steps", *(("modules", "token_values") if parts else ()))
            assert not [name for kind in kinds for name in names(folder, kind) if name[0] == "."]
            resumed.cut(checkpoint)
            assert_holds(folder, checkpoint, parts)
            book(resumed, *range(checkpoint + 1, 13), parts=parts)
        assert_holds(folder, 12, parts)
    raise AssertionError("it never ended")


@pytest.mark.parametrize("parts", [False, True])
def test_a_kill_at_any_point_of_a_flush(tmp_path: Path, parts: bool) -> None:
    def prepare(writer: LedgerWriter) -> None:
        book(writer, 1, 2, 3, 4, parts=parts)
        writer.flush()
        book(writer, 5, 6, 7, parts=parts)

    assert kill_everywhere(tmp_path, prepare, "flush", 4, parts) >= (12 if parts else 6)


@pytest.mark.parametrize("parts", [False, True])
def test_a_kill_at_any_point_of_a_cut(tmp_path: Path, parts: bool) -> None:
    def prepare(writer: LedgerWriter) -> None:
        for steps in (range(1, 4), range(4, 10), range(10, 12), range(12, 13)):
            book(writer, *steps, parts=parts)
            writer.flush()

    assert kill_everywhere(tmp_path, prepare, "cut", 6, parts) >= (24 if parts else 12)


CHILD = """
import sys
sys.path.insert(0, {root!r})
from tests.ledger.rows import RUN, LedgerWriter, book
writer = LedgerWriter({folder!r}, RUN, resume=True, part_rows=24)
writer.cut({checkpoint})
for step in range({checkpoint} + 1, 100_000):
    book(writer, step)
    if step % 7 == 0:
        writer.flush()
        print(step, flush=True)
"""


def test_a_run_that_is_killed_and_resumed_has_every_row_once(tmp_path: Path) -> None:
    checkpoint, moments = 0, random.Random(0)
    for _ in range(4):
        code = CHILD.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path), checkpoint=checkpoint)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            checkpoint = int(child.stdout.readline())
            time.sleep(moments.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
            told = child.stdout.read().splitlines()
        assert child.returncode == -signal.SIGKILL
        checkpoint = int(told[-1]) if told else checkpoint
        found = rows_in(tmp_path)
        assert len(found) == 6 * len({row[0] for row in found})
    with LedgerWriter(tmp_path, RUN, resume=True) as writer:
        writer.cut(checkpoint)
        assert_holds(tmp_path, checkpoint)
        book(writer, *range(checkpoint + 1, checkpoint + 10))
    assert_holds(tmp_path, checkpoint + 9)


def no_space(path: Path) -> BinaryIO:
    return open("/dev/full", "wb")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=24)
    book(writer, 1, 2)
    writer.flush()
    with monkeypatch.context() as full:
        full.setattr(files, "open_temp", no_space)
        book_unasked(writer, 3, 4, 5, 6)
        with pytest.raises(LedgerError, match=r"000000003-000000006-r0\.parquet could not be written \(No space"):
            book(writer, 7)
        book(writer, 8)  # it is told once, until the part is tried again
        with pytest.raises(LedgerError, match="kept in memory: free space"):
            writer.flush()
        with pytest.raises(LedgerError, match=r"000000001-000000002-r0\.parquet could not be cut to step 1"):
            LedgerWriter(tmp_path, RUN, resume=True).cut(1)
        assert_holds(tmp_path, 2)
    book(writer, 9)
    writer.close()
    assert_holds(tmp_path, 9)


def test_what_is_not_yet_on_a_full_disk_can_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LedgerWriter(tmp_path, RUN)
    with monkeypatch.context() as full:
        full.setattr(files, "open_temp", no_space)
        book(writer, 1, 2, 3)
        with pytest.raises(LedgerError, match="No space"):
            writer.flush()
        writer.cut(2)
    book(writer, 3, 4)
    writer.close()
    assert_holds(tmp_path, 4)


def test_a_rename_that_could_not_be_made_durable_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LedgerWriter(tmp_path, RUN)
    book(writer, 1, 2)

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(files, "sync_folder", fail)
        with pytest.raises(LedgerError, match="Input/output error"):
            writer.flush()
    book(writer, 3)
    writer.close()
    assert_holds(tmp_path, 3)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from inrun.ledger import LedgerError
from tests.ledger.rows import *
writer = LedgerWriter({folder!r}, RUN)
book(writer, 1, 2)
writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
book(writer, *range(3, 300))
try:
    writer.flush()
except LedgerError as error:
    print(error)
assert names(Path({folder!r}), "values") == ["000000001-000000002-r0.parquet"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
book(writer, 300)
writer.close()
"""


def test_a_limit_on_the_size_of_files_loses_nothing(tmp_path: Path) -> None:
    code = LIMITED.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "000000003-000000299-r0.parquet could not be written (File too large)" in done.stdout
    assert_holds(tmp_path, 300)

"""Writing off the training thread: in order, in bounded memory, and no harm where the disk or the process fails."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inrun.ledger import LedgerError, LedgerWriter, batch, files
from tests.ledger.rows import RUN, assert_holds, book, book_unasked, names, rows_in

TWO_STEPS = 12  # rows that they have


class Disk:
    """Stands before the disk: parts wait until it is open, and are counted and timed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.delays: list[float] = []  # seconds, of the first writes
        self.written: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.seen: Callable[[], Any] = lambda: None
        self._write = files.write_whole
        patch.setattr(batch, "write_whole", self.write)

    def write(self, path: Path, rank: int, content: Any) -> None:
        self.threads.add(threading.current_thread())
        assert self.open.wait(20), "the training thread waits for the disk"
        time.sleep(self.delays.pop(0) if self.delays else 0)
        self.seen()
        self._write(path, rank, content)
        self.written.append(f"{path.parent.name}/{path.name}")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    standing = Disk(monkeypatch)
    yield standing
    standing.open.set()


def test_booking_waits_for_no_disk_and_parts_are_written_in_order(tmp_path: Path, disk: Disk) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    book(writer, *range(1, 10))
    assert writer.last_step == 9
    assert disk.written == []
    disk.delays = [0.1, 0.0, 0.05]
    disk.open.set()
    writer.close()
    firsts = [name[7:16] for name in disk.written if name.startswith("values")]
    assert firsts == [f"{first:09d}" for first in (1, 3, 5, 7, 9)]
    # The values of a step are there before its row of steps/.
    assert disk.written == [f"{kind}/{name}" for name in names(tmp_path, "values") for kind in ("values", "steps")]
    assert len(disk.threads) == 1
    assert threading.main_thread() not in disk.threads
    assert_holds(tmp_path, 9)


def test_the_thread_ends_with_the_writer(tmp_path: Path, disk: Disk) -> None:
    disk.open.set()
    with LedgerWriter(tmp_path, RUN) as writer:
        book(writer, 1)
    (thread,) = disk.threads
    assert not thread.is_alive()


def test_what_is_booked_may_be_reused_at_once(tmp_path: Path, disk: Disk) -> None:
    ids, values, row = [1, 2], np.array([1.0, 2.0]), {"target": "math", "loss": 1.0}
    with LedgerWriter(tmp_path, RUN, part_rows=1) as writer:
        writer.book(1, ids, {"math": values}, [row])
        ids[:], values[:], row["loss"] = [8, 9], -1.0, -1.0
        disk.open.set()
    assert rows_in(tmp_path) == [(1, 1, "math", 1.0), (1, 2, "math", 2.0)]


def test_a_slow_disk_holds_up_booking_and_nothing_is_lost(tmp_path: Path, disk: Disk) -> None:
    writer = LedgerWriter(tmp_path, RUN, memory=20_000)
    book(writer, 1)
    size, pending, ahead = writer._size, [], []
    disk.seen = lambda: ahead.append(writer.last_step - (int(disk.written[-1][-20:-11]) if disk.written else 0))
    disk.delays = [0.02] * 60
    disk.open.set()
    for step in range(2, 101):
        book(writer, step)
        pending.append(writer._size + sum(batch.size for batch in writer._background.waiting))
    assert max(pending) <= 20_000
    # It was ahead of the disk by the steps that fit, and by no more.
    assert 20_000 // size - 1 <= max(ahead) <= 20_000 // size + 1
    writer.close()
    assert_holds(tmp_path, 100)


def test_a_step_larger_than_the_memory_is_booked(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path, RUN, memory=1) as writer:
        for step in range(1, 4):
            book(writer, step)
            assert len(names(tmp_path, "values")) == step
    assert_holds(tmp_path, 3)
    with pytest.raises(LedgerError, match="memory is 0"):
        LedgerWriter(tmp_path, RUN, resume=True, memory=0)


def test_flush_returns_when_all_that_waits_is_on_disk(tmp_path: Path, disk: Disk) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    book(writer, *range(1, 8))
    disk.delays = [0.02] * 8
    disk.open.set()
    writer.flush()
    assert_holds(tmp_path, 7)


@pytest.mark.parametrize(("act", "last"), [("book", 4), ("flush", 3), ("cut", 1), ("close", 3)])
def test_a_failure_is_told_once_by_whatever_is_called_next(tmp_path: Path, act: str, last: int) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    following: dict[str, Callable[[], None]] = {
        "book": lambda: book(writer, writer.last_step + 1),
        "flush": writer.flush,
        "cut": lambda: writer.cut(1),
        "close": writer.close,
    }
    (tmp_path / "values").rmdir()
    book_unasked(writer, 1, 2)
    with pytest.raises(LedgerError, match="step 2 is booked already"):
        book(writer, 2)  # a mistake of its own is told first, and the disk's is not forgotten
    if act != "book":
        book_unasked(writer, 3)
    with pytest.raises(
        LedgerError, match=r"values/000000001-000000002-r0\.parquet could not be written \(No such file"
    ):
        following[act]()
    assert writer.last_step == 3, "what was booked was lost"
    assert list(tmp_path.rglob("*.tmp")) == []
    (tmp_path / "values").mkdir()
    following[act]()
    assert writer.last_step == last
    writer.close()
    assert_holds(tmp_path, last)


def test_an_error_of_any_kind_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(frame: Any) -> memoryview:
        raise MemoryError("too large a frame")

    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "parquet", fail)
        book_unasked(writer, 1, 2)
        with pytest.raises(MemoryError, match="too large a frame"):
            book(writer, 3)
    writer.close()
    assert_holds(tmp_path, 3)


def test_a_part_that_ctrl_c_broke_off_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """polars raises KeyboardInterrupt on the thread that it works for, besides that of the main thread."""

    def interrupted(frame: Any) -> memoryview:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "parquet", interrupted)
    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    book(writer, 1, 2, 3)
    writer.close()
    assert_holds(tmp_path, 3)


def test_a_disk_that_stays_full_never_hangs_and_loses_nothing(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, RUN, memory=10_000)
    (tmp_path / "steps").rmdir()
    told = []
    for step in range(1, 31):
        try:
            book(writer, step)
        except LedgerError as error:
            told.append((step, str(error)))
        assert writer.last_step == step
    assert {step for step, _ in told} >= set(range(10, 31)), "memory is full, and nobody was told"
    assert all("steps/000000001" in text and "No such file" in text for _, text in told)
    for call in (writer.flush, writer.close):
        with pytest.raises(LedgerError, match="steps/000000001"):
            call()
    (tmp_path / "steps").mkdir()
    writer.close()
    assert_holds(tmp_path, 30)


@pytest.mark.parametrize("step", range(8))
def test_cut_while_rows_wait(tmp_path: Path, disk: Disk, step: int) -> None:
    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    book(writer, *range(1, 8))  # 1 and 2 are being written, 3 to 6 wait, 7 is in the buffer
    opening = threading.Timer(0.05, disk.open.set)
    opening.start()
    writer.cut(step)
    assert writer.last_step == step
    assert_holds(tmp_path, min(step, 2))
    book(writer, *range(step + 1, step + 6))
    writer.close()
    opening.join()
    assert_holds(tmp_path, step + 5)


def test_where_no_thread_can_be_started_the_caller_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    writer = LedgerWriter(tmp_path, RUN, part_rows=TWO_STEPS)
    (tmp_path / "values").rmdir()
    book(writer, 1)
    with pytest.raises(LedgerError, match="No such file"):
        book(writer, 2)
    (tmp_path / "values").mkdir()
    book(writer, 3, 4)
    assert_holds(tmp_path, 4)
    book(writer, 5)
    writer.close()
    assert_holds(tmp_path, 5)


START = """
import atexit, multiprocessing, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from inrun.ledger import LedgerError, batch
from tests.ledger.rows import *
writer = LedgerWriter({folder!r}, RUN, part_rows=12, memory=20_000)
write, began, goes_on = batch.write_whole, threading.Event(), threading.Event()
def slow(*given):
    began.set()
    goes_on.wait({seconds})
    write(*given)
batch.write_whole = slow
"""


def run(folder: Path, body: str, seconds: float = 0.3) -> subprocess.CompletedProcess[str]:
    """Run `body` in a process with a writer, whose parts each wait for `goes_on`, and `seconds` at most."""
    start = START.format(root=str(Path(__file__).parents[2]), folder=str(folder), seconds=seconds)
    return subprocess.run([sys.executable, "-c", start + body], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('of the loop')", 1, "ValueError: of the loop"),
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
        ("", 0, ""),
    ],
)
def test_a_process_that_ends_without_close_leaves_a_ledger(tmp_path: Path, ending: str, code: int, told: str) -> None:
    ended = run(tmp_path, f"book(writer, 1, 2, 3, 4, 5)\nbegan.wait()\n{ending}")
    assert ended.returncode == code, ended.stderr
    assert told in ended.stderr
    assert ended.stderr.count("Traceback") == bool(told), ended.stderr
    # What was being written is there whole, the rest as after a crash.
    assert_holds(tmp_path, 2)
    assert [name for kind in ("values", "steps") for name in names(tmp_path, kind) if name[0] == "."] == []
    with LedgerWriter(tmp_path, RUN, resume=True) as resumed:
        book(resumed, 3)
    assert_holds(tmp_path, 3)


def test_a_wait_for_the_disk_can_be_interrupted(tmp_path: Path) -> None:
    body = """
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    book(writer, *range(1, 100))
except KeyboardInterrupt:
    last = writer.last_step
    print(last, len(names(writer._folder, "values")))
goes_on.set()
writer.close()
assert_holds(writer._folder, last)
"""
    ended = run(tmp_path, body, seconds=20)
    assert ended.returncode == 0, ended.stderr
    last, parts = map(int, ended.stdout.split())
    assert 2 < last < 20
    assert parts == 0, "it was interrupted only when the disk had gone on"


def test_a_ledger_closed_when_the_interpreter_ends_is_whole(tmp_path: Path) -> None:
    ended = run(tmp_path, "atexit.register(writer.close)\nbook(writer, *range(1, 8))", seconds=0.01)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_holds(tmp_path, 7)


FORKS = """
def work():
    try:
        book(writer, 8)
    except LedgerError as error:
        assert f"opened by process {os.getppid()}" in str(error)
        for act in writer.flush, lambda: writer.cut(0):
            try:
                act()
            except LedgerError:
                continue
            os._exit(1)
        return
    os._exit(2)

def join(ended, child):
    until = time.monotonic() + 15
    while (code := ended()) is None and time.monotonic() < until:
        time.sleep(0.01)
    if code is None:
        os.kill(child, signal.SIGKILL)
    print("hangs" if code is None else code, flush=True)

def reaped(child):
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None

with writer:
    book(writer, *range(1, 8))
    began.wait()  # a part is being written while the process forks
    for exits in True, False:
        if not (child := os.fork()):
            work() if exits else None
            sys.exit(7)  # closes the writer on its way
        join(lambda: reaped(child), child)
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    join(lambda: worker.exitcode, worker.pid)
    assert names(writer._folder, "values") == []
    goes_on.set()
    book(writer, 8, 9)
"""


def test_a_fork_while_a_part_is_written_is_not_harmed_and_does_no_harm(tmp_path: Path) -> None:
    ended = run(tmp_path, FORKS, seconds=50)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["7", "7", "0"], ended.stderr
    assert_holds(tmp_path, 9)


def test_the_thread_imports_nothing_but_of_polars(tmp_path: Path) -> None:
    """A fork in the middle of an import leaves the child a lock that nobody releases."""
    body = """
goes_on.set()
before = set(sys.modules)
book(writer, 1)
writer.book(2, ["a"], {"math": np.ones(1)}, [])
writer.flush()
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    ended = run(tmp_path, body)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() in ([], ["polars"])

"""Time and memory: steps taken in turn in one process, and the most memory of a process that takes one kind of step."""

import gc
import math
import multiprocessing
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from benchmarks import rivals
from benchmarks.cases import Case
from benchmarks.models import WORKLOADS, Setting
from benchmarks.plan import predicted
from benchmarks.variants import Line, Opened, Stock, lines_of
from inrun import InrunError

WARM = 2  # rounds that are not counted: memory is taken, kernels are chosen, inrun looks at the model
LONG = 15.0  # seconds of a round that makes one of these enough
LEAST = 3  # rounds that are counted
SLOW = 10.0  # seconds, and plain steps, of a step that is taken once and not again
LONGEST = 600.0  # seconds until a process of which memory is measured is given up
VISIT = 0.05  # seconds that a plain step is repeated for, where one is shorter than the clock and the system are steady
# what a library says, in one way or another, where it does not take a model
FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, LookupError, ImportError,
)  # fmt: skip


@dataclass
class Measured:
    """What is known of a line.

    times: seconds of a step, one a round, the rounds being the same for all lines of a table. first: those of the first
    round, which does not count, but for a line that is so slow that it takes part in no other (`once`). gib, later_gib:
    the most memory of a process that takes such steps, from its start and after the first step. planned: the seconds
    that `Attributor.plan()` says a step takes longer.
    """

    line: Line
    status: str = "measured"  # or "refused", "failed", "not installed"
    reason: str = ""
    times: list[float] = field(default_factory=list)
    first: float = math.nan
    once: bool = False
    gib: float | None = None
    later_gib: float | None = None
    planned: float | None = None

    def out(self, error: BaseException) -> None:
        """The line could not be measured."""
        sentence = re.split(r"(?<=[.!?])\s|\n", str(error).strip())[0]
        if isinstance(error, InrunError):
            self.status, self.reason = "refused", sentence
        elif isinstance(error, torch.OutOfMemoryError):
            self.status, self.reason = "failed", "out of memory"
        else:
            self.status, self.reason = "failed", f"{type(error).__name__}: {sentence}"


def setting_of(case: Case, device: str) -> Setting:
    return Setting(WORKLOADS[case.workload], case.batch, case.dtype, device)


def seconds(device: str, call: Callable[[], object]) -> float:
    """How long the call takes; on a GPU, between two events around it on the device."""
    if not device.startswith("cuda"):
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


class Alternation:
    """Rounds of one step of every line, in turning order.

    Every line's model and attributor stay as they are from round to round. With weights that are shared, each is
    attached for its turn, takes a step that is not counted, and is taken off again.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.setting = setting_of(case, device)
        self.lines = {line.key: Measured(line) for line in lines_of(case.variants, case.targets)}
        self.shared = self.setting.workload.large
        self.warm = 0 if self.shared else WARM
        self.taken, self.repeat = 0, 1
        self._stock = Stock(self.setting, self.shared)
        self._open: dict[str, tuple[Opened, ExitStack]] = {}
        for of in self.lines.values():
            needs = of.line.variant.needs
            if needs and rivals.installed(needs) is None:
                of.status, of.reason = "not installed", f"pip install {needs}"
        rule = next(iter(self.lines.values())).line.variant.rule
        self.parameters = sum(p.numel() for p in self._stock.take(rule)[0].parameters())

    def __enter__(self) -> "Alternation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for key in list(self._open):
            self._close(key)
        del self._stock
        gc.collect()
        if self.setting.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @property
    def counted(self) -> int:
        """Rounds that count, so far."""
        return max(self.taken - self.warm, 0)

    def round(self, tell: Callable[[str], None]) -> None:
        """One step of every line that is left."""
        batch = self.setting.draw(self.setting.batch, self.taken)

        def steps(opened: Opened) -> None:
            for _ in range(self.repeat):
                opened.step(batch)

        keys = [key for key, of in self.lines.items() if of.status == "measured" and not of.once]
        turn = self.taken % len(keys)
        found = {}
        for key in keys[turn:] + keys[:turn]:
            of = self.lines[key]
            tell(of.line.variant.label)
            try:
                found[key] = self._visit(of, steps) / self.repeat
            except InrunError as error:
                of.out(error)
            except FAILURES as error:
                if not foreign(of.line) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                of.out(error)
            if of.status != "measured":
                self._close(key)
                self._stock.clear()
        if self.taken == 0 and self.warm:
            self._look(found)
        if self.taken >= self.warm:
            for key, taken in found.items():
                self.lines[key].times.append(taken)
        self.taken += 1
        if self.taken == self.warm:
            self.repeat = max(1, math.ceil(VISIT / min(found.values(), default=VISIT)))

    def _look(self, found: Mapping[str, float]) -> None:
        """After the first round: which lines are done, and whether another round is needed to warm up."""
        plain = min(found.values(), default=0.0)
        for key, taken in found.items():
            self.lines[key].first = taken
            if foreign(self.lines[key].line) and taken > max(SLOW, SLOW * plain):
                self.lines[key].once = True
                self._close(key)
        if sum(taken for key, taken in found.items() if not self.lines[key].once) > LONG:
            self.warm = 1

    def _visit(self, of: Measured, steps: Callable[[Opened], None]) -> float:
        """The time of the steps, once the line is attached."""
        key, variant = of.line.key, of.line.variant
        if key not in self._open:
            stack = ExitStack()
            self._open[key] = stack.enter_context(variant.open(self._stock, of.line.targets)), stack
            if self.shared:
                with quiet(of.line):
                    steps(self._open[key][0])
        opened, _ = self._open[key]
        with quiet(of.line):
            taken = seconds(self.setting.device, lambda: steps(opened))
        if opened.attributor is not None and of.planned is None:
            of.planned = predicted(opened.attributor)
        if self.shared:
            self._close(key)
        return taken

    def _close(self, key: str) -> None:
        if key in self._open:
            _, stack = self._open.pop(key)
            stack.close()


@contextmanager
def quiet(line: Line) -> Iterator[None]:
    """Other libraries' warnings about what is done to them here, of which there are many, are left out."""
    with warnings.catch_warnings():
        if line.variant.needs is not None:
            warnings.simplefilter("ignore")
        yield


def foreign(line: Line) -> bool:
    """Whether the line is not inrun's, and need not take every model."""
    return line.variant.needs is not None or line.variant.name in ("naive", "forward-mode")


def memory(case: Case, device: str, key: str) -> tuple[float | None, float | None]:
    """The most GiB that a process of its own comes to hold, in two steps of a line and in the second of them.

    None where the process came to an end before that, killed for its memory most likely, or to none.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of a process that has imported everything
    context.set_forkserver_preload(["benchmarks.measure"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(there, case, device, key, torch.get_num_threads()))
    process.start()
    there.close()
    try:
        if not here.poll(LONGEST):
            return None, None
        found: tuple[float, float] = here.recv()
        return found
    except EOFError:
        return None, None
    finally:
        process.terminate()
        process.join()


def _alone(connection: Connection, case: Case, device: str, key: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(threads)
    setting = setting_of(case, device)
    line = next(line for line in lines_of(case.variants, case.targets) if line.key == key)
    with line.variant.open(Stock(setting, setting.workload.large), line.targets) as opened, quiet(line):
        opened.step(setting.draw(setting.batch, 0))
        first = high_water(device)
        opened.step(setting.draw(setting.batch, 1))
        later = high_water(device)
    connection.send((max(first, later), later))


def high_water(device: str) -> float:
    """The most GiB held since this was asked last: by the device's allocator, or by this process, as Linux tells it."""
    if device.startswith("cuda"):
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most / 2**30
    with open("/proc/self/status", encoding="utf-8") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as clear:
        clear.write("5")
    return kib / 2**20


def remembered(case: Case, lines: Sequence[Measured]) -> list[Measured]:
    """The lines whose memory is to be measured: those that the case names and the plain steps they are held against."""
    named = [of for of in lines if of.line.variant.name in case.memory and of.status == "measured" and not of.once]
    rules = {of.line.variant.rule for of in named}
    plain = [of for of in lines if of.line.variant.name in {f"plain-{rule}" for rule in rules}]
    return plain + named

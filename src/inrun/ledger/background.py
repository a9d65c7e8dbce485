"""Writing off the training thread: batches go to disk one after another, on one thread.

All state here belongs to the thread that books. The other one is given a batch and nothing else, so there is no lock
that a fork could copy while it is held. An interpreter that ends without close() waits for the batch that is being
written, no longer (a daemon thread would be torn out of polars there); the rest is lost, as in a crash.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from inrun.ledger.batch import Batch

_MOMENT = 0.2  # seconds


class Background:
    """Calls `write` with one batch after another; one that fails stays the first of those that wait.

    An error is raised once, by whichever method first comes upon it; the batch is tried again when the next one is
    `put`, by `drain`, and by a `keep_up` that has to wait.
    """

    def __init__(self, write: Callable[[Batch], None]) -> None:
        self.waiting: deque[Batch] = deque()  # not durable yet; `_writing` is about the first
        self._write = write
        self._writing: Future[None] | None = None
        self._pool = _pool()

    def put(self, batch: Batch) -> None:
        """Hand over `batch`, to be written after those that wait."""
        self.waiting.append(batch)
        self._begin()

    def keep_up(self, allowed: int) -> None:
        """Go on to the next batch when one is durable; wait while those to be written take more than `allowed` bytes.

        Raises what `write` raised.
        """
        while self.waiting:
            must_wait = sum(batch.size for batch in self.waiting) > allowed
            if must_wait:
                self._begin()
            if self._writing is None or not (must_wait or self._writing.done()):
                return
            self.settle()
            self._begin()

    def drain(self) -> None:
        """Return when every batch is durable. Raises what `write` raised."""
        while self.waiting:
            self._begin()
            self.settle()

    def settle(self) -> None:
        """Wait for the batch that is being written, if any, and begin no other. Raises what `write` raised."""
        if self._writing is not None:
            # By moments: polars' signal handler restarts a wait without an end, so Ctrl-C would not get through.
            while not wait([self._writing], timeout=_MOMENT).done:
                pass
            error, self._writing = self._writing.exception(), None
            if error is None:
                self.waiting.popleft()
            elif not isinstance(error, KeyboardInterrupt):
                # Ctrl-C ends what polars does on any thread; the main thread has been told, and the batch waits.
                raise error

    def stop(self) -> None:
        """End the thread."""
        self._pool.shutdown()

    def _begin(self) -> None:
        while self.waiting and self._writing is None:
            try:
                self._writing = self._pool.submit(self._write, self.waiting[0])
            except RuntimeError:
                # No thread is to be had (there are too many, or the interpreter is ending): write on this one.
                self._pool = _pool()  # the old one may have kept the batch
                self._write(self.waiting[0])
                self.waiting.popleft()


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="inrun-ledger")

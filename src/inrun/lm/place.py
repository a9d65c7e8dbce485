"""A run's folder: what stands in it, held by one process at a time, free again when a run could not begin."""

import errno
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inrun.lm.config import CONFIG, ConfigError

RUN = "run.json"  # the ledger's own: from here on there are values to keep
CONTENTS = (
    CONFIG,
    RUN,
    "examples.parquet",
    "tokenizer",
    "tokens",
    "targets",
    "checkpoints",
    "model",
    "recording",
    "schemes",
)
PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def held_already(run: Path) -> str | None:
    """The name of something in the folder that a run would write, if there is any."""
    return next((name for name in CONTENTS if (run / name).exists()), None)


def forget(run: Path) -> None:
    """Take away what a run wrote that ended before it had a ledger, so that it can begin anew."""
    for name in CONTENTS:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def folder_name(target: str) -> str:
    """A folder's name for a target, whose own name may be any text: differs by more than case, leaves no folder."""
    if PLAIN.fullmatch(target):
        return target
    plain = re.sub(r"[^a-z0-9_-]+", "-", target.lower())[:40].strip("-")
    return f"{plain or 'target'}.{hashlib.sha256(target.encode()).hexdigest()[:12]}"


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the folder against a second process; the system lets go of it however this one ends.

    Raises ConfigError where another process holds it, and where the folder cannot be made or written to.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(
            f"{run}: the run's folder cannot be made or written to ({error.strerror or error}): "
            "correct its rights, or choose another with --out."
        ) from error
    with lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{run}: another process is training in this folder: wait until it ends, or choose another with "
                    "--out."
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                    raise
        yield

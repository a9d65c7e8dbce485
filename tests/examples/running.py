"""Runs an example as its docstring says."""

import subprocess
import sys

from tests.parallel.runs import ROOT, environment


def run(name: str, *arguments: str) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments],
        cwd=ROOT, env=environment() | {"CI": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout

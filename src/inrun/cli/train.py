"""`inrun train`: a language model on the user's text, with every example valued."""

from rich.console import Console

from inrun.lm.config import Train
from inrun.lm.train import train

__all__ = ["Train", "run"]


def run(config: Train) -> int:
    """Carry out the run."""
    train(config, Console())
    return 0

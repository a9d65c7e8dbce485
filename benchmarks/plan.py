"""What `Attributor.plan()` says a step costs, held against what it costs."""

from inrun import Attributor


def predicted(attributor: Attributor) -> float:
    """The plan's seconds: by how much a step takes longer, the targets' own passes apart."""
    return attributor.plan().seconds


def error(planned: float, measured: float) -> float | None:
    """How wrong the plan is, as a share of what was measured: -0.2 is a fifth too little. None if nothing was lost."""
    return planned / measured - 1 if measured > 0 else None

"""What `Attributor.plan()` says a step costs, held against what it costs."""

from inrun import Attributor

SECONDS = "seconds"  # of a plan: by how much a step takes longer, the targets' own passes apart


def predicted(attributor: Attributor) -> float | None:
    """The plan's seconds; None if this version of inrun has no plans, or its plans no such number."""
    plan = getattr(attributor, "plan", None)
    if plan is None:
        return None
    found = getattr(plan(), SECONDS, None)
    return None if found is None else float(found)


def error(planned: float, measured: float) -> float | None:
    """How wrong the plan is, as a share of what was measured: -0.2 is a fifth too little. None if nothing was lost."""
    return planned / measured - 1 if measured > 0 else None

"""What studies make of a ledger's values, by example and by epoch: N examples."""

import numpy as np

from experiments.results import Array
from inrun import Ledger

NORMALISED = ", by step"  # of a method's name: every step's values are divided by the sum of their absolute values


def totals(ledger: Ledger, examples: int, centred: bool = False) -> Array:
    """The sum of every example's values [N], of the only target; centred: of their distances from the mean of their
    step's batch.
    """
    rows = ledger.scan().collect()
    places, values, steps = (rows[name].to_numpy() for name in ("id", "value", "step"))
    if centred:
        values = values - (np.bincount(steps, values) / np.maximum(np.bincount(steps), 1))[steps]
    return np.asarray(np.bincount(places, values, minlength=examples), dtype=np.float64)


def by_epoch(ledger: Ledger, target: str, examples: int, epochs: int, steps: int, normalised: bool = False) -> Array:
    """The value of every example in every epoch, which uses it once: [epochs, N]; normalised: as `NORMALISED` says."""
    rows = ledger.scan().collect()
    rows = rows.filter(rows["target"] == target)
    places, values, at = (rows[name].to_numpy() for name in ("id", "value", "step"))
    at = at - at.min()
    if normalised:
        values = values / np.bincount(at, np.abs(values))[at]
    cells = at * epochs // steps * examples + places
    assert len(np.unique(cells)) == len(cells) == epochs * examples
    return np.bincount(cells, values).reshape(epochs, examples).astype(np.float64)

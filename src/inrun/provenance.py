"""What a run says about itself in its ledger's run.json."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inrun.target import Target
from inrun.units import Unit


def describe(
    optimizers: Sequence[Optimizer], units: Sequence[Unit], targets: Sequence[Target], **settings: Any
) -> dict[str, Any]:
    """Settings, optimizer, targets, versions and coverage; `identity` is what must stay the same when the
    run is resumed.
    """
    plain = (int, float, bool, str, tuple, list, type(None))
    kind = " + ".join(type(optimizer).__name__ for optimizer in optimizers)
    return {
        "identity": {
            **{k: settings[k] for k in ("scheme", "nodes", "momentum")},
            **({"rule": settings["rule"]} if settings["rule"] != "midpoint" else {}),
            **{
                k: settings[k]
                for k in (
                    "refresh",
                    "target_batches",
                    "tolerance",
                    "max_nodes",
                    "modules",
                    "token_values",
                    "replayable",
                )
                if k in settings
            },
            "optimizer": kind,
            "targets": [t.name for t in targets],
        },
        **settings,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "inrun": version("inrun"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "units": {"value": "nats of target loss", "positive": "the example lowered the target's loss"},
        "optimizer": {
            "class": kind,
            "groups": [
                {
                    k: float(v) if isinstance(v, Tensor) else v
                    for k, v in group.items()
                    if isinstance(v, (*plain, Tensor)) and k != "params"
                }
                | {"parameters": sum(p.numel() for p in group["params"])}
                for optimizer in optimizers
                for group in optimizer.param_groups
            ],
        },
        "targets": {t.name: {"batches": len(t.batches)} for t in targets},
        "coverage": coverage(units),
    }


def coverage(units: Sequence[Unit]) -> dict[str, Any]:
    """By unit: its type, how many parameters it has, by which rule, and which of them are of modules inside it."""
    return {
        u.name: {
            "module": type(u.module).__name__,
            "parameters": sum(p.numel() for p in {*u.parameters.values()}),
            "rule": "closed form" if u.closed_form else "forward mode",
            **({"lifted": [name for name in u.parameters if "." in name]} if u.lifted else {}),
        }
        for u in units
    }

"""From times to numbers: ratios, what is beyond the target's own passes, tables, JSON.

* ratio: a step's time over that of the plain step, under the same optimizer, of the same round in the same process.
* beyond: the ratio, less what the targets' own work costs: 1 + (step - own) / plain, where `own` is, in the same round,
  a plain step with the targets' forward and backward passes (for `second`, with their gradients and double backward
  passes).

Every number is the median over the rounds, with the range of its middle half.
"""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import plan, rivals
from benchmarks.cases import RIVALS, SCHEMES, SLOW_WAYS, Case
from benchmarks.measure import Alternation, Measured
from benchmarks.models import NOTES
from benchmarks.variants import own_line, plain_line

Row = dict[str, Any]


def spread(values: Sequence[float]) -> list[float] | None:
    """The median, and the ends of the middle half; None of nothing."""
    if len(values) < 2:
        return [values[0]] * 3 if values else None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def machine(device: str) -> Row:
    """What the numbers were measured on."""
    found: Row = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }
    return found | {name: rivals.installed(name) for name in ("opacus", "captum", "dattri", "bergson")}


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summarise(case: Case, running: Alternation, complete: bool) -> Row:
    """A case as it goes into the JSON."""
    rows = [_row(of, case.targets, running.lines) for of in running.lines.values()]
    return {
        "title": case.title,
        "workload": case.workload,
        "parameters": running.parameters,
        "size": running.setting.workload.size(case.batch),
        "note": NOTES.get(case.workload, ""),
        "batch": case.batch,
        "dtype": case.dtype,
        "targets": case.targets,
        "shared_weights": running.shared,
        "complete": complete,
        "rounds": running.counted,
        "rows": rows,
        "not_beaten": not_beaten(rows),
    }


def _row(of: Measured, targets: int, lines: Mapping[str, Measured]) -> Row:
    variant, line = of.line.variant, of.line
    base = lines[plain_line(variant.rule).key]
    own = None if line.baseline else lines[own_line(variant, targets).key]
    mine, plain = ([of.first], [base.first]) if of.once else (of.times, base.times)
    row: Row = {
        "variant": line.key,
        "label": variant.label,
        "optimizer": variant.rule,
        "baseline": line.baseline,
        "status": of.status,
        "reason": of.reason,
        "once": of.once,
        "seconds": spread(mine),
        "ratio": spread([a / b for a, b in zip(mine, plain, strict=False)]),
        "beyond": None,
        "beyond_what": None,
        "peak_gib": of.gib,
        "later_peak_gib": of.later_gib,
        "peak_ratio": of.gib / base.gib if of.gib and base.gib else None,
        "later_peak_ratio": of.later_gib / base.later_gib if of.later_gib and base.later_gib else None,
        "times": mine,
    }
    if own is not None:
        rounds = list(zip(mine, [own.first] if of.once else own.times, plain, strict=False))
        row["beyond"] = spread([1 + (a - theirs) / b for a, theirs, b in rounds])
        row["beyond_what"] = own.line.key
        extra = spread([a - theirs for a, theirs, _ in rounds])
        if of.planned is not None and extra is not None:
            row |= {"extra": extra, "planned": of.planned, "planned_error": plan.error(of.planned, extra[0])}
    return row


def not_beaten(rows: Sequence[Row]) -> list[str]:
    """Where another way takes no longer than inrun does with its own choice of kernels, in words.

    Under the same optimizer; under AdamW the other ways' numbers are those of SGD.
    """
    found = []
    for other in (row for row in rows if row["variant"] in (*SLOW_WAYS, *RIVALS) and row["ratio"]):
        alike = [row for row in rows if row["variant"] in SCHEMES and row["optimizer"] == other["optimizer"]]
        ours = [row for row in alike if row["ratio"] and row["ratio"][0] >= other["ratio"][0]]
        if ours:
            beaten = ", ".join(f"{row['label']} ({row['ratio'][0]:.2f})" for row in ours)
            found.append(f"{other['label']} ({other['ratio'][0]:.2f}) is not slower than {beaten}")
    return found


def table(found: Row) -> str:
    """A case as text."""
    count = f"{found['targets']} target{'s' * (found['targets'] != 1)}"
    size = f"{found['parameters'] / 1e6:.3g} M parameters, {found['size']}"
    head = f"{found['workload']}: {size}, {found['dtype']}, {count}, {found['rounds']} rounds"
    rows = found["rows"]
    width = max(len(row["label"]) for row in rows) + 2
    text = [head + ("" if found["complete"] else " (cut short)")]
    text += [f"({found['note']})"] if found["note"] else []
    text.append(
        f"{'':{width}}{'s/step':>8}  {'ratio (middle half)':24}{'beyond (middle half)':24}"
        f"{'peak GiB, x plain (after step 1)':>32}"
    )
    for row in rows:
        if row["status"] != "measured":
            text.append(f"{row['label']:{width}}{row['status']}: {row['reason']}")
        elif row["seconds"] is not None:
            text.append(
                f"{row['label']:{width}}{row['seconds'][0]:8.3g}  {_spread(row['ratio'], row['once']):24}"
                f"{_spread(row['beyond'], row['once']):24}{_memory(row):>32}".rstrip()
            )
    text += [f"  {sentence}" for sentence in found["not_beaten"]]
    for row in (row for row in rows if row.get("planned") is not None):
        off = "" if row["planned_error"] is None else f", {row['planned_error']:+.0%}"
        text.append(f"  {row['label']}: plan() says {row['planned']:.3g} s more, measured {row['extra'][0]:.3g} s{off}")
    return "\n".join(text)


def _spread(of: Sequence[float] | None, once: bool) -> str:
    if of is None:
        return ""
    return f"{of[0]:.2f}  (" + ("one step)" if once else f"{of[1]:.2f} to {of[2]:.2f})")


def _memory(row: Row) -> str:
    if row["peak_gib"] is None or row["peak_ratio"] is None:
        return ""
    return f"{row['peak_gib']:.2f}  {row['peak_ratio']:.2f} ({row['later_peak_ratio']:.2f})"


def headline(of: Row) -> str:
    """The machine, in a line."""
    also = "" if of["device"] == "cpu" else f", {of['device']}"
    return f"{of['processor']}, {of['threads']} thread{'s' * (of['threads'] != 1)}{also}, torch {of['torch']}"


def write(folder: Path, of: Row, cases: Sequence[Row]) -> None:
    """result.json and table.txt, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "result.json", json.dumps({"machine": of, "cases": list(cases)}, indent=1) + "\n")
    _replace(folder / "table.txt", "\n\n".join([headline(of), *map(table, cases)]) + "\n")


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)

"""What recording and replaying a run cost, in plain training's steps: the GPT of 14 million parameters, batch 8 x 256.

python -m benchmarks.replay [--rounds 2] [--only NAME] [--out benchmarks/replay.json], and a figure beside it

Every round trains plainly, trains attributed with and without recording, and replays, one after the other in one
process, in an order that is turned round from one round to the next; ratios are of a round's own times. What takes long
(`ONCE`) is in the first round alone. *Peak memory* is the process's resident memory at most while a line is measured.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inrun
from benchmarks.models import TARGET_SEED, WORKLOADS
from benchmarks.report import machine
from inrun.replaying.store import place_of
from inrun.scratch import gib

WORKLOAD = WORKLOADS["gpt14m"]
CLIP = 1.0
STEPS = 16  # of training
# name -> targets, spacing of checkpoints, steps, settings of inrun.replay
REPLAYS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "one target": (1, 16, 32, {}),
    "one target, checkpoints every 4 steps": (1, 4, 32, {}),
    "one target, differences": (1, 16, 32, {"hessian": "difference"}),
    "one target, horizon=10": (1, 16, 32, {"horizon": 10}),
    "one target, horizon=0": (1, 16, 32, {"horizon": 0}),
    "one target, 16 steps": (1, 16, 16, {}),
    "eight targets, 16 steps": (8, 16, 16, {}),
}
ONCE = [name for name in REPLAYS if name != "one target"]


def loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return WORKLOAD.each(WORKLOAD.outputs(model, inputs), labels).mean()


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = WORKLOAD.build()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-4)


def train(steps: int, folder: Path | None = None, every: int | None = None) -> float:
    """Seconds a step, after a first one that does not count; attributed if there is a folder, and recorded."""
    model, optimizer = made()
    batches = [WORKLOAD.draw(8, step) for step in range(steps + 1)]
    recording = inrun.Recording(every=every, clip_norm=CLIP) if every else False
    attributor = None
    if folder is not None:
        kernel: Any = "tangent" if every else "auto"
        target = {"0": WORKLOAD.draw(1, TARGET_SEED)}
        attributor = inrun.Attributor(
            model, optimizer, target, loss, ledger=folder, kernel=kernel, replayable=recording
        )
    begun = 0.0
    for step, batch in enumerate(batches):
        if step == 1:
            begun = time.perf_counter()
        if attributor is None:
            loss(model, batch).backward()
        else:
            with attributor.batch(ids=list(range(8 * step, 8 * step + 8)), data=batch):
                loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    found = (time.perf_counter() - begun) / steps
    if attributor is not None:
        attributor.close()
    return found


def replay(folder: Path, name: str) -> float:
    """Seconds a step of a replay of a recorded run, its beginning included."""
    targets, _, steps, settings = REPLAYS[name]
    model, optimizer = made()
    batches = {f"{k}": WORKLOAD.draw(1, TARGET_SEED + k) for k in range(targets)}
    shutil.rmtree(folder / "schemes", ignore_errors=True)
    begun = time.perf_counter()
    inrun.replay(folder, batches, loss, model=model, optimizer=optimizer, progress=_silent, **settings)
    return (time.perf_counter() - begun) / steps


def _silent(done: float, steps: int, loss: float | None) -> None:
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="the lines whose names have this in them")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("replay.json"))
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="inrun-replay-"))
    try:
        found = measured(folder, options.rounds, options.only)
    finally:
        shutil.rmtree(folder)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    draw(found, options.out.with_suffix(".svg"))
    print(table(found))
    return 0


def measured(folder: Path, rounds: int, only: str) -> dict[str, Any]:
    replays = {name: of for name, of in REPLAYS.items() if only in name}
    runs = {of[1:3]: folder / f"every-{of[1]}-of-{of[2]}" for of in replays.values()}
    disk = {}
    for (every, steps), place in runs.items():
        train(steps - 1, place, every)
        disk[every, steps] = sum(path.stat().st_size for path in place_of(place).rglob("*") if path.is_file())
    work: dict[str, Callable[[], float]] = {
        "plain training": lambda: train(STEPS),
        "attributed": lambda: train(STEPS, _fresh(folder / "attributed")),
        **{
            f"attributed and recorded, every {every} steps": partial(_recorded, STEPS, folder / "recorded", every)
            for every in (16, 4)
        },
        **{name: partial(replay, runs[of[1:3]], name) for name, of in replays.items()},
    }
    work = {name: call for name, call in work.items() if only in name or name == "plain training"}
    times: dict[str, list[float]] = {name: [] for name in work}
    peaks: dict[str, int] = {}
    for k in range(rounds):
        names = [name for name in work if k == 0 or name not in ONCE]
        for name in names[:: 1 if k % 2 == 0 else -1]:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
            times[name].append(work[name]())
            peaks[name] = max(peaks.get(name, 0), _peak())
            print(f"round {k + 1} of {rounds}: {name}: {times[name][-1]:.2f} s a step", flush=True)
    lines = []
    for name, of in times.items():
        ratios = [one / plain for one, plain in zip(of, times["plain training"], strict=False)]
        line: dict[str, Any] = {"name": name, "seconds": of, "ratio": statistics.median(ratios)}
        line |= {"spread": [min(ratios), max(ratios)], "rounds": len(of), "memory": peaks[name]}
        if name in REPLAYS:
            line["disk"] = disk[REPLAYS[name][1:3]]
        lines.append(line)
    return {"machine": machine("cpu"), "load": os.getloadavg()[0], "lines": lines}


def _peak() -> int:
    """Bytes of resident memory at most, since it was counted anew."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _recorded(steps: int, folder: Path, every: int) -> float:
    return train(steps, _fresh(folder), every)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    of = found["machine"]
    lines = [
        f"{of['processor']}, {of['threads']} threads, torch {of['torch']}. Replays of 32 steps, if nothing else is",
        "said; the first takes some twenty more, in which it finds out whose rows are whose, and takes its memory.",
        "",
        "| | plain steps, a step | lowest to highest | peak memory | recording on disk |",
        "|---|---|---|---|---|",
    ]
    for line in found["lines"]:
        low, high = line["spread"]
        spread = f"{low:.2f} to {high:.2f}, {line['rounds']} rounds" if line["rounds"] > 1 else "once"
        disk = gib(line["disk"]) if "disk" in line else ""
        lines.append(f"| {line['name']} | {line['ratio']:.2f} | {spread} | {gib(line['memory'])} | {disk} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars of time, with their spread, memory and disk beside each other."""
    importlib.import_module("matplotlib").use("Agg")  # of the study group
    plt = importlib.import_module("matplotlib.pyplot")
    lines = found["lines"][::-1]
    names = [line["name"] for line in lines]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained", width_ratios=[2, 1, 1])
    ratios = [line["ratio"] for line in lines]
    errors = [[abs(line["ratio"] - line["spread"][k]) for line in lines] for k in (0, 1)]
    axes[0].barh(names, ratios, xerr=errors, color="#4c72b0")
    axes[0].set_xlabel("steps of plain training, a step")
    axes[1].barh(names, [line["memory"] / 2**30 for line in lines], color="#8172b3")
    axes[1].set_xlabel("peak memory, GiB")
    axes[2].barh(names, [line.get("disk", 0) / 2**30 for line in lines], color="#937860")
    axes[2].set_xlabel("recording on disk, GiB")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

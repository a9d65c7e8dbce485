"""`inrun demo`: the main job on real text that installs with a few packages, in minutes on two cores."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import polars as pl
from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from inrun.cli.by import print_by
from inrun.cli.top import print_top
from inrun.errors import InrunError
from inrun.ledger import Ledger
from inrun.lm.config import CONFIG, Train
from inrun.lm.sources import demo_mixture
from inrun.lm.train import train
from inrun.report import write_report

CORPUS = "corpus.jsonl"
MARK = ".demo"  # says that the folder is a demo's, however far it came
SOURCES = ("scripture", "code", "news", "parliament", "tweets")


class DemoError(InrunError):
    """The demo's folder cannot be used, or its result is not what it must be."""


@dataclass(frozen=True)
class Demo:
    """Train a small GPT on five kinds of real text, a held-out share of each being a target, and show what helped what.

    Example: inrun demo --out runs/demo
    """

    out: Annotated[Path, arg(metavar="RUN")] = Path("runs/demo")
    """The run's folder; an earlier demo there is replaced."""
    steps: int = 300
    """Optimizer steps."""
    characters: int = 400_000
    """Characters of text from each source."""


def run(config: Demo) -> int:
    """Train, print the tables and the books, write the report."""
    begun = time.monotonic()
    console = Console()
    _clear(config.out)
    corpus = _write_corpus(config)
    console.print(f"{len(SOURCES)} sources of real text: {corpus}", highlight=False)
    train(
        Train(
            data=(str(corpus),), out=config.out, model="tiny", vocab_size=4096, sequence=128, batch=8,
            steps=config.steps, learning_rate=5e-4, min_learning_rate=5e-5, warmup_steps=config.steps // 4,
            target_from="domain", target_share=0.05, target_examples=48, target_batch=3, audit_every=20, save_every=200,
        ),
        console,
    )  # fmt: skip
    ledger = Ledger(config.out)
    console.rule("value of each source (rows) for each target (columns), in nats of the target's loss")
    print_by(ledger, "domain", console=console)
    console.rule("the examples that helped most")
    print_top(ledger, 8, console=console)
    console.rule("the examples that hurt most")
    print_top(ledger, 8, worst=True, console=console)
    console.rule("the books of the audited steps")
    _print_books(ledger, console)
    page = write_report(config.out)
    console.print(f"report: {page}  ({time.monotonic() - begun:.0f} s in all)", highlight=False)
    return _check_own_source(ledger, console)


def _clear(folder: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if (folder / MARK).exists() or ((folder / CORPUS).exists() and (folder / CONFIG).exists()):
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise DemoError(f"{folder} holds something other than an earlier demo: choose another folder with --out.")


def _write_corpus(config: Demo) -> Path:
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / MARK).touch()
    draft = config.out / f".{CORPUS}"
    with draft.open("w", encoding="utf-8") as file:
        for document in demo_mixture(config.characters, names=SOURCES):
            file.write(json.dumps({"id": document.id, "text": document.text, **document.columns}) + "\n")
    os.replace(draft, config.out / CORPUS)
    return config.out / CORPUS


def _print_books(ledger: Ledger, console: Console) -> None:
    """Loss drop = values + momentum + decay + unexplained, by target, over the audited steps."""
    audited = ledger.steps().filter(pl.col("loss_before").is_not_null())
    accounts = ["value", "momentum", "decay", "unexplained"]
    totals = audited.group_by("target").agg(
        (pl.col("loss_before") - pl.col("loss_after")).sum().alias("loss drop"), *(pl.col(a).sum() for a in accounts)
    )
    table = Table("target", *(f"{name} (nats)" for name in ("loss drop", *accounts)), "unexplained share")
    for row in totals.sort("target").iter_rows(named=True):
        figures = [f"{row[name]:+.4f}" for name in ("loss drop", *accounts)]
        table.add_row(row["target"], *figures, f"{abs(row['unexplained'] / row['loss drop']):.1%}")
    console.print(table)
    worst = max(audited["conservation"].to_list(), default=0.0)
    console.print(
        f"{audited['step'].n_unique()} steps audited; largest conservation error {worst:.1e}", highlight=False
    )


def _check_own_source(ledger: Ledger, console: Console) -> int:
    """Each source must be worth most to the target that was drawn from it."""
    values = ledger.by("domain").filter(pl.col("domain").is_not_null())
    best = values.sort("value", descending=True).group_by("target", maintain_order=True).first()
    strayed = best.filter(pl.col("domain") != pl.col("target"))
    for row in strayed.iter_rows(named=True):
        console.print(f"UNEXPECTED: {row['domain']} is worth more to target {row['target']} than its own source.")
    if strayed.is_empty():
        console.print("every target was helped most by the source that it was drawn from", highlight=False)
    return 1 if len(strayed) else 0

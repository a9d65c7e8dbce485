"""What `inrun train` is told, as it is stored with the run."""

import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from inrun.errors import InrunError
from inrun.kernels import Kernel

CONFIG = "config.json"

_MOST = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("target_examples", "target_batch", "batch", "accumulation", "steps", "max_nodes"), (1, _MOST)),
    **dict.fromkeys(("refresh", "save_every", "replay_every", "replay_disk"), (1, _MOST)),
    **dict.fromkeys(("warmup_steps", "audit_every", "audit_permutations"), (0, _MOST)),
    **dict.fromkeys(("learning_rate", "min_learning_rate", "weight_decay", "clip", "memory"), (0, sys.float_info.max)),
    "sequence": (2, _MOST),
    "vocab_size": (257, _MOST),  # 256 bytes and the end of a text
    "seed": (0, 2**32 - 1),
}


class ConfigError(InrunError):
    """Options that do not go together, or not with the run that they are to continue."""


def _bytes(given: list[str]) -> int | Literal["auto"]:
    """What stands behind --memory and --replay-disk."""
    found = re.fullmatch(r"auto|(\d+(?:\.\d+)?)([KMGT]iB)?", given[0], re.ASCII)
    if found is None:
        raise ValueError("give a number of bytes, as 2000000000 or 2GiB (KiB, MiB, GiB, TiB), or auto")
    number, unit = found.groups()
    return "auto" if number is None else int(float(number) * _UNITS[unit])


_UNITS = {None: 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BYTES = PrimitiveConstructorSpec(
    nargs=1,
    metavar="BYTES",
    instance_from_str=_bytes,
    is_instance=lambda value: value in ("auto", None) or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Train:
    """Train a causal language model on your text, and keep the value of every training example for each target.

    Example: inrun train corpus.jsonl --out runs/first --model tiny --target-from domain
    """

    data: Annotated[Positional[tuple[str, ...]], arg(metavar="DATA")] = ()
    """Text to train on: .jsonl, .parquet, .csv, a folder of text files, a `datasets` name or path; several join."""
    out: Annotated[Path, arg(metavar="RUN")] = Path("runs/train")
    """The run's folder: configuration, tokens, checkpoints, the ledger of values, the model."""
    resume: bool = False
    """Continue the run in RUN from its last checkpoint; the other options may then be left out."""

    target: Annotated[tuple[str, ...], arg(metavar="NAME=FILE")] = ()
    """A target and the text that it is: --target math=math.jsonl law=law.jsonl."""
    target_from: Annotated[str | None, arg(metavar="COLUMN")] = None
    """Hold a share of every group of this column out of training, as a target named like the group."""
    target_share: float = 0.05
    """The share of a group's documents that --target-from holds out."""
    target_examples: int = 64
    """The most examples of a target that are used, spread evenly over its text."""
    target_batch: int = 8
    """Examples of each target that one step's values are for; the target's batches are used in rotation."""

    text_column: str = "text"
    """The column that holds the text."""
    id_column: str | None = None
    """The column that holds a document's id; by default `id` if there is one, else file and row."""
    split: str = "train"
    """The split of a `datasets` source."""

    model: str = "tiny"
    """A preset (tiny, small, gpt2-small, pythia-410m, ...), a configuration, or a folder of pretrained weights."""
    tokenizer: Path | None = None
    """A tokenizer's folder; by default that of the pretrained weights, or one trained on the text."""
    vocab_size: int | None = None
    """The vocabulary of a tokenizer trained on the text; by default the preset's."""
    sequence: int | None = None
    """Tokens of an example at the most; this and what follows are the preset's by default."""
    batch: int | None = None
    """Examples of a step; with --accumulation, of each of its parts."""
    accumulation: int = 1
    """Batches whose gradients are added up for one step."""
    steps: int | None = None
    """Optimizer steps."""
    epochs: float | None = None
    """Passes over the text, instead of --steps."""
    learning_rate: float | None = None
    """The rate after warm-up."""
    min_learning_rate: float | None = None
    """The rate at the end of the cosine."""
    warmup_steps: int | None = None
    """Steps over which the rate rises."""
    weight_decay: float | None = None
    """AdamW's decay, of matrices only."""
    clip: float | None = None
    """The norm that the gradient is clipped to; 0 for no clipping."""

    scheme: Literal["path", "first", "second"] = "path"
    """How a value is computed: along the optimizer's move, or by the paper's first or second order."""
    nodes: int | Literal["adaptive"] = 1
    """Points of the path at which the target's gradient is taken; or as many as the step's measured drop asks for."""
    rule: Literal["midpoint", "gauss"] = "midpoint"
    """Where the nodes lie."""
    tolerance: float = 0.02
    """For adaptive nodes: the share of the drop that the values may miss."""
    max_nodes: int = 9
    """For adaptive nodes: the most of them."""
    refresh: int = 1
    """For the first order: the steps that a target's gradient is used for."""
    momentum: Literal["account", "credit"] = "account"
    """Whether what old momentum does has an account of its own, or is paid to the examples it came from."""
    kernel: Kernel = "auto"
    """How a layer is valued: run once more (tangent), from gradients formed by example (perexample), or the cheaper."""
    token_values: bool = False
    """Value every token as well, for the report to shade; every layer is run once more for it."""
    memory: Annotated[int | Literal["auto"], BYTES] = "auto"
    """What examples' gradients may take before the rest goes to disk, as 2GiB; auto is half of what is free."""
    audit_every: int = 50
    """Steps between audits of the books; 0 for none."""
    audit_permutations: int = 0
    """On audited steps, random orders of the examples by which the step's real game is played (in full up to 12
    examples); 0 for none. A game takes hundreds of losses of every target."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose gradient or target loss is not finite."""
    replayable: bool = False
    """Keep what `inrun replay` needs in RUN/recording: batches, random states, checkpoints."""
    replay_every: int = 16
    """Steps between these checkpoints, to begin with: when they take more than --replay-disk, half as many are kept."""
    replay_disk: Annotated[int | None, BYTES] = None
    """What these checkpoints may take on disk, as 20GiB; by default a quarter of what is free."""
    seed: int = 0
    """Of the weights, the order of the examples and the held-out share."""
    save_every: int = 500
    """Steps between checkpoints."""

    def check_numbers(self) -> None:
        """Raise ConfigError for the first number that is out of its range."""
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value not in (None, "auto") and not least <= value <= most:
                limits = f"of {least} or more" if most in (_MOST, sys.float_info.max) else f"from {least} to {most}"
                raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number {limits}.")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"--epochs {self.epochs}: give a number above 0.")
        if self.target_from is not None and not 0 < self.target_share < 1:
            raise ConfigError(f"--target-share {self.target_share}: give a share between 0 and 1, as 0.05.")

    def store(self) -> None:
        """Write the configuration into the run's folder, whole or not at all."""
        temporary = self.out / f".{CONFIG}"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n", encoding="utf-8")
            os.replace(temporary, self.out / CONFIG)
        except OSError as error:
            raise ConfigError(
                f"{self.out / CONFIG} could not be written ({error.strerror or error}): free space or correct the "
                "folder's rights, then begin again."
            ) from error

    @classmethod
    def stored(cls, folder: Path) -> Self | None:
        """The configuration of the run in a folder, if there is one."""
        path = folder / CONFIG
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for name, value in found.items():
                if isinstance(value, list):
                    found[name] = tuple(value)
                elif value is not None and name in ("out", "tokenizer"):
                    found[name] = Path(value)
            return cls(**found)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: not the configuration of a run ({error}); choose another folder.") from error

    def continued(self) -> "Train":
        """The configuration of the run in `out`, which the options given now must not contradict."""
        before = Train.stored(self.out)
        if before is None:
            if not self.data:
                raise ConfigError(f"{self.out}: no run to resume here (no {CONFIG}); give the data to begin one.")
            return self
        if before.out != self.out:
            before = replace(before, out=self.out)  # the folder was moved
        default = Train()
        differing = [
            f"--{f.name.replace('_', '-')} {getattr(self, f.name)} (the run has {getattr(before, f.name)})"
            for f in fields(self)
            if f.name not in ("resume", "out")
            and getattr(self, f.name) not in (getattr(default, f.name), getattr(before, f.name))
        ]
        if differing:
            raise ConfigError(
                f"{self.out}: the run to resume was begun with other options: {'; '.join(differing)}. "
                "Leave them out, or choose another folder for another run."
            )
        return before

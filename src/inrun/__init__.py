"""How much each training example helped or hurt, measured during the one training run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inrun import oracle
    from inrun.attributor import Attributor
    from inrun.books import ConservationError
    from inrun.errors import InrunError, NonFiniteError
    from inrun.ledger import Ledger, LedgerError, write_examples
    from inrun.step import Step

__all__ = [
    "Attributor",
    "ConservationError",
    "InrunError",
    "Ledger",
    "LedgerError",
    "NonFiniteError",
    "Step",
    "oracle",
    "write_examples",
]

# Loaded on first use: reading a ledger (`inrun top`) needs no torch.
_HOMES = {
    "Attributor": "inrun.attributor",
    "ConservationError": "inrun.books",
    "Step": "inrun.step",
    **dict.fromkeys(("InrunError", "NonFiniteError"), "inrun.errors"),
    **dict.fromkeys(("Ledger", "LedgerError", "write_examples"), "inrun.ledger"),
}


def __getattr__(name: str) -> Any:
    if name == "oracle":
        return import_module("inrun.oracle")
    if name not in _HOMES:
        raise AttributeError(f"module 'inrun' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

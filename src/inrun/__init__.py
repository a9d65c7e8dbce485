"""How much each training example helped or hurt, measured during the one training run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inrun import oracle
    from inrun.attributor import Attributor, audit
    from inrun.books import ConservationError
    from inrun.errors import InrunError, MixedExamplesWarning, NonFiniteError
    from inrun.ledger import Ledger, LedgerError, write_examples
    from inrun.replaying.face import replay
    from inrun.replaying.recording import Recording
    from inrun.replaying.store import RecordingError
    from inrun.step import Step
    from inrun.update import CoupledUpdate, Update, register_update

__all__ = [
    "Attributor",
    "ConservationError",
    "CoupledUpdate",
    "InrunError",
    "Ledger",
    "LedgerError",
    "MixedExamplesWarning",
    "NonFiniteError",
    "Recording",
    "RecordingError",
    "Step",
    "Update",
    "audit",
    "oracle",
    "register_update",
    "replay",
    "write_examples",
]

# Loaded on first use: reading a ledger (`inrun top`) needs no torch.
_HOMES = {
    **dict.fromkeys(("Attributor", "audit"), "inrun.attributor"),
    "ConservationError": "inrun.books",
    "Recording": "inrun.replaying.recording",
    "RecordingError": "inrun.replaying.store",
    "Step": "inrun.step",
    **dict.fromkeys(("CoupledUpdate", "Update", "register_update"), "inrun.update"),
    **dict.fromkeys(("InrunError", "MixedExamplesWarning", "NonFiniteError"), "inrun.errors"),
    **dict.fromkeys(("Ledger", "LedgerError", "write_examples"), "inrun.ledger"),
    "replay": "inrun.replaying.face",
}


def __getattr__(name: str) -> Any:
    if name == "oracle":
        return import_module("inrun.oracle")
    if name not in _HOMES:
        raise AttributeError(f"module 'inrun' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

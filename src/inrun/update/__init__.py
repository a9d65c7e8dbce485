"""What each optimizer does with a gradient: the displacement D (design, 2.1 and 2.2)."""

from inrun.update.adadelta import AdadeltaUpdate
from inrun.update.adafactor import AdafactorUpdate
from inrun.update.adagrad import AdagradUpdate
from inrun.update.adam import AdamUpdate
from inrun.update.adamax import AdamaxUpdate
from inrun.update.asgd import ASGDUpdate
from inrun.update.base import (
    CoupledUpdate,
    Mix,
    Moved,
    Pull,
    Update,
    check_move,
    register_update,
    supported_optimizers,
    unwrapped,
    update_of,
)
from inrun.update.muon import MuonUpdate
from inrun.update.nadam import NAdamUpdate
from inrun.update.radam import RAdamUpdate
from inrun.update.rmsprop import RMSpropUpdate
from inrun.update.rprop import RpropUpdate
from inrun.update.sgd import SGDUpdate

__all__ = [
    "ASGDUpdate",
    "AdadeltaUpdate",
    "AdafactorUpdate",
    "AdagradUpdate",
    "AdamUpdate",
    "AdamaxUpdate",
    "CoupledUpdate",
    "Mix",
    "Moved",
    "MuonUpdate",
    "NAdamUpdate",
    "Pull",
    "RAdamUpdate",
    "RMSpropUpdate",
    "RpropUpdate",
    "SGDUpdate",
    "Update",
    "check_move",
    "register_update",
    "supported_optimizers",
    "unwrapped",
    "update_of",
]

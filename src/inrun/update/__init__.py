"""What each optimizer does with a gradient: the displacement D (design, 2.1 and 2.2)."""

from inrun.update.adam import AdamUpdate
from inrun.update.base import Moved, Update, check_move, supported_optimizers, update_of
from inrun.update.sgd import SGDUpdate

__all__ = ["AdamUpdate", "Moved", "SGDUpdate", "Update", "check_move", "supported_optimizers", "update_of"]

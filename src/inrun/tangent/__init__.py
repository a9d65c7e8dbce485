"""The tangent of a unit's output in a direction of its parameters: by a rule for its type, or the generic one."""

from inrun.tangent import linear
from inrun.tangent.generic import forward_mode
from inrun.tangent.rules import has_closed_form, register_tangent, tangent

__all__ = ["forward_mode", "has_closed_form", "linear", "register_tangent", "tangent"]

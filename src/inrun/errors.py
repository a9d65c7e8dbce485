"""The one base of every error that inrun raises on purpose."""


class InrunError(Exception):
    """What was wrong, where, and what to do: meant to be read by the user as it is."""


class NonFiniteError(InrunError):
    """A gradient, a target's loss or a value is infinite or not a number."""

"""The one base of every error that inrun raises on purpose, and a warning."""


class InrunError(Exception):
    """What was wrong, where, and what to do: meant to be read by the user as it is."""


class NonFiniteError(InrunError):
    """A gradient, a target's loss or a value is infinite or not a number."""


class MixedExamplesWarning(UserWarning):
    """The model mixes the examples of a batch, so that none has a loss, and a gradient, of its own.

    An example's value is what went through its own rows: sum over units of <b_i, df(a_i)[q]>, where b_i, the gradient
    of its rows of an output, is that of the whole batch's loss. It is the derivative towards q of a copy of the weights
    that this example's rows alone are computed with. The values still add up to <G, q>.
    """

"""The gradient that the optimizer receives, against the one that backward made.

Between the two, a loop may clip or unscale. Example i's contribution follows: g_i is scaled, coordinate by coordinate,
as the whole gradient was, so that sum_i g_i = G stays true of the gradient that the optimizer really receives.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inrun.errors import InrunError
from inrun.update import Moved


class Received:
    """A copy of the gradient at the end of the last batch, and what was done to it since."""

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self.raw: dict[nn.Parameter, Tensor] = {}
        self._seen: dict[nn.Parameter, tuple[Tensor | None, int]] = {}

    def keep(self) -> None:
        """Take the copy."""
        for p in self._names:
            gradient = p.grad
            if gradient is None:
                self.raw.pop(p, None)
            elif p in self.raw:
                self.raw[p].copy_(gradient)
            else:
                self.raw[p] = gradient.detach().clone()
            self._seen[p] = gradient, -1 if gradient is None else gradient._version

    def _touched(self, p: nn.Parameter) -> bool:
        gradient, version = self._seen.get(p, (None, -1))
        return p.grad is not gradient or (gradient is not None and gradient._version != version)

    def check_untouched(self) -> None:
        """Raise InrunError if a gradient changed since the copy: accumulation must go on from where it "
        "was."""
        changed = [name for p, name in self._names.items() if self._touched(p)]
        if changed:
            raise InrunError(
                "a `batch` had no optimizer.step(), and the gradients changed before the next one "
                f"({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}). "
                "If they were dropped on purpose (zero_grad without a step), call attributor.discard(); a "
                "backward pass outside of a `batch` block belongs inside of one."
            )

    def scales(self, moves: Mapping[nn.Parameter, Moved]) -> dict[nn.Parameter, Tensor] | None:
        """Received gradient / made gradient by parameter and coordinate; None if nothing was changed.

        Raises InrunError if it was changed by more than a scaling (clipping and unscaling are; added noise is not).
        """
        if not any(self._touched(p) for p in self._names):
            return None
        scales = {}
        for p, raw in self.raw.items():
            received = moves[p].gradient if p in moves else torch.zeros_like(raw)
            scale = torch.where(raw == 0, 0, received / raw)
            if bool((((raw == 0) & (received != 0)) | (scale < 0)).any()):
                raise InrunError(
                    f"{self._names[p]}: between backward() and step() its gradient was changed by more than "
                    "clipping or scaling (a coordinate changed its sign, or "
                    "came from nothing), so it no longer is the sum of the examples' contributions. Add such "
                    "terms inside the loss, or in the optimizer."
                )
            scales[p] = scale
        return scales

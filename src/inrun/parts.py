"""Values in parts, by module: which part of the model a value came through.

<g_i, q> is a sum over parameters, and every parameter belongs to one part by its name in the model: what a tied weight
gets through the modules that share it is the part's that its first name belongs to, whichever of them was called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from inrun.errors import InrunError

OTHER = "other"


@dataclass(frozen=True)
class Parts:
    """The names of the parts, and the place of every parameter's part among them; both empty if none are asked for."""

    names: list[str] = field(default_factory=list)
    of: dict[nn.Parameter, int] = field(default_factory=dict)


def parts_of(
    by_module: bool | Sequence[str] | Mapping[str, str], names: Mapping[nn.Parameter, str], model: str
) -> Parts:
    """The parts of `Attributor(by_module=...)`.

    Args:
        by_module: True: a part for every module that owns parameters, by its name; patterns of parameters' names, as
            the shell has them, or such by the name of the part. A parameter belongs to the first that it matches, and
            to "other" if it matches none. False: no parts.
        names: the trained parameters' names in the model.
        model: what the module without a name, the model itself, is called.

    Raises:
        InrunError: not patterns, or one that no parameter belongs to.
    """
    if by_module is False:
        return Parts()
    if by_module is True:
        chosen = {p: name.rpartition(".")[0] or model for p, name in names.items()}
        parts = list(dict.fromkeys(chosen.values()))
    else:
        patterns = by_module if isinstance(by_module, Mapping) else {pattern: pattern for pattern in by_module}
        if (
            isinstance(by_module, str)
            or not patterns
            or not all(isinstance(x, str) for of in patterns.items() for x in of)
        ):
            raise InrunError(
                f"by_module={by_module!r}: give True, a list of patterns of parameters' names such as '*.attn.*', or a "
                "mapping of names to such patterns."
            )
        if OTHER in patterns:
            raise InrunError(f"by_module: {OTHER!r} is what matches no pattern; give this part another name.")
        chosen = {
            p: next((part for part, pattern in patterns.items() if fnmatchcase(name, pattern)), OTHER)
            for p, name in names.items()
        }
        parts = [part for part in (*patterns, OTHER) if part in chosen.values()]
        unused = next((part for part in patterns if part not in parts), None)
        if unused is not None:
            raise InrunError(
                f"by_module: no trained parameter belongs to the pattern {patterns[unused]!r}: none matches it, or "
                f"only such as match an earlier one. Their names are such as {', '.join(list(names.values())[:4])}."
            )
    return Parts(parts, {p: parts.index(part) for p, part in chosen.items()})

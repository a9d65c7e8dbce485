"""Which documents of a text are kept from training, to be a target for what remains."""

import hashlib
from collections.abc import Iterable

from inrun.lm.documents import Document, TextError


def held_out_ids(documents: Iterable[Document], column: str, per_group: int | float, seed: int = 0) -> dict[str, str]:
    """The documents to hold out of each group, groups being the values of `column`: {document id: group}.

    `per_group`: a count, or a share under 1. A document's side hangs on a hash of its id and `seed` only, so
    under a share it stays when others come or go; a group never gives all its documents nor none. Documents
    without a value in `column` are kept. Ids are held, never texts. Raises TextError for a column that no
    document has, and for a group too small.
    """
    if not (per_group >= 1 if isinstance(per_group, int) else 0 < per_group < 1):
        raise TextError(f"{per_group} documents cannot be held out of a group: give a count, or a share under 1")
    ranks: dict[str, list[tuple[float, str]]] = {}
    there: set[str] = set()
    for document in documents:
        there |= document.columns.keys()
        group = document.columns.get(column)
        if group is not None:
            digest = hashlib.sha256(f"hold out\0{seed}\0{document.id}".encode()).digest()
            rank = int.from_bytes(digest[:8], "big") / 2**64
            ranks.setdefault(str(group), []).append((rank, document.id))
    if not ranks:
        raise TextError(f"no document has a value in column {column!r}; there are: {sorted(there)}")
    held: dict[str, str] = {}
    for group, ranked in sorted(ranks.items()):
        ranked.sort()
        share = sum(rank < per_group for rank, _ in ranked)
        take = per_group if isinstance(per_group, int) else min(max(share, 1), len(ranked) - 1)
        if not 0 < take < len(ranked):
            raise TextError(
                f"group {group!r} of {column!r} has {len(ranked)} documents: holding out {max(take, 1)} "
                "leaves none to train on; hold out fewer, or give the target its own file"
            )
        held |= {name: group for _, name in ranked[:take]}
    return held

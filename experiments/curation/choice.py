"""What every method would drop: from finished values to blocks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.curation.config import NEGATIVES, Piece, Study, pieces_of
from experiments.results import Array

NOT_VALUES = ("kind", "step", "target", "weights", "seconds")
ONE_PASS = "path, one pass"
CONTROLS = ("random", "random again", "oracle")
PARTS = ("path, rubbish", "path, clean")  # `path`, but that nothing else is below zero


def values_of(study: Study, paths: Mapping[Piece, Path], seed: int) -> dict[str, Array]:
    """Every method's values of the blocks: [N]. `path` and `first` are of the main target, `path, one pass` of the
    first use of every block alone.

    Of `oracle` rubbish is below zero, and all else above; `path, rubbish` and `path, clean` are those of `path` there,
    and one elsewhere.
    """
    found: dict[str, Array] = {}
    for piece in pieces_of(study):
        if piece.seed == seed:
            with np.load(paths[piece]) as arrays:
                for name in set(arrays.files).difference(NOT_VALUES):
                    method = name.removesuffix(f", {study.main}")
                    found[method] = np.atleast_2d(arrays[name]).sum(axis=0)
                    if name == f"path, {study.main}":
                        found[ONE_PASS] = arrays[name][0]
    bad = rubbish_of(study, paths, seed)
    draws = [np.random.default_rng([seed, k]).uniform(size=study.blocks) for k in range(len(CONTROLS))]
    found |= dict(zip(PARTS, (np.where(which, found["path"], 1.0) for which in (bad, ~bad)), strict=True))
    return found | dict(zip(CONTROLS, (draws[0], draws[1], draws[2] - bad), strict=True))


def kind_of(paths: Mapping[Piece, Path], seed: int) -> NDArray[np.int64]:
    """Every block's place in `study.kinds`: [N]."""
    with np.load(paths[Piece(seed, "path")]) as arrays:
        return np.asarray(arrays["kind"])


def rubbish_of(study: Study, paths: Mapping[Piece, Path], seed: int) -> NDArray[np.bool_]:
    """[N]."""
    return kind_of(paths, seed) >= len(study.clean)


def dropped(rule: str, values: Array, path: Array) -> NDArray[np.bool_]:
    """What is below zero; or the lowest, as many as `path` has below zero: [N]."""
    if rule == NEGATIVES:
        return values < 0
    found = np.zeros(len(values), dtype=bool)
    found[np.argsort(values, kind="stable")[: int((path < 0).sum())]] = True
    return found

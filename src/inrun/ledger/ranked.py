"""Sorting totals that come in frames by their value, holding little more than the answer.

A value's first 16 bits (sign, exponent, four bits of its fraction) are its *cell*. Cells are put together to buckets of
about as many rows each; the rows of every frame are dealt out to them, and the buckets then sorted one by one.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from inrun.ledger.checks import Floats

_BUCKETS = 128
_AT_ONCE = 8  # frames that are held twice
_CELLS = 2**16
_RISING = np.concatenate([np.arange(_CELLS - 1, _CELLS // 2 - 1, -1), np.arange(_CELLS // 2)])  # by their values

Places = np.ndarray[Any, np.dtype[np.uint32]]
Cells = np.ndarray[Any, np.dtype[np.uint16]]
Buckets = np.ndarray[Any, np.dtype[np.uint8]]


def ranked(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """The rows of all frames, the largest value first, and by id where they are equal. The list is emptied on the way.

    Every frame is sorted by id, and no id of a later one is below one of an earlier. Values are finite.
    """
    filled = np.sum([np.bincount(_cells(frame), minlength=_CELLS) for frame in frames], axis=0)[_RISING]
    bucket_of = np.empty(_CELLS, dtype=np.uint8)
    bucket_of[_RISING] = (np.cumsum(filled) - filled) * _BUCKETS // max(int(filled.sum()), 1)
    buckets: list[list[pl.DataFrame]] = [[] for _ in range(_BUCKETS)]
    frames.reverse()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while frames:
            some = [frames.pop() for _ in range(min(len(frames), _AT_ONCE))]
            for pieces in pool.map(partial(_dealt, bucket_of=bucket_of), some):
                for bucket, piece in zip(buckets, pieces, strict=True):
                    bucket.append(piece)
        return pl.concat(pool.map(_joined, reversed(buckets)), rechunk=False)


def _cells(frame: pl.DataFrame) -> Cells:
    values = frame["value"].to_numpy() + 0.0  # which makes -0.0 of no other cell than 0.0
    return (values.view(np.uint64) >> np.uint64(48)).astype(np.uint16)


def _dealt(frame: pl.DataFrame, bucket_of: Buckets) -> list[pl.DataFrame]:
    """The rows of every bucket, in tables of their own."""
    bucket = bucket_of[_cells(frame)]
    order = np.argsort(bucket, kind="stable").astype(np.uint32)  # polars' own kind of places
    ends = np.cumsum(np.bincount(bucket, minlength=_BUCKETS))
    return [frame[rows] for rows in np.split(order, ends[:-1])]


def _joined(bucket: list[pl.DataFrame]) -> pl.DataFrame:
    rows = pl.concat(bucket, rechunk=True)
    bucket.clear()
    return rows[_descending(rows["value"].to_numpy())]


def _descending(values: Floats) -> Places:
    """The order of the values, the largest first and equal ones as they stand.

    Numbers are sorted several times as fast as orders are: so each number has its place in its last bits, and where
    that took a difference away the order itself is sorted.
    """
    count = len(values)
    if count == 0:
        return np.empty(0, dtype=np.uint32)
    low, high = float(values.min()), float(values.max())
    width = max(count - 1, 1).bit_length()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scaled = high - values
        scaled *= np.float64(2.0 ** (63 - width)) / np.float64(high - low)
    if np.isfinite(scaled.max()):
        keys = scaled.astype(np.uint64)
        keys <<= np.uint64(width)
        keys |= np.arange(count, dtype=np.uint64)
        keys.sort()
        keys &= np.uint64(2**width - 1)
        order = keys.astype(np.uint32)
        of = values[order]
        steps = of[:-1] > of[1:]
        if steps.all() or (steps | ((of[:-1] == of[1:]) & (order[:-1] < order[1:]))).all():
            return order
    return np.argsort(-values, kind="stable").astype(np.uint32)

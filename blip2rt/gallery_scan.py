"""Cosines of everything in a gallery with some queries, in one pass over its files and with bounded memory.

rows    [n, Q, E] float16 on disk ── widen ──> [n, Q, E] float32, block by block in a core's cache
queries [T, P, E] ── laid out ──> [E, T * P]
rows @ queries ──> [n, Q, T, P] ── largest over Q and P ──> cosines [n, T]
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .errors import InputError
from .gallery_store import GalleryStore
from .native.cosines import native_cosines

Array = np.ndarray[Any, Any]
Compare = Callable[[Array], Array]  # rows [n, Q, E] float16 -> the largest products [n, C] with C queries

BLOCKS = 16  # of a shard, which the cores share

BLOCK_VALUES = 1 << 17  # that a core widens to float32 at a time: they stay in its cache
# Multiplications of a matrix product up to which OpenBLAS stays on the thread that calls it. Its own threads would wait
# for each other beside those of a search, and burn ten times the processor time.
ONE_THREAD = 1 << 18
LEAST_ROWS = 32  # of a matrix product, where there are as many
BIAS = np.float32(2.0**112)  # between the exponents of float16 and float32


def nearest(store: GalleryStore, queries: Array, k: int, threads: int | None = None) -> tuple[Array, Array]:
    """Rows [T, k] and cosines [T, k] of what lies nearest to queries [T, P, E], best first; exact.

    Of equal cosines what was added first comes first. A shard is mapped at a time, so that the memory in use does not
    grow with the gallery. `threads`: cores to use; None: all.
    """
    alive = np.array([identifier is not None for identifier in store.ids])
    k = min(k, len(store.rows))
    best = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for first, found in cosines(store, queries, threads):
        living = np.flatnonzero(alive[first : first + len(found)])
        largest, places = top(found[living].T, k)
        best = np.concatenate((best, largest), axis=1)
        rows = np.concatenate((rows, first + living[places]), axis=1)
        best, places = top(best, k)
        rows = np.take_along_axis(rows, places, axis=1)
    return rows, best


def cosines(store: GalleryStore, queries: Array, threads: int | None = None) -> Iterator[tuple[int, Array]]:
    """First row and cosines [n, T] of every shard with queries [T, P, E], dead rows included."""
    num_queries, num_parts, width = queries.shape
    if store.header is None or width != store.header.itc[-1]:  # the native pass would read beyond the queries
        raise InputError(f"embeddings of width {width}, and {store.path} wants {store.header and store.header.itc[-1]}")
    compare = (native_cosines() or numpy_cosines)(queries.reshape(-1, width))
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for first, shard in store.shards("itc"):
            block = -(-len(shard) // BLOCKS)
            blocks = (shard[start : start + block] for start in range(0, len(shard), block))
            found = np.concatenate(list(pool.map(compare, blocks)))  # [n, T * P]
            yield first, found.reshape(-1, num_queries, num_parts).max(axis=2)


def numpy_cosines(queries: Array) -> Compare:
    """The twin of the native pass."""
    width = queries.shape[1]
    columns = laid_out(queries)  # [E, C]

    def compare(half: Array) -> Array:
        num_rows, per_row, _ = half.shape
        step = max(1, ONE_THREAD // (max(per_row, LEAST_ROWS) * width))  # queries a product
        block = max(1, BLOCK_VALUES // (per_row * width))  # rows
        found = np.empty((num_rows, len(queries)), np.float32)
        for row in range(0, num_rows, block):
            wide = widened(half[row : row + block])  # [n, Q, E]
            for start in range(0, len(queries), step):
                products = product(wide, columns[:, start : start + step])
                products.max(axis=1, out=found[row : row + block, start : start + step])
        return found

    return compare


def product(wide: Array, group: Array) -> Array:
    """[n, Q, E] @ [E, C], several rows at a time where Q is small; on this thread."""
    count, per_row, width = wide.shape
    rows = max(1, ONE_THREAD // (width * group.shape[1]) // per_row)
    if rows == 1:
        return wide @ group
    whole = count // rows * rows
    many = wide[:whole].reshape(whole // rows, rows * per_row, width) @ group
    return np.concatenate((many.reshape(whole, per_row, group.shape[1]), wide[whole:] @ group))


def widened(half: Array) -> Array:
    """float16 [..., E] as float32 that `laid_out` queries may be multiplied with; finite values.

    Of an even E, even places come first and then the odd ones, all 2 ** 112 times too small: so two halves are moved to
    where float32 has its sign, exponent and fraction without ever being taken apart, in a quarter of the time that
    numpy's conversion takes.
    """
    if half.shape[-1] % 2:
        return half.astype(np.float32)
    pairs = np.ascontiguousarray(half).view(np.int32)  # the even place in the lower bits
    bits = np.empty(half.shape, np.int32)
    even, odd = bits[..., : pairs.shape[-1]], bits[..., pairs.shape[-1] :]
    np.left_shift(pairs, 16, out=even)
    np.right_shift(even, 3, out=even)  # of an integer with a sign: the upper four bits are its copies
    np.right_shift(pairs, 3, out=odd)
    np.bitwise_and(bits, ~0x70001FFF, out=bits)  # of the sign one bit is to stay, of the other half none
    return bits.view(np.float32)


def laid_out(vectors: Array) -> Array:
    """float32 vectors [N, E] as columns [E, N] whose products with `widened` rows are what they should be."""
    if vectors.shape[-1] % 2:
        return vectors.T
    return np.concatenate((vectors[:, ::2], vectors[:, 1::2]), axis=1).T * BIAS


def top(scores: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row [T, n] and their places, best first; of equal ones the first."""
    if scores.shape[1] > k:
        least = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
        chosen = []
        for row, bound in zip(scores, least, strict=True):
            above = np.flatnonzero(row > bound)
            equal = np.flatnonzero(row == bound)[: k - len(above)]
            either = np.sort(np.concatenate((above, equal)))
            chosen.append(either[np.argsort(-row[either], kind="stable")])
        places = np.stack(chosen)
    else:
        places = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, places, axis=1), places

"""What the native kernels compute, in numpy and bit for bit, and how weights are laid out for them.

`quantized_matmul.h`, `cached_attention.h` and `quantized_attention.h` state the arithmetic and the layout; this is the
slow side of the tests that they agree.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP, TILE = 128, 16  # values of K that share a scale; outputs that lie together
LANES, HIDDEN = 8, np.float32(-1e30)  # rows of attention that go together; a mask that hides
ROWS_OF_SUM = 512  # of attention in 8 bits: more could overflow


def pack_weight(values: Array, bits: int) -> Array:
    """Rounded weights [N, K] int8 -> tiles [ceil(N/16), bytes of a tile] uint8."""
    num_tiles, depth = -(-values.shape[0] // TILE), -(-values.shape[1] // 8) * 8
    padded = np.full((num_tiles * TILE, depth), 1 << (bits - 1), np.uint8)
    padded[: values.shape[0], : values.shape[1]] = values + np.int16(1 << (bits - 1))
    quads = padded.reshape(num_tiles, TILE, depth // 4, 4).transpose(0, 2, 1, 3)  # [N/16, K/4, 16, 4]
    if bits == 4:
        quads = quads[:, 0::2] | quads[:, 1::2] << 4  # [N/16, K/8, 16, 4]
    return np.ascontiguousarray(quads).reshape(num_tiles, -1)


def unpack_weight(packed: Array, outputs: int, depth: int, bits: int) -> Array:
    """Tiles -> rounded weights [N, K] int8."""
    quads = packed.reshape(len(packed), -1, TILE, 4)
    if bits == 4:
        quads = np.stack((quads & 15, quads >> 4), axis=2).reshape(len(packed), -1, TILE, 4)  # [N/16, K/4, 16, 4]
    padded = quads.transpose(0, 2, 1, 3).reshape(len(packed) * TILE, -1)
    return (padded[:outputs, :depth] - np.int16(1 << (bits - 1))).astype(np.int8)


def pack_scales(scales: Array) -> Array:
    """Scales [N, G] float32, all bfloat16 numbers -> [ceil(N/16), G, 16] uint16."""
    padded = np.zeros((-(-len(scales) // TILE) * TILE, scales.shape[1]), np.float32)
    padded[: len(scales)] = scales
    halves = (padded.view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(halves.reshape(-1, TILE, scales.shape[1]).transpose(0, 2, 1))


def unpack_scales(packed: Array, outputs: int) -> Array:
    """[ceil(N/16), G, 16] uint16 -> [N, G] float32."""
    halves = packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:outputs]
    return (halves.astype(np.uint32) << 16).view(np.float32)


def round_rows(x: Array) -> tuple[Array, Array]:
    """Rows [M, K] float32 -> values [M, G, 128] int8 and scales [M, G] float32."""
    groups = -(-x.shape[1] // GROUP)
    padded = np.zeros((len(x), groups * GROUP), np.float32)
    padded[:, : x.shape[1]] = x
    values, scales = round_along(padded.reshape(len(x), groups, GROUP), 2)
    return values, scales[:, :, 0]


def round_along(x: Array, axis: int) -> tuple[Array, Array]:
    """float32 -> values int8, and scales of size 1 along the axis; NaN where there is one or an infinity."""
    largest = np.abs(x).max(axis=axis, keepdims=True)  # NaN where there is one
    usable = np.isfinite(largest) & (largest >= np.float32(1e-30))
    divisor = np.where(usable, largest, np.float32(1))
    scaled = np.where(usable, x, np.float32(0)) * (np.float32(127) / divisor)
    scales = np.where(usable, divisor / np.float32(127), np.where(np.isfinite(largest), 0, np.nan)).astype(np.float32)
    return np.rint(scaled).astype(np.int8), scales


def quantized_matmul(x: Array, packed: Array, scales: Array, bias: Array, bits: int, activation: str = "") -> Array:
    """x [M, K] float32 times packed weights [N, K], plus bias [N], through one of ACTIVATIONS: [M, N] float32."""
    outputs, depth = len(bias), x.shape[1]
    weight = unpack_weight(packed, outputs, depth, bits).astype(np.float64)  # products of integers stay exact
    weight_scales = unpack_scales(scales, outputs)
    values, row_scales = round_rows(x)
    total = np.zeros((len(x), outputs), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for g in range(values.shape[1]):
            columns = weight[:, g * GROUP : (g + 1) * GROUP]
            dot = values[:, g, : columns.shape[1]].astype(np.float64) @ columns.T
            total += dot.astype(np.float32) * (weight_scales[:, g] * row_scales[:, g, None])
        return ACTIVATIONS[activation](total + bias)


def cached_attention(
    scale: float, qkv: Array, past_key: Array, past_value: Array, mask: Array, write_indices: Array
) -> tuple[Array, Array, Array]:
    """New rows qkv [B, S, 3*H*d] written into caches [B, H, C, d] from write_indices [B] on, and attending to them.

    Args:
        mask: [B, 1 or H, S, C], added to the scores.

    Returns:
        Joined heads [B, S, H*d], and both caches.
    """
    batch, heads, capacity, width = past_key.shape
    rows = qkv.shape[1]
    query, new_key, new_value = qkv.reshape(batch, rows, 3, heads, width).transpose(2, 0, 3, 1, 4)  # [B, H, S, d]
    key, value = past_key.copy(), past_value.copy()
    for b, start in enumerate(write_indices):
        key[b, :, start : start + rows], value[b, :, start : start + rows] = new_key[b], new_value[b]
    mask = np.broadcast_to(mask, (batch, heads, rows, capacity))
    joined = np.zeros((batch, heads, rows, width), np.float32)
    for b, h, first in np.ndindex(batch, heads, -(-rows // LANES)):
        some = slice(first * LANES, (first + 1) * LANES)
        seen = np.flatnonzero((mask[b, h, some] > HIDDEN).any(axis=0))
        if len(seen):
            arrays = query[b, h, some], key[b, h, seen], value[b, h, seen], mask[b, h, some][:, seen]
            joined[b, h, some] = _attend(*arrays, np.float32(scale))
    return joined.transpose(0, 2, 1, 3).reshape(batch, rows, heads * width), key, value


def _attend(query: Array, key: Array, value: Array, mask: Array, scale: np.float32) -> Array:
    """[S, d], [C, d], [C, d], [S, C] -> [S, d], every sum in its order."""
    scores = np.zeros(mask.shape, np.float32)
    for k in range(query.shape[1]):
        scores += query[:, k, None] * key[:, k]
    scores = scores * scale + mask
    weights = exponential(scores - scores.max(axis=1, keepdims=True))
    total, joined = np.zeros(len(query), np.float32), np.zeros(query.shape, np.float32)
    for c in range(len(key)):
        total += weights[:, c]
        joined += weights[:, c, None] * value[c]
    return joined / total[:, None]


def quantized_attention(scale: float, heads: int, qkv: Array) -> Array:
    """Rows qkv [B, T, 3*H*d] that all attend to each other, in 8 bits: joined heads [B, T, H*d]."""
    batch, rows = qkv.shape[:2]
    query, key, value = qkv.reshape(batch, rows, 3, heads, -1).transpose(2, 0, 3, 1, 4)  # [B, H, T, d]
    joined = np.full(query.shape, np.nan, np.float32)
    for b, h in np.ndindex(batch, heads):
        with np.errstate(over="ignore", invalid="ignore"):
            found = _attend_quantized(query[b, h], key[b, h], value[b, h], np.float32(scale))
        if found is not None:
            joined[b, h] = found
    return joined.transpose(0, 2, 1, 3).reshape(batch, rows, -1)


def _attend_quantized(query: Array, key: Array, value: Array, scale: np.float32) -> Array | None:
    """[T, d] each -> [T, d]; None where a number is none or a score could overflow."""
    total = np.zeros(key.shape[1], np.float32)
    for row in key:
        total += row
    queries, query_scales = round_along(query, 1)
    keys, key_scales = round_along(key - total / np.float32(len(key)), 1)
    values, value_scales = round_along(value, 0)
    query_scales = query_scales * scale
    bounds = [np.add.accumulate(scales.ravel())[-1] for scales in (query_scales, key_scales, np.abs(value).max(axis=0))]
    if not (bounds[0] * bounds[1] * np.float32(127 * 127 * key.shape[1]) < 1e37 and bounds[2] < 1e37):
        return None
    dots = (queries.astype(np.int32) @ keys.T.astype(np.int32)).astype(np.float32)
    scores = dots * (key_scales.T * query_scales)
    weights = np.rint(exponential(scores - scores.max(axis=1, keepdims=True)) * np.float32(32767)).astype(np.int32)
    sums = np.zeros(query.shape, np.float32)
    for first in range(0, len(key), ROWS_OF_SUM):
        some = slice(first, first + ROWS_OF_SUM)
        sums += (weights[:, some] @ values[some].astype(np.int32)).astype(np.float32)
    inverse = np.float32(1) / weights.sum(axis=1, dtype=np.int32, keepdims=True).astype(np.float32)
    return sums * (value_scales * inverse)


def relu(x: Array) -> Array:
    """max(x, 0); NaN stays NaN."""
    return np.where(x < 0, np.float32(0), x)


def gelu(x: Array) -> Array:
    """x * P(X <= x) of a standard normal X, to 2e-6."""
    z = np.clip(x, np.float32(-5.2), np.float32(5.2))
    square = z * z
    above = square * np.float32(-1.6164160e-8) + np.float32(5.3742074e-6)
    for coefficient in (4.1179164e-4, 6.0806409e-3, 6.0276423e-2, 3.9894187e-1):
        above = above * square + np.float32(coefficient)
    below = square * np.float32(1.3832100e-4) + np.float32(3.2533603e-3)
    for coefficient in (4.3216560e-2, 3.1774831e-1, 1.0):
        below = below * square + np.float32(coefficient)
    part = np.clip(z * above / below, np.float32(-0.5), np.float32(0.5))
    return x * (part + np.float32(0.5))


ACTIVATIONS = {"": lambda x: x, "Relu": relu, "Gelu": gelu}  # by ONNX's names, in the order of their numbers


def exponential(x: Array) -> Array:
    """e^x for x <= 0 float32, to 2 units in the last place; below -87 as at -87."""
    shift = np.float32(12582912)
    x = np.where(x < np.float32(-87), np.float32(-87), x)
    power = (x * np.float32(1.44269504) + shift) - shift
    rest = (x - power * np.float32(0.693359375)) - power * np.float32(-2.12194440e-4)
    series = rest * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = series * rest + np.float32(coefficient)
    series = (series * (rest * rest) + rest) + np.float32(1)
    return np.ldexp(series, power.astype(np.int32))

"""What the native kernels compute, in numpy and bit for bit, and how weights are laid out for them.

`quantized_matmul.h` and `cached_attention.h` state the arithmetic and the layout; this is the slow side of the tests
that they agree.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP, TILE = 128, 16  # values of K that share a scale; outputs that lie together
LANES, HIDDEN = 8, np.float32(-1e30)  # rows of attention that go together; a mask that hides


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
    padded = padded.reshape(len(x), groups, GROUP)
    largest = np.abs(padded).max(axis=2)  # [M, G], NaN where there is one
    usable = np.isfinite(largest) & (largest >= np.float32(1e-30))
    divisor = np.where(usable, largest, np.float32(1))
    scaled = np.where(usable[:, :, None], padded, np.float32(0)) * (np.float32(127) / divisor)[:, :, None]
    scales = np.where(usable, divisor / np.float32(127), np.where(np.isfinite(largest), 0, np.nan)).astype(np.float32)
    return np.rint(scaled).astype(np.int8), scales


def quantized_matmul(x: Array, packed: Array, scales: Array, bias: Array, bits: int) -> Array:
    """x [M, K] float32 times packed weights [N, K], plus bias [N]: [M, N] float32."""
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
        return total + bias


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


def exponential(x: Array) -> Array:
    """e^x for x <= 0 float32, to 2 units in the last place; 0 below -87."""
    shift = np.float32(12582912)
    tiny = x < np.float32(-87)
    x = np.where(tiny, np.float32(0), x)
    power = (x * np.float32(1.44269504) + shift) - shift
    rest = (x - power * np.float32(0.693359375)) - power * np.float32(-2.12194440e-4)
    series = rest * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = series * rest + np.float32(coefficient)
    series = (series * (rest * rest) + rest) + np.float32(1)
    return np.where(tiny, np.float32(0), np.ldexp(series, power.astype(np.int32)))

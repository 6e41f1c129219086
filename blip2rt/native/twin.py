"""What the native kernels compute, in numpy and bit for bit, and how weights are laid out for them.

`quantized_matmul.h` states the arithmetic and the layout; this is the slow side of the test that they agree.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GROUP, TILE = 128, 16  # values of K that share a scale; outputs that lie together


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

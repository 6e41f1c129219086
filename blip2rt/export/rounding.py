"""Float weights -> 4- or 8-bit weights with a scale for every output and group of inputs. No data is needed.

Both are symmetric. 8 bits take the largest weight of a group as 127. 4 bits have 16 levels only, so several ranges are
tried, each improved once by least squares, and the one with the smallest squared error stays: a group's largest weight
may be clipped where that helps the others.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

# What a group's largest weight may become in 4 bits, tried in turn: beyond -8 it is clipped.
LARGEST = (7, -8, -8.5, -9.1, -9.8, -10.7)
NUMBERS_AT_ONCE = 2**18  # rounded together: they stay in the cache, which is three times as fast


def round_weight(weight: Tensor, bits: int, group: int) -> tuple[Array, Array]:
    """Round a weight [N, K] to multiples of a scale for each output and `group` inputs.

    Args:
        weight: float32.
        bits: 4 or 8.
        group: inputs that share a scale; the last group may be shorter.

    Returns:
        Values [N, K] int8 (-127..127, or -8..7) and scales [N, G] float32, all of them bfloat16 numbers.
    """
    outputs, depth = weight.shape
    groups = -(-depth // group)
    values = np.empty((outputs, depth), np.int8)
    scales = np.empty((outputs, groups), np.float32)
    rows_at_once = max(1, NUMBERS_AT_ONCE // depth)
    for start in range(0, outputs, rows_at_once):
        rows = weight[start : start + rows_at_once]
        padded = torch.nn.functional.pad(rows, (0, groups * group - depth)).unflatten(1, (groups, group))
        rounded, scale = (_round8 if bits == 8 else round4)(padded)
        values[start : start + len(rows)] = rounded.flatten(1)[:, :depth].to(torch.int8).numpy()
        scales[start : start + len(rows)] = scale.squeeze(2).numpy()
    return values, scales


def _round8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, G, group] -> values of the same shape and scales [N, G, 1]."""
    scale = _bfloat16(weight.abs().amax(2, keepdim=True) / 127)
    return divide(weight, scale).clamp_(-127, 127), scale


def round4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, G, group] -> values of the same shape and scales [N, G, 1], which may be negative."""
    largest = weight.gather(2, weight.abs().argmax(2, keepdim=True))
    best_error = torch.full_like(largest, torch.inf)
    best_values, best_scale = torch.zeros_like(weight), torch.zeros_like(largest)
    for level in LARGEST:
        values = divide(weight, largest / level).clamp_(-8, 7)
        squares = (values * values).sum(2, keepdim=True)
        scale = _bfloat16((weight * values).sum(2, keepdim=True) / squares.clamp_(min=1))
        values = divide(weight, scale).clamp_(-8, 7)
        error = (weight - values * scale).square_().sum(2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better, values, best_values)
    return best_values, best_scale


def divide(weight: Tensor, scale: Tensor) -> Tensor:
    """Rounded quotient; 0 where the scale is."""
    return torch.where(scale == 0, 0, weight / scale).round_()


def _bfloat16(scale: Tensor) -> Tensor:
    """The nearest bfloat16 numbers: half the bytes, and the rounding of the values makes up for it."""
    return scale.to(torch.bfloat16).float()

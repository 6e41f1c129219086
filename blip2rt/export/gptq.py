"""Weights in 4 bits by what they do to activations: an error of one input is made up for by the inputs after it.

Source: Frantar et al., GPTQ (arXiv 2210.17323); the ranges of groups are those of `rounding.py`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rounding import divide, round4

Array = np.ndarray[Any, Any]
DAMPING = (0.01, 0.1, 1.0)  # of the mean of the diagonal; more where the matrix is not positive without


def round_by_moments(weight: Tensor, moments: Tensor, group: int) -> tuple[Array, Array]:
    """Round a weight [N, K] to 4 bits so that its products with typical inputs change little.

    Args:
        weight: float32.
        moments: [K, K] mean of x x' over such inputs x.
        group: inputs that share a scale; the last group may be shorter.

    Returns:
        As `round_weight`: values [N, K] int8 (-8..7) and scales [N, G] float32, all of them bfloat16 numbers.
    """
    outputs, depth = weight.shape
    factor = _factor(moments)  # [K, K] upper
    left = weight.clone()
    values = np.empty((outputs, depth), np.int8)
    scales = []
    for start in range(0, depth, group):
        end = min(start + group, depth)
        part = left[:, start:end]  # [N, group], as the errors so far have left it
        scale = round4(part[:, None])[1][:, 0]  # [N, 1]
        errors = torch.empty_like(part)
        for i in range(end - start):
            column, row = part[:, i : i + 1], factor[start + i, start:end]
            rounded = divide(column, scale).clamp_(-8, 7)
            values[:, start + i] = rounded[:, 0].to(torch.int8).numpy()
            errors[:, i : i + 1] = (column - rounded * scale) / row[i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * row[i + 1 :]
        left[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
    return values, torch.cat(scales, 1).numpy()


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, damped until there is one."""
    mean = moments.diagonal().mean().clamp(min=1e-12)
    for damping in DAMPING:
        damped = moments.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return factor
    return torch.eye(len(moments))  # no input tells anything: each weight is rounded by itself

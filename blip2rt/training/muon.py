"""Muon: momentum, made orthogonal, for the matrices of blocks.

Steps as torch.optim.Muon takes them, but for two things that decide the time on a CPU: the Newton-Schulz iteration
runs in bfloat16 only where the training does, and each process of several makes its share of the matrices orthogonal
instead of all of them.

Source: Jordan et al., Muon (https://kellerjordan.github.io/posts/muon); Liu et al., Muon is Scalable for LLM Training.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .sharding import full, spread

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(Optimizer):
    """Nesterov momentum of each matrix, its singular values brought near 1, scaled to the size of AdamW's steps.

    Args:
        params: Matrices, or groups of them (`params`, `lr`, `weight_decay`); in the same order in every process, with
            the same gradients.
        dtype: that matrices are made orthogonal in.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all matrices that have a gradient."""
        learning = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        directions = []
        for parameter, group in learning:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"]
            average.lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(full(parameter.grad.lerp(average, group["momentum"])))
        for (parameter, group), direction in zip(learning, shared_orthogonal(directions, self._dtype), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(spread(direction, parameter), alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def shared_orthogonal(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonal` of each; every process computes a share of them, and all get all."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1 or not matrices:
        return [orthogonal(matrix, dtype) for matrix in matrices]
    rank, work = dist.get_rank(), [0] * processes
    result = matrices[0].new_zeros(sum(matrix.numel() for matrix in matrices))
    shares = result.split([matrix.numel() for matrix in matrices])
    for matrix, share in sorted(zip(matrices, shares, strict=True), key=lambda pair: -_work(pair[0])):
        owner = work.index(min(work))
        work[owner] += _work(matrix)
        if owner == rank:
            share.copy_(orthogonal(matrix, dtype).flatten())
    dist.all_reduce(result)  # a sum with zeros: the owner's bits
    return [share.view_as(matrix) for matrix, share in zip(matrices, shares, strict=True)]


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Near U V' of the matrix's U S V', computed in `dtype`: singular values come to between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrix.dtype)


def _work(matrix: Tensor) -> int:
    """Multiplications of an iteration, to within a factor."""
    short, long = sorted(matrix.shape)
    return short * short * (2 * long + short)

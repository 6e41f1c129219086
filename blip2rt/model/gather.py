"""Batches that several processes hold a part of each, as one. Without a process group there is one part."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_row(rows: int) -> int:
    """Where this process's rows begin in what is gathered: every process has as many."""
    return rows * dist.get_rank() if num_processes() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """[B, ...] of every process -> [W*B, ...], in order of their ranks; no gradient flows back."""
    if num_processes() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(num_processes())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """The same; a row's gradient is the sum of those that all processes have for it."""
    if num_processes() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.rows = len(x)  # type: ignore[attr-defined]
        return gather(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        rows: int = ctx.rows  # type: ignore[attr-defined]
        return total.narrow(0, first_row(rows), rows)

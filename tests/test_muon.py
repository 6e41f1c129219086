"""Muon: against torch's own, and in two processes as in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from two_processes import in_two_processes

from blip2rt.training.muon import Muon, orthogonal

SIZES = st.integers(1, 24)
SHAPES = [(8, 8), (8, 20), (30, 8), (1, 5), (16, 16)]


def trained(steps: int = 4, kind: Callable[..., torch.optim.Optimizer] = Muon, **options: Any) -> list[Tensor]:
    """Matrices after some steps, the third one without a gradient in the first."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [
        {"params": matrices[:2], "weight_decay": 0.3},
        {"params": matrices[2:], "weight_decay": 0.0, "lr": 0.003},
    ]
    optimizer = kind(groups, lr=0.02, **options)
    for step in range(steps):
        for i, matrix in enumerate(matrices):
            gradient = torch.randn(matrix.shape, generator=generator)
            matrix.grad = None if (step, i) == (0, 2) else gradient
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_steps_are_those_of_torch() -> None:
    """It rounds to bfloat16 in the iteration; this one only where the training does."""
    expected = trained(kind=torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    for ours, theirs, start in zip(trained(), expected, trained(steps=0), strict=True):
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


@settings(deadline=None)
@given(rows=SIZES, columns=SIZES, scale=st.sampled_from([1e-3, 1.0, 1e6]), seed=st.integers(0, 99))
def test_directions_keep_singular_vectors(rows: int, columns: int, scale: float, seed: int) -> None:
    """The float64 twin: every singular value through the polynomial five times, its vectors untouched."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s) @ v
    assert (orthogonal(matrix, torch.float32) - expected).abs().max() < 1e-3
    assert (orthogonal(matrix, torch.bfloat16) - expected).norm() < 0.2 * expected.norm()


def trained_together(rank: int) -> list[Tensor]:
    """What each of two processes ends with."""
    return trained()


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """Each has half of the matrices to make orthogonal, and both end with the bits of one alone."""
    expected = trained()
    for found in in_two_processes(__file__, "trained_together", tmp_path):
        assert all(torch.equal(ours, alone) for ours, alone in zip(found, expected, strict=True))

"""Which parameters learn how fast: groups, the optimisers over them, and the learning rate of every step."""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from .muon import Muon
from .recipe import OptimizerRecipe
from .sharding import full

BLOCK = re.compile(r"vision\.blocks\.(\d+)\.")


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], recipe: OptimizerRecipe, precision: str = "fp32"
) -> list[Optimizer]:
    """Optimisers over the parameters that learn; `precision` is that of the training.

    Vectors (biases, norms) do not decay. Muon takes the matrices of blocks, AdamW all else: embeddings, heads,
    convolutions. Each group's `scale` times the step's rate is its learning rate.
    """
    learning = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    depth = 1 + max((int(found[1]) for name, _ in learning if (found := BLOCK.search(name))), default=0)
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in learning:
        is_matrix = recipe.name == "muon" and parameter.ndim == 2 and ".blocks." in name
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        scale = recipe.vision_layer_decay ** _layers_above(name, depth)
        groups.setdefault((is_matrix, decay, scale), []).append(parameter)
    muon, adamw = (
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (is_matrix, decay, scale), parameters in groups.items()
            if is_matrix == kind
        ]
        for kind in (True, False)
    )
    optimizers: list[Optimizer] = []
    if adamw:
        optimizers.append(AdamW(adamw, lr=recipe.learning_rate, betas=(recipe.betas[0], recipe.betas[1])))
    if muon:  # rates of AdamW fit it
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        optimizers.append(Muon(muon, lr=recipe.learning_rate, dtype=dtype))
    return optimizers


def _layers_above(name: str, depth: int) -> int:
    """Blocks of the image encoder between a parameter and the encoder's end."""
    if not name.startswith("vision.") or name.startswith("vision.norm."):
        return 0
    found = BLOCK.search(name)
    return depth - 1 - int(found[1]) if found else depth


def learning_rate(step: int, steps: int, recipe: OptimizerRecipe) -> float:
    """The rate of a step, counted from 0: a linear warm-up from near zero, then half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    span = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Give every group the step's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale gradients down to a norm of `largest` (0: leave them); the norm they had, all slices together."""
    spread_ones: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        (spread_ones if isinstance(parameter, DTensor) else whole).append(parameter)
    kinds = [kind for kind in (spread_ones, whole) if kind]  # torch measures no mixture of them
    norms = [full(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest or math.inf, norm)
    return float(norm)

"""Low-rank adapters beside the linear layers of a frozen language model (Hu et al., 2021)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BASE = ".base"  # where a layer that has an adapter keeps its own weights


class LoRALinear(nn.Module):
    """`base`, which is frozen, plus scale * up(down(x)); up begins at zero, so nothing changes at first."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        down = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)

    def merged(self) -> Tensor:
        """The weight of the one linear layer that computes the same."""
        return self.base.weight + self.scale * (self.up @ self.down)


def add_adapters(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Put an adapter beside every linear layer in the blocks of `model`'s encoder and decoder of language."""
    generator = torch.Generator().manual_seed(seed)
    for prefix in ("encoder", "decoder"):
        part = getattr(model, prefix, None)
        if part is None:
            continue
        part.requires_grad_(False)
        for name, linear in list(part.named_modules()):
            if isinstance(linear, nn.Linear) and name.startswith("blocks."):
                owner, _, child = name.rpartition(".")
                setattr(part.get_submodule(owner), child, LoRALinear(linear, rank, alpha, generator))


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values as if there were no adapters."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if owner in adapted:
            continue  # up and down
        layer = adapted.get(owner.removesuffix(BASE))
        if layer is None or not owner.endswith(BASE):
            yield name, parameter
        else:
            is_weight = name.endswith(".weight")
            yield name.replace(f"{BASE}.", "."), layer.merged() if is_weight else parameter

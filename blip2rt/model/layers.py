"""What the three transformers share: attention over heads and the activation table."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def activation(name: str) -> nn.Module:
    """The activation that a transformers configuration calls `name` (see `config.ACTIVATIONS`)."""
    return {
        "gelu": nn.GELU(),
        "gelu_new": nn.GELU(approximate="tanh"),
        "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": QuickGELU(),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
    }[name]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), CLIP's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, D] -> [B, H, S, d]"""
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of heads [B, H, S, d] over [B, H, C, d], joined to [B, S, D]; `mask` [B, 1, S, C] is added."""
    joined = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return joined.transpose(1, 2).flatten(2)

"""What the transformers share: attention over heads, the cache in place, and the activation table."""

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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of heads [B, H, S, d] over [B, H, C, d], joined to [B, S, H*d].

    `mask` [B, 1 or H, S, C] is added to the scores; `scale` multiplies them, None: 1 / sqrt(d); of the weights a
    share `dropout` is left out.
    """
    joined = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return joined.transpose(1, 2).flatten(2)


def _row_index(rows: Tensor, write_indices: Tensor) -> Tensor:
    """Rows of the cache that rows [B, H, S, d] go to, in their shape."""
    index = write_indices[:, None] + torch.arange(rows.shape[2], device=rows.device)  # [B, S]
    return index[:, None, :, None].expand_as(rows)


@torch.library.custom_op("blip2rt::write_cache", mutates_args=())
def write_cache(cache: Tensor, rows: Tensor, write_indices: Tensor) -> Tensor:
    """Cache [B, H, C, d] with rows [B, H, S, d] written from row write_indices[b] on; ONNX calls it TensorScatter."""
    return cache.scatter(2, _row_index(rows, write_indices), rows)


@write_cache.register_fake
def _(cache: Tensor, rows: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(cache)


class CacheInPlace:
    """A cache [B, H, C, d] that an executor owns: new rows are written into it, and nothing else is copied."""

    def __init__(self, cache: Tensor):
        self._cache = cache

    def write(self, rows: Tensor, write_indices: Tensor) -> Tensor:
        """The cache, with rows [B, H, S, d] from row write_indices[b] on."""
        return self._cache.scatter_(2, _row_index(rows, write_indices), rows)


Past = Tensor | CacheInPlace | None


def with_past(past: Past, rows: Tensor, write_indices: Tensor) -> Tensor:
    """The cache [B, H, C, d] that new rows [B, H, S, d] attend to: `past` with them written into it.

    Without a past (training sees whole texts) the rows are all there is.
    """
    if past is None:
        return rows
    return past.write(rows, write_indices) if isinstance(past, CacheInPlace) else write_cache(past, rows, write_indices)


def embed_rows(token: nn.Embedding, prefix: Tensor, input_ids: Tensor) -> Tensor:
    """Rows of `prefix` [B, S, D] where the id [B, S] is negative (the picture), token embeddings elsewhere."""
    return torch.where(input_ids[:, :, None] < 0, prefix, token(input_ids.clamp(min=0)))


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows [B, R] of x [B, S, D] that want logits: [B, R, D]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))

"""T5: the encoder reads picture and prompt once; the decoder generates over a cache in place (Raffel et al., 2020).

Keys and values of the decoder's cross-attention depend on the picture and the prompt alone. The encoder stage ends with
them, so the decoder neither computes them again in a step nor holds them once for every beam.

Relative positions come from depths: how deep a row lies in its beam's text. So the rows of several beams can stand in
one cache in any order, and rows that move keep their meaning (`stages.py`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import T5Config
from .layers import Past, activation, attend, embed_rows, pick_rows, split_heads, with_past


@torch.library.custom_op("blip2rt::relative_bucket", mutates_args=())
def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Bucket of each distance (key position - query position, int64): one for each short one, then logarithmic ones.

    The exporter makes a table of it: a logarithm that another library rounds otherwise would move a boundary.
    """
    buckets = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        buckets += (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    # in float32 and in this order, because transformers rounds so
    fraction = torch.log(distance.float() / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (fraction * (num_buckets - num_exact)).to(torch.int64)
    return buckets + torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))


@relative_bucket.register_fake
def _(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    return torch.empty_like(distance)


class RelativeBias(nn.Module):
    """What distance adds to attention scores, the same in every block."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.bidirectional = bidirectional
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.bucket = nn.Embedding(self.num_buckets, config.num_heads)

    def forward(self, positions: Tensor, cached_positions: Tensor, mask: Tensor) -> Tensor:
        """Positions of queries [B, S] and keys [B, C], mask [B, 1, S or 1, C]: what is added to scores [B, H, S, C]."""
        distance = cached_positions[:, None, :] - positions[:, :, None]  # [B, S, C]
        buckets = relative_bucket(distance, self.num_buckets, self.max_distance, self.bidirectional)
        return self.bucket(buckets).permute(0, 3, 1, 2) + mask


class RMSNorm(nn.Module):
    """x over its root mean square; no mean is subtracted and there is no bias."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """Feed-forward layer, gated or not: pre-norm, with its residual."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.norm = RMSNorm(config)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False) if config.is_gated_act else None
        self.fc1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.activation = activation(config.dense_act_fn)
        self.fc2 = nn.Linear(config.d_ff, config.d_model, bias=False)  # overflows in fp16: keep it fp32 there

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        hidden = self.activation(self.fc1(y)) if self.gate is None else self.activation(self.gate(y)) * self.fc1(y)
        return x + self.fc2(hidden)


class T5EncoderBlock(nn.Module):
    """Self-attention over all rows, feed-forward."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.norm = RMSNorm(config)
        self.qkv = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, config.d_model, bias=False)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return self.ffn(x + self.proj(attend(query, key, value, bias, scale=1.0)))


class T5EncoderEmbedding(nn.Module):
    """Rows of the picture where the id is negative, token embeddings elsewhere: -> [B, E, D]."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, prefix: Tensor, input_ids: Tensor) -> Tensor:
        return embed_rows(self.token, prefix, input_ids)


class CrossKeyValue(nn.Module):
    """Keys and values [B, H, E, d] that one block of the decoder looks at."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.kv = nn.Linear(config.d_model, 2 * config.num_heads * config.d_kv, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        return key.contiguous(), value.contiguous()


class T5Encoder(nn.Module):
    """The encoder stage: prefix, input_ids [B, E], encoder_mask [B, 1, 1, E] -> keys and values for the decoder."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.embedding = T5EncoderEmbedding(config)
        self.relative_bias = RelativeBias(config, bidirectional=True)
        self.blocks = nn.ModuleList(T5EncoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config)
        self.cross = nn.ModuleList(CrossKeyValue(config) for _ in range(config.num_decoder_layers))

    def forward(self, prefix: Tensor, input_ids: Tensor, positions: Tensor, encoder_mask: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(prefix, input_ids)
        bias = self.relative_bias(positions, positions, encoder_mask)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        return tuple(tensor for cross in self.cross for tensor in cross(x))


class T5DecoderBlock(nn.Module):
    """Self-attention over a cache of keys and values, cross-attention to the encoder's, feed-forward."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.norm1 = RMSNorm(config)
        self.qkv = nn.Linear(config.d_model, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, config.d_model, bias=False)
        self.norm2 = RMSNorm(config)
        self.cross_query = nn.Linear(config.d_model, inner, bias=False)
        self.cross_proj = nn.Linear(inner, config.d_model, bias=False)
        self.ffn = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        write_indices: Tensor,
        encoder_mask: Tensor,
        past_key: Past,
        past_value: Past,
        cross_key: Tensor,
        cross_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        present_key = with_past(past_key, key, write_indices)
        present_value = with_past(past_value, value, write_indices)
        x = x + self.proj(attend(query, present_key, present_value, bias, scale=1.0))
        query = split_heads(self.cross_query(self.norm2(x)), self.num_heads)
        x = x + self.cross_proj(attend(query, cross_key, cross_value, encoder_mask, scale=1.0))
        return self.ffn(x), present_key, present_value


class T5DecoderEmbedding(nn.Module):
    """Token embeddings: [B, S] -> [B, S, D]."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token(input_ids)


class T5Head(nn.Module):
    """Logits [B, R, V] of the R rows that want them; a tied head scales, as the first T5 was trained."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.norm = RMSNorm(config)
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, x: Tensor, logit_rows: Tensor, token_embedding: Tensor) -> Tensor:
        x = self.norm(pick_rows(x, logit_rows))
        x = x if self.scale == 1.0 else x * self.scale
        weight = token_embedding if self.lm_head is None else self.lm_head.weight
        # two axes, so that the export can multiply by the transposed embedding as it lies in the file
        return F.linear(x.flatten(0, 1), weight).unflatten(0, logit_rows.shape)


class T5Decoder(nn.Module):
    """The decoder stage. `caches`: past keys and values of every block, then the encoder's for every block.

    A past of None: the new rows are the whole text.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.embedding = T5DecoderEmbedding(config)
        self.relative_bias = RelativeBias(config, bidirectional=False)
        self.blocks = nn.ModuleList(T5DecoderBlock(config) for _ in range(config.num_decoder_layers))
        self.head = T5Head(config)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cached_positions: Tensor,
        write_indices: Tensor,
        mask: Tensor,
        encoder_mask: Tensor,
        logit_rows: Tensor,
        *caches: Past,
    ) -> tuple[Tensor, ...]:
        x = self.embedding(input_ids)
        bias = self.relative_bias(positions, cached_positions, mask)
        past, cross = caches[: len(caches) // 2], caches[len(caches) // 2 :]
        present: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            own = slice(2 * i, 2 * i + 2)
            x, key, value = block(x, bias, write_indices, encoder_mask, *past[own], *cross[own])
            present += key, value
        return self.head(x, logit_rows, self.embedding.token.weight), *present

"""Q-Former: image_embeds [B, N+1, Dv] -> query_embeds [B, Q, Dq], prefix [B, Q, D] for the language model."""

import torch
from torch import Tensor, nn

from .config import QFormerConfig
from .layers import activation, attend, split_heads


class SelfAttention(nn.Module):
    """BERT's self-attention: post-norm, with its residual."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.norm(x + self.proj(attend(query, key, value)))


class CrossAttention(nn.Module):
    """The queries look at the picture."""

    def __init__(self, config: QFormerConfig, vision_width: int):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.kv = nn.Linear(vision_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        query = split_heads(self.query(x), self.num_heads)  # [B, H, Q, d]
        key, value = (split_heads(part, self.num_heads) for part in self.kv(image_embeds).chunk(2, dim=-1))
        return self.norm(x + self.proj(attend(query, key, value)))


class FeedForward(nn.Module):
    """BERT's feed-forward layer: post-norm, with its residual."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fc2(self.activation(self.fc1(x))))


class QFormerBlock(nn.Module):
    """Self-attention, cross-attention in every `cross_attention_frequency`-th block, feed-forward."""

    def __init__(self, config: QFormerConfig, vision_width: int, index: int):
        super().__init__()
        self.self_attention = SelfAttention(config)
        has_cross_attention = index % config.cross_attention_frequency == 0
        self.cross_attention = CrossAttention(config, vision_width) if has_cross_attention else None
        self.query_ffn = FeedForward(config)

    def forward(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        x = self.self_attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, image_embeds)
        return self.query_ffn(x)


class QueryEmbedding(nn.Module):
    """The learned queries, the same for every picture: [B, N+1, Dv] -> [B, Q, Dq]."""

    def __init__(self, config: QFormerConfig, num_queries: int):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.norm(self.query_tokens).expand(image_embeds.shape[0], -1, -1)


class QFormer(nn.Module):
    """The qformer stage: query tokens, blocks, and the projection to the language model's width."""

    def __init__(self, config: QFormerConfig, vision_width: int, num_queries: int, language_width: int):
        super().__init__()
        self.embedding = QueryEmbedding(config, num_queries)
        self.blocks = nn.ModuleList(QFormerBlock(config, vision_width, i) for i in range(config.num_hidden_layers))
        self.projection = nn.Linear(config.hidden_size, language_width)

    def forward(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(image_embeds)
        for block in self.blocks:
            x = block(x, image_embeds)
        return x, self.projection(x)

"""Q-Former: image_embeds [B, N+1, Dv] -> query_embeds [B, Q, Dq], prefix [B, Q, D] for the language model.

Its rows x are the Q queries, L tokens of a text behind them, or, without a picture, the text alone. All rows attend to
each other as far as the mask lets them, only the queries look at the picture, and queries and text have feed-forward
layers of their own (BLIP-2 paper, figure 2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import QFormerConfig
from .layers import activation, attend, split_heads


class SelfAttention(nn.Module):
    """BERT's self-attention: post-norm, with its residual."""

    dropout = 0.0  # of attention weights: what a training sets

    def __init__(self, config: QFormerConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if mask is not None:
            rows = x.shape[1]
            mask = F.pad(mask, (rows - mask.shape[3], 0)).expand(-1, -1, rows, -1)  # [B, 1, Q+L, Q+L]
        return self.norm(x + self.proj(attend(query, key, value, mask, dropout=self.dropout)))


class CrossAttention(nn.Module):
    """The queries look at the picture."""

    dropout = 0.0

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
        return self.norm(x + self.proj(attend(query, key, value, dropout=self.dropout)))


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

    def __init__(self, config: QFormerConfig, vision_width: int, num_queries: int, index: int):
        super().__init__()
        self.num_queries = num_queries
        self.self_attention = SelfAttention(config)
        has_cross_attention = index % config.cross_attention_frequency == 0
        self.cross_attention = CrossAttention(config, vision_width) if has_cross_attention else None
        self.query_ffn = FeedForward(config)
        self.text_ffn = FeedForward(config) if config.use_qformer_text_input else None

    def forward(self, x: Tensor, image_embeds: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Rows [B, Q+L, Dq] -> the same.

        Args:
            x: queries, then text; without a picture, text alone.
            image_embeds: [B, N+1, Dv], or None where there are no queries.
            mask: added to the attention to the text, [B, 1, 1, L] for all rows alike (the queries are always seen); or
                to all of it, [B, 1, Q+L, Q+L].
        """
        x = self.self_attention(x, mask)
        if image_embeds is None:
            return self._text_ffn(x)
        queries = x[:, : self.num_queries]
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, image_embeds)
        queries = self.query_ffn(queries)
        if x.shape[1] == self.num_queries:
            return queries
        return torch.cat((queries, self._text_ffn(x[:, self.num_queries :])), dim=1)

    def _text_ffn(self, text: Tensor) -> Tensor:
        assert self.text_ffn is not None, "this Q-Former was built without its text branch"
        return self.text_ffn(text)


class QFormerEmbedding(nn.Module):
    """The learned queries, the same for every picture, and the tokens of the text at their positions."""

    def __init__(self, config: QFormerConfig, num_queries: int):
        super().__init__()
        width = config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, width))
        if config.use_qformer_text_input:
            self.token = nn.Embedding(config.vocab_size, width)
            self.position = nn.Embedding(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, image_embeds: Tensor | None = None, text_ids: Tensor | None = None) -> Tensor:
        """[B, N+1, Dv], [B, L] -> [B, Q+L, Dq]; what is None has no rows."""
        rows = []
        if image_embeds is not None:
            rows.append(self.norm(self.query_tokens).expand(image_embeds.shape[0], -1, -1))  # [B, Q, Dq]
        if text_ids is not None:
            rows.append(self.norm(self.token(text_ids) + self.position.weight[: text_ids.shape[1]]))  # [B, L, Dq]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def qformer_blocks(config: QFormerConfig, vision_width: int, num_queries: int) -> nn.ModuleList:
    """All blocks of a Q-Former."""
    return nn.ModuleList(QFormerBlock(config, vision_width, num_queries, i) for i in range(config.num_hidden_layers))


class Queries(nn.Module):
    """Queries and text [B, Q+L, Dq] -> the queries [B, Q, Dq]."""

    def __init__(self, num_queries: int):
        super().__init__()
        self.num_queries = num_queries

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.num_queries]


class QFormer(nn.Module):
    """The qformer stage: query tokens, blocks, and the projection to the language model's width."""

    def __init__(self, config: QFormerConfig, vision_width: int, num_queries: int, language_width: int):
        super().__init__()
        self.embedding = QFormerEmbedding(config, num_queries)
        self.blocks = qformer_blocks(config, vision_width, num_queries)
        self.queries = Queries(num_queries)
        self.projection = nn.Linear(config.hidden_size, language_width)

    def forward(
        self, image_embeds: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the queries saw; with `text_ids` [B, L] and `text_mask` [B, 1, 1, L], in the light of a question."""
        x = self.embedding(image_embeds, text_ids)
        for block in self.blocks:
            x = block(x, image_embeds, text_mask)
        queries = self.queries(x)
        return queries, self.projection(queries)

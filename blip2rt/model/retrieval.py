"""BLIP-2 of stage 1, before it meets a language model: images and texts in one space, and whether they match.

The Q-Former is one set of weights with three ways through it. Each way is a stage, so the three share their modules:
image_embeds -> qformer, text -> text, both -> itm. `SHARED` says under which name a shared parameter is stored.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..stages import MASKED
from .config import QFormerConfig, RetrievalConfig
from .layers import activation
from .qformer import QFormerEmbedding, qformer_blocks
from .vision import VisionEncoder

SHARED = {f"{stage}.{part}.": f"qformer.{part}." for stage in ("text", "itm") for part in ("embedding", "blocks")}


def stored_name(parameter: str) -> str:
    """The name under which a parameter is stored: that of the first stage that shares it."""
    for prefix, owner in SHARED.items():
        if parameter.startswith(prefix):
            return owner + parameter.removeprefix(prefix)
    return parameter


class ITCProjection(nn.Linear):
    """Rows [..., Dq] -> unit vectors [..., E]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


class TextProjection(ITCProjection):
    """A text [B, L, Dq] -> the unit vector [B, E] of its first token, [CLS]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0])


class MatchHead(nn.Linear):
    """Queries and text [B, Q+L, Dq] -> the queries [B, Q, Dq] and their logits [B, Q, 2]: no match, match."""

    def __init__(self, width: int, num_queries: int):
        super().__init__(width, 2)
        self.num_queries = num_queries

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        queries = x[:, : self.num_queries]
        return queries, super().forward(queries)


class CaptionHead(nn.Module):
    """BERT's language model head over the token embedding: [B, L, Dq] -> logits [B, L, V]."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, token_embedding: Tensor) -> Tensor:
        return F.linear(self.norm(self.activation(self.dense(x))), token_embedding, self.bias)


class ImageStage(nn.Module):
    """The qformer stage: [B, N+1, Dv] -> query_embeds [B, Q, Dq], itc_embeds [B, Q, E]."""

    def __init__(self, config: RetrievalConfig):
        super().__init__()
        self.embedding = QFormerEmbedding(config.qformer, config.num_query_tokens)
        self.blocks = qformer_blocks(config.qformer, config.vision.hidden_size, config.num_query_tokens)
        self.itc = ITCProjection(config.qformer.hidden_size, config.image_text_hidden_size)

    def forward(self, image_embeds: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(image_embeds)
        for block in self.blocks:
            x = block(x, image_embeds)
        return x, self.itc(x)


class TextStage(nn.Module):
    """The text stage: ids [B, L], mask [B, 1, 1, L] -> text_embeds [B, L, Dq], itc_embeds [B, E]."""

    def __init__(self, config: RetrievalConfig, owner: ImageStage):
        super().__init__()
        self.embedding, self.blocks = owner.embedding, owner.blocks
        self.itc = TextProjection(config.qformer.hidden_size, config.image_text_hidden_size)

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(None, text_ids)
        for block in self.blocks:
            x = block(x, None, text_mask)
        return x, self.itc(x)


class MatchStage(nn.Module):
    """The itm stage: image_embeds and a text for each -> multimodal_embeds [B, Q, Dq], itm_logits [B, Q, 2].

    A pair's logit is the mean over the queries. That is left to the caller: ONNX Runtime's mean has other last bits for
    one pair than for several.
    """

    def __init__(self, config: RetrievalConfig, owner: ImageStage):
        super().__init__()
        self.embedding, self.blocks = owner.embedding, owner.blocks
        self.head = MatchHead(config.qformer.hidden_size, config.num_query_tokens)

    def forward(self, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.rows(image_embeds, text_ids, text_mask))

    def rows(self, image_embeds: Tensor, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Queries and text after the last block, [B, Q+L, Dq]; `mask` as `QFormerBlock` takes it."""
        x = self.embedding(image_embeds, text_ids)
        for block in self.blocks:
            x = block(x, image_embeds, mask)
        return x


class Blip2Retrieval(nn.Module):
    """Reference model. Each child but the training parts is one engine: same name, inputs and outputs (`stages.py`)."""

    def __init__(self, config: RetrievalConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.qformer = ImageStage(config)
        self.text = TextStage(config, self.qformer)
        self.itm = MatchStage(config, self.qformer)
        # what only training and caption generation need, and only LAVIS's and mmpretrain's files hold
        self.temperature = nn.Parameter(torch.tensor(0.07)) if config.has_training_parts else None
        self.itg = CaptionHead(config.qformer) if config.has_training_parts else None

    def itg_logits(self, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits [B, L, V] of the next token of a text that starts with [DEC] (BLIP-2 paper, section 3.2).

        Args:
            image_embeds: [B, N+1, Dv].
            text_ids: [B, L].
            text_mask: [B, 1, 1, L], `MASKED` where a text is padded.
        """
        assert self.itg is not None, "this model was built without its training parts"
        mask = multimodal_causal_mask(text_mask, self.config.num_query_tokens)
        rows = self.itm.rows(image_embeds, text_ids, mask)
        return self.itg(rows[:, self.config.num_query_tokens :], self.qformer.embedding.token.weight)


def multimodal_causal_mask(text_mask: Tensor, num_queries: int) -> Tensor:
    """[B, 1, 1, L] -> [B, 1, Q+L, Q+L]: queries see queries, a token sees the queries, itself and tokens before it."""
    length = text_mask.shape[3]
    rows = torch.arange(num_queries + length, device=text_mask.device)
    last_seen = rows.clamp(min=num_queries - 1)
    hidden = rows > last_seen[:, None]  # [Q+L, Q+L]
    mask = F.pad(text_mask, (num_queries, 0)).expand(-1, -1, num_queries + length, -1)
    return mask.masked_fill(hidden, MASKED)

"""OPT over a cache in place: S new rows [B, S, D] and the rows cached so far -> logits [B, R, V].

The same forward prefills (S = query slots and prompt) and steps (S = one row a beam). Which rows are new, where they
are written, what each may see and which want logits are inputs: so beams can be branches of one tree (`stages.py`).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .config import OPTConfig
from .layers import Past, activation, attend, embed_rows, pick_rows, split_heads, with_past

POSITION_OFFSET = 2  # OPT's position table starts two rows late, an inheritance of its padding index


class OPTBlock(nn.Module):
    """Pre-norm transformer block over a cache of keys and values [B, H, C, d]."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        width, bias = config.hidden_size, config.enable_bias
        affine = config.layer_norm_elementwise_affine
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = nn.Linear(width, config.ffn_dim, bias=bias)
        self.activation = activation(config.activation_function)
        self.fc2 = nn.Linear(config.ffn_dim, width, bias=bias)

    def forward(
        self, x: Tensor, write_indices: Tensor, mask: Tensor, past_key: Past, past_value: Past
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        present_key = with_past(past_key, key, write_indices)
        present_value = with_past(past_value, value, write_indices)
        x = x + self.proj(attend(query, present_key, present_value, mask))
        x = x + self.fc2(self.activation(self.fc1(self.norm2(x))))
        return x, present_key, present_value


class OPTEmbedding(nn.Module):
    """Rows of the picture where the id is negative, token embeddings elsewhere, and positions: -> [B, S, D]."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)

    def forward(self, prefix: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        return embed_rows(self.token, prefix, input_ids) + self.position(positions + POSITION_OFFSET)


class OPTHead(nn.Module):
    """Logits [B, R, V] of the R rows that want them; the weight is the token embedding's where they are tied."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.norm = (
            nn.Identity()
            if config._remove_final_layer_norm
            else nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)
        )
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(self, x: Tensor, logit_rows: Tensor, token_embedding: Tensor) -> Tensor:
        x = pick_rows(x, logit_rows)
        weight = token_embedding if self.lm_head is None else self.lm_head.weight
        # two axes, so that the export can multiply by the transposed embedding as it lies in the file
        logits = F.linear(self.norm(x).flatten(0, 1), weight)  # [B*R, V]
        return logits.unflatten(0, logit_rows.shape)


class OPT(nn.Module):
    """The decoder stage. `past`: keys and values of every block; all None: the new rows are the whole text."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.embedding = OPTEmbedding(config)
        self.blocks = nn.ModuleList(OPTBlock(config) for _ in range(config.num_hidden_layers))
        self.head = OPTHead(config)

    def forward(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        mask: Tensor,
        logit_rows: Tensor,
        *past: Past,
    ) -> tuple[Tensor, ...]:
        x = self.embedding(prefix, input_ids, positions)
        present: list[Tensor] = []
        for block, key, value in zip(self.blocks, past[0::2], past[1::2], strict=True):
            x, key, value = block(x, write_indices, mask, key, value)
            present += key, value
        return self.head(x, logit_rows, self.embedding.token.weight), *present

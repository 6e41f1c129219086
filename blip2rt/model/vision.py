"""EVA ViT-g or CLIP's ViT-L: pixel_values [B, 3, S, S] -> image_embeds [B, N+1, Dv], after the vision norm."""

import torch
from torch import Tensor, nn

from .config import VisionConfig
from .layers import activation, attend, split_heads


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)  # bias is (q, 0, v) in every published model
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.activation = activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.proj(attend(query, key, value))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class VisionEmbedding(nn.Module):
    """Patches and the class token, with learned positions: [B, 3, S, S] -> [B, N+1, Dv]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not config.pre_norm)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch(pixel_values).flatten(2).transpose(1, 2)  # [B, N, Dv]
        class_token = self.class_token.expand(patches.shape[0], -1, -1)
        return self.norm(torch.cat((class_token, patches), dim=1) + self.position)  # [B, N+1, Dv]


class VisionEncoder(nn.Module):
    """The vision stage."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embedding = VisionEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norm(self.features(pixel_values))

    def features(self, pixel_values: Tensor) -> Tensor:
        """What comes before the norm, [B, N+1, Dv]: all that stays as it is while the encoder is frozen."""
        x = self.embedding(pixel_values)
        for block in self.blocks:
            x = block(x)
        return x

"""BLIP-2: the three stages under one roof."""

from torch import Tensor, nn

from .config import Blip2Config
from .opt import OPT
from .qformer import QFormer
from .vision import VisionEncoder


class Blip2(nn.Module):
    """Reference model. Each child is one engine: same name, same inputs, same outputs (`stages.py`)."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.qformer = QFormer(
            config.qformer, config.vision.hidden_size, config.num_query_tokens, config.text.hidden_size
        )
        self.decoder = OPT(config.text)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, S, S] -> image_embeds [B, N+1, Dv], query_embeds [B, Q, Dq], prefix [B, Q, D]."""
        image_embeds = self.vision(pixel_values)
        return image_embeds, *self.qformer(image_embeds)

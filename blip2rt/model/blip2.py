"""BLIP-2: its stages under one roof."""

from torch import Tensor, nn

from .config import Blip2Config, T5Config
from .opt import OPT
from .qformer import QFormer
from .t5 import T5Decoder, T5Encoder
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
        if isinstance(config.text, T5Config):
            self.encoder = T5Encoder(config.text)
            self.decoder: OPT | T5Decoder = T5Decoder(config.text)
        else:
            self.decoder = OPT(config.text)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, S, S] -> image_embeds [B, N+1, Dv], query_embeds [B, Q, Dq], prefix [B, Q, D]."""
        image_embeds = self.vision(pixel_values)
        return image_embeds, *self.qformer(image_embeds)

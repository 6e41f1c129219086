"""The PyTorch reference of BLIP-2: what is exported, and what every engine is compared with."""

from .blip2 import Blip2
from .checkpoint import Checkpoint, load_blip2
from .config import Blip2Config
from .sources import CheckpointSource

__all__ = ["Blip2", "Blip2Config", "Checkpoint", "CheckpointSource", "load_blip2"]

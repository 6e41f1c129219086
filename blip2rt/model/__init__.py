"""The PyTorch reference of BLIP-2: what is exported, and what every engine is compared with."""

from .blip2 import Blip2
from .checkpoint import Checkpoint, load_blip2, load_retrieval
from .config import Blip2Config, RetrievalConfig
from .retrieval import Blip2Retrieval
from .sources import CheckpointSource

__all__ = [
    "Blip2",
    "Blip2Config",
    "Blip2Retrieval",
    "Checkpoint",
    "CheckpointSource",
    "RetrievalConfig",
    "load_blip2",
    "load_retrieval",
]

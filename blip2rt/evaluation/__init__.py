"""How good answers, captions and rankings are, by the rules that papers use."""

from .vqa import vqa_accuracy, vqa_table

__all__ = ["vqa_accuracy", "vqa_table"]

"""How good answers, captions and rankings are, by the rules that papers use."""

from .captions import CaptionScores, score_captions
from .recall import recall_at, retrieval_table
from .vqa import exact_accuracy, vqa_accuracy, vqa_table

__all__ = [
    "CaptionScores",
    "exact_accuracy",
    "recall_at",
    "retrieval_table",
    "score_captions",
    "vqa_accuracy",
    "vqa_table",
]

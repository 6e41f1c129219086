"""Data sets as they are published, read without their frameworks; all that is wrong with one is listed at once."""

from .captions import CaptionItem, read_captions
from .vqa import Question, read_questions

__all__ = ["CaptionItem", "Question", "read_captions", "read_questions"]

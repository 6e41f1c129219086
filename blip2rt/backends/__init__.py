"""Backends run one stage: arrays in, arrays out."""

from .ort import Binding, Stage

__all__ = ["Binding", "Stage"]

"""What the pipeline gives back: frozen dataclasses of plain values."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Generation:
    """A generated text and how sure the model was of it. `str(result)` is the text."""

    text: str  # decoded, special tokens skipped, stripped
    token_ids: list[int]  # generated tokens only, up to and without the first stop token
    token_logprobs: list[float]  # of each of `token_ids`: log-softmax of the raw logits
    finish_reason: str  # "stop" or "length"
    score: float  # beams: transformers' sequences_scores; else sum of log-probabilities over length ** length_penalty
    alternatives: list["Generation"] = field(default_factory=list)  # the other sequences, best first

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Caption(Generation):
    """The caption of a picture."""


@dataclass(frozen=True)
class RankedCaption(Caption):
    """A caption that stands where ITM puts it, among its alternatives."""

    itm: float | None = None  # the "matched" logit; None: the text has no tokens, or too many


@dataclass(frozen=True)
class Answer(Generation):
    """The answer to a question about a picture."""


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What the vision tower and the Q-Former saw in one picture; every call takes it in the picture's place."""

    image_embeds: np.ndarray[Any, np.dtype[np.float32]]  # [N+1, Dv], after the vision norm
    query_embeds: np.ndarray[Any, np.dtype[np.float32]]  # [Q, Dq]
    prefix: np.ndarray[Any, np.dtype[np.float32]] | None = None  # [Q, D], for the language model
    itc_embeds: np.ndarray[Any, np.dtype[np.float32]] | None = None  # [Q, E], unit vectors, of a retrieval engine
    retrieval: "ImageFeatures | None" = None  # what the retrieval engine saw, where one stands beside


@dataclass(frozen=True, eq=False)
class MatchScores:
    """How well I images and T texts match, each [I, T]. Retrieval ranks by the sum of `itm` and `itc`."""

    itc: np.ndarray[Any, np.dtype[np.float32]]  # cosine, largest over the queries, without temperature
    itm: np.ndarray[Any, np.dtype[np.float32]]  # the "matched" logit, mean over the queries
    itm_probability: np.ndarray[Any, np.dtype[np.float32]]  # softmax over the two logits

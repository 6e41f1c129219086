"""What a decoder gives a search: logits of all tokens, or on a GPU the few that can win, and the best among those."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .logits import check_finite

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shortlist:
    """The n likeliest tokens of every row instead of all logits, best first: what a GPU sends to the host."""

    tokens: Array  # [.., R, n]
    logprobs: Array  # [.., R, n] float32

    def __getitem__(self, image: int) -> "Shortlist":
        return Shortlist(self.tokens[image], self.logprobs[image])


@dataclass(frozen=True)
class Continuations:
    """The best continuations of all rows of an image together, best first; of equal ones the first row and token."""

    sums: Array  # [.., N] float32: processed log-probabilities of the row so far and of the token
    parents: Array  # [.., N] rows
    tokens: Array  # [.., N]
    logprobs: Array  # [.., N] float32: raw ones of `tokens`

    def __getitem__(self, at: Any) -> "Continuations":
        return Continuations(self.sums[at], self.parents[at], self.tokens[at], self.logprobs[at])


# logits of all tokens; on a GPU the likeliest of every row, or, where it adds up scores as well, of an image
Scores = Array | Shortlist | Continuations


def num_continuations(shortlist: int, num_rows: int, vocab_size: int) -> int:
    """How many continuations of an image decide what its shortlists of that length do: stop tokens may be banned."""
    return min(2 * shortlist, num_rows * min(shortlist, vocab_size))


def best_of(found: Shortlist | Continuations, sums: Array, banned: Array, size: int) -> Continuations:
    """The best continuations of an image; of equal ones the first.

    Args:
        found: shortlists [1 or K, n] of its rows, of which one serves all; or continuations, which are cut only.
        sums: scores of the rows so far, [K] float32.
        banned: tokens that are taken out of the race.
        size: how many.

    Raises:
        EngineError: the decoder gave NaN or infinite logits.
    """
    check_finite(found.logprobs[..., 0])
    if isinstance(found, Continuations):
        return found[np.flatnonzero(~is_among(found.tokens, banned))[:size]] if len(banned) else found[:size]
    shape = (len(sums), found.tokens.shape[1])
    tokens, logprobs = (np.broadcast_to(values, shape).ravel() for values in (found.tokens, found.logprobs))
    parents = np.arange(shape[0]).repeat(shape[1])
    scores = logprobs + sums[parents]
    if len(banned):
        scores[is_among(tokens, banned)] = -np.inf
    order = np.lexsort((tokens, parents, -scores))[:size]
    return Continuations(scores[order], parents[order], tokens[order], logprobs[order])


def is_among(tokens: Array, few: Array) -> Array:
    """Which tokens [N] are some of a few [S]."""
    return np.asarray((tokens[:, None] == few).any(1))

"""What a search does to logits: penalties and bans, temperature, softmax, and finding the largest."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import EngineError
from .options import ResolvedOptions

Array = np.ndarray[Any, Any]
BLOCK = 128  # scores of which `largest` takes the maximum first


def process(
    scores: Array, history: Array, num_generated: int, options: ResolvedOptions, stop_ids: Array | Sequence[int]
) -> Array:
    """Penalties and bans, in place.

    Args:
        scores: [R, V] float32: logits, or log-probabilities in a beam search.
        history: [R, L] ids seen by each row; those outside the vocabulary are image slots and cannot be generated.
        num_generated: tokens generated so far.
        options: resolved options.
        stop_ids: banned before `min_new_tokens`.

    Returns:
        `scores`.
    """
    vocab_size = scores.shape[1]
    for row, ids in enumerate(history):
        if options.repetition_penalty != 1.0:
            seen = np.unique(ids[(ids >= 0) & (ids < vocab_size)])
            values = scores[row, seen]
            penalty = np.float32(options.repetition_penalty)
            scores[row, seen] = np.where(values < 0, values * penalty, values / penalty)
        size = options.no_repeat_ngram_size
        if 0 < size <= len(ids):
            windows = np.lib.stride_tricks.sliding_window_view(ids, size)
            repeated = windows[(windows[:, :-1] == ids[len(ids) + 1 - size :]).all(axis=1), -1]
            scores[row, repeated[(repeated >= 0) & (repeated < vocab_size)]] = -np.inf
    if num_generated < options.min_new_tokens:
        scores[:, list(stop_ids)] = -np.inf
    return scores


def warp(scores: Array, options: ResolvedOptions) -> Array:
    """What sampling does to processed logits [R, V]: temperature, then top-k, then top-p."""
    if options.temperature != 1.0:
        scores = scores / np.float32(options.temperature)
    if 0 < options.top_k < scores.shape[1]:
        smallest = np.partition(scores, -options.top_k, axis=1)[:, -options.top_k, None]
        scores = np.where(scores < smallest, np.float32(-np.inf), scores)
    if options.top_p < 1.0:
        order = np.argsort(scores, axis=1, kind="stable")
        cumulative = np.cumsum(probabilities(np.take_along_axis(scores, order, axis=1)), axis=1, dtype=np.float64)
        unlikely = cumulative.astype(np.float32) <= np.float32(1 - options.top_p)
        unlikely[:, -1] = False  # the likeliest token stays
        removed = np.empty_like(unlikely)
        np.put_along_axis(removed, order, unlikely, axis=1)
        scores = np.where(removed, np.float32(-np.inf), scores)
    return scores


def probabilities(scores: Array) -> Array:
    """Softmax over the last axis, float32."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def draw(probs: Array, rng: np.random.Generator) -> Array:
    """One token a row [R] from probabilities [R, V], by inverting the distribution function."""
    cumulative = np.cumsum(probs, axis=1, dtype=np.float64)
    thresholds = rng.random(len(probs)) * cumulative[:, -1]
    return np.array([np.searchsorted(c, t, side="right") for c, t in zip(cumulative, thresholds, strict=True)])


def log_softmax(logits: Array) -> Array:
    """[R, V] float32 -> log-probabilities, rounded in the order in which torch does.

    Raises:
        EngineError: the logits hold NaN or infinity.
    """
    with np.errstate(invalid="ignore"):  # inf - inf, which is refused below
        shifted = logits - logits.max(axis=1, keepdims=True)
        logsumexp = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    check_finite(logsumexp)
    return np.asarray(np.subtract(shifted, logsumexp, out=shifted))


def check_finite(values: Array) -> None:
    """Refuse what a decoder gave of weights that overflow.

    Raises:
        EngineError: some value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise EngineError(
            "the decoder gave NaN or infinite logits: the engine is damaged or its weights overflow; "
            "check it with `blip2rt verify ENGINE --model CHECKPOINT`"
        )


def largest(scores: Array, size: int) -> Array:
    """Indices of the `size` largest scores [N] (all, where N is smaller), best first; of equal ones the first.

    As many blocks have a maximum that is no less than `least`, so no score below it can be among them: one pass of
    comparisons is left to do where a partition would take ten times as long.
    """
    blocks = scores[: scores.size // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1)
    least = np.partition(blocks, -size)[-size] if size <= blocks.size else -np.inf
    among = np.flatnonzero(scores >= least)
    return np.asarray(among[np.lexsort((among, -scores[among]))][:size])

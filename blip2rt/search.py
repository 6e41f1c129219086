"""Greedy search, beam search and sampling: logits in, token sequences out.

Each image has a search of its own (`advance` it with logits, it says which rows to decode next), so an answer cannot
depend on the images beside it. The decoder is known by three methods: `prefill`, `step` and `keep`.

The beam search follows transformers 5 (`GenerationMixin._beam_search`), its float32 arithmetic included; with
`rules="lavis"` it ends sequences as transformers 4.33 did (`BeamSearchScorer`), which LAVIS and mmpretrain ran on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import EngineError
from .options import ResolvedOptions

Array = np.ndarray[Any, Any]
BLOCK = 128  # scores of which `largest` takes the maximum first
DEAD = np.float32(-1e9)  # what transformers adds to a score to take it out of the race


class Decoder(Protocol):
    """All that a search knows of a decoder. R rows of an image run side by side (`ResolvedOptions.num_rows`)."""

    def prefill(self) -> Array:
        """Logits [B, 1, V] of the first token of every image."""

    def step(self, tokens: Array, parents: Array) -> Array:
        """Row r of image b continues row `parents[b, r]` of the step before with `tokens[b, r]`: logits [B, R, V]."""

    def keep(self, images: Sequence[int]) -> None:
        """Go on with these images only, in this order."""


@dataclass(frozen=True)
class TokenSequence:
    """A finished sequence."""

    token_ids: list[int]  # without the stop token
    token_logprobs: list[float]
    finish_reason: str
    score: float


class Search:
    """The search of one image."""

    def advance(self, logits: Array) -> tuple[Array, Array] | None:
        """Take logits [R, V] ([1, V] at first); tokens and parents [R] of the rows to decode next, None at the end."""
        raise NotImplementedError

    def sequences(self) -> list[TokenSequence]:
        """What was found, best first."""
        raise NotImplementedError


def start_search(options: ResolvedOptions, history: Sequence[int], stop_ids: Sequence[int]) -> Search:
    """The search that `options` ask for.

    Args:
        options: resolved options.
        history: the ids that the repetition and n-gram rules see before the first generated token.
        stop_ids: tokens that end a sequence; may be empty.
    """
    beams = LavisBeamSearch if options.rules == "lavis" else BeamSearch
    kind = beams if options.num_beams > 1 else RowSearch
    return kind(options, history, stop_ids)


def run_searches(decoder: Decoder, searches: Sequence[Search]) -> Iterator[None]:
    """Drive the searches of a batch to their ends; yields after every token, so that a caller can stream."""
    active = list(range(len(searches)))  # row of the decoder -> image
    logits = decoder.prefill()
    while True:
        moves = [searches[image].advance(logits[row]) for row, image in enumerate(active)]
        yield
        kept = [row for row, move in enumerate(moves) if move is not None]
        if not kept:
            return
        if len(kept) < len(active):
            kept = _fill_holes(kept)
            decoder.keep(kept)
            active = [active[row] for row in kept]
        running = [move for row in kept if (move := moves[row]) is not None]
        logits = decoder.step(np.stack([m[0] for m in running]), np.stack([m[1] for m in running]))


def _fill_holes(kept: list[int]) -> list[int]:
    """Order the kept rows so that as few as possible move: the last ones take the places of those that left."""
    rest = [row for row in kept if row >= len(kept)]
    stay = set(kept)
    return [row if row in stay else rest.pop() for row in range(len(kept))]


class RowSearch(Search):
    """Rows that do not know of each other: one greedy row, or `num_return_sequences` sampled ones."""

    def __init__(self, options: ResolvedOptions, history: Sequence[int], stop_ids: Sequence[int]):
        self.options = options
        self.stop_ids = list(stop_ids)
        self.history = np.tile(np.asarray(history, np.int64), (options.num_rows, 1))  # [R, L], grows by a column a step
        self.rng = np.random.default_rng(options.seed)
        self.tokens: list[list[int]] = [[] for _ in range(options.num_rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(options.num_rows)]
        self.stopped = np.zeros(options.num_rows, bool)
        self.num_generated = 0
        self._parents = np.arange(options.num_rows)

    def advance(self, logits: Array) -> tuple[Array, Array] | None:
        num_rows = len(self.tokens)
        logits = np.broadcast_to(logits, (num_rows, logits.shape[1]))  # [R, V]
        logprobs = log_softmax(logits)
        scores = process(logits.copy(), self.history, self.num_generated, self.options, self.stop_ids)
        if self.options.do_sample:
            chosen = draw(probabilities(warp(scores, self.options)), self.rng)
        else:
            chosen = scores.argmax(axis=1)  # [R]
        for row, token in enumerate(chosen):
            if not self.stopped[row]:
                self.tokens[row].append(int(token))
                self.logprobs[row].append(float(logprobs[row, token]))
        self.stopped |= np.isin(chosen, self.stop_ids)
        self.history = np.concatenate((self.history, chosen[:, None]), axis=1)
        self.num_generated += 1
        if self.stopped.all() or self.num_generated >= self.options.max_new_tokens:
            return None
        return chosen, self._parents

    def sequences(self) -> list[TokenSequence]:
        found = []
        for tokens, logprobs, stopped in zip(self.tokens, self.logprobs, self.stopped, strict=True):
            score = sum(logprobs) / _length_divisor(len(tokens), self.options)
            end = len(tokens) - bool(stopped)
            found.append(TokenSequence(tokens[:end], logprobs[:end], "stop" if stopped else "length", score))
        return found


@dataclass(frozen=True)
class Candidates:
    """The best continuations of all beams of an image, best first: arrays [2K] or more."""

    scores: Array  # sums of processed log-probabilities
    parents: Array
    tokens: Array
    logprobs: Array  # raw ones of `tokens`
    is_stop: Array
    ends: Array


class BeamSearch(Search):
    """K beams that compete, and the K best finished sequences."""

    def __init__(self, options: ResolvedOptions, history: Sequence[int], stop_ids: Sequence[int]):
        num_beams = options.num_beams
        self.options = options
        self.stop_ids = list(stop_ids)
        self.prompt_length = len(history)
        self.history = np.tile(np.asarray(history, np.int64), (num_beams, 1))  # [K, L]
        self.logprobs = np.zeros((num_beams, 0), np.float32)  # [K, t] raw log-probabilities
        self.scores = np.full(num_beams, DEAD)  # sums of processed log-probabilities
        self.scores[0] = 0  # one beam at first: K equal ones would choose the same tokens
        self.finished_scores = np.full(num_beams, -np.inf, np.float32)  # below DEAD, which long texts can reach
        self.is_finished = np.zeros(num_beams, bool)
        self.finished: list[TokenSequence | None] = [None] * num_beams
        # enough candidates to fill every beam even when all stop tokens of all beams are among them
        self.num_candidates = max(2, 1 + len(self.stop_ids)) * num_beams

    def advance(self, logits: Array) -> tuple[Array, Array] | None:
        options, num_beams, vocab_size = self.options, self.options.num_beams, logits.shape[1]
        length = self.logprobs.shape[1] + 1  # of a sequence that this step ends

        # STEP 1: score every continuation of every beam, [K, V]; the first logits [1, V] serve all beams
        logprobs = log_softmax(logits)
        scores = process(logprobs.copy(), self.history[: len(logits)], length - 1, options, self.stop_ids)
        scores = np.broadcast_to(scores, (num_beams, vocab_size)) + self.scores[:, None]

        # STEP 2: the best candidates of all beams together, best first
        flat = scores.ravel()
        best = largest(flat, self.num_candidates)
        candidate_scores, parents, tokens = flat[best], best // vocab_size, best % vocab_size
        raw = np.broadcast_to(logprobs, scores.shape)[parents, tokens]
        is_stop = np.isin(tokens, self.stop_ids)
        candidates = Candidates(candidate_scores, parents, tokens, raw, is_stop, is_stop | self._is_last(length))

        # STEP 3: the best that go on are the beams of the next step; sorted already, so a stable order suffices
        running_scores = candidate_scores + candidates.ends * DEAD
        running = np.argsort(-running_scores, kind="stable")[:num_beams]

        # STEP 4: among the first K, those that end compete with the sequences finished before
        self._finish(candidates, length)

        # STEP 5: go on, unless nothing can improve
        self.scores = running_scores[running]
        tokens, parents = tokens[running], parents[running]
        self.history = np.concatenate((self.history[parents], tokens[:, None]), axis=1)
        self.logprobs = np.concatenate((self.logprobs[parents], raw[running][:, None]), axis=1)
        if self._is_done(candidates, length):
            return None
        return tokens, parents

    def sequences(self) -> list[TokenSequence]:
        return [s for s in self.finished if s is not None][: self.options.num_return_sequences]

    def _is_last(self, length: int) -> bool:
        """Whether every candidate of this length ends, stop token or not."""
        return length >= self.options.max_new_tokens

    def _finish(self, candidates: "Candidates", length: int) -> None:
        """Take up the candidates among the first K that end."""
        if self.is_finished.all() and self.options.early_stopping is True:
            return
        scores = candidates.scores / np.float32(_length_divisor(length, self.options))
        for place in np.flatnonzero(candidates.ends[: self.options.num_beams]).tolist():
            self._insert(self._sequence(candidates, place, scores[place]))

    def _sequence(self, candidates: "Candidates", place: int, score: float) -> TokenSequence:
        parent, is_stop = candidates.parents[place], bool(candidates.is_stop[place])
        tokens = self.history[parent, self.prompt_length :].tolist()
        logprobs = self.logprobs[parent].tolist()
        if not is_stop:
            tokens.append(int(candidates.tokens[place]))
            logprobs.append(float(candidates.logprobs[place]))
        return TokenSequence(tokens, logprobs, "stop" if is_stop else "length", float(score))

    def _insert(self, sequence: TokenSequence) -> None:
        """Keep the K best finished sequences; an equal score goes behind the older one."""
        place = int((self.finished_scores >= np.float32(sequence.score)).sum())
        if place == len(self.finished):
            return
        self.finished_scores = np.insert(self.finished_scores, place, np.float32(sequence.score))[:-1]
        self.is_finished = np.insert(self.is_finished, place, True)[:-1]
        self.finished = [*self.finished[:place], sequence, *self.finished[place:]][:-1]

    def _is_done(self, candidates: "Candidates", length: int) -> bool:
        """No beam can beat the worst finished sequence, by the estimate that `early_stopping` chooses."""
        options = self.options
        if candidates.ends.all() or (options.early_stopping is True and self.is_finished.all()):
            return True
        reach = options.max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else length
        best_possible = self.scores[0] / np.float32(_length_divisor(reach, options))
        worst_finished = np.where(self.is_finished, self.finished_scores.min(), -np.inf)
        return not bool((best_possible > worst_finished).any())


class LavisBeamSearch(BeamSearch):
    """Beam search that ends as transformers 4.33 did.

    There the start token counts in the length of a sequence that is cut (but stands in for the stop token of one that
    ended), the best candidate decides when to stop, whether it ends or not, and when the length is reached all K
    running beams compete, not only those among the first K candidates.
    """

    def _is_last(self, length: int) -> bool:
        return False  # `_is_done` takes up the running beams

    def _finish(self, candidates: Candidates, length: int) -> None:
        divisor = _length_divisor(length, self.options)
        for place in np.flatnonzero(candidates.is_stop[: self.options.num_beams]).tolist():
            self._insert(self._sequence(candidates, place, float(candidates.scores[place]) / divisor))

    def _insert(self, sequence: TokenSequence) -> None:
        """Keep the K best; among equals the last one comes first, and a full list takes better ones only."""
        found = [other for other in self.finished if other is not None]
        if len(found) == len(self.finished) and sequence.score <= found[-1].score:
            return
        place = sum(other.score > sequence.score for other in found)
        found.insert(place, sequence)
        missing = len(self.finished) - len(found)
        self.finished = [*found[: len(self.finished)], *([None] * missing)]

    def _is_done(self, candidates: Candidates, length: int) -> bool:
        options, worst = self.options, self.finished[-1]
        if worst is not None:
            most = options.early_stopping == "never" and options.length_penalty > 0
            divisor = _length_divisor((options.max_new_tokens if most else length) + 1, options)
            if options.early_stopping is True or worst.score >= float(candidates.scores[0]) / divisor:
                return True
        if length < options.max_new_tokens:
            return False
        divisor = _length_divisor(length + 1, options)
        for beam, score in enumerate(self.scores):
            tokens, logprobs = self.history[beam, self.prompt_length :].tolist(), self.logprobs[beam].tolist()
            self._insert(TokenSequence(tokens, logprobs, "length", float(score) / divisor))
        return True


def process(
    scores: Array, history: Array, num_generated: int, options: ResolvedOptions, stop_ids: Sequence[int]
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
    if not np.isfinite(logsumexp).all():
        raise EngineError(
            "the decoder gave NaN or infinite logits: the engine is damaged or its weights overflow; "
            "check it with `blip2rt verify ENGINE --model CHECKPOINT`"
        )
    return np.asarray(np.subtract(shifted, logsumexp, out=shifted))


def largest(scores: Array, size: int) -> Array:
    """Indices of the `size` largest scores [N] (all, where N is smaller), best first; of equal ones the first.

    As many blocks have a maximum that is no less than `least`, so no score below it can be among them: one pass of
    comparisons is left to do where a partition would take ten times as long.
    """
    blocks = scores[: scores.size // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1)
    least = np.partition(blocks, -size)[-size] if size <= blocks.size else -np.inf
    among = np.flatnonzero(scores >= least)
    return np.asarray(among[np.lexsort((among, -scores[among]))][:size])


def _length_divisor(length: int, options: ResolvedOptions) -> float:
    with np.errstate(over="ignore"):
        return float(np.power(float(length), options.length_penalty))

"""Greedy search, beam search and sampling: logits in, token sequences out.

Each image has a search of its own (`advance` it with logits, it says which rows to decode next), so an answer cannot
depend on the images beside it. The decoder is known by three methods: `prefill`, `step` and `keep`.

The beam search follows transformers 5 (`GenerationMixin._beam_search`), its float32 arithmetic included; with
`rules="lavis"` it ends sequences as transformers 4.33 did (`BeamSearchScorer`), which LAVIS and mmpretrain ran on.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .logits import draw, largest, log_softmax, probabilities, process, warp
from .options import ResolvedOptions
from .scores import Continuations, Scores, best_of, is_among

Array = np.ndarray[Any, Any]
NONE = np.zeros(0, np.int64)  # tokens
DEAD = np.float32(-1e9)  # what transformers adds to a score to take it out of the race


class Move(NamedTuple):
    """The rows of an image to decode next, [R] each."""

    tokens: Array
    parents: Array  # rows of the step before
    sums: Array  # float32: their scores so far, zeros where rows do not compete


class Decoder(Protocol):
    """All that a search knows of a decoder. R rows of an image run side by side (`ResolvedOptions.num_rows`)."""

    def prefill(self) -> Scores:
        """Logits [B, 1, V] of the first token of every image, or the likeliest of them."""

    def step(self, tokens: Array, parents: Array, sums: Array) -> Scores:
        """Row r of image b continues row `parents[b, r]` of the step before with `tokens[b, r]`: logits [B, R, V].

        Or what stands for them. `sums` are the scores of rows, for a decoder that gives `Continuations`.
        """

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

    def advance(self, scores: Scores) -> Move | None:
        """Take logits [R, V] ([1, V] at first); the rows to decode next, None at the end.

        A `Shortlist` may come instead, where `shortlist_size` says how long it must be; or, but for the first,
        `Continuations` of all such shortlists, `num_continuations` of them.
        """
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


def shortlist_size(options: ResolvedOptions, stop_ids: Sequence[int]) -> int | None:
    """How many of the likeliest tokens of a row decide a search; None: all count, as it changes or draws scores."""
    if options.do_sample or options.repetition_penalty != 1.0 or options.no_repeat_ngram_size:
        return None
    # the stop tokens may be banned at first
    return num_candidates(options, stop_ids) + len(stop_ids)


def num_candidates(options: ResolvedOptions, stop_ids: Sequence[int]) -> int:
    """Enough continuations to fill every beam even when all stop tokens of all beams are among them."""
    return max(2, 1 + len(stop_ids)) * options.num_beams


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
        logits = decoder.step(*(np.stack(part) for part in zip(*running, strict=True)))


def _fill_holes(kept: list[int]) -> list[int]:
    """Order the kept rows so that as few as possible move: the last ones take the places of those that left."""
    rest = [row for row in kept if row >= len(kept)]
    stay = set(kept)
    return [row if row in stay else rest.pop() for row in range(len(kept))]


class RowSearch(Search):
    """Rows that do not know of each other: one greedy row, or `num_return_sequences` sampled ones."""

    def __init__(self, options: ResolvedOptions, history: Sequence[int], stop_ids: Sequence[int]):
        self.options = options
        self.stop_ids = np.asarray(stop_ids, np.int64)
        self.history = np.tile(np.asarray(history, np.int64), (options.num_rows, 1))  # [R, L], grows by a column a step
        self.rng = np.random.default_rng(options.seed)
        self.tokens: list[list[int]] = [[] for _ in range(options.num_rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(options.num_rows)]
        self.stopped = np.zeros(options.num_rows, bool)
        self.num_generated = 0
        self._parents, self._sums = np.arange(options.num_rows), np.zeros(options.num_rows, np.float32)

    def advance(self, scores: Scores) -> Move | None:
        num_rows = len(self.tokens)
        if not isinstance(scores, np.ndarray):  # greedy
            banned = self.stop_ids if self.num_generated < self.options.min_new_tokens else NONE
            best = best_of(scores, self._sums, banned, 1)
            chosen, logprobs = best.tokens, best.logprobs
        else:
            logits = np.broadcast_to(scores, (num_rows, scores.shape[1]))  # [R, V]
            logprobs = log_softmax(logits)
            found = process(logits.copy(), self.history, self.num_generated, self.options, self.stop_ids)
            if self.options.do_sample:
                chosen = draw(probabilities(warp(found, self.options)), self.rng)
            else:
                chosen = found.argmax(axis=1)  # [R]
            logprobs = logprobs[np.arange(num_rows), chosen]
        for row, token in enumerate(chosen):
            if not self.stopped[row]:
                self.tokens[row].append(int(token))
                self.logprobs[row].append(float(logprobs[row]))
        self.stopped |= is_among(chosen, self.stop_ids)
        self.history = np.concatenate((self.history, chosen[:, None]), axis=1)
        self.num_generated += 1
        if self.stopped.all() or self.num_generated >= self.options.max_new_tokens:
            return None
        return Move(chosen, self._parents, self._sums)

    def sequences(self) -> list[TokenSequence]:
        found = []
        for tokens, logprobs, stopped in zip(self.tokens, self.logprobs, self.stopped, strict=True):
            score = sum(logprobs) / _length_divisor(len(tokens), self.options)
            end = len(tokens) - bool(stopped)
            found.append(TokenSequence(tokens[:end], logprobs[:end], "stop" if stopped else "length", score))
        return found


@dataclass(frozen=True)
class Candidates(Continuations):
    """Those that a step chooses among, [2K] or more."""

    is_stop: Array
    ends: Array


class BeamSearch(Search):
    """K beams that compete, and the K best finished sequences."""

    def __init__(self, options: ResolvedOptions, history: Sequence[int], stop_ids: Sequence[int]):
        num_beams = options.num_beams
        self.options = options
        self.stop_ids = np.asarray(stop_ids, np.int64)
        self.prompt_length = len(history)
        self.history = np.tile(np.asarray(history, np.int64), (num_beams, 1))  # [K, L]
        self.logprobs = np.zeros((num_beams, 0), np.float32)  # [K, t] raw log-probabilities
        self.scores = np.full(num_beams, DEAD)  # sums of processed log-probabilities
        self.scores[0] = 0  # one beam at first: K equal ones would choose the same tokens
        self.finished_scores = np.full(num_beams, -np.inf, np.float32)  # below DEAD, which long texts can reach
        self.is_finished = np.zeros(num_beams, bool)
        self.finished: list[TokenSequence | None] = [None] * num_beams
        self.num_candidates = num_candidates(options, stop_ids)

    def advance(self, scores: Scores) -> Move | None:
        num_beams, length = self.options.num_beams, self.logprobs.shape[1] + 1  # of a sequence that this step ends

        # STEPS 1, 2: score every continuation of every beam; the best of all beams together, best first
        best = self._candidates(scores, length)
        is_stop = is_among(best.tokens, self.stop_ids)
        ends = is_stop | self._is_last(length)
        candidates = Candidates(best.sums, best.parents, best.tokens, best.logprobs, is_stop, ends)

        # STEP 3: the best that go on are the beams of the next step; sorted already, so a stable order suffices
        running_scores = best.sums + ends * DEAD
        running = np.argsort(-running_scores, kind="stable")[:num_beams]

        # STEP 4: among the first K, those that end compete with the sequences finished before
        self._finish(candidates, length)

        # STEP 5: go on, unless nothing can improve
        self.scores = running_scores[running]
        tokens, parents = best.tokens[running], best.parents[running]
        self.history = np.concatenate((self.history[parents], tokens[:, None]), axis=1)
        self.logprobs = np.concatenate((self.logprobs[parents], best.logprobs[running][:, None]), axis=1)
        if self._is_done(candidates, length):
            return None
        return Move(tokens, parents, self.scores)

    def _candidates(self, scores: Scores, length: int) -> Continuations:
        """The best continuations of all beams."""
        if not isinstance(scores, np.ndarray):
            banned = self.stop_ids if length - 1 < self.options.min_new_tokens else NONE
            return best_of(scores, self.scores, banned, self.num_candidates)
        num_beams, vocab_size = self.options.num_beams, scores.shape[1]
        logprobs = log_softmax(scores)  # the first, [1, V], serve all beams
        sums = process(logprobs.copy(), self.history[: len(scores)], length - 1, self.options, self.stop_ids)
        flat = (np.broadcast_to(sums, (num_beams, vocab_size)) + self.scores[:, None]).ravel()
        best = largest(flat, self.num_candidates)
        parents, tokens = best // vocab_size, best % vocab_size
        raw = np.broadcast_to(logprobs, (num_beams, vocab_size))[parents, tokens]
        return Continuations(flat[best], parents, tokens, raw)

    def sequences(self) -> list[TokenSequence]:
        return [s for s in self.finished if s is not None][: self.options.num_return_sequences]

    def _is_last(self, length: int) -> bool:
        """Whether every candidate of this length ends, stop token or not."""
        return length >= self.options.max_new_tokens

    def _finish(self, candidates: Candidates, length: int) -> None:
        """Take up the candidates among the first K that end."""
        if self.is_finished.all() and self.options.early_stopping is True:
            return
        divisor = np.float32(_length_divisor(length, self.options))
        for place in np.flatnonzero(candidates.ends[: self.options.num_beams]).tolist():
            self._insert(self._sequence(candidates, place, candidates.sums[place] / divisor))

    def _sequence(self, candidates: Candidates, place: int, score: float) -> TokenSequence:
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

    def _is_done(self, candidates: Candidates, length: int) -> bool:
        """No beam can beat the worst finished sequence, by the estimate that `early_stopping` chooses."""
        options = self.options
        if candidates.ends.all() or (options.early_stopping is True and self.is_finished.all()):
            return True
        reach = options.max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else length
        best_possible = self.scores[0] / np.float32(_length_divisor(reach, options))
        worst_finished = self.finished_scores.min() if self.is_finished.all() else -np.inf
        return not bool(best_possible > worst_finished)


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
            self._insert(self._sequence(candidates, place, float(candidates.sums[place]) / divisor))

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
            if options.early_stopping is True or worst.score >= float(candidates.sums[0]) / divisor:
                return True
        if length < options.max_new_tokens:
            return False
        divisor = _length_divisor(length + 1, options)
        for beam, score in enumerate(self.scores):
            tokens, logprobs = self.history[beam, self.prompt_length :].tolist(), self.logprobs[beam].tolist()
            self._insert(TokenSequence(tokens, logprobs, "length", float(score) / divisor))
        return True


def _length_divisor(length: int, options: ResolvedOptions) -> float:
    try:
        return float(length) ** options.length_penalty
    except OverflowError:
        return math.inf

"""A closed list of answers, ranked: every candidate is a row of the decoder, fed token by token.

The rows are branches of one tree, so the picture and the prompt are read once for all of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .errors import InputError
from .logits import log_softmax
from .scores import Scores
from .search import Decoder, Move, Search, TokenSequence, run_searches

Array = np.ndarray[Any, Any]

CANDIDATE_ROWS = 32  # candidates that are decoded side by side; scores do not depend on it


class CandidateSearch(Search):
    """The "search" of one image that follows given sequences and only reads off how likely they are.

    Args:
        candidates: token ids of each, without the stop token; none is empty.
        stop_ids: the stop tokens; the likeliest of them ends a candidate.
    """

    def __init__(self, candidates: Sequence[Sequence[int]], stop_ids: Sequence[int]):
        self._candidates, self._stop_ids = candidates, list(stop_ids)
        self._logprobs: list[list[float]] = [[] for _ in candidates]  # of the tokens, then of the stop token
        self._length = 0  # tokens that every row has been given

    def advance(self, scores: Scores) -> Move | None:
        assert isinstance(scores, np.ndarray)  # any token may be asked for
        logprobs = log_softmax(scores)
        for row, candidate in enumerate(self._candidates):
            after = logprobs[row if self._length else 0]
            if self._length < len(candidate):
                self._logprobs[row].append(float(after[candidate[self._length]]))
            elif self._length == len(candidate):
                self._logprobs[row].append(float(after[self._stop_ids].max()))
        if self._length == max(map(len, self._candidates)):
            return None
        # a row whose candidate has ended goes on with any token: nobody reads what comes of it
        tokens = np.array([c[self._length] if self._length < len(c) else c[-1] for c in self._candidates])
        rows = len(self._candidates)
        parents = np.arange(rows) if self._length else np.zeros(rows, np.int64)
        self._length += 1
        return Move(tokens, parents, np.zeros(rows, np.float32))

    def sequences(self) -> list[TokenSequence]:
        """In the order of the candidates; the score is the mean log-probability, stop token included."""
        return [
            TokenSequence(list(candidate), logprobs[:-1], "stop", sum(logprobs) / len(logprobs))
            for candidate, logprobs in zip(self._candidates, self._logprobs, strict=True)
        ]


def rank_candidates(
    candidates: list[list[int]],
    num_rows: int,
    stop_ids: Sequence[int],
    num_images: int,
    decoders: Iterator[Decoder],
) -> list[list[TokenSequence]]:
    """Every candidate scored for every image, best first; of equal ones the first.

    Args:
        candidates: token ids of each, `num_rows` at least.
        num_rows: rows that the decoders have an image.
        stop_ids: the stop tokens.
        num_images: how many the decoders hold.
        decoders: a fresh one for every `num_rows` candidates.
    """
    found: list[list[TokenSequence]] = [[] for _ in range(num_images)]
    for start in range(0, len(candidates), num_rows):
        rows = candidates[start : start + num_rows]
        filled = rows + candidates[: num_rows - len(rows)]  # the last rows are filled up with the first
        searches = [CandidateSearch(filled, stop_ids) for _ in found]
        for _ in run_searches(next(decoders), searches):
            pass
        for sequences, search in zip(found, searches, strict=True):
            sequences += search.sequences()[: len(rows)]
    return [sorted(sequences, key=lambda sequence: -sequence.score) for sequences in found]


def checked_candidates(candidates: Any) -> list[str]:
    """Candidates as a list.

    Raises:
        InputError: no list of strings, an empty one, an empty string, or one that is given twice.
    """
    if not isinstance(candidates, list | tuple) or not candidates:
        raise InputError(f"candidates must be a list that is not empty, not {candidates!r:.60}")
    for candidate in candidates:
        if not isinstance(candidate, str) or not candidate.strip():
            raise InputError(f"a candidate must be a string that is not empty, not {candidate!r}")
    twice = sorted({candidate for candidate in candidates if candidates.count(candidate) > 1})
    if twice:
        raise InputError(f"candidates that are given twice: {', '.join(map(repr, twice[:10]))}")
    return list(candidates)

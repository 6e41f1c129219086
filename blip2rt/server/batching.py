"""Requests that wait go through the engines together; nobody's answer depends on who was beside him.

A batch is what waits when the engines become free, at most `max_batch` pictures: they are encoded together, and decoded
together where their options are equal. A request joins at the next batch, not at the next step: the decoder's cache is
laid out when a batch begins. A client that leaves frees its row at the next step. What the retrieval engine is asked
(`Call`) waits in the same queue, and goes before the texts of its batch.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from ..generative import Prompt
from ..options import ResolvedOptions
from ..pipeline import Pipeline
from ..results import Generation
from ..scores import Scores
from ..search import Move, Search, TokenSequence, run_searches, start_search
from .metrics import Metrics

Array = np.ndarray[Any, Any]
LOG = logging.getLogger("blip2rt.server")


class QueueFullError(Exception):
    """As many pictures wait as may wait."""


class GoneError(Exception):
    """The client has left, or the time was up, before there was an answer."""


@dataclass(eq=False, kw_only=True)
class Task:
    """Something that waits for the engines."""

    deadline: float  # by `monotonic`
    cancelled: bool = False
    future: "Future[Any]" = field(default_factory=Future)
    arrived: float = field(default_factory=monotonic)

    @property
    def is_gone(self) -> bool:
        """Nobody waits for the answer any more."""
        return self.cancelled or monotonic() > self.deadline


@dataclass(eq=False)
class Job(Task):
    """One picture with one prompt; its future becomes a `Generation`."""

    pixels: Array  # [3, S, S]
    prompt: Prompt
    options: ResolvedOptions
    on_text: Callable[[str], None] | None = None  # called in the engines' thread with every new piece of the text
    given: str = ""  # the text that `on_text` was told


@dataclass(eq=False)
class Call(Task):
    """Anything else that only the engines' thread does; its future becomes what `work` gives."""

    work: Callable[[], Any]


class _Watched(Search):
    """A search that ends when nobody waits for it, and tells its text while it grows."""

    def __init__(self, search: Search, job: Job, decode: Callable[[list[int]], str]):
        self._search, self._job, self._decode = search, job, decode

    def advance(self, scores: Scores) -> Move | None:
        if self._job.is_gone:
            return None
        move = self._search.advance(scores)
        if self._job.on_text:
            self._tell(self._job.on_text, is_last=move is None)
        return move

    def _tell(self, on_text: Callable[[str], None], is_last: bool) -> None:
        text = self._decode(self._search.sequences()[0].token_ids).strip()
        # half a character decodes to U+FFFD: wait for the rest
        if len(text) > len(self._job.given) and (is_last or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            on_text(text[len(self._job.given) :])
            self._job.given = text

    def sequences(self) -> list[TokenSequence]:
        return self._search.sequences()


class Batcher:
    """A thread that owns the engines of one pipeline."""

    def __init__(self, pipe: Pipeline, max_batch: int, max_queue: int, metrics: Metrics):
        self.pipe = pipe
        self._max_batch, self._max_queue, self._metrics = max_batch, max_queue, metrics
        self._waiting: deque[Task] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._rate = 1.0  # pictures a second, lately
        self._thread = threading.Thread(target=self._work, name="engines", daemon=True)
        self._thread.start()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Let tasks wait for the engines, all or none of them.

        Raises:
            QueueFullError: there is no room.
        """
        with self._changed:
            self._drop_gone()
            if self._waiting and len(self._waiting) + len(tasks) > self._max_queue:
                raise QueueFullError
            for task in tasks:
                task.future.set_running_or_notify_cancel()  # from now on only this thread ends it
            self._waiting.extend(tasks)
            self._metrics.queue.set(len(self._waiting))
            self._changed.notify()

    def retry_after(self) -> int:
        """Seconds after which there will be room again, as far as one can tell."""
        return max(1, min(60, round(len(self._waiting) / self._rate)))

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _drop_gone(self) -> None:
        """Those that left free their place at once, not when their turn comes."""
        for task in [task for task in self._waiting if task.is_gone]:
            self._waiting.remove(task)
            self._give_up(task)
        self._metrics.queue.set(len(self._waiting))

    def _give_up(self, task: Task) -> None:
        self._metrics.cancelled.inc()
        task.future.set_exception(GoneError())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                self._drop_gone()
                if not self._waiting:
                    if self._closing:
                        return
                    continue
                batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
                self._metrics.queue.set(len(self._waiting))
            start = monotonic()
            for task in batch:
                self._metrics.waited.observe(start - task.arrived)
            for task in batch:
                if isinstance(task, Call):
                    self._call(task)
            self._answer([task for task in batch if isinstance(task, Job)])
            self._rate = 0.8 * self._rate + 0.2 * len(batch) / max(monotonic() - start, 1e-6)

    def _call(self, call: Call) -> None:
        """Its result or its error; never raises."""
        if call.is_gone:
            self._give_up(call)
            return
        try:
            result = call.work()
        except Exception as error:
            LOG.exception("a call failed")
            call.future.set_exception(error)
        else:
            call.future.set_result(result)

    def _answer(self, batch: list[Job]) -> None:
        """Results or errors for all jobs of a batch; never raises."""
        if not batch:
            return
        try:
            self._run(batch)
        except Exception as error:
            pending = [job for job in batch if not job.future.done()]
            LOG.exception("%d pictures failed together", len(pending))
            for job in pending:
                if len(batch) > 1 and not job.given:  # one of them is at fault, and the others must not pay for it
                    self._answer([job])
                else:
                    job.future.set_exception(error)

    def _run(self, batch: list[Job]) -> None:
        features = self.pipe.generative_engine.encode([job.pixels for job in batch], None)
        groups: dict[ResolvedOptions, list[int]] = {}
        for i, job in enumerate(batch):
            groups.setdefault(job.options, []).append(i)
        for options, members in groups.items():
            self._decode([batch[i] for i in members], [features[i] for i in members], options)

    def _decode(self, jobs: list[Job], features: list[Any], options: ResolvedOptions) -> None:
        """`GenerativeEngine.decode`, for jobs that may leave on the way."""
        engine = self.pipe.generative_engine
        self._metrics.batch.observe(len(jobs))
        searches = [
            _Watched(
                start_search(options, engine.history(job.prompt, options), engine.manifest.tokens.stop),
                job,
                engine.tokenizer.decode,
            )
            for job in jobs
        ]
        decoder = engine.open_decoder(features, [job.prompt for job in jobs], options)
        for _ in run_searches(decoder, searches):
            pass
        for job, search in zip(jobs, searches, strict=True):
            if job.is_gone:
                self._give_up(job)
                continue
            result = engine.result(Generation, search.sequences())
            self._metrics.pictures.inc()
            self._metrics.tokens.inc(sum(len(row.token_ids) for row in (result, *result.alternatives)))
            job.future.set_result(result)

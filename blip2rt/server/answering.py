"""From encoded pictures to results, for every route: limits, decoding in threads, waiting, leaving."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from time import monotonic
from typing import Any, Protocol

from ..errors import InputError
from ..generative import Prompt
from ..options import GenerationOptions, ResolvedOptions, resolve_options
from ..pipeline import ANSWER_DEFAULTS, CAPTION_DEFAULTS, GENERATE_DEFAULTS
from ..results import Generation
from .batching import Call, GoneError, Job, QueueFullError, Task
from .engines import Engine
from .errors import HttpError
from .fetching import fetch
from .pictures import check_picture, decode_data_url
from .settings import ServerSettings

DEFAULTS: dict[str, dict[str, Any]] = {
    "caption": CAPTION_DEFAULTS, "answer": ANSWER_DEFAULTS, "generate": GENERATE_DEFAULTS,
}  # fmt: skip
RESULT_KEYS = ("text", "score", "token_ids", "token_logprobs", "finish_reason")
MAX_CHARACTERS = 10_000  # of a text that is embedded, far more than the models read
LOOK_SECONDS = 0.2  # how often a request looks whether its client is still there


class Client(Protocol):
    """Who waits for an answer: a request of Starlette, or another that can tell whether it was left."""

    async def is_disconnected(self) -> bool:
        """Whether nobody will read the answer."""


class Answering:
    """What the routes share. One for a server."""

    def __init__(self, settings: ServerSettings, num_threads: int):
        self.settings = settings
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def options(self, task: str, given: Mapping[str, Any]) -> ResolvedOptions:
        """Generation options of a request, within the server's limits.

        Raises:
            InputError: an unknown or wrong option, or more than the server allows.
        """
        known = {field.name for field in fields(GenerationOptions)}
        options = resolve_options(
            DEFAULTS[task], None, {k: v for k, v in given.items() if v is not None or k not in known}
        )
        limits = {
            "max_new_tokens": self.settings.max_new_tokens,
            "num_beams": self.settings.max_beams,
            "num_return_sequences": self.settings.max_beams,
        }
        for name, limit in limits.items():
            if getattr(options, name) > limit:
                raise InputError(f"{name}={getattr(options, name)} is more than this server allows: {limit}")
        return options

    def check_texts(self, texts: Sequence[str]) -> None:
        """Whether texts are few and short enough to be looked at.

        Raises:
            InputError: they are not.
        """
        if len(texts) > self.settings.max_texts:
            raise InputError(f"{len(texts)} texts are more than a request may have: {self.settings.max_texts}")
        longest = max(map(len, texts), default=0)
        if longest > MAX_CHARACTERS:
            raise InputError(f"a text of {longest} characters is longer than this server reads: {MAX_CHARACTERS}")

    async def picture(self, url: str) -> bytes:
        """The encoded picture that a URL means.

        Raises:
            ImageError: it is no data URL of a picture, and of no host that may be asked.
        """
        if url[:5].lower() == "data:":
            return decode_data_url(url)
        return await self.in_thread(lambda: fetch(url, self.settings))

    async def jobs(
        self, engine: Engine, pictures: Sequence[bytes], prompts: Sequence[Prompt], options: ResolvedOptions
    ) -> list[Job]:
        """Pictures checked and decoded, nothing submitted.

        Raises:
            InputError: a wrong picture (`ImageError`).
        """
        deadline = self.deadline()
        pixels = await self.pixels(pictures, engine.generative.preprocess)
        return [Job(image, prompt, options, deadline=deadline) for image, prompt in zip(pixels, prompts, strict=True)]

    async def pixels(self, pictures: Sequence[bytes], preprocess: Callable[[bytes], Any]) -> list[Any]:
        """Pictures, checked, as the `preprocess` of an engine gives them.

        Raises:
            InputError: too many, or a wrong picture (`ImageError`).
        """
        if len(pictures) > self.settings.max_pictures:
            raise InputError(f"{len(pictures)} pictures are more than a request may have: {self.settings.max_pictures}")

        def decode(data: bytes) -> Any:
            return preprocess(check_picture(data, self.settings))

        return await asyncio.gather(*(self.in_thread(partial(decode, data)) for data in pictures))

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def deadline(self) -> float:
        """Of a request that begins now."""
        return monotonic() + self.settings.timeout

    async def call(self, client: Client, engine: Engine, work: Callable[[], Any]) -> Any:
        """What `work` gives in the engines' thread, where the retrieval engine is asked.

        Raises:
            HttpError: as `results`.
        """
        [result] = await self.results(client, engine, [Call(work, deadline=self.deadline())])
        return result

    def submit(self, engine: Engine, tasks: Sequence[Task]) -> None:
        """Let tasks wait for the engines.

        Raises:
            HttpError: 429, there is no room.
        """
        try:
            engine.batcher.submit(tasks)
        except QueueFullError:
            seconds = str(engine.batcher.retry_after())
            raise HttpError(
                429, f"too many requests wait: try again in {seconds} s", {"retry-after": seconds}
            ) from None

    async def results(self, client: Client, engine: Engine, tasks: Sequence[Task]) -> list[Any]:
        """Submit tasks and wait. Where the client leaves, or the wait is cancelled, they give back their places.

        Raises:
            HttpError: 429, 504, or 499 where nobody is there any more to read it.
        """
        self.submit(engine, tasks)
        waiting = asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))
        try:
            while not waiting.done():
                left = max(task.deadline for task in tasks) - monotonic()
                if left <= 0:
                    raise self.too_late()
                await asyncio.wait([waiting], timeout=min(LOOK_SECONDS, left))
                if not waiting.done() and await client.is_disconnected():
                    raise HttpError(499, "the client has left")
            return list(waiting.result())
        except GoneError:
            raise self.too_late() from None
        finally:
            for task in tasks:
                task.cancelled = True
            waiting.cancel()

    def stream(self, engine: Engine, job: Job) -> AsyncIterator[str | Generation]:
        """Submit a job; pieces of its text as they come, then its result.

        Raises:
            HttpError: at once 429; from the iterator 504.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        job.on_text = lambda piece: _tell(loop, pieces, piece)
        job.future.add_done_callback(lambda _: _tell(loop, pieces, None))
        self.submit(engine, [job])
        return self._pieces(job, pieces)

    async def _pieces(self, job: Job, pieces: "asyncio.Queue[str | None]") -> AsyncIterator[str | Generation]:
        try:
            async with asyncio.timeout(max(0.0, job.deadline - monotonic())):
                while (piece := await pieces.get()) is not None:
                    yield piece
            yield job.future.result()
        except (GoneError, TimeoutError):
            raise self.too_late() from None
        finally:
            job.cancelled = True

    def too_late(self) -> HttpError:
        return HttpError(504, f"no answer within {self.settings.timeout:g} s: ask for fewer tokens, or try later")


def _tell(loop: asyncio.AbstractEventLoop, pieces: "asyncio.Queue[str | None]", piece: str | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)


def read_prompt(engine: Engine, task: str, text: str, options: ResolvedOptions) -> Prompt:
    """The text of a request as the engine's models read it.

    Raises:
        InputError: it is too long, or no possible text.
    """
    generative = engine.generative
    return generative.question(text, options) if task == "answer" else generative.prompt(text, options)


def row_of(result: Generation) -> dict[str, Any]:
    """A result with the keys of `blip2rt caption --json`. JSON knows no infinity."""
    row = {key: getattr(result, key) for key in RESULT_KEYS}
    row["score"] = result.score if math.isfinite(result.score) else None
    return row | {"alternatives": [row_of(other) for other in result.alternatives]}

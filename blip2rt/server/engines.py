"""The engine that answers now, and how another one takes its place without a dropped request."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Blip2rtError
from ..pipeline import Pipeline
from .batching import Batcher
from .metrics import Metrics
from .settings import ServerSettings

LOG = logging.getLogger("blip2rt.server")


class Engine:
    """An open engine directory, and those who use it just now."""

    def __init__(self, pipe: Pipeline, settings: ServerSettings, metrics: Metrics):
        self.pipe = pipe
        self.name = pipe.manifest.name
        self.batcher = Batcher(pipe, settings.max_batch, settings.max_queue, metrics)
        self.users = 0


class Engines:
    """One engine at a time. All but opening happens in the event loop."""

    def __init__(
        self, path: str | Path, name: str | None, threads: int | None, settings: ServerSettings, metrics: Metrics
    ):
        """Open the engine.

        Raises:
            EngineError: as `Pipeline`.
        """
        self._path, self._name, self._threads = path, name, threads
        self._settings, self._metrics = settings, metrics
        self.current = self._open()
        self.is_ready = True
        self._retired: set[asyncio.Task[None]] = set()

    def _open(self) -> Engine:
        pipe = Pipeline(self._path, name=self._name, threads=self._threads)
        _ = pipe.generative_engine  # an error where there is none
        return Engine(pipe, self._settings, self._metrics)

    @contextmanager
    def use(self) -> Iterator[Engine]:
        """The engine of a request, from its first look at the picture to its last byte."""
        engine = self.current
        engine.users += 1
        try:
            yield engine
        finally:
            engine.users -= 1

    async def reload(self) -> None:
        """Open the engine directory again: requests under way end with the old engine, later ones have the new one.

        Where it cannot be opened, the old one stays.
        """
        try:
            new = await asyncio.to_thread(self._open)
        except Blip2rtError as error:
            LOG.error("the new engine cannot be opened, the old one stays: %s", error)
            self._metrics.reloads.labels("failed").inc()
            return
        old, self.current = self.current, new
        LOG.info("engine %s is open and answers from now on", new.name)
        self._metrics.reloads.labels("ok").inc()
        task = asyncio.create_task(self._retire(old))
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def _retire(self, engine: Engine) -> None:
        while engine.users:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.batcher.close)

    async def close(self) -> None:
        """Answer what was accepted, and end."""
        self.is_ready = False
        await asyncio.gather(*self._retired, self._retire(self.current))

"""The engine that answers now, and how another one takes its place without a dropped request."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Blip2rtError, EngineError
from ..gallery import Gallery
from ..generative import GenerativeEngine
from ..manifest import GENERATIVE, RETRIEVAL
from ..pipeline import Pipeline
from ..retrieval import RetrievalEngine
from .batching import Batcher
from .errors import HttpError
from .metrics import Metrics
from .settings import ServerSettings

LOG = logging.getLogger("blip2rt.server")


class Engine:
    """What is open: a generative engine, a retrieval engine or both, perhaps a gallery; and those who use it just now.

    Attributes:
        names: of the models, by kind; `name` is the first's.
    """

    def __init__(self, pipe: Pipeline, gallery: Gallery | None, settings: ServerSettings, metrics: Metrics):
        self.pipe = pipe
        self.names = {pipe.manifest.kind: pipe.manifest.name}
        with suppress(EngineError):
            self.names.setdefault(RETRIEVAL, pipe.retrieval_engine.manifest.name)
        self.name = pipe.manifest.name
        self._gallery = gallery
        self.batcher = Batcher(pipe, settings.max_batch, settings.max_queue, metrics)
        self.users = 0

    @property
    def generative(self) -> GenerativeEngine:
        """The engine that writes.

        Raises:
            HttpError: 400, there is none.
        """
        if GENERATIVE not in self.names:
            raise HttpError(400, f"{self.name} compares pictures with texts and writes none: ask a generative engine")
        return self.pipe.generative_engine

    @property
    def retrieval(self) -> RetrievalEngine:
        """The engine that compares.

        Raises:
            HttpError: 400, there is none.
        """
        if RETRIEVAL not in self.names:
            raise HttpError(
                400, f"{self.name} has no ITC and ITM heads: its operator can serve a retrieval engine beside it"
            )
        return self.pipe.retrieval_engine

    @property
    def gallery(self) -> Gallery:
        """The pictures that can be searched.

        Raises:
            HttpError: 404, the operator named none.
        """
        if self._gallery is None:
            raise HttpError(404, "this server has no gallery: its operator names one with --gallery DIR")
        return self._gallery


class Engines:
    """One engine at a time. All but opening happens in the event loop."""

    def __init__(
        self, path: str | Path, name: str | None, threads: int | None, settings: ServerSettings, metrics: Metrics
    ):
        """Open the engine.

        Raises:
            EngineError: as `Pipeline` and `Gallery`; the gallery is empty.
        """
        self._path, self._name, self._threads = path, name, threads
        self._settings, self._metrics = settings, metrics
        self.current = self._open()
        self.is_ready = True
        self._retired: set[asyncio.Task[None]] = set()

    def _open(self) -> Engine:
        pipe = Pipeline(self._path, name=self._name, threads=self._threads)
        gallery = None
        if self._settings.gallery is not None:
            gallery = Gallery(self._settings.gallery, pipe)
            if not len(gallery):
                raise EngineError(f"the gallery {gallery.path} is empty: add pictures to it with `blip2rt embed`")
        return Engine(pipe, gallery, self._settings, self._metrics)

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

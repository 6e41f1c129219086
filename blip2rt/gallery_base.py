"""What galleries of images and of texts share: a folder of embeddings, its one writer, its model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import numpy as np

from .errors import EngineError, InputError
from .gallery_store import GalleryStore, Header, Identifier, checked_ids
from .pipeline import Pipeline
from .retrieval import RetrievalEngine

Array = np.ndarray[Any, Any]

ADD_BATCH = 64  # that are embedded and committed together, and looked at together by ITM
RERANKED = 128  # candidates that ITM looks at: LAVIS's k_test
OPEN_WITH = {
    "images": "search it by text (`Gallery`, `blip2rt search TEXT`)",
    "texts": "search it by image (`TextGallery`, `blip2rt search --image FILE`)",
}


Method = TypeVar("Method", bound=Callable[..., Any])


def guarded(method: Method) -> Method:
    """A method of a gallery during which no other thread changes what is known of it."""

    @wraps(method)
    def alone(self: "GalleryBase", *arguments: Any, **options: Any) -> Any:
        with self.guard:
            return method(self, *arguments, **options)

    return cast(Method, alone)


class Ranking(NamedTuple):
    """What a search found, best first: of one query a list of ids and their scores, of several a list of each."""

    ids: Any
    scores: Any


class GalleryBase:
    """Embeddings on disk. One process may add and remove; any number may search."""

    HOLDS: ClassVar[str]  # "images" or "texts"

    def __init__(self, path: str | Path, pipeline: Pipeline | str | Path = "engines"):
        """Open a gallery, or, where there is none, name the place of a new one.

        Args:
            path: its folder.
            pipeline: a pipeline with a retrieval engine, or where its engines lie; opened when first needed.

        Raises:
            EngineError: damaged, newer than this program, of something else, or of another model than the pipeline that
                is given.
        """
        self._store = GalleryStore(Path(path))
        self._pipeline = pipeline
        self._check_kind()
        if isinstance(pipeline, Pipeline):
            self._check_model(pipeline)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._store.path

    @property
    def guard(self) -> AbstractContextManager[Any]:
        """Held by a thread whose calls must agree with each other: nothing changes for this object meanwhile."""
        return self._store.guard

    @property
    def ids(self) -> list[Identifier]:
        """Ids of all that it holds, in the order in which they were added."""
        with self.guard:
            self._store.refresh()
            return list(self._store.rows)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that embeds images and texts.

        Raises:
            EngineError: no retrieval engine there, or one of another model.
        """
        if not isinstance(self._pipeline, Pipeline):
            pipeline = Pipeline(self._pipeline)
            self._check_model(pipeline)
            self._pipeline = pipeline
        return self._pipeline

    @property
    def threads(self) -> int | None:
        """Cores that a search uses: the pipeline's, once it is open; None: all."""
        return self._pipeline.threads if isinstance(self._pipeline, Pipeline) else None

    @property
    def engine(self) -> RetrievalEngine:
        """The pipeline's retrieval engine."""
        return self.pipeline.retrieval_engine

    def close(self) -> None:
        """Let others write. Garbage collection and the end of the process do the same."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @guarded
    def remove(self, ids: Sequence[Identifier]) -> None:
        """Remove some.

        Raises:
            InputError: an id that is not there; nothing is removed then.
            EngineError: another process is writing.
        """
        identifiers = checked_ids(ids)
        self._store.lock()
        absent = [identifier for identifier in identifiers if identifier not in self._store.rows]
        if absent:
            raise InputError(f"not in the gallery: {', '.join(map(repr, absent[:10]))} ({len(absent)} ids)")
        self._store.remove(identifiers)

    def _lock(self) -> None:
        """Become the writer."""
        self._store.lock()
        self._check_kind()
        self._check_open_model()

    def _filled(self) -> Header:
        """The header of a gallery that holds something."""
        self._store.refresh()
        if self._store.header is None or not self._store.rows:
            raise EngineError(f"the gallery {self.path} is empty: add {self.HOLDS} with `add` or `blip2rt embed`")
        self._check_kind()
        self._check_open_model()
        return self._store.header

    def _check_open_model(self) -> None:
        """Another process may have begun the gallery, with another model, since this one was opened."""
        if isinstance(self._pipeline, Pipeline):
            self._check_model(self._pipeline)

    def _ids_of(self, rows: Array, k: int) -> list[list[Identifier]]:
        """The first k of rows [T, n] by id; only living rows are ever found."""
        return [[i for row in ranked[:k] if (i := self._store.ids[row]) is not None] for ranked in rows.tolist()]

    def _check_kind(self) -> None:
        holds = self._store.header.holds if self._store.header else self.HOLDS
        if holds != self.HOLDS:
            raise EngineError(
                f"{self.path} is a gallery of {holds}, not of {self.HOLDS}: {OPEN_WITH.get(holds, holds)}"
            )

    def _check_model(self, pipeline: Pipeline) -> None:
        expected = self._store.header.model_sha256 if self._store.header else None
        found = pipeline.retrieval_engine.manifest.source_sha256
        if expected not in (None, found):
            raise EngineError(
                f"{self.path} is a gallery of another model (checkpoint {str(expected)[:16]}..., this engine's is "
                f"{found[:16]}...): open it with the engine it was made with, or make it anew"
            )


def in_order(rows: Array, scores: Array) -> tuple[Array, Array]:
    """Rows and scores [T, k], best first; of equal scores the order stays."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def checked_count(name: str, value: Any, least: int) -> int:
    """A number that a caller gave.

    Raises:
        InputError: no whole number, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value

"""Pictures -> pixel values in worker processes, in order, ahead of the engines that wait for them."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

import numpy as np

from ..errors import ImageError
from ..manifest import ImageSpec
from ..preprocess import ImageSource, preprocess

Array = np.ndarray[Any, Any]
Pixels = tuple[Array, ...]  # pixel values [3, S, S] of a picture, for every engine that looks at it
Decoded = Pixels | str  # or why there are none
Entry = TypeVar("Entry")
CHUNK = 8  # pictures that go to a worker together
CHUNKS_AHEAD = 3  # for every worker


class Decoders:
    """Worker processes that decode. One that dies of a picture takes no other picture with it."""

    def __init__(self, specs: Sequence[ImageSpec], num_workers: int):
        """`specs`: what engines want of a picture; `num_workers`: processes; 0: decode in this one."""
        self._specs, self._num_workers = tuple(specs), num_workers
        self._pool = self._start(num_workers) if num_workers else None

    def run(self, entries: Iterable[tuple[Entry, ImageSource | None]]) -> Iterator[tuple[Entry, Decoded | None]]:
        """Entries in their order, with their pixel values for pictures; where there is no picture there is None."""
        ahead: deque[tuple[list[tuple[Entry, ImageSource | None]], Future[list[Decoded]] | None]] = deque()
        for chunk in _chunks(entries):
            ahead.append((chunk, self._submit([source for _, source in chunk if source is not None])))
            if len(ahead) > CHUNKS_AHEAD * self._num_workers:
                yield from self._collect(*ahead.popleft())
        while ahead:
            yield from self._collect(*ahead.popleft())

    def close(self) -> None:
        """End the workers."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, num_workers: int) -> ProcessPoolExecutor:
        # not by fork: the engines' threads would be missing in the child, with their locks held
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(num_workers, context, initializer=_die_with_the_parent)

    def _submit(self, sources: Sequence[ImageSource]) -> "Future[list[Decoded]] | None":
        if self._pool is None or not sources:
            return None
        try:
            return self._pool.submit(decode, self._specs, sources)
        except BrokenProcessPool:  # an earlier picture's doing, which `_collect` comes to in its turn
            self._pool = self._start(self._num_workers)
            return self._pool.submit(decode, self._specs, sources)

    def _collect(
        self, chunk: list[tuple[Entry, ImageSource | None]], future: "Future[list[Decoded]] | None"
    ) -> Iterator[tuple[Entry, Decoded | None]]:
        sources = [source for _, source in chunk if source is not None]
        try:
            decoded = iter(future.result() if future else decode(self._specs, sources))
        except BrokenProcessPool:  # by one of these, or by one of another chunk
            decoded = iter(self._decode_apart(sources))
        for entry, source in chunk:
            yield entry, None if source is None else next(decoded)

    def _decode_apart(self, sources: Sequence[ImageSource]) -> list[Decoded]:
        """In a process of their own, and if they kill this one as well, each in one of its own."""
        with self._start(1) as pool:
            try:
                return pool.submit(decode, self._specs, sources).result()
            except BrokenProcessPool:
                if len(sources) > 1:
                    return [found for source in sources for found in self._decode_apart([source])]
                return ["decoding it killed the process (out of memory, or a fault in a codec): replace it"]


def decode(specs: Sequence[ImageSpec], sources: Sequence[ImageSource]) -> list[Decoded]:
    """Pixel values of pictures, or the reasons why there are none. What a worker does."""
    decoded: list[Decoded] = []
    for source in sources:
        try:
            decoded.append(tuple(preprocess(source, spec.size, spec.mean, spec.std) for spec in specs))
        except ImageError as error:
            decoded.append(error.reason)
    return decoded


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _die_with_the_parent() -> None:
    """A worker would wait for work for ever if its parent was killed: the pipe's other end is open in itself, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait(exit_: Callable[[int], Any] = os._exit) -> None:
        connection.wait([parent.sentinel])
        exit_(1)

    threading.Thread(target=wait, daemon=True).start()

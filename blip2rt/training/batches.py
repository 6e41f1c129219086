"""Batches: threads decode the next pictures while the model works; bad ones are counted, named and passed over.

What a batch holds depends on the seed and the place in the stream alone, never on the threads or on where a training
was interrupted.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ..data.examples import BadRecords, Example
from ..errors import ImageError, InputError
from ..preprocess import Array
from .pictures import WHOLE, View, render
from .recipe import ImageRecipe
from .streams import Mixture
from .texts import BadExampleError, Batch, Row, Rows, stack

MOST_BAD = 1000  # in a row: then nothing good is to be expected


@dataclass(frozen=True)
class PictureReader:
    """Examples -> pixel values [3, S, S], or what is cached of the frozen image encoder, [N+1, Dv]."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    recipe: ImageRecipe
    cached: Callable[[str], Array | None] | None = None

    def __call__(self, example: Example, draw: np.random.Generator) -> tuple[str, Array, View]:
        """What it is called in a batch, its values, and the view they show.

        Raises:
            ImageError: the picture cannot be read.
        """
        assert example.image is not None
        if self.cached is not None:
            features = self.cached(example.id)
            if features is None:
                raise ImageError("it could not be read when the features were computed")
            return "image_features", features, WHOLE
        pixels, view = render(example.image, self.size, self.mean, self.std, self.recipe, draw)
        return "pixel_values", pixels, view


@dataclass(frozen=True)
class Step:
    """A batch, the names of its examples, and the streams' positions behind it."""

    batch: Batch
    names: list[str]
    positions: list[int]


class Batches:
    """An endless iterator of batches.

    Args:
        examples: where they come from.
        rows: what the stage makes of them.
        pictures: how it sees them; None: texts alone.
        batch_size: examples in a batch.
        seed, rank: with an example's place, what its random numbers come from.
        workers: threads; 0: none but the caller's.
        bad: what could not be used.
    """

    def __init__(
        self,
        examples: Mixture,
        rows: Rows,
        pictures: PictureReader | None,
        batch_size: int,
        seed: int,
        rank: int,
        workers: int,
        bad: BadRecords,
    ):
        self._examples, self._rows, self._pictures = examples, rows, pictures
        self._batch_size, self._seed, self._rank, self._bad = batch_size, seed, rank, bad
        self._pool = ThreadPoolExecutor(workers, "decode") if workers else None
        self._ahead = (2 * workers + batch_size) if workers else 1
        self._pending: deque[tuple[str, list[int], Future[Row | Exception] | Row | Exception]] = deque()

    def __next__(self) -> Step:
        rows: list[Row] = []
        names: list[str] = []
        num_bad = 0
        while len(rows) < self._batch_size:
            name, positions, row = self._next_row()
            if isinstance(row, BadExampleError | ImageError):
                self._bad.add(f"{name}: {row}")
                num_bad += 1
                if num_bad >= MOST_BAD:
                    raise InputError(f"{num_bad} records in a row cannot be used; {self._bad}")
                continue
            if isinstance(row, Exception):
                raise row
            num_bad = 0
            rows.append(row)
            names.append(name)
        batch = self._rows.batch(rows)
        for picture in ("pixel_values", "image_features"):
            if picture in rows[0]:
                batch[picture] = stack(rows, picture)
        return Step(batch, names, positions)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _next_row(self) -> tuple[str, list[int], Row | Exception]:
        while len(self._pending) < self._ahead:
            place, source, example = next(self._examples)
            arguments = (example, source, np.random.default_rng((self._seed, self._rank, place)))
            row = self._pool.submit(self._make, *arguments) if self._pool else self._make(*arguments)
            self._pending.append((example.id, self._examples.positions, row))
        name, positions, row = self._pending.popleft()
        return name, positions, row.result() if isinstance(row, Future) else row

    def _make(self, example: Example, source: int, draw: np.random.Generator) -> Row | Exception:
        try:
            if self._pictures is None:
                return self._rows.row(example, source, draw, WHOLE)
            kind, values, view = self._pictures(example, draw)
            return self._rows.row(example, source, draw, view) | {kind: values}
        except Exception as error:
            return error


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch where the model is."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

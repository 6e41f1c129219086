"""A cache in an array that can be indexed: of numpy in this memory, or of torch on a GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class ArrayCache:
    """Keys or values of a layer, [B, H, C, d]; see `Cache`.

    Attributes:
        array: where they lie now.
    """

    def __init__(self, zeros: Callable[[tuple[int, ...]], Any], array: Any):
        """A cache of what `array` holds; `zeros` makes another array of a shape."""
        self._zeros = zeros
        self.array = array

    def keep(self, images: Sequence[int]) -> None:
        """See `Cache`."""
        for to, image in enumerate(images):
            if to != image:
                self.array[to] = self.array[image]
        self.array = self.array[: len(images)]

    def grow(self, capacity: int, rows: int) -> None:
        """See `Cache`."""
        old = self.array
        self.array = self._zeros((*old.shape[:2], capacity, old.shape[3]))
        self.array[:, :, :rows] = old[:, :, :rows]

    def move_rows(self, image: int, rows: Array, to: int) -> None:
        """See `Cache`."""
        self.array[image, :, to : to + len(rows)] = self.array[image][:, rows]

"""The native pass of a search over a gallery (cosines.h); its twin in numpy is in gallery_scan.py."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from . import library_path, native_path

Array = np.ndarray[Any, Any]


def native_cosines(path: str | None = None) -> Callable[[Array], Callable[[Array], Array]] | None:
    """Queries [C, E] float32 -> rows [n, Q, E] float16 -> the largest product [n, C] of each row's vectors.

    It runs on the calling thread and lets other Python threads run. None: no library, or no such pass for this
    processor.

    Args:
        path: of the kernels, for tests; None: the best one.
    """
    file, name = library_path(), path or native_path()
    if file is None or name is None:
        return None
    run = getattr(
        ctypes.CDLL(str(file)), "blip2rt_cosines", None
    )  # None: a library that was built before there was one
    if run is None or run(name.encode(), None, *map(ctypes.c_size_t, (0, 0, 0)), None, ctypes.c_size_t(0), None):
        return None

    def prepare(queries: Array) -> Callable[[Array], Array]:
        columns = np.ascontiguousarray(queries, np.float32)
        count = ctypes.c_size_t(len(columns))

        def compare(half: Array) -> Array:
            rows = np.ascontiguousarray(half)
            found = np.empty((len(rows), len(columns)), np.float32)
            addresses = [ctypes.c_void_p(array.ctypes.data) for array in (rows, columns, found)]
            run(name.encode(), addresses[0], *map(ctypes.c_size_t, rows.shape), addresses[1], count, addresses[2])
            return found

        return compare

    return prepare

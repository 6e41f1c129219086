"""Embeddings as numpy reads them: embeddings.npy, float32 [N, ...], and ids.jsonl with the id of every row."""

from pathlib import Path
from typing import Any

import numpy as np

from .items import Item
from .sinks import AppendedFile, Row, Sink, json_line

HEADER_BYTES = 128  # room for every shape; the vectors behind it are aligned
MAGIC = b"\x93NUMPY\x01\x00"


class NpySink(Sink):
    """A file that `np.load(..., mmap_mode="r")` opens, at the end of every run and whenever it was killed."""

    def __init__(self, output: Path, state: Any):
        vectors, ids, shape = state or (0, 0, None)
        self._vectors = AppendedFile(output / "embeddings.npy", vectors)
        self._ids = AppendedFile(output / "ids.jsonl", ids)
        self._shape: tuple[int, ...] | None = shape and tuple(shape)  # of one row
        self._write_header()  # it may count rows that were cut off

    def write(self, item: Item, row: Row) -> None:
        vector = np.asarray(row["embedding"], "<f4")
        self._shape = vector.shape
        if not self._vectors.size:
            self._vectors.append(npy_header((0, *vector.shape)))
        self._vectors.append(vector.tobytes())
        self._ids.append(json_line(row["id"]))

    def _write_header(self) -> None:
        if self._shape is not None:
            rows = (self._vectors.size - HEADER_BYTES) // (4 * int(np.prod(self._shape)))
            self._vectors.rewrite_head(npy_header((rows, *self._shape)))

    def sync(self) -> None:
        self._write_header()
        self._vectors.sync()
        self._ids.sync()

    def state(self) -> Any:
        return [self._vectors.size, self._ids.size, self._shape]

    def close(self) -> None:
        self._vectors.close()
        self._ids.close()


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Of float32 in C order, format 1.0 (numpy.lib.format), always of HEADER_BYTES bytes."""
    described = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    length = HEADER_BYTES - len(MAGIC) - 2
    return MAGIC + length.to_bytes(2, "little") + described.ljust(length - 1) + b"\n"

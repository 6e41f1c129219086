"""Tensors -> a safetensors or a torch file, one at a time: no more than one of them is ever in memory."""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..model.weight_files import DTYPES

ROUNDED = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8"}  # types that no checkpoint has
ALIGNMENT = 64  # of torch's files, so that they can be mapped


@dataclass(frozen=True)
class Entry:
    """A tensor to write: what a file has to say of it beforehand, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def write(self, stream: BinaryIO | Any) -> None:
        """Its values, little-endian and row by row."""
        tensor = self.read()
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype)
        stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_safetensors(path: Path, entries: Mapping[str, Entry], advance: Callable[[], None]) -> None:
    """Write a `.safetensors` file; `advance` is called after every tensor."""
    names = {dtype: name for name, dtype in DTYPES.items()} | ROUNDED
    # the widest types first: then every tensor lies at a multiple of its type's size
    order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in order:
        entry = entries[key]
        end = offset + entry.num_bytes
        header[key] = {"dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for key in order:
            entries[key].write(stream)
            advance()


def write_torch(
    path: Path, wrapper: str, entries: Mapping[str, Entry], extra: Mapping[str, Any], advance: Callable[[], None]
) -> None:
    """Write what `torch.save({wrapper: tensors, **extra}, path)` would: a zip of a pickle and the values."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle({wrapper: _tensors(entries), **extra}))
        archive.writestr("archive/byteorder", "little")
        for i, entry in enumerate(entries.values()):
            info = zipfile.ZipInfo(f"archive/data/{i}")
            assert archive.fp is not None
            # a local header is 30 bytes, the name, this padding in an extra field, and 20 bytes of zip64 sizes
            start = archive.fp.tell() + 30 + len(info.filename) + 20 + 4
            padding = -start % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as stream:
                entry.write(stream)
            advance()
        archive.writestr("archive/version", "3\n")


@dataclass
class _Storage:
    """Stands for the values of a tensor, which lie in a record of their own."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass
class _Tensor:
    """Stands for a tensor in the pickle."""

    storage: _Storage
    shape: tuple[int, ...]


def _tensors(entries: Mapping[str, Entry]) -> OrderedDict[str, _Tensor]:
    return OrderedDict(
        (name, _Tensor(_Storage(str(i), entry.dtype, torch.Size(entry.shape).numel()), entry.shape))
        for i, (name, entry) in enumerate(entries.items())
    )


class _Pickler(pickle.Pickler):
    """Pickles the stand-ins as torch pickles tensors."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[value.dtype]
        return "storage", getattr(torch, kind), value.key, "cpu", value.numel

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Tensor):
            return NotImplemented
        stride = torch.empty(value.shape, device="meta").stride()
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (value.storage, 0, value.shape, stride, False, hooks)


def _pickle(content: Any) -> bytes:
    stream = BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()

"""Checkpoint -> the data file of a graph, one tensor at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from .lower import StoredWeight

# stored name and form of a weight -> its arrays by the end of their names
Written = dict[tuple[str, str], dict[str, ir.ExternalTensor]]
PAGE = 4096  # tensors begin on a page, so that the runtime can map each as it lies


def write_stage(
    model: ir.Model,
    weights: Sequence[StoredWeight],
    read: Callable[[str], torch.Tensor],
    path: Path,
    written: Written,
    stored_name: Callable[[str], str],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `path` (an .onnx file) and, beside it, those of its weights that no other stage has written.

    Args:
        model: the lowered graph.
        weights: what its initialisers are made of.
        read: parameter name -> float32 tensor.
        path: where the graph goes; the weights go to the same name with `.data`.
        written: where the weights of all stages so far lie, by stored name and form; added to.
        stored_name: parameter name -> the name under which stages share it.
        advance: called after every parameter, for a progress bar.
    """
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for stored in weights:
            key = stored_name(stored.parameter), stored.form
            if key not in written:
                written[key] = {
                    suffix: _append(stream, data.name, array)
                    for suffix, array in stored.convert(read(stored.parameter)).items()
                }
            for suffix, tensor in written[key].items():
                name = stored.parameter + suffix
                value = model.graph.initializers[name]
                assert value.shape == tensor.shape, (name, value.shape, tensor.shape)
                assert value.dtype == tensor.dtype, (name, value.dtype, tensor.dtype)
                value.const_value = _renamed(tensor, name)
            advance()
    ir.save(model, path)


def _append(stream: BinaryIO, file: str, array: np.ndarray[Any, Any]) -> ir.ExternalTensor:
    """Write an array to the end of a file, from the next page on."""
    offset = -stream.tell() % PAGE + stream.tell()
    stream.write(bytes(offset - stream.tell()))
    stream.write(array.reshape(-1).view(np.uint8).data)  # bytes: bfloat16 is no type of buffers
    dtype = ir.DataType.from_numpy(array.dtype)
    return ir.ExternalTensor(file, offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=file)


def _renamed(tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name)

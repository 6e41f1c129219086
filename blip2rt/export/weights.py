"""Checkpoint -> the data file of a graph, one tensor at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from .lower import StoredWeight

PAGE = 4096  # tensors begin on a page, so that the runtime can map each as it lies


def write_stage(
    model: ir.Model,
    weights: Sequence[StoredWeight],
    read: Callable[[str], torch.Tensor],
    path: Path,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `path` (an .onnx file) and, beside it, its weights.

    Args:
        model: the lowered graph.
        weights: what its initialisers are made of.
        read: parameter name -> float32 tensor.
        path: where the graph goes; the weights go to the same name with `.data`.
        advance: called after every parameter, for a progress bar.
    """
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for stored in weights:
            for name, array in stored.convert(read(stored.parameter)).items():
                offset = -stream.tell() % PAGE + stream.tell()
                stream.write(bytes(offset - stream.tell()))
                stream.write(array.data)
                value, dtype = model.graph.initializers[name], ir.DataType.from_numpy(array.dtype)
                assert value.shape == ir.Shape(array.shape), (name, value.shape, array.shape)
                assert value.dtype == dtype, (name, value.dtype, dtype)
                value.const_value = ir.ExternalTensor(
                    data.name, offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name
                )
            advance()
    ir.save(model, path)

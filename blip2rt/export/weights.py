"""Checkpoint -> the data file of a graph, one tensor at a time."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch

from .lower import StoredWeight

PAGE = 4096  # tensors begin on a page, so that the runtime can map each as it lies


def write_stage(
    model: ir.Model,
    weights: dict[str, StoredWeight],
    read: Callable[[str], torch.Tensor],
    path: Path,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `path` (an .onnx file) and, beside it, its weights.

    Args:
        model: the lowered graph.
        weights: what each initialiser is made of.
        read: parameter name -> float32 tensor.
        path: where the graph goes; the weights go to the same name with `.data`.
        advance: called after every tensor, for a progress bar.
    """
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for name, stored in weights.items():
            tensor = read(stored.parameter)
            tensor = (tensor.t() if stored.transposed else tensor).contiguous()
            offset = -stream.tell() % PAGE + stream.tell()
            stream.write(bytes(offset - stream.tell()))
            stream.write(tensor.numpy().data)
            value = model.graph.initializers[name]
            assert value.shape == ir.Shape(tensor.shape), (name, value.shape, tensor.shape)
            value.const_value = ir.ExternalTensor(
                data.name, offset, tensor.nbytes, ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name
            )
            advance()
    ir.save(model, path)

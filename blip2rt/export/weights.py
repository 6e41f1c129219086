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
    written: dict[tuple[str, bool], ir.ExternalTensor],
    stored_name: Callable[[str], str],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `path` (an .onnx file) and, beside it, those of its weights that no other stage has written.

    Args:
        model: the lowered graph.
        weights: what each initialiser is made of.
        read: parameter name -> float32 tensor.
        path: where the graph goes; the weights go to the same name with `.data`.
        written: where the weights of all stages so far lie, by stored name and whether they are transposed; added to.
        stored_name: parameter name -> the name under which stages share it.
        advance: called after every tensor, for a progress bar.
    """
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for name, stored in weights.items():
            key, value = (stored_name(stored.parameter), stored.transposed), model.graph.initializers[name]
            if key in written:
                value.const_value = _renamed(written[key], name)
                continue
            tensor = read(stored.parameter)
            tensor = (tensor.t() if stored.transposed else tensor).contiguous()
            offset = -stream.tell() % PAGE + stream.tell()
            stream.write(bytes(offset - stream.tell()))
            stream.write(tensor.numpy().data)
            assert value.shape == ir.Shape(tensor.shape), (name, value.shape, tensor.shape)
            written[key] = value.const_value = ir.ExternalTensor(
                data.name, offset, tensor.nbytes, ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name
            )
            advance()
    ir.save(model, path)


def _renamed(tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
    return ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name)

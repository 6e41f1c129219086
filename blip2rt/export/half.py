"""ONNX -> ONNX: a float32 graph becomes one of fp16 or bf16, for GPUs.

Strongly typed, as TensorRT 11 wants it: every float inside has the one type, the caches too. Pictures, masks,
embeddings and logits stay float32 at the edges, so that all backends bind the same arrays; so do unit vectors, from
their norm on. Normalisation layers add up in float32 by themselves (`stash_type`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..stages import KEYS_AND_VALUES, StageSpec, TensorSpec
from .lower import StoredWeight, constant

Convert = Callable[[torch.Tensor], Mapping[str, np.ndarray[Any, Any]]]

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NAMES = {"fp16": "float16", "bf16": "bfloat16"}  # as signatures write them
LEAST = {ir.DataType.FLOAT16: -65504.0, ir.DataType.BFLOAT16: -3.3895313892515355e38}  # numbers that are finite


def halve(model: ir.Model, precision: str, weights: Sequence[StoredWeight]) -> list[StoredWeight]:
    """Rewrite the graph in place.

    Args:
        model: the lowered graph.
        precision: "fp16" or "bf16".
        weights: what its initialisers are made of.

    Returns:
        The same, in the new type.
    """
    graph, dtype = model.graph, TYPES[precision]
    exact = _from_norms_on(graph)
    for value in [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]:
        if value.dtype != ir.DataType.FLOAT or value.producer() in exact:
            continue
        if value.const_value is None:
            value.type = ir.TensorType(dtype)  # types are shared: a new one for each
        elif not any(use.node in exact for use in value.uses()):
            value.type = ir.TensorType(dtype)
            value.const_value = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), name=value.name)
    for value in list(graph.inputs):
        if value.dtype == dtype and not str(value.name).startswith(KEYS_AND_VALUES):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            _cast_input(graph, value, dtype)
    for node in exact:
        for i, read in enumerate(node.inputs):
            if read is not None and read.dtype == dtype:
                cast = _cast(read, ir.DataType.FLOAT)
                graph.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])
    for i, value in enumerate(graph.outputs):
        if value.dtype == dtype and not str(value.name).startswith(KEYS_AND_VALUES):
            name, cast = value.name, _cast(value, ir.DataType.FLOAT)
            value.name = f"{name}_{precision}"
            graph.append(cast)
            graph.outputs[i] = cast.outputs[0]
            cast.outputs[0].name = name
    return [
        replace(stored, form=f"{stored.form} {precision}", convert=_rounded(stored.convert, dtype))
        for stored in weights
    ]


def half_spec(spec: StageSpec, precision: str) -> StageSpec:
    """The signature of a stage whose keys and values lie in fp16 or bf16."""

    def typed(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(replace(t, dtype=NAMES[precision]) if t.name.startswith(KEYS_AND_VALUES) else t for t in tensors)

    return StageSpec(typed(spec.inputs), typed(spec.outputs))


def _from_norms_on(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that make unit vectors, and all behind them."""
    found: list[ir.Node] = []
    for node in graph:
        if node.op_type == "ReduceL2" or any(v is not None and v.producer() in found for v in node.inputs):
            found.append(node)
    return found


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """An input as the graph computes with it; the least number of a mask stays finite."""
    uses, nodes = tuple(value.uses()), []
    source = value
    if str(value.name).endswith("mask"):
        least = constant(graph, f"half.least_{dtype.name}", np.float32(LEAST[dtype]))
        nodes.append(ir.node("Max", [value, least]))
        source = nodes[0].outputs[0]
        source.shape, source.type = value.shape, value.type
    nodes.append(_cast(source, dtype))
    graph.insert_before(graph[0], nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": dtype})
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(dtype)
    return cast


def _rounded(convert: Convert, dtype: ir.DataType) -> Convert:
    return lambda tensor: {suffix: array.astype(dtype.numpy()) for suffix, array in convert(tensor).items()}

"""ONNX -> ONNX: what the runtime should not have to do is done once, here.

Linear layers come out of torch as MatMul(x, Transpose(weight)). A weight that is used only so is stored transposed; the
token embedding, which is also looked up row by row, stays as it is and the output layer becomes Gemm(transB=1).
`quantize.py` goes on from there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch


@dataclass(frozen=True)
class StoredWeight:
    """How initialisers are made from one parameter.

    `convert` gives their contents by what their names have behind the parameter's; `form` tells apart what is made of
    one parameter in different ways.
    """

    parameter: str
    form: str
    convert: Callable[[torch.Tensor], Mapping[str, np.ndarray[Any, Any]]]


def lower(model: ir.Model, parameters: set[str]) -> list[StoredWeight]:
    """Rewrite the graph in place.

    Args:
        model: graph from `trace_stage`.
        parameters: names of the initialisers that are weights of the module.

    Returns:
        What these initialisers are to be filled with, in the order in which the graph uses them.
    """
    graph = model.graph
    transposed: set[str] = set()
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        weight, product = node.inputs[0], node.outputs[0]
        if weight is None or weight.name not in parameters:
            continue
        if len(weight.uses()) == 1:
            assert weight.shape is not None
            weight.shape = ir.Shape(list(reversed(weight.shape.dims)))
            transposed.add(weight.name)
            ir.convenience.replace_all_uses_with(product, weight)
        else:
            for use in tuple(product.uses()):
                _to_gemm(graph, use.node, weight)
        graph.remove(node, safe=True)
    _sort_inputs(graph, parameters)
    return [_as_it_is(name, name in transposed) for name in graph.initializers if name in parameters]


def _as_it_is(name: str, transposed: bool) -> StoredWeight:
    form = "transposed" if transposed else "plain"
    return StoredWeight(name, form, lambda tensor: {"": (tensor.t() if transposed else tensor).contiguous().numpy()})


def _to_gemm(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    """MatMul(x [M, D], Transpose(weight [V, D])) -> Gemm(x, weight, transB=1)."""
    if matmul.op_type != "MatMul":
        raise NotImplementedError(f"a shared weight feeds {matmul.op_type} {matmul.name} transposed")
    gemm = ir.node("Gemm", [matmul.inputs[0], weight], attributes={"transB": 1}, name=f"{matmul.name}_gemm")
    replace_node(graph, matmul, [gemm])


def replace_node(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; what the last of them gives has the old name, shape and type, and all its uses."""
    before, after = old.outputs[0], new[-1].outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def constant(graph: ir.Graph, name: str, content: np.ndarray[Any, Any] | np.generic) -> ir.Value:
    """A small initialiser inside the graph, one for all who ask for the name."""
    if name not in graph.initializers:
        tensor = ir.Tensor(np.asarray(content), name=name)
        graph.register_initializer(
            ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype)
            )
        )
    return graph.initializers[name]


def _sort_inputs(graph: ir.Graph, parameters: set[str]) -> None:
    """Put the weights into the order of their first use, so that a file is read from front to back."""
    order = {v.name: i for i, v in enumerate(v for node in graph for v in node.inputs if v is not None)}
    weights = sorted((name for name in graph.initializers if name in parameters), key=lambda name: order.get(name, 0))
    for name in weights:
        value = graph.initializers.pop(name)
        graph.initializers[name] = value

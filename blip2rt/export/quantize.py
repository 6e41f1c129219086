"""ONNX -> ONNX: linear layers over float weights become products of small integers.

A linear layer is a product with a weight of the module, whatever its name; which ones stay float32, and how many bits
the others get, is two tables below. Activations are rounded as the graph runs, with scales of their own for every row,
so no row depends on another: an answer stays the same alone and in any batch.

Two ways to run them. `native`: one operator of our own (`native/`), scales for every 128 inputs on both sides.
`stock`: ONNX Runtime's own operators, where the library is not built. 8 bits: one scale for every row and every output,
rounded in standard operators before `MatMulIntegerToFloat`; 4 bits: `MatMulNBits`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ..native import twin
from .lower import StoredWeight, constant, replace_node
from .rounding import round_weight

Array = np.ndarray[Any, Any]
RoundingOfOne = Callable[[Tensor, int, int], tuple[Array, Array]]  # as `round_weight`
Rounding = Callable[[str, Tensor, int, int], tuple[Array, Array]]  # the same, with the weight's name before

NATIVE_DOMAIN, STOCK_DOMAIN = "blip2rt", "com.microsoft"
NATIVE_VERSION = 2  # `kVersion` of the operators: raise both when an older library would compute a new graph wrongly

# (precision, stage, weight) -> bits, the first row that fits: 8, 4, or 32 for one that stays float32, as without a row.
# Convolutions, norms, embeddings and softmax are no linear layers and stay float32 anyway.
BITS = (
    ("*", "qformer", "projection.weight", 32),  # what the language model sees: 2 MB that spoil everything after them
    ("*", "*", "itc.weight", 32),
    ("*", "itm", "head.weight", 32),
    ("int4", "decoder", "embedding.token.weight", 8),  # the output layer: its error is that of the logits
    ("int4", "decoder", "head.lm_head.weight", 8),
    ("int4", "decoder", "*", 4),
    ("int4", "encoder", "*", 4),  # T5's, up to the keys and values of cross-attention
    ("int4", "*", "*", 8),
    ("int8", "*", "*", 8),
)


@dataclass(frozen=True)
class Linear:
    """x [..., K] times a weight: MatMul(x, [K, N]), or Gemm(x, [N, K], transB=1); with the Add of a bias after it."""

    node: ir.Node
    parameter: str
    outputs: int
    depth: int
    bias: tuple[ir.Node, ir.Value] | None


def quantize(
    model: ir.Model,
    stage: str,
    precision: str,
    weights: list[StoredWeight],
    kernels: str,
    rounding: Rounding = lambda _, *weight: round_weight(*weight),
) -> list[StoredWeight]:
    """Rewrite the linear layers of a lowered graph in place.

    Args:
        model: graph from `lower`.
        stage: its name, for the tables above.
        precision: of the engine.
        weights: what `lower` gave.
        kernels: "native" or "stock".
        rounding: what rounds a weight, by its name; as `round_weight` otherwise.

    Returns:
        What the initialisers are now to be filled with.
    """
    graph, rewritten = model.graph, {}
    for linear in list(find_linears(graph, {stored.parameter for stored in weights})):
        bits = bits_of(precision, stage, linear.parameter)
        if bits < 32:
            rewrite = _native if kernels == "native" else _stock8 if bits == 8 else _stock4
            rewritten[linear.parameter] = rewrite(graph, linear, bits, partial(rounding, linear.parameter))
            domain, version = (NATIVE_DOMAIN, NATIVE_VERSION) if kernels == "native" else (STOCK_DOMAIN, 1)
            graph.opset_imports[domain] = version
    result = []
    for stored in weights:
        value = graph.initializers[stored.parameter]
        if value.uses():  # a token embedding is looked up in float32 as well
            result.append(stored)
        else:
            del graph.initializers[stored.parameter]
        if stored.parameter in rewritten:
            result.append(rewritten[stored.parameter])
    return result


def bits_of(precision: str, stage: str, weight: str) -> int:
    """How many bits a weight gets, by the table above."""
    wanted = precision, stage, weight
    rows = (row[3] for row in BITS if all(map(fnmatch, wanted, row[:3])))
    return next(rows, 32)


def find_linears(graph: ir.Graph, parameters: set[str]) -> Iterator[Linear]:
    """Products with a weight of the module, in the graph's order."""
    for node in graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) != 2:
            continue
        weight = node.inputs[1]
        if weight is None or weight.name not in parameters or weight.shape is None or weight.shape.rank() != 2:
            continue
        sizes = weight.shape.numpy()
        outputs, depth = sizes if node.op_type == "Gemm" else reversed(sizes)
        uses = [use.node for use in node.outputs[0].uses()]
        add = uses[0] if len(uses) == 1 and uses[0].op_type == "Add" else None
        others = [v for v in add.inputs if v is not None and v is not node.outputs[0]] if add else []
        bias = next((v for v in others if v.name in parameters and v.shape == ir.Shape([outputs])), None)
        yield Linear(node, weight.name, outputs, depth, (add, bias) if add and bias else None)


def _native(graph: ir.Graph, linear: Linear, bits: int, rounding: RoundingOfOne) -> StoredWeight:
    """-> blip2rt.QuantizedMatMul(x, tiles, scales, bias), which also does what an activation behind it does"""
    name, outputs, depth = linear.parameter, linear.outputs, linear.depth
    tiles, groups = -(-outputs // twin.TILE), -(-depth // twin.GROUP)
    packed = _initializer(graph, f"{name}.tiles", (tiles, -(-depth // 8) * twin.TILE * bits), ir.DataType.UINT8)
    scales = _initializer(graph, f"{name}.scales", (tiles, groups, twin.TILE), ir.DataType.UINT16)
    nodes = [linear.node]
    if linear.bias:
        add, bias = linear.bias
        nodes.append(add)
    else:
        bias = constant(graph, f"{name}.no_bias", np.zeros(outputs, np.float32))
    activation = _activation(nodes[-1])
    if activation is not None:
        nodes.append(activation)
    number = list(twin.ACTIVATIONS).index(activation.op_type if activation else "")
    inputs = [linear.node.inputs[0], packed, scales, bias]
    attributes = {"N": outputs, "K": depth, "bits": bits, "activation": number}
    replace_node(graph, nodes[-1], [ir.node("QuantizedMatMul", inputs, attributes=attributes, domain=NATIVE_DOMAIN)])
    for node in reversed(nodes[:-1]):
        graph.remove(node, safe=True)

    def convert(weight: Tensor) -> Mapping[str, Array]:
        values, scale = rounding(weight, bits, twin.GROUP)
        return {".tiles": twin.pack_weight(values, bits), ".scales": twin.pack_scales(scale)}

    return StoredWeight(name, f"native {bits}", convert)


def _activation(node: ir.Node) -> ir.Node | None:
    """The activation that alone reads what a node gives, if the operator knows it."""
    (output,), uses = node.outputs, [use.node for use in node.outputs[0].uses()]
    if len(uses) != 1 or output.is_graph_output() or uses[0].domain or uses[0].op_type not in twin.ACTIVATIONS:
        return None
    approximate = uses[0].attributes.get("approximate")
    return uses[0] if approximate is None or approximate.as_string() == "none" else None


def _stock8(graph: ir.Graph, linear: Linear, bits: int, rounding: RoundingOfOne) -> StoredWeight:
    """-> x / s rounded to uint8, MatMulIntegerToFloat, times s; s [..., 1] is a row's largest magnitude over 127"""
    name = linear.parameter
    values = _initializer(graph, f"{name}.values", (linear.depth, linear.outputs), ir.DataType.INT8)
    scales = _initializer(graph, f"{name}.scales", (linear.outputs,), ir.DataType.FLOAT)
    one = constant(graph, "quantize.one", np.float32(1))
    middle = constant(graph, "quantize.middle", np.uint8(128))
    zero = constant(graph, f"{name}.zero", np.int8(0))  # its own: ONNX Runtime may turn both to unsigned
    least = constant(graph, "quantize.least", np.float32(1e-30))  # a row of zeros stays one
    levels = constant(graph, "quantize.levels", np.float32(127))
    last_axis = constant(graph, "quantize.last_axis", np.array([-1], np.int64))
    x = linear.node.inputs[0]
    magnitude = ir.node("Abs", [x])
    largest = ir.node("ReduceMax", [magnitude.outputs[0], last_axis], attributes={"keepdims": 1})
    positive = ir.node("Max", [largest.outputs[0], least])
    scale = ir.node("Div", [positive.outputs[0], levels])
    scaled = ir.node("Div", [x, scale.outputs[0]])
    rounded = ir.node("QuantizeLinear", [scaled.outputs[0], one, middle])
    product = ir.node(
        "MatMulIntegerToFloat", [rounded.outputs[0], values, one, scales, middle, zero], domain=STOCK_DOMAIN
    )
    result = ir.node("Mul", [product.outputs[0], scale.outputs[0]])
    replace_node(graph, linear.node, [magnitude, largest, positive, scale, scaled, rounded, product, result])

    def convert(weight: Tensor) -> Mapping[str, Array]:
        rounded, scale = rounding(weight, bits, weight.shape[1])
        return {".values": np.ascontiguousarray(rounded.T), ".scales": scale[:, 0]}

    return StoredWeight(name, "stock 8", convert)


def _stock4(graph: ir.Graph, linear: Linear, bits: int, rounding: RoundingOfOne) -> StoredWeight:
    """-> com.microsoft.MatMulNBits with blocks of 128 and activations in 8 bits, the fastest of its variants

    It computes one row another way than the same row among others, so a row of zeros goes along.
    """
    name, block = linear.parameter, twin.GROUP
    groups = -(-linear.depth // block)
    values = _initializer(graph, f"{name}.values", (linear.outputs, groups, block // 2), ir.DataType.UINT8)
    scales = _initializer(graph, f"{name}.scales", (linear.outputs, groups), ir.DataType.FLOAT)
    sizes = {"N": linear.outputs, "K": linear.depth, "bits": bits, "block_size": block, "accuracy_level": 4}
    zeros = constant(graph, f"quantize.zeros_{linear.depth}", np.zeros((1, linear.depth), np.float32))
    rows_of = constant(graph, f"quantize.rows_of_{linear.depth}", np.array([-1, linear.depth], np.int64))
    width = constant(graph, f"quantize.width_{linear.outputs}", np.array([linear.outputs], np.int64))
    first, last = (constant(graph, f"quantize.index_{i}", np.array([i], np.int64)) for i in (0, -1))
    x = linear.node.inputs[0]
    rows = ir.node("Reshape", [x, rows_of])
    padded = ir.node("Concat", [rows.outputs[0], zeros], attributes={"axis": 0})
    product = ir.node("MatMulNBits", [padded.outputs[0], values, scales], attributes=sizes, domain=STOCK_DOMAIN)
    wanted = ir.node("Slice", [product.outputs[0], first, last, first])
    batch = ir.node("Shape", [x], attributes={"end": -1})
    shape = ir.node("Concat", [batch.outputs[0], width], attributes={"axis": 0})
    result = ir.node("Reshape", [wanted.outputs[0], shape.outputs[0]])
    replace_node(graph, linear.node, [rows, padded, product, wanted, batch, shape, result])

    def convert(weight: Tensor) -> Mapping[str, Array]:
        rounded, scale = rounding(weight, bits, block)
        padded = np.full((linear.outputs, groups * block), 8, np.uint8)
        padded[:, : linear.depth] = rounded + np.int8(8)
        nibbles = (padded[:, 0::2] | padded[:, 1::2] << 4).reshape(linear.outputs, groups, block // 2)
        return {".values": nibbles, ".scales": scale}

    return StoredWeight(name, "stock 4", convert)


def _initializer(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    """An initialiser whose content `write_stage` will give."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.initializers.add(value)
    return value

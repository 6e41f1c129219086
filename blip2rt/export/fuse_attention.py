"""ONNX -> ONNX: attention becomes operators of our own (`native/cached_attention.h`, `native/quantized_attention.h`).

A graph from torch splits the rows into queries, keys and values, turns each around, attends and turns the result back.
The operators take the rows as the linear layer gives them. Over a cache, torch's graph also scatters the new keys
and values into it and attends over its whole capacity; the operator reads only the cached rows that somebody sees.
Where all rows see each other, as in the image encoder, the products can be in 8 bits.
"""

import onnx_ir as ir

from .lower import replace_node
from .quantize import NATIVE_DOMAIN, NATIVE_VERSION


def fuse_attention(graph: ir.Graph, in_8_bits: bool) -> None:
    """Rewrite every attention over a cache in place, and with `in_8_bits` those without cache and mask; others stay."""
    for attention in [node for node in graph if node.op_type == "Attention"]:
        turned = _only_use(attention, "Transpose")
        joined = _only_use(turned, "Reshape") if turned is not None else None
        if turned is None or joined is None:
            continue
        scatters = [s for value in attention.inputs[1:3] if (s := _producer(value, "TensorScatter")) is not None]
        new = [scatter.inputs[1] for scatter in scatters] or attention.inputs[1:3]
        rows = _split_rows([attention.inputs[0], *new])
        if rows is None:
            continue
        attributes = {"scale": _scale(attention)}
        if len(scatters) == 2:
            key, value = scatters
            inputs = [rows, key.inputs[0], value.inputs[0], attention.inputs[3], key.inputs[2]]
            fused = ir.node("CachedAttention", inputs, attributes=attributes, num_outputs=3, domain=NATIVE_DOMAIN)
            for scatter, cache in ((key, fused.outputs[1]), (value, fused.outputs[2])):
                present = scatter.outputs[0]
                cache.name, cache.shape, cache.type = present.name, present.shape, present.type
                ir.convenience.replace_all_uses_with(present, cache, replace_graph_outputs=True)
        elif in_8_bits and not scatters and _sees_everything(attention):
            attributes |= {"heads": _heads_and_width(attention)[0]}
            fused = ir.node("QuantizedAttention", [rows], attributes=attributes, domain=NATIVE_DOMAIN)
        else:
            continue
        replace_node(graph, joined, [fused])
        graph.opset_imports[NATIVE_DOMAIN] = NATIVE_VERSION
        _remove_unused(graph, [turned, *scatters])


def _scale(attention: ir.Node) -> float:
    scale = attention.attributes.get("scale")
    return scale.as_float() if scale else _heads_and_width(attention)[1] ** -0.5


def _heads_and_width(attention: ir.Node) -> tuple[int, int]:
    heads = attention.inputs[0]
    assert heads is not None
    assert heads.shape is not None
    _, number, _, width = heads.shape
    assert isinstance(number, int)
    assert isinstance(width, int)
    return number, width


def _sees_everything(attention: ir.Node) -> bool:
    """Neither a mask nor an order of the rows nor a cap on the scores."""
    options = [attention.attributes.get(name) for name in ("is_causal", "softcap")]
    return len([v for v in attention.inputs if v is not None]) == 3 and not any(o and o.value for o in options)


def _split_rows(heads: list[ir.Value | None]) -> ir.Value | None:
    """The rows [B, S, 3*H*d] that queries, keys and values [B, H, S, d] were split from, in this order."""
    rows = [_rows_of(head) for head in heads]
    split = rows[0].producer() if rows[0] is not None else None
    return split.inputs[0] if split is not None and split.op_type == "Split" and list(split.outputs) == rows else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _only_use(node: ir.Node, op_type: str) -> ir.Node | None:
    """The one node that takes what `node` gives."""
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def _rows_of(heads: ir.Value | None) -> ir.Value | None:
    """The rows [B, S, H*d] that Reshape and Transpose have made heads [B, H, S, d] of."""
    transpose = _producer(heads, "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    return reshape.inputs[0] if reshape is not None else None


def _remove_unused(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Remove nodes that nobody needs, and then those that only they needed."""
    waiting: list[ir.Node] = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        producers = [v.producer() for v in node.inputs if v is not None]
        graph.remove(node, safe=True)
        waiting += [producer for producer in producers if producer is not None]

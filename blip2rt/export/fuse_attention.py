"""ONNX -> ONNX: attention over a cache becomes one operator of our own (`native/cached_attention.h`).

A graph from torch splits the rows into queries, keys and values, turns each around, scatters two of them into the
caches, attends over their whole capacity and turns the result back: eleven operators, whose cost is that of the
capacity. The operator takes the rows as the linear layer gives them and reads only the cached rows that somebody sees.
"""

import onnx_ir as ir

from .lower import replace_node
from .quantize import NATIVE_DOMAIN


def fuse_attention(graph: ir.Graph) -> None:
    """Rewrite every attention over a cache, in place; others stay as they are."""
    for attention in [node for node in graph if node.op_type == "Attention"]:
        scatters = [_producer(value, "TensorScatter") for value in attention.inputs[1:3]]
        turned = _only_use(attention, "Transpose")
        joined = _only_use(turned, "Reshape") if turned is not None else None
        key, value = scatters
        if key is None or value is None or turned is None or joined is None:
            continue
        rows = [_rows_of(head) for head in (attention.inputs[0], key.inputs[1], value.inputs[1])]
        split = rows[0].producer() if rows[0] is not None else None
        if split is None or split.op_type != "Split" or list(split.outputs) != rows:
            continue
        mask, scale = attention.inputs[3], attention.attributes.get("scale")
        heads = attention.inputs[0]
        assert heads is not None
        assert heads.shape is not None
        width = heads.shape[-1]
        assert isinstance(width, int)
        fused = ir.node(
            "CachedAttention",
            [split.inputs[0], key.inputs[0], value.inputs[0], mask, key.inputs[2]],
            attributes={"scale": scale.as_float() if scale else width**-0.5},
            num_outputs=3,
            domain=NATIVE_DOMAIN,
        )
        for scatter, cache in ((key, fused.outputs[1]), (value, fused.outputs[2])):
            present = scatter.outputs[0]
            cache.name, cache.shape, cache.type = present.name, present.shape, present.type
            ir.convenience.replace_all_uses_with(present, cache, replace_graph_outputs=True)
        replace_node(graph, joined, [fused])
        graph.opset_imports[NATIVE_DOMAIN] = 1
        _remove_unused(graph, [turned, key, value])


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

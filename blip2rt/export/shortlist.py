"""ONNX -> ONNX: a decoder for a GPU also gives the likeliest tokens of each row, so that no logits leave the device."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..stages import StageSpec, TensorSpec
from .lower import constant

SIZE = 64  # tokens of a row: beams need twice their number; a search that wants more takes the logits


def add_shortlist(graph: ir.Graph, spec: StageSpec) -> StageSpec:
    """Append the outputs `best_tokens` and `best_logprobs` [B, R, n], best first; the signature with them.

    Args:
        graph: of a decoder, with float32 `logits`.
        spec: its signature.
    """
    logits = graph.outputs[0]
    assert logits.shape is not None
    *rows, vocab_size = spec.outputs[0].shape
    size = min(SIZE, int(vocab_size))
    logprobs = ir.node("LogSoftmax", [logits], attributes={"axis": -1})
    k = constant(graph, "shortlist.size", np.array([size], np.int64))
    best = ir.node("TopK", [logprobs.outputs[0], k], attributes={"axis": -1}, num_outputs=2)
    logprobs.outputs[0].shape, logprobs.outputs[0].type = logits.shape, logits.type
    added = (
        TensorSpec("best_logprobs", "float32", (*rows, size)),
        TensorSpec("best_tokens", "int64", (*rows, size)),
    )
    for value, tensor, dtype in zip(best.outputs, added, (ir.DataType.FLOAT, ir.DataType.INT64), strict=True):
        value.name, value.shape, value.dtype = tensor.name, ir.Shape(tensor.shape), dtype
        graph.outputs.append(value)
    graph.extend([logprobs, best])
    return replace(spec, outputs=(*spec.outputs, *added))

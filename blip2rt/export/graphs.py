"""Reference model -> ONNX graphs, without weights.

The modules are traced on the meta device, so a graph costs neither the memory nor the time of its weights. Initialisers
keep the names of the parameters; `weights.py` fills them afterwards. The residual stream between two blocks is named
`hidden_<i>`: that is where `verify.py` cuts a stage that is larger than the memory. So are the tensors of `PASSED_ON`.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.values import Opset
from torch import nn

from ..model.t5 import relative_bucket
from ..stages import StageSpec, TensorSpec
from .repeat import CACHED, repeat_blocks, shorten

OPSET = 24  # the first with TensorScatter
TRACE_SIZES = {
    "B": 2,
    "S": 3,
    "C": 5,
    "R": 4,
    "E": 6,
    "L": 7,
}  # all different and none 1, which torch would take for a constant
PASSED_ON = {"relative_bias": "attention_bias", "norm": "encoder_output"}  # what these parts give to others

_opset = Opset("", OPSET)


def trace_stage(module: nn.Module, spec: StageSpec) -> ir.Model:
    """ONNX graph of a stage module that lies on the meta device; its initialisers have shapes but no values."""
    short = shorten(module, spec)
    traced = short.spec.inputs
    example = [_example(tensor) for tensor in traced]
    dynamic = [{axis: size for axis, size in enumerate(t.shape) if isinstance(size, str)} for t in traced]
    num_named = len([t for t in traced if not CACHED.fullmatch(t.name)])  # the rest: *caches
    shapes = (*dynamic[:num_named], *([tuple(dynamic[num_named:])] if len(dynamic) > num_named else []))
    with _quiet():
        program = torch.onnx.export(
            short.module.eval(),
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            custom_translation_table={
                torch.ops.blip2rt.write_cache.default: _write_cache,
                torch.ops.blip2rt.relative_bucket.default: _relative_bucket,
            },
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = program.model
        parameters = dict(short.module.named_parameters())
        for name, value in model.graph.initializers.items():
            if name in parameters:
                value.const_value = None  # a meta tensor, which the optimiser would try to fold
        optimize_ir(model)
    graph = model.graph
    _name_hidden_states(graph)
    for values, tensors in ((graph.inputs, traced), (graph.outputs, short.spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            if not str(value.name).startswith("hidden_"):
                value.name = tensor.name
    repeat_blocks(graph, spec, short)
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name
            value.shape = ir.Shape(tensor.shape)
    return model


def _write_cache(cache, rows, write_indices):  # type: ignore[no-untyped-def]  # onnxscript traces values of its own
    return _opset.TensorScatter(cache, rows, write_indices, axis=-2)


def _relative_bucket(distance, num_buckets, max_distance, bidirectional):  # type: ignore[no-untyped-def]
    """A table of the buckets of all distances that have different ones."""
    distances = torch.arange(-max_distance, max_distance + 1)
    table = relative_bucket(distances, num_buckets, max_distance, bidirectional)
    low, high = (_opset.Constant(value=ir.tensor(np.array(limit))) for limit in (-max_distance, max_distance))
    index = _opset.Add(_opset.Clip(distance, low, high), high)
    return _opset.Gather(_opset.Constant(value=ir.tensor(table.numpy())), index)


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [TRACE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.empty(shape, dtype=getattr(torch, tensor.dtype), device="meta")


def _name_hidden_states(graph: ir.Graph) -> None:
    """Name the float tensors that pass from one part of a stage to another, so that the graph can be cut there."""
    parts: dict[ir.Node, str] = {}
    for node in graph:
        parts[node] = _part(node, parts)
    for node in graph:
        for value in node.outputs:
            entered = {parts[use.node] for use in value.uses()} - {parts[node]}
            if value.dtype != ir.DataType.FLOAT or not entered:
                continue
            if parts[node] in PASSED_ON:
                value.name = PASSED_ON[parts[node]]
            elif value.shape is not None and value.shape.rank() != 3:
                continue  # a mask of all blocks, which the optimiser computes in the first
            elif parts[node].startswith("blocks."):
                value.name = f"hidden_{int(parts[node].removeprefix('blocks.')) + 1}"
            elif "blocks.0" in entered:
                value.name = "hidden_0"


def _part(node: ir.Node, known: Mapping[ir.Node, str]) -> str:
    """The child of the stage's module that a node comes from: "embedding", "blocks.3", ..."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:  # nodes that the optimiser made have no scope of their own
        producers = [v.producer() for v in node.inputs if v is not None]
        return next((known[p] for p in producers if p is not None and p in known), "")
    return ([part.strip("' ") for part in scopes.strip("[]").split(",")] + [""])[1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch and onnxscript talk about absent torchvision and unfolded constants; neither concerns the caller."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

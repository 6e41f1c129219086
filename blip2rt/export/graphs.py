"""Reference model -> ONNX graphs, without weights.

The modules are traced on the meta device, so a graph costs neither the memory nor the time of its weights. Initialisers
keep the names of the parameters; `weights.py` fills them afterwards. The residual stream between two blocks is named
`hidden_<i>`: that is where `verify.py` cuts a stage that is larger than the memory.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.values import Opset
from torch import nn

from ..model.config import Blip2Config
from ..stages import DECODER, QFORMER, VISION, StageSpec, TensorSpec, decoder_spec, qformer_spec, vision_spec

OPSET = 24  # the first with TensorScatter
TRACE_SIZES = {"B": 2, "S": 3, "C": 5, "R": 4}  # all different and none 1, which torch would take for a constant

_opset = Opset("", OPSET)


def stage_specs(config: Blip2Config) -> dict[str, StageSpec]:
    """The signature of every stage of a model of these sizes."""
    vision, text = config.vision, config.text
    return {
        VISION: vision_spec(vision.image_size, vision.num_tokens, vision.hidden_size),
        QFORMER: qformer_spec(
            vision.num_tokens,
            vision.hidden_size,
            config.num_query_tokens,
            config.qformer.hidden_size,
            text.hidden_size,
        ),
        DECODER: decoder_spec(
            text.num_hidden_layers,
            text.num_attention_heads,
            text.hidden_size // text.num_attention_heads,
            text.hidden_size,
            text.vocab_size,
        ),
    }


def trace_stage(module: nn.Module, spec: StageSpec) -> ir.Model:
    """ONNX graph of a stage module that lies on the meta device; its initialisers have shapes but no values."""
    example = [_example(tensor) for tensor in spec.inputs]
    dynamic = [{axis: size for axis, size in enumerate(t.shape) if isinstance(size, str)} for t in spec.inputs]
    num_named = len([name for name in spec.inputs if not name.name.startswith("past_")])
    shapes = (*dynamic[:num_named], *([tuple(dynamic[num_named:])] if len(dynamic) > num_named else []))
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            custom_translation_table={torch.ops.blip2rt.write_cache.default: _write_cache},
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = program.model
        parameters = dict(module.named_parameters())
        for name, value in model.graph.initializers.items():
            if name in parameters:
                value.const_value = None  # a meta tensor, which the optimiser would try to fold
        optimize_ir(model)
    _name_hidden_states(model.graph)
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name
            value.shape = ir.Shape(tensor.shape)
    return model


def _write_cache(cache, rows, write_indices):  # type: ignore[no-untyped-def]  # onnxscript traces values of its own
    return _opset.TensorScatter(cache, rows, write_indices, axis=-2)


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [TRACE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.empty(shape, dtype=getattr(torch, tensor.dtype), device="meta")


def _name_hidden_states(graph: ir.Graph) -> None:
    """Name what enters block i `hidden_<i>`: the one float tensor that leaves the part of the graph before it."""
    scope: dict[ir.Node, str] = {}
    for node in graph:
        modules = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        block = next((m.strip("' ") for m in modules.strip("[]").split(",") if m.strip("' ").startswith("blocks.")), "")
        if block:
            scope[node] = ".".join(block.split(".")[:2])
        else:  # nodes that the optimiser made have no scope of their own
            producers = [v.producer() for v in node.inputs if v is not None and v.producer() in scope]
            first = producers[0] if producers and "pkg.torch.onnx.name_scopes" not in node.metadata_props else None
            scope[node] = scope[first] if first else modules
    for node in graph:
        for value in node.outputs:
            entered = {scope[use.node] for use in value.uses() if scope[use.node] != scope[node]}
            blocks = sorted(int(name.split(".")[1]) for name in entered if name.startswith("blocks."))
            if value.dtype == ir.DataType.FLOAT and blocks:
                value.name = f"hidden_{blocks[0]}"
            elif value.dtype == ir.DataType.FLOAT and entered and scope[node].startswith("blocks."):
                value.name = f"hidden_{int(scope[node].split('.')[1]) + 1}"


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

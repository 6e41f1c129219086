"""Attention over a cache as one operator: against the graph it was made of, and its caches in place."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from test_repeat import OPT, QFORMER_SIZES, T5, VISION

from blip2rt.backends.ort import session_options
from blip2rt.export.fuse_attention import fuse_attention
from blip2rt.export.graphs import trace_stage
from blip2rt.export.lower import lower
from blip2rt.export.pieces import IR_VERSION
from blip2rt.export.quantize import NATIVE_VERSION
from blip2rt.export.verify import _decoder_inputs
from blip2rt.model import Blip2, Blip2Config
from blip2rt.model.config import OPTConfig, T5Config
from blip2rt.model.signatures import stage_specs
from blip2rt.native import library_path, twin
from blip2rt.stages import DECODER, StageSpec

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(library_path() is None, reason="the native kernels were not built: no C++ compiler")


def decoder(text: OPTConfig | T5Config) -> tuple[ir.Model, StageSpec, dict[str, Array]]:
    """A lowered decoder with random weights, its signature, and inputs."""
    config = Blip2Config(VISION, QFORMER_SIZES, text, num_query_tokens=5)
    with torch.device("meta"):
        module = Blip2(config).get_submodule(DECODER)
    spec = stage_specs(config)[DECODER]
    model = trace_stage(module, spec)
    lower(model, {name for name, _ in module.named_parameters()})
    fill_weights(model)
    return model, spec, _decoder_inputs(spec, config)


def fill_weights(model: ir.Model) -> None:
    """Random weights for a graph from `lower`."""
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            values = rng.normal(0, 0.3, tuple(value.shape.numpy())).astype(np.float32)
            value.const_value = ir.tensor(values, name=name)


def session_of(model: ir.Model) -> ort.InferenceSession:
    proto = ir.to_proto(ir.Model(model.graph, ir_version=IR_VERSION)).SerializeToString()
    return ort.InferenceSession(proto, session_options(2), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("text", [OPT, T5], ids=["opt", "t5"])
def test_equals_the_graph_it_was_made_of(text: OPTConfig | T5Config) -> None:
    """OPT's one mask for all heads and T5's bias for each; cross-attention stays; so do the caches, to the bit."""
    model, spec, inputs = decoder(text)
    expected = session_of(model).run(None, inputs)
    before = [node.op_type for node in model.graph]
    fuse_attention(model.graph, in_8_bits=False)
    after = [node.op_type for node in model.graph]
    blocks = text.num_decoder_layers if isinstance(text, T5Config) else text.num_hidden_layers
    assert after.count("CachedAttention") == before.count("TensorScatter") // 2 == blocks
    assert after.count("Attention") == (blocks if isinstance(text, T5Config) else 0)
    assert not {"TensorScatter", "Split"} & set(after)
    found = session_of(model).run(None, inputs)
    for tensor, one, other in zip(spec.outputs, found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=tensor.name)


def operator(heads: int, width: int, scale: float) -> ort.InferenceSession:
    """A session whose graph is the operator alone."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    cache: list[int | str] = ["B", heads, "C", width]
    shapes: dict[str, list[int | str]] = {
        "rows": ["B", "S", 3 * heads * width],
        "key": cache,
        "value": cache,
        "mask": ["B", "M", "S", "C"],
    }
    inputs = [ir.Value(name=name, shape=ir.Shape(shape), type=float32) for name, shape in shapes.items()]
    inputs.append(ir.Value(name="write_indices", shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.INT64)))
    node = ir.node("CachedAttention", inputs, attributes={"scale": scale}, num_outputs=3, domain="blip2rt")
    for output, name in zip(node.outputs, ("joined", "present_key", "present_value"), strict=True):
        output.name, output.type = name, float32
        output.shape = ir.Shape(["B", "S", heads * width]) if name == "joined" else ir.Shape(cache)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24, "blip2rt": NATIVE_VERSION})
    return session_of(ir.Model(graph, ir_version=IR_VERSION))


def problem() -> dict[str, Array]:
    """Two images, three heads of 20 values, four new rows in caches of 12."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 4, 180), dtype=np.float32)
    key, value = rng.standard_normal((2, 2, 3, 12, 20), dtype=np.float32)
    mask = np.where(rng.random((2, 1, 4, 12)) < 0.5, np.float32(0), np.finfo(np.float32).min)
    return {"rows": rows, "key": key, "value": value, "mask": mask, "write_indices": np.array([8, 3])}


def test_caches_in_place_or_copied() -> None:
    """Where a cache goes out in the buffer that it came in, and where it does not, in ONNX Runtime's threads."""
    inputs, session = problem(), operator(3, 20, 0.5)
    expected = twin.cached_attention(0.5, *inputs.values())
    before = inputs["key"].copy()
    for found, wanted in zip(session.run(None, inputs), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(inputs["key"], before)
    joined = np.empty((2, 4, 60), np.float32)
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    outputs = {"joined": joined, "present_key": inputs["key"], "present_value": inputs["value"]}
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    for found, wanted in zip(outputs.values(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_refuses_what_does_not_fit() -> None:
    """Else it would read or write beyond its buffers."""
    session, inputs = operator(3, 20, 0.5), problem()
    for start in (-1, 9):
        with pytest.raises(Exception, match="beyond its cache"):
            session.run(None, inputs | {"write_indices": np.array([0, start])})
    wrong = {
        "mask": inputs["mask"][:, :, :, :11],
        "value": inputs["value"][:, :, :11],
        "rows": inputs["rows"][:, :3],
        "write_indices": np.array([0]),
    }
    for name, array in wrong.items():
        with pytest.raises(Exception, match="do not fit together"):
            session.run(None, inputs | {name: np.ascontiguousarray(array)})

"""Attention in 8 bits: kernel against twin, twin against softmax, graph against the one it was made of."""

import ctypes
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fuse_attention import fill_weights, session_of
from test_repeat import OPT, QFORMER_SIZES, VISION

from blip2rt.export.fuse_attention import fuse_attention
from blip2rt.export.graphs import trace_stage
from blip2rt.export.lower import lower
from blip2rt.export.pieces import IR_VERSION
from blip2rt.export.quantize import NATIVE_VERSION
from blip2rt.model import Blip2, Blip2Config
from blip2rt.model.signatures import stage_specs
from blip2rt.native import PATHS, library_path, twin

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(library_path() is None, reason="the native kernels were not built: no C++ compiler")


def kernel(path: str, scale: float, heads: int, qkv: Array) -> Array:
    """The library's attention, without ONNX Runtime."""
    library = ctypes.CDLL(str(library_path()))
    images, rows, channels = qkv.shape
    joined = np.full((images, rows, channels // 3), np.float32(7e7))
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (qkv, joined)]
    sizes = [ctypes.c_size_t(n) for n in (images, rows, heads, channels // 3 // heads)]
    status = library.blip2rt_quantized_attention(path.encode(), *addresses, *sizes, ctypes.c_float(scale))
    if status == 1:
        pytest.skip(f"this processor cannot run the {path} path")
    assert status == 0
    return joined


def problem(seed: int, images: int, rows: int, heads: int, width: int) -> Array:
    """qkv from flat to sharp attention, channels and rows that stand out, heads of zeros."""
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((images, rows, 3, heads, width), dtype=np.float32)
    qkv *= np.float32(10.0) ** rng.uniform(-2, 1, (images, 1, 3, heads, 1)).astype(np.float32)
    qkv[:, :, :, :, rng.random(width) < 0.1] *= 30
    qkv[:, rng.random(rows) < 0.1] *= 10
    qkv[:, :, 1, :, rng.random(width) < 0.2] += 50  # what all keys have in common
    qkv[rng.random((images, rows, 3, heads)) < 0.05] = 0
    return qkv.reshape(images, rows, -1)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.integers(1, 90))
@example(0, 1, 257, 2, 88)  # ViT-g
@example(0, 1, 1030, 1, 8)  # more rows than a sum holds
@example(0, 1, 6, 1, 600)
def test_kernel_equals_twin(path: str, seed: int, images: int, rows: int, heads: int, width: int) -> None:
    """Catches a saturating sum, another order, a fused operation, lanes behind the last row, what was left behind."""
    qkv = problem(seed, images, rows, heads, width)
    expected = twin.quantized_attention(width**-0.5, heads, qkv)
    np.testing.assert_array_equal(kernel(path, width**-0.5, heads, qkv), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-38, 3e38])
@pytest.mark.parametrize("of", range(3), ids=["query", "key", "value"])
def test_numbers_at_the_edge(path: str, value: float, of: int) -> None:
    """A number that is none makes its own head NaN and no other; tiny ones count as zero."""
    qkv = problem(1, 2, 20, 2, 24).reshape(2, 20, 3, 2, 24)
    qkv[1, 7, of, 0, 5] = value
    qkv = qkv.reshape(2, 20, -1)
    found = kernel(path, 0.2, 2, qkv)
    np.testing.assert_array_equal(found, twin.quantized_attention(0.2, 2, qkv))
    assert np.isfinite(found[0]).all()
    assert np.isfinite(found[1, :, 24:]).all()
    assert np.isfinite(found[1]).all() if value == 1e-38 else np.isnan(found[1, :, :24]).all()


def softmax_attention(scale: float, heads: int, qkv: Array) -> Array:
    """In float64."""
    images, rows = qkv.shape[:2]
    query, key, value = qkv.astype(np.float64).reshape(images, rows, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = scale * query @ key.transpose(0, 1, 3, 2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ value).transpose(0, 2, 1, 3).reshape(images, rows, -1)


@pytest.mark.parametrize("sharpness", [0.1, 1, 3])
@pytest.mark.parametrize("common", [0, 50], ids=["no outliers", "outliers"])
def test_attention_is_attention(sharpness: float, common: float) -> None:
    """To two per cent of the norm at ViT-g's sizes, also where a few channels of all keys stand out."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((1, 257, 3, 2, 88))
    qkv[:, :, 0] *= sharpness
    qkv[:, :, 1, :, :5] += common
    rows = qkv.reshape(1, 257, -1).astype(np.float32)
    expected = softmax_attention(88**-0.5, 2, rows)
    error = twin.quantized_attention(88**-0.5, 2, rows) - expected
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(expected)


def test_many_small_weights_beside_a_large_one() -> None:
    """One key takes most of a softmax and 256 others a ten-thousandth each: with one byte they would all vanish."""
    qkv = np.zeros((1, 257, 3, 1, 8), np.float32)
    qkv[0, :, 0, 0, 0] = 1
    qkv[0, 0, 1, 0, 0] = np.log(1e4)
    qkv[0, :, 2, 0, 0] = -1
    qkv[0, 0, 2, 0, 0] = 1
    rows = qkv.reshape(1, 257, -1)
    expected = (1 - 256e-4) / (1 + 256e-4)
    np.testing.assert_allclose(twin.quantized_attention(1, 1, rows)[0, :, 0], expected, rtol=0.01)
    np.testing.assert_allclose(softmax_attention(1, 1, rows)[0, :, 0], expected, rtol=1e-4)


def operator(heads: int, channels: int, scale: float) -> ort.InferenceSession:
    """A session whose graph is the operator alone."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    rows = ir.Value(name="rows", shape=ir.Shape(["B", "T", channels]), type=float32)
    node = ir.node("QuantizedAttention", [rows], attributes={"heads": heads, "scale": scale}, domain="blip2rt")
    joined = node.outputs[0]
    joined.name, joined.type, joined.shape = "joined", float32, ir.Shape(["B", "T", None])
    graph = ir.Graph([rows], [joined], nodes=[node], opset_imports={"": 24, "blip2rt": NATIVE_VERSION})
    return session_of(ir.Model(graph, ir_version=IR_VERSION))


def test_operator_equals_twin() -> None:
    """In ONNX Runtime, on its threads; an image is the same in any company, and after one of another size."""
    session = operator(3, 180, 0.3)
    for rows in (50, 17, 50):
        qkv = problem(rows, 4, rows, 3, 20)
        (found,) = session.run(None, {"rows": qkv})
        np.testing.assert_array_equal(found, twin.quantized_attention(0.3, 3, qkv))
        np.testing.assert_array_equal(session.run(None, {"rows": qkv[2:3]})[0], found[2:3])
    (found,) = session.run(None, {"rows": qkv[:0]})
    assert found.shape == (0, 50, 60)


def test_operator_refuses_wrong_sizes() -> None:
    for heads, shape in ((3, (1, 5, 182)), (3, (1, 0, 180)), (3, (1, 32769, 180)), (40, (1, 5, 180))):
        with pytest.raises(Exception, match=r"rows must be \[B, T, 3 \* heads \* d\]"):
            operator(heads, shape[2], 1.0).run(None, {"rows": np.zeros(shape, np.float32)})
    with pytest.raises(Exception, match="heads must be positive"):
        operator(0, 180, 1.0)


@pytest.mark.parametrize("stage", ["vision", "qformer"])
def test_graph_is_near_the_one_it_was_made_of(stage: str) -> None:
    """The image encoder's attention is found; the Q-Former's sees a mask, or the image, and stays."""
    config = Blip2Config(VISION, QFORMER_SIZES, OPT, num_query_tokens=5)
    with torch.device("meta"):
        module = Blip2(config).get_submodule(stage)
    spec = stage_specs(config)[stage]
    model = trace_stage(module, spec)
    lower(model, {name for name, _ in module.named_parameters()})
    before = [node.op_type for node in model.graph]
    if stage == "qformer":
        fuse_attention(model.graph, in_8_bits=True)
        assert [node.op_type for node in model.graph] == before
        return
    fill_weights(model)
    (tensor,) = spec.inputs
    sizes = tuple(3 if isinstance(size, str) else size for size in tensor.shape)
    inputs = {tensor.name: np.random.default_rng(1).standard_normal(sizes, dtype=np.float32)}
    (expected,) = session_of(model).run(None, inputs)
    fuse_attention(model.graph, in_8_bits=True)
    after = [node.op_type for node in model.graph]
    assert after.count("QuantizedAttention") == before.count("Attention") == VISION.num_hidden_layers
    assert not {"Attention", "Split", "Transpose"} & set(after[after.index("QuantizedAttention") :])
    (found,) = session_of(model).run(None, inputs)
    assert 0 < np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)

"""The native kernels against their Python twin, bit for bit, on every path that this processor can run."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blip2rt import EngineError
from blip2rt.backends.ort import session_options
from blip2rt.export.quantize import NATIVE_VERSION
from blip2rt.native import PATHS, library_path, native_path, twin

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.skipif(library_path() is None, reason="the native kernels were not built: no C++ compiler")


def kernel(path: str, x: Array, packed: Array, scales: Array, bias: Array, bits: int, activation: str = "") -> Array:
    """The library's product, without ONNX Runtime."""
    library = ctypes.CDLL(str(library_path()))
    y = np.full((len(x), len(bias)), np.float32(7e7))
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (x, packed, scales, bias, y)]
    rows, depth, outputs = (ctypes.c_size_t(size) for size in (*x.shape, len(bias)))
    status = library.blip2rt_quantized_matmul(
        path.encode(),
        addresses[0],
        rows,
        depth,
        *addresses[1:4],
        outputs,
        ctypes.c_int(bits),
        ctypes.c_int(list(twin.ACTIVATIONS).index(activation)),
        addresses[4],
    )
    if status == 1:
        pytest.skip(f"this processor cannot run the {path} path")
    assert status == 0
    return y


def problem(seed: int, rows: int, depth: int, outputs: int, bits: int) -> tuple[Array, Array, Array, Array, int]:
    """Random x, tiles, scales and bias, extremes included: every level of the weights, rows of any magnitude."""
    rng = np.random.default_rng(seed)
    lowest = -8 if bits == 4 else -127
    values = rng.integers(lowest, -lowest + (bits == 8), (outputs, depth)).astype(np.int8)
    values[rng.random(values.shape) < 0.1] = lowest
    scales = rng.standard_normal((outputs, -(-depth // twin.GROUP)), dtype=np.float32)
    scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    x = rng.standard_normal((rows, depth), dtype=np.float32)
    x *= np.float32(10.0) ** rng.integers(-12, 12, (rows, 1)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] *= 100
    x[rng.random(rows) < 0.1] = 0
    x[rng.random(rows) < 0.1] = 1  # all values at the largest level
    bias = rng.standard_normal(outputs, dtype=np.float32)
    return x, twin.pack_weight(values, bits), twin.pack_scales(scales), bias, bits


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, 700),
    st.integers(1, 90),
    st.sampled_from([4, 8]),
    st.sampled_from(list(twin.ACTIVATIONS)),
)
@example(0, 275, 1027, 33, 4, "")  # more rows than go together
@example(0, 71, 392, 72, 8, "Gelu")  # many rows through two tiles, five of them left, and a tile
@example(0, 66, 1024, 70, 4, "Relu")
@example(0, 275, 1027, 33, 8, "Gelu")
@example(0, 1, 128, 16, 4, "")
def test_kernel_equals_twin(
    path: str, seed: int, rows: int, depth: int, outputs: int, bits: int, activation: str
) -> None:
    """Catches a saturating sum, a fused multiplication and addition, another order, a tile or group cut short."""
    inputs = problem(seed, rows, depth, outputs, bits)
    found = kernel(path, *inputs, activation)
    np.testing.assert_array_equal(found, twin.quantized_matmul(*inputs, activation))


def test_activations_are_those_of_torch() -> None:
    """The twins, over every magnitude; GELU against its definition in float64."""
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    x *= np.float32(10.0) ** np.random.default_rng(1).integers(-8, 8, x.shape).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(twin.gelu(x), expected, rtol=4e-7, atol=2e-6)
    np.testing.assert_array_equal(twin.relu(x), torch.from_numpy(x).relu().numpy())
    for activation in twin.ACTIVATIONS.values():
        assert np.isnan(activation(np.array([np.nan], np.float32))).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-38, 3e38])
def test_numbers_at_the_edge(path: str, value: float) -> None:
    """A number that is none makes its own row NaN and no other; tiny ones count as zero, huge ones overflow alike."""
    x, packed, scales, bias, bits = problem(1, 9, 300, 40, 4)
    x[4, 130] = value
    expected = twin.quantized_matmul(x, packed, scales, bias, bits)
    found = kernel(path, x, packed, scales, bias, bits)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(np.delete(found, 4, axis=0)).all()
    assert np.isfinite(value) or np.isnan(found[4]).all()


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 50), st.sampled_from([4, 8]))
@settings(max_examples=30, deadline=None)
def test_packing_keeps_every_weight(seed: int, depth: int, outputs: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-8 if bits == 4 else -127, 8 if bits == 4 else 128, (outputs, depth)).astype(np.int8)
    packed = twin.pack_weight(values, bits)
    assert packed.nbytes == -(-outputs // 16) * 16 * (-(-depth // 8) * 8) * bits // 8
    np.testing.assert_array_equal(twin.unpack_weight(packed, outputs, depth, bits), values)


def attention_problem(
    seed: int, images: int, rows: int, heads: int, width: int, capacity: int, mask_heads: int
) -> tuple[Array, ...]:
    """qkv, caches, mask and write indices: rows that see anything from nothing to everything, and biases as T5 has."""
    rng = np.random.default_rng(seed)
    qkv = 3 * rng.standard_normal((images, rows, 3 * heads * width), dtype=np.float32)
    key, value = rng.standard_normal((2, images, heads, capacity, width), dtype=np.float32)
    mask = 5 * rng.standard_normal((images, mask_heads, rows, capacity), dtype=np.float32)
    mask[rng.random(mask.shape) < rng.random()] = np.finfo(np.float32).min
    mask[:, :, :, rng.random(capacity) < 0.3] = np.finfo(np.float32).min
    mask[:, :, rng.random(rows) < 0.1] = np.finfo(np.float32).min
    return qkv, key, value, mask, rng.integers(0, capacity - rows + 1, images)


def attention_kernel(path: str, inputs: tuple[Array, ...], scale: float) -> tuple[Array, Array, Array]:
    """The library's attention, without ONNX Runtime."""
    library = ctypes.CDLL(str(library_path()))
    qkv, key, value, mask, write_indices = inputs
    images, heads, capacity, width = key.shape
    joined, key, value = np.full((images, qkv.shape[1], heads * width), np.float32(7e7)), key.copy(), value.copy()
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (qkv, mask, write_indices, key, value, joined)]
    sizes = [ctypes.c_size_t(n) for n in (images, qkv.shape[1], heads, width, capacity, mask.shape[1])]
    status = library.blip2rt_cached_attention(path.encode(), *addresses, *sizes, ctypes.c_float(scale))
    if status == 1:
        pytest.skip(f"this processor cannot run the {path} path")
    assert status == 0
    return joined, key, value


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 40),
    st.booleans(),
)
def test_attention_equals_twin(
    path: str, seed: int, images: int, rows: int, heads: int, width: int, more: int, by_head: bool
) -> None:
    """Catches a row that is hidden and counts, lanes beyond the last row, another order, a cache written elsewhere."""
    inputs = attention_problem(seed, images, rows, heads, width, rows + more, heads if by_head else 1)
    expected = twin.cached_attention(width**-0.5, *inputs)
    for found, wanted in zip(attention_kernel(path, inputs, width**-0.5), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 20), st.integers(0, 30))
def test_attention_is_attention(seed: int, rows: int, width: int, more: int) -> None:
    """The twin against softmax in float64, where a row sees something; its exponential against numpy's."""
    inputs = attention_problem(seed, 2, rows, 2, width, rows + more, 1)
    joined, key, value = twin.cached_attention(0.7, *inputs)
    query = inputs[0].reshape(2, rows, 3, 2, width)[:, :, 0].transpose(0, 2, 1, 3).astype(np.float64)
    scores = 0.7 * query @ key.transpose(0, 1, 3, 2) + inputs[3]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = (weights / weights.sum(axis=-1, keepdims=True)) @ value
    sees = np.any(inputs[3] > -1e30, axis=-1)[:, 0]
    found = joined.reshape(2, rows, 2, width)
    np.testing.assert_allclose(found[sees], expected.transpose(0, 2, 1, 3)[sees], rtol=1e-4, atol=1e-5)
    x = -np.abs(np.random.default_rng(seed).standard_normal(1000)).astype(np.float32) * 30
    np.testing.assert_allclose(twin.exponential(x), np.exp(x.astype(np.float64)), rtol=3e-7, atol=2e-38)


def operator(
    outputs: int,
    depth: int,
    bits: int,
    packed: Array,
    scales: Array,
    bias: Array,
    activation: int = 0,
    version: int = NATIVE_VERSION,
) -> ort.InferenceSession:
    """A session whose graph is the operator alone."""
    x = ir.Value(name="x", shape=ir.Shape(["B", "S", None]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in (("packed", packed), ("scales", scales), ("bias", bias))
    ]
    attributes = {"N": outputs, "K": depth, "bits": bits, "activation": activation}
    node = ir.node("QuantizedMatMul", [x, *weights], attributes=attributes, domain="blip2rt")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["B", "S", outputs])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 24, "blip2rt": version})
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    return ort.InferenceSession(model, session_options(2), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("bits", [4, 8])
def test_operator_equals_twin(bits: int) -> None:
    """In ONNX Runtime, on its threads; a row is the same in any company."""
    x, packed, scales, bias, _ = problem(5, 150, 321, 1000, bits)
    session = operator(1000, 321, bits, packed, scales, bias)
    expected = twin.quantized_matmul(x, packed, scales, bias, bits)
    (found,) = session.run(None, {"x": x.reshape(3, 50, 321)})
    np.testing.assert_array_equal(found.reshape(150, 1000), expected)
    for rows in (1, 2, 5, 17):
        (found,) = session.run(None, {"x": x[None, :rows]})
        np.testing.assert_array_equal(found[0], expected[:rows])
    (found,) = session.run(None, {"x": x[None, :0]})
    assert found.shape == (1, 0, 1000)


def test_operator_refuses_wrong_sizes() -> None:
    """Else it would read beyond its weights."""
    x, packed, scales, bias, _ = problem(5, 2, 128, 32, 4)
    for outputs, depth in ((48, 128), (32, 256), (32, 64)):
        with pytest.raises(Exception, match="not the size"):
            operator(outputs, depth, 4, packed, scales, bias).run(None, {"x": x[None]})
    for bits, activation in ((5, 0), (4, 3), (4, -1)):
        with pytest.raises(Exception, match="bits 4 or 8, activation 0, 1 or 2"):
            operator(32, 128, bits, packed, scales, bias, activation)


def test_another_version_of_the_operators_is_refused() -> None:
    """A graph of a time when they computed something else."""
    _, packed, scales, bias, _ = problem(5, 2, 128, 32, 4)
    with pytest.raises(Exception, match="QuantizedMatMul"):
        operator(32, 128, 4, packed, scales, bias, version=NATIVE_VERSION - 1)


def test_a_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2RT_KERNELS", "portable")
    assert native_path() == "portable"
    monkeypatch.setenv("BLIP2RT_KERNELS", "avx9")
    with pytest.raises(EngineError, match=r"'avx9' is not one of stock, vnni, avx2, portable"):
        native_path()
    monkeypatch.setenv("BLIP2RT_KERNELS", "stock")
    assert native_path() is None


def test_the_best_path_is_taken() -> None:
    """What /proc/cpuinfo says is what runs."""
    flags = Path("/proc/cpuinfo").read_text().split() if os.path.exists("/proc/cpuinfo") else []
    best = "vnni" if {"avx512_vnni", "avx512bw"} <= set(flags) else "avx2" if "avx2" in flags else "portable"
    program = "from blip2rt.native import native_path; print(native_path())"
    environment = {name: value for name, value in os.environ.items() if name != "BLIP2RT_KERNELS"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert told.stdout.strip() == best

"""int8 and int4: each pass against its unlowered twin, outliers, limits, and answers that batches do not change."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2rt import EngineError, Pipeline
from blip2rt.backends.ort import session_options
from blip2rt.cli import main
from blip2rt.errors import ExportError
from blip2rt.export import export_engine, verify
from blip2rt.export.lower import StoredWeight
from blip2rt.export.quantize import bits_of, quantize
from blip2rt.export.rounding import round_weight
from blip2rt.export.weights import write_stage
from blip2rt.manifest import Manifest
from blip2rt.native import library_path, native_path, twin

Array = np.ndarray[Any, Any]

KERNELS = [
    pytest.param("native", marks=pytest.mark.skipif(library_path() is None, reason="the kernels were not built")),
    "stock",
]
SIZES = [(48, 200), (130, 64), (16, 129), (33, 256)]  # [N, K]
ONE_LAYER = 7  # a seed of the smallest checkpoint


# --- weights ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 300), st.sampled_from([4, 8]))
def test_rounded_weights_are_near(seed: int, outputs: int, depth: int, bits: int) -> None:
    """8 bits: within half a step. 4 bits: never worse than plain rounding to 16 levels, group by group."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, depth, generator=generator) ** 3
    weight[0] = 0
    values, scales = round_weight(weight, bits, 128)
    assert np.abs(values.astype(int)).max() <= (8 if bits == 4 else 127)
    assert not (scales.view(np.uint32) & 0xFFFF).any()  # bfloat16
    for g in range(scales.shape[1]):
        group = weight[:, g * 128 : (g + 1) * 128].numpy()
        rounded = values[:, g * 128 : (g + 1) * 128] * scales[:, g, None]
        largest = np.abs(group).max(axis=1, keepdims=True)
        if bits == 8:
            assert (np.abs(group - rounded) <= largest / 127 * 0.52).all()
        else:
            plain = largest / 7 * np.rint(group / np.maximum(largest / 7, 1e-30))
            errors, plain_errors = np.square(group - rounded).sum(1), np.square(group - plain).sum(1)
            assert errors.sum() <= 1.05 * plain_errors.sum() + 1e-5 * np.square(group).sum()  # a scale has 8 bits
    assert (values[0] == 0).all()


def test_four_bits_clip_where_it_helps() -> None:
    """On normal weights the error is well below that of plain rounding."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    values, scales = round_weight(weight, 4, 128)
    error = np.linalg.norm(weight.numpy() - values * scales.repeat(128, axis=1)) / float(weight.norm())
    groups = weight.unflatten(1, (8, 128))
    step = groups.abs().amax(2, keepdim=True) / 7
    plain = float((groups - step * (groups / step).round()).norm() / weight.norm())
    assert error < 0.90 * plain


# --- graphs ----------------------------------------------------------------------------------------------------------


def float_graph(outputs: int, depth: int, biased: bool, shared: bool, activation: str) -> ir.Model:
    """A linear layer as `lower` leaves it: MatMul and Add, or the Gemm of a weight that is also looked up."""
    x = ir.Value(name="x", shape=ir.Shape(["S", depth]), type=ir.TensorType(ir.DataType.FLOAT))
    shape = [outputs, depth] if shared else [depth, outputs]
    weight = ir.Value(name="weight", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    nodes = [ir.node("Gemm", [x, weight], attributes={"transB": 1}) if shared else ir.node("MatMul", [x, weight])]
    initializers, results = [weight], [nodes[0].outputs[0]]
    if biased:
        bias = ir.Value(name="bias", shape=ir.Shape([outputs]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes.append(ir.node("Add", [results[0], bias]))
        initializers.append(bias)
        results[0] = nodes[-1].outputs[0]
    if activation:
        nodes.append(ir.node(activation, [results[0]]))
        results[0] = nodes[-1].outputs[0]
    if shared:
        index = ir.Value(name="index", shape=ir.Shape(["R"]), type=ir.TensorType(ir.DataType.INT64))
        nodes.append(ir.node("Gather", [weight, index]))
        results.append(nodes[-1].outputs[0])
    for result, name in zip(results, ("y", "rows"), strict=False):
        result.name, result.type = name, ir.TensorType(ir.DataType.FLOAT)
    inputs = [x, index] if shared else [x]
    graph = ir.Graph(inputs, results, nodes=nodes, opset_imports={"": 24})
    for value in initializers:
        graph.initializers.add(value)
    return ir.Model(graph, ir_version=11)


def plain(shared: bool, tensor: torch.Tensor) -> dict[str, Array]:
    """What `lower` stores: the transposed weight, unless it is shared."""
    return {"": (tensor if shared else tensor.t()).contiguous().numpy()}


def build(
    folder: Path,
    kernels: str,
    precision: str,
    weight: Array,
    bias: Array | None,
    shared: bool,
    activation: str = "",
) -> Any:
    """The rewritten graph, written to a folder and opened: a function of x, and what was written."""
    outputs, depth = weight.shape
    model = float_graph(outputs, depth, bias is not None, shared, activation)
    tensors = {"weight": torch.from_numpy(weight)} | ({} if bias is None else {"bias": torch.from_numpy(bias)})
    stored = [StoredWeight(name, "plain", partial(plain, shared)) for name in tensors]
    written = quantize(model, "decoder", precision, stored, kernels)
    write_stage(model, written, lambda name: tensors[name], folder / "layer.onnx", {}, lambda name: name)
    session = ort.InferenceSession(folder / "layer.onnx", session_options(2), providers=["CPUExecutionProvider"])
    domains = {node.domain for node in model.graph if node.op_type not in ("Gather", "Add")}
    assert ("blip2rt" if kernels == "native" else "com.microsoft") in domains
    inputs = {"index": np.arange(len(weight))} if shared else {}
    return lambda x: session.run(None, {"x": x, **inputs}), written


def rounded_rows(x: Array) -> Array:
    """x with every row rounded to multiples of its largest magnitude over 127."""
    step = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return np.rint(x / step) * step


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    ("biased", "shared", "activation"),
    [(True, False, ""), (False, False, ""), (False, True, ""), (True, False, "Gelu"), (False, False, "Relu")],
)
def test_rewritten_graph_equals_its_twin(
    kernels: str, precision: str, biased: bool, shared: bool, activation: str, tmp_path: Path
) -> None:
    """The float graph on rounded weights and rounded activations; native ones to the bit. A row knows no other row."""
    rng = np.random.default_rng(0)
    for outputs, depth in SIZES:
        weight = rng.standard_normal((outputs, depth), dtype=np.float32)
        bias = rng.standard_normal(outputs, dtype=np.float32) if biased else None
        x = rng.standard_normal((37, depth), dtype=np.float32)
        x *= np.float32(10) ** rng.integers(-3, 3, (37, 1)).astype(np.float32)
        x[3] = 0
        run, written = build(tmp_path, kernels, precision, weight, bias, shared, activation)
        found, *looked_up = run(x)
        bits = 8 if precision == "int8" else 4
        add = np.zeros(outputs, np.float32) if bias is None else bias
        if kernels == "native":
            parts = next(s for s in written if s.convert(torch.from_numpy(weight)).keys() >= {".tiles"})
            arrays = parts.convert(torch.from_numpy(weight))
            expected = twin.quantized_matmul(x, arrays[".tiles"], arrays[".scales"], add, bits, activation)
            np.testing.assert_array_equal(found, expected)
        else:
            group = depth if bits == 8 else 128
            values, scales = round_weight(torch.from_numpy(weight), bits, group)
            rounded = (values * scales.repeat(group, axis=1)[:, :depth]).astype(np.float64)
            blocks = [(rounded_rows(x[:, i : i + group]), rounded[:, i : i + group]) for i in range(0, depth, group)]
            expected = twin.ACTIVATIONS[activation](sum(a @ b.T for a, b in blocks) + add)
            near = 2e-5 if bits == 8 else 5e-3  # MatMulNBits may round a tie of the activations another way
            assert (np.abs(found - expected) <= near * np.abs(expected).max(1, keepdims=True)).all()
        for rows in looked_up:
            np.testing.assert_array_equal(rows, weight)
        for rows in (1, 2, 5, 16):
            np.testing.assert_array_equal(run(x[:rows])[0], found[:rows])


@pytest.mark.parametrize("reason", [None, "another formula", "an output", "another reader"])
def test_which_activations_go_into_the_operator(reason: str | None) -> None:
    """Only those that it knows, and only where nobody wants what is before them."""
    model = float_graph(16, 128, True, False, "Gelu")
    graph = model.graph
    add, activation = graph[1], graph[2]
    if reason == "another formula":
        activation.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    elif reason == "an output":
        graph.outputs.append(add.outputs[0])
    elif reason == "another reader":
        graph.append(ir.node("Neg", [add.outputs[0]]))
    stored = [StoredWeight(name, "plain", partial(plain, False)) for name in ("weight", "bias")]
    quantize(model, "decoder", "int8", stored, "native")
    found = {node.op_type: node for node in graph}
    assert found["QuantizedMatMul"].attributes["activation"].as_int() == (0 if reason else 2)
    assert ("Gelu" in found) == (reason is not None)
    assert graph.outputs[0].name == "y"


def test_products_of_bytes_do_not_overflow() -> None:
    """The largest bytes there are, which saturate 16 bits: every session adds them up exactly on any processor."""
    x = ir.Value(name="x", shape=ir.Shape(["S", 256]), type=ir.TensorType(ir.DataType.UINT8))
    weight = ir.Value(name="weight", const_value=ir.tensor(np.full((256, 32), 127, np.int8), name="weight"))
    node = ir.node("MatMulInteger", [x, weight])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 24})
    proto = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(proto, session_options(1), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((5, 256), 255, np.uint8)})
    assert (found == 256 * 255 * 127).all()


def test_table_of_bits() -> None:
    """What stays float32, whatever the precision; a row for another model is one line."""
    assert bits_of("fp32", "decoder", "blocks.0.fc1.weight") == 32
    assert {bits_of(p, "qformer", "projection.weight") for p in ("fp32", "int8", "int4")} == {32}
    assert bits_of("int4", "decoder", "blocks.3.qkv.weight") == 4
    assert bits_of("int4", "decoder", "embedding.token.weight") == 8
    assert bits_of("int4", "vision", "blocks.3.qkv.weight") == bits_of("int8", "decoder", "blocks.3.fc2.weight") == 8


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("factor", [30, 100])
def test_outlier_channels(kernels: str, factor: float, tmp_path: Path) -> None:
    """Six channels of the activations are `factor` times as large, in one of 20 rows 20 times that, as OPT has them.

    One scale for the whole tensor loses the ordinary rows; a scale for every row, or row and group, keeps them.
    """
    rng = np.random.default_rng(0)
    depth, outputs = 2560, 256
    weight = rng.standard_normal((outputs, depth), dtype=np.float32)
    x = rng.standard_normal((60, depth), dtype=np.float32)
    x[:, rng.choice(depth, 6, replace=False)] *= factor
    x[::20] *= 20
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    ordinary = np.arange(60) % 20 != 0

    def error(found: Array) -> float:
        """Of the worst ordinary row."""
        return float((np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1))[ordinary].max())

    values, scales = round_weight(torch.from_numpy(weight), 8, depth)
    step = np.abs(x).max() / 127
    per_tensor = error((np.rint(x / step) * step) @ (values * scales).T.astype(np.float64))
    ours = {
        precision: error(build(tmp_path, kernels, precision, weight, None, False)[0](x)[0])
        for precision in ("int8", "int4")
    }
    assert per_tensor > 0.4
    assert ours["int8"] < (0.04 if kernels == "native" else 0.15)
    assert ours["int4"] < 0.15


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, checkpoint_maker: Callable[..., Path]) -> Path:
    """The smallest checkpoint."""
    return checkpoint_maker(tmp_path_factory.mktemp("small") / "checkpoint", seed=ONE_LAYER, num_hidden_layers=1)


@pytest.fixture(scope="module", params=[(k, p) for k in ("native", "stock") for p in ("int8", "int4")], ids=str)
def engine(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: Any) -> Path:
    """Its engine, for each precision and each kind of kernels; the folder has the name of the kind."""
    kernels, precision = request.param
    if kernels == "native" and library_path() is None:
        pytest.skip("the kernels were not built")
    with pytest.MonkeyPatch.context() as patch:
        if kernels == "stock":
            patch.setenv("BLIP2RT_KERNELS", "stock")
        return export_engine(checkpoint, tmp_path_factory.mktemp("engine") / kernels, precision=precision)


def pictures(pipe: Pipeline, count: int) -> list[Array]:
    """Normalised pixel values of random pictures."""
    size = pipe.manifest.image.size
    return list(np.random.default_rng(0).standard_normal((count, 3, size, size), dtype=np.float32))


def test_engine_tells_what_it_is(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.read(engine)
    assert manifest.kernels == engine.name
    for stage, parity in manifest.parity.items():
        assert 1e-5 < parity.max_rel < 1.0, stage
        assert parity.cosine > 0.9, stage
    assert main(["inspect", str(engine), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernels"] == manifest.kernels
    assert told["path"] == (native_path() if manifest.kernels == "native" else None)
    main(["inspect", str(engine)])
    assert f"kernels     {manifest.kernels}" in capsys.readouterr().out


def test_alone_equals_in_a_batch(engine: Path) -> None:
    """Bit for bit: features, tokens, log-probabilities."""
    pipe = Pipeline(engine)
    images = pictures(pipe, 5)
    features = pipe.encode(images)
    for image, found in zip(images, features, strict=True):
        alone = pipe.encode(image)
        np.testing.assert_array_equal(alone.image_embeds, found.image_embeds)
        np.testing.assert_array_equal(alone.prefix, found.prefix)
    prompts = ["w1", "w1 w2 w3 w4 w5", "", "w3", "w2 w7"]
    choices: list[dict[str, Any]] = [{"num_beams": 1}, {"num_beams": 5}, {"num_beams": 3, "num_return_sequences": 2}]
    for options in choices:
        together = pipe.generate(images, prompts, max_new_tokens=12, **options)
        assert together == [
            pipe.generate(i, p, max_new_tokens=12, **options) for i, p in zip(images, prompts, strict=True)
        ]


def test_t5_as_well(checkpoint_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Another language model, in two stages, by the same pattern."""
    checkpoint = checkpoint_maker(tmp_path / "checkpoint", seed=ONE_LAYER, model_type="t5")
    pipe = Pipeline(export_engine(checkpoint, tmp_path / "engine", precision="int4"))
    assert "encoder" in pipe.manifest.stages
    assert all(parity.max_rel > 1e-5 for parity in pipe.manifest.parity.values())  # each of them is rounded
    images = pictures(pipe, 3)
    prompts = ["w1", "w1 w2 w3 w4 w5", ""]
    together = pipe.generate(images, prompts, max_new_tokens=9, num_beams=3)
    alone = [pipe.generate(i, p, max_new_tokens=9, num_beams=3) for i, p in zip(images, prompts, strict=True)]
    assert together == alone


def test_threads_change_nothing(engine: Path) -> None:
    images = pictures(Pipeline(engine), 3)
    one, many = (Pipeline(engine, threads=threads).caption(images, "w1", max_new_tokens=9) for threads in (1, 7))
    assert one == many


@pytest.mark.skipif(library_path() is None, reason="the kernels were not built")
def test_engine_without_its_kernels(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths of the library agree to the bit; without it, one sentence says so."""
    path = export_engine(checkpoint, tmp_path / "engine", precision="int4")
    images = pictures(Pipeline(path), 2)
    best = Pipeline(path).caption(images, "w1 w2", max_new_tokens=9)
    monkeypatch.setenv("BLIP2RT_KERNELS", "portable")
    assert Pipeline(path).caption(images, "w1 w2", max_new_tokens=9) == best
    monkeypatch.setenv("BLIP2RT_KERNELS", "stock")
    with pytest.raises(EngineError, match=r"native kernels, which this installation lacks.*C\+\+ compiler"):
        Pipeline(path)
    assert main(["inspect", str(path)]) == 0
    assert "here: missing" in capsys.readouterr().out


def test_export_fails_beyond_the_limit(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight rounded with a wrong scale is found, in the block where it is."""

    def round_wrongly(weight: torch.Tensor, bits: int, group: int) -> tuple[Array, Array]:
        values, scales = round_weight(weight, bits, group)
        return values, scales * 2

    monkeypatch.setattr(sys.modules["blip2rt.export.quantize"], "round_weight", round_wrongly)
    with pytest.raises(ExportError, match=r"disagree.*vision.*diverges first in blocks\.0 \(limit 0\.08\)"):
        export_engine(checkpoint, tmp_path / "engine", precision="int8")
    assert not (tmp_path / "engine").exists()
    assert verify.LIMITS["int8"] < verify.LIMITS["int4"]

"""`--device cuda` and `--device tensorrt` without a GPU: graphs, planner, memory and executors.

ONNX Runtime's CPU provider computes what the GPU would (`host_device.py`). No test here has run on a GPU.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnx
import pytest
from host_device import HostDevice, fake_tensorrt
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from blip2rt import EngineError, InputError, Pipeline
from blip2rt.backends import ort_cuda, tensorrt
from blip2rt.backends.array_cache import ArrayCache
from blip2rt.backends.device_memory import Buffer, CudaDevice, DeviceCache, Pool
from blip2rt.cli import main
from blip2rt.decoder import padded
from blip2rt.export import export_engine, gpu
from blip2rt.export.plans import Limits, plan_sizes, profile_shapes
from blip2rt.export.verify import verify_engine
from blip2rt.inputs import ahead
from blip2rt.inspection import describe_engine
from blip2rt.manifest import Manifest
from blip2rt.model.config import Blip2Config, RetrievalConfig
from blip2rt.model.named_configs import read_config
from blip2rt.model.signatures import stage_specs
from blip2rt.stages import DECODER, ENCODER

RNG = np.random.default_rng(4)
IMAGES = [RNG.integers(0, 256, (11, 9, 3), np.uint8) for _ in range(4)]
PROMPTS = ["w1", "w2 w3 w4", "w5", ""]
PUBLISHED = (("blip2-opt-2.7b", Blip2Config), ("blip2-flan-t5-xl", Blip2Config), ("blip2", RetrievalConfig))
OPTIONS: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 25, "min_new_tokens": 12}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """The only "GPU" of the machine, with ONNX Runtime's provider and TensorRT for it."""
    found = HostDevice()
    for module in (ort_cuda, tensorrt, gpu):
        monkeypatch.setattr(module, "CudaDevice", lambda: found)
    monkeypatch.setattr(ort_cuda, "check_provider", lambda: None)
    monkeypatch.setattr(ort_cuda, "providers", lambda device, stage: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    return found


@pytest.fixture(scope="module", params=["opt", "t5"])
def checkpoint(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    checkpoint_maker: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    if request.param == "opt":
        return tiny_checkpoint
    return checkpoint_maker(tmp_path_factory.mktemp("t5") / "checkpoint", 1, "t5")


def assert_same(cpu: Pipeline, other: Pipeline) -> None:
    """The same tokens, scores but for rounding: beams that grow and drop rows, samples, candidates."""
    expected, found = (pipe.generate(IMAGES, PROMPTS, **OPTIONS) for pipe in (cpu, other))
    for one, two in zip(expected, found, strict=True):
        for left, right in zip((one, *one.alternatives), (two, *two.alternatives), strict=True):
            assert left.token_ids == right.token_ids
            assert left.score == pytest.approx(right.score, abs=1e-4)
    draw: dict[str, Any] = {"do_sample": True, "num_beams": 1, "seed": 5, "num_return_sequences": 2}
    sampled = [pipe.caption(IMAGES, **draw) for pipe in (cpu, other)]
    assert [row.token_ids for row in sampled[0]] == [row.token_ids for row in sampled[1]]
    ranked = [pipe.answer(IMAGES[0], "w1", candidates=["w2", "w3 w4", "w6"]).text for pipe in (cpu, other)]
    assert ranked[0] == ranked[1]


def test_cuda_says_what_the_cpu_says(checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    export_engine(checkpoint, tmp_path / "cpu")
    export_engine(checkpoint, tmp_path / "cuda", device="cuda", precision="fp32")
    assert_same(Pipeline(tmp_path / "cpu"), Pipeline(tmp_path / "cuda"))


def test_a_step_sends_what_changes(checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    """Catches what is copied to the GPU again and again: rows of the picture, or what the encoder gave of it."""
    sent: list[tuple[int, ...]] = []
    original = device.to_device

    def spy(address: int, array: Any) -> None:
        sent.append(array.shape)
        original(address, array)

    export_engine(checkpoint, tmp_path / "cuda", device="cuda", precision="fp32")
    pipe, counts = Pipeline(tmp_path / "cuda"), []
    device.to_device = spy  # type: ignore[method-assign]
    for tokens in (4, 12):
        sent.clear()
        pipe.generate(IMAGES[0], PROMPTS[1], num_beams=3, max_new_tokens=tokens, min_new_tokens=tokens)
        counts.append(sum(len(shape) > 2 and shape[1] != 1 for shape in sent))  # no mask
    assert counts[1] <= counts[0] + 1  # where the cache has grown all is bound anew
    has_encoder = ENCODER in pipe.manifest.stages
    assert counts[0] == (3 if has_encoder else 4)  # pixel values, image_embeds, prefix; zeros in its place in steps


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_graphs_are_near_the_reference(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    """Every block by itself, by the export's own comparison; caches in half the bits, edges in float32."""
    if precision == "fp16" and "t5" in str(checkpoint):
        with pytest.raises(InputError, match="overflow in fp16: use bf16"):
            export_engine(checkpoint, tmp_path / "cuda", device="cuda", precision=precision)
        return
    engine = export_engine(checkpoint, tmp_path / "cuda", device="cuda", precision=precision)
    assert all(not comparison.first_divergence for comparison in verify_engine(engine, checkpoint))
    manifest = Manifest.read(engine)
    for stage in manifest.stages.values():
        onnx.checker.check_model(engine / stage.file, full_check=True)  # no operator has inputs of two types
        for tensor in (*stage.signature.inputs, *stage.signature.outputs):
            is_cache = tensor.name.startswith(("past_", "present_", "cross_"))
            expected = {"fp16": "float16", "bf16": "bfloat16"}[precision] if is_cache else ("float32", "int64")
            assert tensor.dtype in expected


def test_retrieval_in_half(tiny_retrieval_checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    export_engine(tiny_retrieval_checkpoint, tmp_path / "cpu")
    export_engine(tiny_retrieval_checkpoint, tmp_path / "trt", device="tensorrt", precision="fp16")
    cpu, trt = Pipeline(tmp_path / "cpu"), Pipeline(tmp_path / "trt")
    left, right = (pipe.match(IMAGES, ["w1 w2", "w3"]) for pipe in (cpu, trt))
    assert np.allclose(left.itc, right.itc, atol=0.02)
    assert np.allclose(left.itm_probability, right.itm_probability, atol=0.05)
    norms = np.linalg.norm(trt.embed_images(IMAGES), axis=-1)
    assert np.allclose(norms, 1, atol=1e-5)  # made in float32


def test_tensorrt_says_what_its_graphs_say(tiny_checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    """fp16 plans with a fixed cache against the fp16 graphs with one that grows; more pictures than a plan takes."""
    limits = Limits(max_batch=4, max_prompt=8, capacity=160)
    export_engine(tiny_checkpoint, tmp_path / "trt", device="tensorrt", precision="fp16", limits=limits)
    export_engine(tiny_checkpoint, tmp_path / "cuda", device="cuda", precision="fp16")
    trt, cuda = Pipeline(tmp_path / "trt"), Pipeline(tmp_path / "cuda")
    assert_same(cuda, trt)
    many = [RNG.integers(0, 256, (7, 8, 3), np.uint8) for _ in range(11)]
    texts = [[row.text for row in pipe.caption(many, max_new_tokens=6)] for pipe in (cuda, trt)]
    assert texts[0] == texts[1]
    assert trt.manifest.toolchain["gpu"] == "imagined (sm_00)"
    assert "those of TensorRT 11.4.0, for imagined (sm_00)" in str(describe_engine(tmp_path / "trt"))
    assert "ONNX Runtime's, on a GPU" in str(describe_engine(tmp_path / "cuda"))
    assert sorted(trt.manifest.files) == [
        *("decoder.plan", "qformer.plan", "timings.cache", "tokenizer.json", "vision.plan")
    ]


def test_steps_are_captured_once(tiny_checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    """The same calls get the same memory, once all of it has been given back, and find the graphs captured before."""
    export_engine(tiny_checkpoint, tmp_path / "trt", device="tensorrt", precision="fp16")
    pipe = Pipeline(tmp_path / "trt")
    first, second = (pipe.caption(IMAGES[0], max_new_tokens=8, min_new_tokens=8) for _ in range(2))
    assert first == second
    captures, blocks = device.num_captures, len(device.memory)
    assert captures
    assert pipe.caption(IMAGES[0], max_new_tokens=8, min_new_tokens=8) == first
    assert (device.num_captures, len(device.memory)) == (captures, blocks)


def test_threads_do_not_meet(tiny_checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    """Eight threads over one stream, with its captures and its pool, say what one says."""
    export_engine(tiny_checkpoint, tmp_path / "trt", device="tensorrt", precision="fp16")
    pipe = Pipeline(tmp_path / "trt")
    asked = [(image, prompt) for image in IMAGES for prompt in PROMPTS]

    def answer(question: tuple[Any, str]) -> tuple[str, float]:
        result = pipe.generate(*question, max_new_tokens=12, num_beams=3)
        return result.text, result.score

    alone = [answer(question) for question in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, asked * 4)) == alone * 4


def test_the_next_is_under_way() -> None:
    """While the first is used the second is made; an error comes in its turn, and nothing after it is begun."""
    begun = [Event() for _ in range(4)]

    def make(i: int) -> int:
        begun[i].set()
        if i == 2:
            raise ValueError("the third")
        return i

    results = ahead([partial(make, i) for i in range(4)], is_worth=True)
    assert next(results) == 0
    assert begun[1].wait(10)
    assert next(results) == 1
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert not begun[3].is_set()
    assert list(ahead([partial(make, i) for i in (0, 1, 3)], is_worth=False)) == [0, 1, 3]


def test_refit(
    checkpoint_maker: Callable[..., Path], tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of another model of the same sizes say what plans of its own say."""
    checkpoints = [checkpoint_maker(tmp_path / "0", 1), checkpoint_maker(tmp_path / "1", 1)]
    weights = load_file(checkpoints[1] / "model.safetensors")
    save_file({name: 0.9 * weight for name, weight in weights.items()}, checkpoints[1] / "model.safetensors")
    options: dict[str, Any] = {"device": "tensorrt", "precision": "fp16"}
    first = export_engine(checkpoints[0], tmp_path / "first", **options)
    second = export_engine(checkpoints[1], tmp_path / "second", **options)
    monkeypatch.setattr(gpu, "build_plan", None)
    refitted = export_engine(checkpoints[1], tmp_path / "refitted", refit=first, **options)
    said = [
        [(row.text, row.score) for row in Pipeline(engine).caption(IMAGES, max_new_tokens=6)]
        for engine in (first, second, refitted)
    ]
    assert said[1] == said[2] != said[0]


def test_other_plans_are_refused(
    tiny_checkpoint: Path, checkpoint_maker: Callable[..., Path], tmp_path: Path, device: HostDevice, capsys: Any
) -> None:
    options: dict[str, Any] = {"device": "tensorrt", "precision": "fp16"}
    engine = export_engine(tiny_checkpoint, tmp_path / "trt", **options)
    other = checkpoint_maker(tmp_path / "other", 9)
    with pytest.raises(InputError, match="other sizes or precision"):
        export_engine(other, tmp_path / "new", refit=engine, **options)
    cpu = export_engine(tiny_checkpoint, tmp_path / "cpu")
    with pytest.raises(InputError, match="an engine for 'cpu' has no plans"):
        export_engine(tiny_checkpoint, tmp_path / "new", refit=cpu, **options)
    with pytest.raises(InputError, match="do not fit a cache of 32 rows"):
        export_engine(tiny_checkpoint, tmp_path / "new", limits=Limits(capacity=32), **options)
    with pytest.raises(InputError, match="max_batch of a plan must be at least 4, not 1"):
        Limits(max_batch=1)
    with pytest.raises(InputError, match="TensorRT's, device 'cuda' takes any"):
        export_engine(tiny_checkpoint, tmp_path / "new", device="cuda", limits=Limits())
    arguments = ["export", "--model", str(tiny_checkpoint), "--output", str(tmp_path / "new")]
    assert main([*arguments, "--device", "tensorrt", "--precision", "fp32"]) == 2
    assert "not one of fp16, bf16 (device tensorrt)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    manifest = Manifest.read(engine)
    for what in ("gpu", "tensorrt"):
        found = {**manifest.toolchain, what: "another"}
        with pytest.raises(EngineError, match=f"was built for {what} .*, and here is another: .*--device tensorrt"):
            tensorrt.check_built_for(manifest, found)
    (tmp_path / "text.plan").write_bytes(b"no plan at all")
    trt, spec = sys.modules["tensorrt"], manifest.stages["vision"].signature
    with pytest.raises(EngineError, match=r"is no plan that TensorRT 11\.4\.0 takes"):
        tensorrt.Stage("vision", tmp_path / "text.plan", spec, Pool(device), trt, trt.Runtime(None))


def test_beyond_the_plan(tiny_checkpoint: Path, tmp_path: Path, device: HostDevice) -> None:
    """Too many beams, or a tree that does not fit its cache: errors before anything is computed wrongly."""
    limits = Limits(max_batch=4, max_beams=6, max_prompt=8, capacity=48)
    export_engine(tiny_checkpoint, tmp_path / "trt", device="tensorrt", precision="fp16", limits=limits)
    pipe = Pipeline(tmp_path / "trt")
    with pytest.raises(InputError, match="fewer images, beams or words at once, or export with larger"):
        pipe.caption(IMAGES[0], num_beams=7, max_new_tokens=3)
    with pytest.raises(InputError, match=r"rows of the cache, and this engine holds 48: .* --capacity"):
        pipe.caption(IMAGES[0], num_beams=6, max_new_tokens=30, min_new_tokens=30, num_return_sequences=6)


def test_without_a_gpu(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence each: no driver, no provider, two ONNX Runtimes, no bindings, no TensorRT."""
    engine = export_engine(tiny_checkpoint, tmp_path / "cuda", device="cuda", precision="fp32")
    with pytest.raises(EngineError, match="has none: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"):
        Pipeline(engine)
    monkeypatch.setattr(ort_cuda, "_is_installed", lambda name: True)
    with pytest.raises(EngineError, match=r"both installed, own the same module, .*: pip uninstall -y"):
        Pipeline(engine)
    with pytest.raises(EngineError, match=r"no GPU can be used \(.*InsufficientDriver.*\): install NVIDIA's driver"):
        CudaDevice()
    with pytest.raises(EngineError, match=r"cannot be imported .*: pip install tensorrt"):
        export_engine(tiny_checkpoint, tmp_path / "trt", device="tensorrt", precision="fp16")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"cuda-bindings is missing: pip install 'blip2rt\[cuda\]'"):
        CudaDevice()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_caches_move_alike(data: st.DataObject) -> None:
    """A cache in the memory of a device against one in an array, through the same random operations."""
    batch, heads, capacity, width = (data.draw(st.integers(1, n)) for n in (4, 3, 12, 5))
    device = HostDevice()
    pool = Pool(device)
    ours = DeviceCache(pool, (batch, heads, capacity, width), 4)
    twin = ArrayCache(np.zeros, np.zeros((batch, heads, capacity, width), np.float32))
    assert (ours.read(np.float32) == 0).all()
    twin.array[:] = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(twin.array.shape)
    ours.write(np.ascontiguousarray(twin.array))
    for _ in range(data.draw(st.integers(1, 6))):
        operation = data.draw(st.sampled_from(["keep", "grow", "move"]))
        images, rows = twin.array.shape[0], twin.array.shape[2]
        if operation == "keep":
            kept = data.draw(st.lists(st.integers(0, images - 1), min_size=1, unique=True).map(sorted))
            for cache in (ours, twin):
                cache.keep(kept)
        elif operation == "grow":
            larger, used = rows + data.draw(st.integers(1, 9)), data.draw(st.integers(0, rows))
            for cache in (ours, twin):
                cache.grow(larger, used)
        else:
            moved = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True).map(sorted)))
            to, image = data.draw(st.integers(0, int(moved[0]))), data.draw(st.integers(0, images - 1))
            for cache in (ours, twin):
                cache.move_rows(image, moved, to)
        assert np.array_equal(ours.read(np.float32), twin.array)


def test_a_pool_gives_back_before_it_fails() -> None:
    device = HostDevice()
    pool = Pool(device)
    device.most = 100
    first = Buffer(pool, 60)
    address = first.address
    del first
    again = Buffer(pool, 60)
    assert again.address == address
    del again
    other = Buffer(pool, 90)  # only after the 60 went back to the device
    with pytest.raises(EngineError, match="no memory left"):
        Buffer(pool, 20)
    assert len(device.memory) == 1
    del other


@settings(deadline=None)
@given(batch=st.integers(4, 300), beams=st.integers(5, 64), prompt=st.integers(1, 200), capacity=st.integers(32, 600))
def test_every_profile_is_possible(batch: int, beams: int, prompt: int, capacity: int) -> None:
    """Least, usual and most of every size are in order, and the runtime's sizes lie inside; or export refuses."""
    limits = Limits(batch, beams, prompt, capacity)
    for specs in (stage_specs(kind.from_transformers(read_config(name))) for name, kind in PUBLISHED):
        is_full = (1 if ENCODER in specs else 32 + prompt) + beams > capacity
        for stage, spec in specs.items():
            if stage == DECODER and is_full:
                with pytest.raises(InputError, match=f"{beams} beams do not fit a cache of {capacity} rows"):
                    plan_sizes(stage, spec, limits, 32)
                continue
            profiles = plan_sizes(stage, spec, limits, 32)
            assert len(profiles) == (2 if stage == DECODER else 1)
            for sizes in profiles:
                assert sizes["B"][2] == batch
                for name, (least, usual, most) in profile_shapes(spec, sizes).items():
                    assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)), name
            if stage == DECODER:
                prefill, step = profiles
                assert prefill["S"][2] == (1 if ENCODER in specs else 32 + prompt)
                assert step["S"][2] == step["R"][2] == beams
            if stage == ENCODER:
                assert profiles[0]["E"][2] >= padded(32 + prompt)

"""`--device torch`: the reference's modules as an engine, against the engine of the same checkpoint on the CPU.

Here they run on the CPU. CUDA graphs, and what a GPU rounds otherwise, these tests do not see.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blip2rt import EngineError, InputError, Pipeline
from blip2rt.backends import open_stages
from blip2rt.backends.rounded_linears import LARGEST, LAYERS, group_of, round_rows, unpack4
from blip2rt.backends.torch_modules import Stage
from blip2rt.cli import main
from blip2rt.export import export_engine
from blip2rt.export.modules import round_linear
from blip2rt.export.rounding import round_weight
from blip2rt.export.verify import verify_engine
from blip2rt.inspection import describe_engine, gpus_needed
from blip2rt.manifest import Manifest
from blip2rt.model import Checkpoint

RNG = np.random.default_rng(4)
IMAGES = [RNG.integers(0, 256, (11, 9, 3), np.uint8) for _ in range(4)]
OPTIONS: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 25, "min_new_tokens": 12}


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


def engines(checkpoint: Path, folder: Path, precision: str = "fp32") -> tuple[Pipeline, Pipeline]:
    """The CPU's and torch's."""
    export_engine(checkpoint, folder / "cpu")
    export_engine(checkpoint, folder / "torch", device="torch", precision=precision)
    return Pipeline(folder / "cpu"), Pipeline(folder / "torch")


def test_it_says_what_the_cpu_says(checkpoint: Path, tmp_path: Path) -> None:
    """Float32: the same tokens, the same scores but for rounding; the tree grows, drops rows and loses pictures."""
    cpu, modules = engines(checkpoint, tmp_path)
    assert modules.manifest.device == "torch"
    prompts = ["w1", "w2 w3 w4", "w5", ""]
    for expected, found in zip(
        cpu.generate(IMAGES, prompts, **OPTIONS), modules.generate(IMAGES, prompts, **OPTIONS), strict=True
    ):
        for left, right in zip((expected, *expected.alternatives), (found, *found.alternatives), strict=True):
            assert left.token_ids == right.token_ids
            assert left.score == pytest.approx(right.score, abs=1e-4)
    sampled = [
        [row.token_ids for row in pipe.caption(IMAGES, do_sample=True, num_beams=1, seed=5, num_return_sequences=2)]
        for pipe in (cpu, modules)
    ]
    assert sampled[0] == sampled[1]
    ranked = [pipe.answer(IMAGES[0], "w1", candidates=["w2", "w3 w4", "w6"]).text for pipe in (cpu, modules)]
    assert ranked[0] == ranked[1]


def test_half_the_bits(checkpoint: Path, tmp_path: Path) -> None:
    """bf16: weights are rounded once, everything is computed in it; captions stay near."""
    cpu, modules = engines(checkpoint, tmp_path, "bf16")
    stored = load_file(tmp_path / "torch" / "weights.safetensors")
    reference = Checkpoint(checkpoint)
    for name, value in stored.items():
        assert torch.equal(value, reference.parameter(name).to(torch.bfloat16)), name
    left, right = (pipe.encode(IMAGES[0]) for pipe in (cpu, modules))
    for name in ("image_embeds", "query_embeds", "prefix"):
        a, b = getattr(left, name), getattr(right, name)
        assert b.dtype == np.float32
        assert np.abs(a - b).max() < 0.05 * np.abs(a).max()
    expected, found = (pipe.caption(IMAGES[0], num_beams=3, max_new_tokens=3) for pipe in (cpu, modules))
    assert found.score == pytest.approx(expected.score, abs=0.1)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["opt", "t5"])
def test_weights_of_fewer_bits(
    model_type: str, precision: str, tmp_path: Path, checkpoint_maker: Callable[..., Path]
) -> None:
    """Linear layers of sizes that a GPU multiplies, each weight within half a step of what it was."""
    heads: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
    text: dict[str, Any] = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 48}
    if model_type == "opt":
        text = {**heads, "word_embed_proj_dim": 32, "ffn_dim": 48}
    checkpoint = checkpoint_maker(tmp_path / "checkpoint", 2, model_type, **text)
    cpu, modules = engines(checkpoint, tmp_path, precision)
    stored, reference = load_file(tmp_path / "torch" / "weights.safetensors"), Checkpoint(checkpoint)
    rounded = [name.replace(".scale", ".weight") for name in stored if name.endswith(".scale")]
    assert len(rounded) > 3
    for name in rounded:
        assert name.startswith("decoder.blocks.")
        expected, scale = reference.parameter(name), stored[name.replace(".weight", ".scale")].float()
        if precision == "int4":
            found, scale = (unpack4(stored[name]) - 8).float(), scale.repeat_interleave(32, 1)
            assert 0.02 < (found * scale - expected).norm() / expected.norm() < 0.12
            continue
        error = (stored[name].float() * scale - expected).abs()
        # 3 bits behind the first, and subnormal steps; half a step
        most = expected.abs() / 16 + scale / 512 * 1.001 if precision == "fp8" else scale * 0.501
        assert (error <= most).all()
    expected, found = (pipe.caption(IMAGES[0], num_beams=3, max_new_tokens=3) for pipe in (cpu, modules))
    assert found.score == pytest.approx(expected.score, abs=0.6 if precision == "int4" else 0.3)
    assert f"{precision} on torch" in str(describe_engine(tmp_path / "torch"))


@pytest.mark.parametrize("precision", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_layer_multiplies_what_it_stores(precision: str, dtype: torch.dtype) -> None:
    """Few rows and many, of any leading sizes, against float64; a row has one product, alone and among others."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 64).requires_grad_(False).to(dtype)
    rounded = LAYERS[precision](layer)
    parts = round_linear(layer.weight.float(), precision)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == rounded.parts(layer)
    rounded.load_state_dict(parts, strict=False)
    weight, scale = parts["weight"].double(), parts["scale"].double()
    if precision == "int4":
        weight, scale = unpack4(parts["weight"]).double() - 8, scale.repeat_interleave(group_of(96), 1)
    for shape in ((1, 96), (5, 96), (3, 7, 96), (200, 96)):
        x = torch.randn(shape).to(dtype)
        exact = x.double() @ (weight * scale).t() + layer.bias.double()
        if precision in ("fp8", "int8"):
            values, scales = round_rows(x.flatten(0, -2), rounded.weight.dtype)
            exact = ((values.double() * scales) @ (weight * scale).t()).unflatten(0, shape[:-1]) + layer.bias.double()
        found = rounded(x)
        assert found.dtype == dtype
        assert found.shape == (*shape[:-1], 64)
        assert (found.double() - exact).abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-4) * exact.abs().max()


def test_four_bits_are_those_of_the_cpu() -> None:
    """One set of rounded weights: the groups of the CPU's engines, where 128 divides the inputs."""
    weight = torch.randn(32, 256)
    values, scale = round_weight(weight, 4, 128)
    parts = round_linear(weight, "int4")
    assert torch.equal(unpack4(parts["weight"]) - 8, torch.from_numpy(values).int())
    assert torch.equal(parts["scale"].float(), torch.from_numpy(scale))


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_an_outlier_spoils_its_own_row_only(dtype: torch.dtype) -> None:
    """One channel a hundred times the others, as OPT's are, in one row: the other rows stay what they were."""
    x = torch.randn(5, 64)
    spoiled = x.clone()
    spoiled[2, 7] *= 100
    one, two = (values.float() * scale for values, scale in (round_rows(x, dtype), round_rows(spoiled, dtype)))
    others = [0, 1, 3, 4]
    assert torch.equal(one[others], two[others])
    assert (two - spoiled).norm() < 0.05 * spoiled.norm()


def test_retrieval(tiny_retrieval_checkpoint: Path, tmp_path: Path) -> None:
    """Stages that share their weights; each is stored once."""
    cpu, modules = engines(tiny_retrieval_checkpoint, tmp_path)
    left, right = (pipe.match(IMAGES, ["w1 w2", "w3"]) for pipe in (cpu, modules))
    for name in ("itc", "itm", "itm_probability"):
        assert np.allclose(getattr(left, name), getattr(right, name), atol=1e-5)
    stored = load_file(tmp_path / "torch" / "weights.safetensors")
    assert sum(value.numel() for value in stored.values()) == sum(modules.manifest.parameters.values())


def test_caches_are_written_in_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A step writes its rows where they belong and leaves everything else as it is, like the functional reference."""
    engine = export_engine(tiny_checkpoint, tmp_path / "torch", device="torch", precision="fp32")
    manifest = Manifest.read(engine)
    stage = open_stages(engine, manifest, 1)["decoder"]
    assert isinstance(stage, Stage)
    spec, sizes = manifest.stages["decoder"].signature, {"B": 2, "S": 3, "C": 9, "R": 3}
    arrays: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        is_id = tensor.dtype == "int64"
        arrays[tensor.name] = RNG.integers(0, 3, shape) if is_id else RNG.standard_normal(shape, dtype=np.float32)
    arrays["write_indices"] = np.array([2, 6])
    caches = [tensor.name for tensor in spec.inputs if tensor.name.startswith("past_")]
    given = [torch.from_numpy(array) for array in arrays.values()]
    expected = dict(zip((t.name for t in spec.outputs), stage.module(*given), strict=True))
    logits = np.empty(tuple(expected["logits"].shape), np.float32)
    binding, bound = stage.bind(), {}
    for name, array in arrays.items():
        bound[name] = array
        if name in caches:
            bound[name] = stage.cache(array.shape)
            bound[name].array[:] = torch.from_numpy(array)
        binding.input(name, bound[name])
    binding.output("logits", logits)
    binding.run()
    assert np.array_equal(logits, expected["logits"].numpy())
    for name in caches:
        assert torch.equal(bound[name].array, expected[name.replace("past", "present")])
        assert not torch.equal(bound[name].array, torch.from_numpy(arrays[name]))


def test_verify_and_damage(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each piece is compared in the engine's precision; a weight that changed is found and named."""
    engine = export_engine(tiny_checkpoint, tmp_path / "torch", device="torch", precision="bf16")
    assert all(comparison.first_divergence is None for comparison in verify_engine(engine, tiny_checkpoint))
    assert main(["inspect", str(engine), "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["bytes"]
    assert sum(sizes.values()) == pytest.approx((engine / "weights.safetensors").stat().st_size, abs=3)
    assert main(["inspect", str(engine)]) == 0
    assert "bf16 on torch" in capsys.readouterr().out
    weights = engine / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content[:-10])
    with pytest.raises(EngineError, match=r"weights.safetensors has .*`blip2rt export"):
        Pipeline(engine)
    assert main(["verify", str(engine), "--model", str(tiny_checkpoint)]) == 1
    assert "weights.safetensors" in capsys.readouterr().err


def test_wrong_combinations(
    tiny_checkpoint: Path,
    tiny_retrieval_checkpoint: Path,
    tiny_engine: Path,
    tmp_path: Path,
    checkpoint_maker: Callable[..., Path],
) -> None:
    for device, precision, message in (
        ("torch", "int5", "'int5' is not one of fp32, bf16, fp16, fp8, int8, int4 .device torch."),
        ("cpu", "bf16", "no bf16 kernels"),
        ("metal", "fp16", "'metal' is not one of cpu, torch, cuda, tensorrt"),
        ("cuda", "fp8", "'fp8' is not one of fp32, fp16, bf16 .device cuda."),
    ):
        with pytest.raises(InputError, match=message):
            export_engine(tiny_checkpoint, tmp_path / "none", device=device, precision=precision)
    for precision in LAYERS:
        with pytest.raises(
            InputError, match=f"{precision} is for the decoder's .* a retrieval model has none: use bf16"
        ):
            export_engine(tiny_retrieval_checkpoint, tmp_path / "none", device="torch", precision=precision)
    t5 = checkpoint_maker(tmp_path / "t5", 1, "t5")
    with pytest.raises(InputError, match="T5's feed-forward layers overflow in fp16: use bf16"):
        export_engine(t5, tmp_path / "none", device="torch", precision="fp16")
    with pytest.raises(EngineError, match=r"was built for 'cpu', not 'torch': .*--device torch"):
        Pipeline(tiny_engine, device="torch")


def test_a_gpu_for_each_process(tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    """What Ray is asked for: none for an engine of the CPU, and none where none is."""
    engine = export_engine(tiny_checkpoint, tmp_path / "torch", device="torch")
    assert Manifest.read(engine).precision == "bf16"  # what GPUs are for, where nothing is said
    assert [gpus_needed(engine, None, available) for available in (0, 0.5, 1, 8)] == [0, 0, 1, 1]
    assert gpus_needed(tiny_engine, None, 8) == 0


def test_without_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One sentence, with the command that installs it."""
    engine = export_engine(tiny_checkpoint, tmp_path / "torch", device="torch")
    program = f"""
import sys
sys.modules["torch"] = None
import blip2rt
try:
    blip2rt.Pipeline({str(engine)!r})
except blip2rt.EngineError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'blip2rt[torch]'" in said
    assert said.count("\n") == 1

"""Weights rounded by pictures: GPTQ against rounding without data, by what both do to outputs."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from blip2rt import InputError, Pipeline, bundled
from blip2rt.cli import main
from blip2rt.export import export_engine
from blip2rt.export.calibrate import Calibration
from blip2rt.export.gptq import round_by_moments
from blip2rt.export.rounding import round_weight
from blip2rt.manifest import Manifest
from blip2rt.model import Checkpoint
from blip2rt.stages import DECODER, ENCODER, MASKED, QFORMER, VISION

GROUP = 128
SIZES = {"outputs": st.integers(1, 40), "depth": st.integers(1, 300), "seed": st.integers(0, 999)}


def spread(rounded: tuple[Any, Any], depth: int) -> Tensor:
    """The weight that values and scales stand for."""
    values, scales = rounded
    return torch.from_numpy(values * np.repeat(scales, GROUP, axis=1)[:, :depth])


def round_by_itself(stage: str, name: str, weight: Tensor, bits: int, group: int) -> tuple[Any, Any]:
    """As `Calibration.round`, without pictures."""
    return round_weight(weight, bits, group)


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 40), **SIZES)
def test_outputs_change_less(rank: int, outputs: int, depth: int, seed: int) -> None:
    """Inputs that go together, as activations do: products are nearer than those of weights rounded by themselves."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, depth, generator=generator)
    inputs = torch.randn(500, rank, generator=generator) @ torch.randn(rank, depth, generator=generator)
    inputs += 0.1 * torch.randn(500, depth, generator=generator)
    exact = inputs @ weight.t()
    found = round_by_moments(weight, inputs.t() @ inputs / 500, GROUP)
    assert found[0].dtype == np.int8
    assert -8 <= found[0].min() <= found[0].max() <= 7
    assert torch.equal(torch.from_numpy(found[1]).to(torch.bfloat16).float(), torch.from_numpy(found[1]))
    errors = [
        float((inputs @ spread(rounded, depth).t() - exact).norm())
        for rounded in (found, round_weight(weight, 4, GROUP))
    ]
    assert errors[0] <= 1.05 * errors[1]
    if depth >= 2 * rank and outputs >= 5 and depth > 20:
        assert errors[0] < 0.8 * errors[1]


@settings(deadline=None, max_examples=20)
@given(**SIZES)
def test_inputs_that_say_nothing(outputs: int, depth: int, seed: int) -> None:
    """White inputs, and none at all: every weight is rounded by itself."""
    weight = torch.randn(outputs, depth, generator=torch.Generator().manual_seed(seed))
    values, scales = round_weight(weight, 4, GROUP)
    for moments in (torch.eye(depth), torch.zeros(depth, depth)):
        found = round_by_moments(weight, moments, GROUP)
        assert np.array_equal(found[0], values)
        assert np.array_equal(found[1], scales)


def test_the_bundled_model_is_nearer() -> None:
    """Logits of captions of other pictures than those it was calibrated with."""
    checkpoint = Checkpoint(bundled.CHECKPOINT)
    images = [Image.open(path).convert("RGBA").convert("RGB") for path in bundled.IMAGES]
    size = checkpoint.config.vision.image_size
    pictures = [np.asarray(picture.resize((size, size)), np.float32) / 127.5 - 1 for picture in images]
    views = [view for picture in pictures[::2] for view in (picture, picture[:, ::-1], picture[::-1])]
    rng = np.random.default_rng(0)
    text = [[2, *rng.integers(3, 1000, 12)] for _ in views]
    calibration = Calibration(checkpoint, np.stack(views).transpose(0, 3, 1, 2).copy(), text)
    reference = checkpoint.build()
    decoder = checkpoint.load(deepcopy(reference.get_submodule("decoder")), "decoder")
    others = torch.from_numpy(np.stack(pictures[1::2]).transpose(0, 3, 1, 2).copy())
    vision, qformer = (checkpoint.load(deepcopy(reference.get_submodule(n)), n) for n in ("vision", "qformer"))
    with torch.no_grad():
        prefix = qformer(vision(others))[1]
        exact = logits(decoder, prefix)
        rounded = []
        for round_one in (calibration.round, round_by_itself):
            copy = deepcopy(decoder)
            for name, child in copy.named_modules():
                if isinstance(child, nn.Linear) and name.startswith("blocks."):
                    found = round_one(DECODER, f"{name}.weight", child.weight, 4, GROUP)
                    child.weight.data = spread(found, child.in_features)
            rounded.append(float((logits(copy, prefix) - exact).norm() / exact.norm()))
    assert rounded[0] < 0.9 * rounded[1], rounded


def logits(decoder: nn.Module, prefix: Tensor) -> Tensor:
    """Of all rows of a few texts behind pictures."""
    batch, queries, _ = prefix.shape
    text = torch.randint(3, 1000, (batch, 12), generator=torch.Generator().manual_seed(5))
    ids = torch.cat((torch.full((batch, queries), -1), text), 1)
    rows = ids.shape[1]
    mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1).expand(batch, 1, -1, -1)
    laid = nn.functional.pad(prefix, (0, 0, 0, rows - queries))
    positions = torch.arange(rows).expand(batch, -1)
    nothing = [None] * (2 * len(decoder.get_submodule("blocks")))  # type: ignore[arg-type]
    wanted = torch.arange(queries, rows).expand(batch, -1)
    found: Tensor = decoder(laid, ids, positions, torch.zeros(batch, dtype=torch.int64), mask, wanted, *nothing)[0]
    return found


def test_t5_is_nearer(checkpoint_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Logits of T5 for other pictures and texts, with both of its stages rounded."""
    sizes = {"d_model": 128, "d_kv": 16, "d_ff": 256, "num_heads": 8, "num_layers": 2, "num_decoder_layers": 2}
    vision = {"image_size": 28, "patch_size": 14}
    checkpoint = Checkpoint(checkpoint_maker(tmp_path / "t5", 3, "t5", vision=vision, **sizes))
    rng = np.random.default_rng(0)
    images, others = rng.standard_normal((2, 24, 3, 28, 28), dtype=np.float32)
    texts, other_texts = ([[*rng.integers(3, 38, rng.integers(2, 12)), 2] for _ in images] for _ in range(2))
    calibration = Calibration(checkpoint, images, texts)
    model = checkpoint.load(checkpoint.build(), "")
    exact = t5_logits(model, others, other_texts)
    rounded = []
    for round_one in (calibration.round, round_by_itself):
        copy = deepcopy(model)
        for stage in (ENCODER, DECODER):
            for name, child in copy.get_submodule(stage).named_modules():
                if isinstance(child, nn.Linear) and name.startswith(("blocks.", "cross.")):
                    found = round_one(stage, f"{name}.weight", child.weight, 4, GROUP)
                    child.weight.data = spread(found, child.in_features)
        rounded.append(float((t5_logits(copy, others, other_texts) - exact).norm() / exact.norm()))
    assert rounded[0] < 0.9 * rounded[1], rounded


@torch.no_grad()
def t5_logits(model: nn.Module, images: Any, texts: list[list[int]]) -> Tensor:
    """Of all tokens of all texts, a picture at a time, without padding."""
    vision, qformer, encoder, decoder = (model.get_submodule(name) for name in (VISION, QFORMER, ENCODER, DECODER))
    found = []
    for image, text in zip(images, texts, strict=True):
        prefix = qformer(vision(torch.from_numpy(image)[None]))[1]
        ids = torch.tensor([[-1] * prefix.shape[1] + text])
        rows, written = torch.arange(ids.shape[1])[None], torch.tensor([[1, *text]])
        laid = nn.functional.pad(prefix, (0, 0, 0, len(text)))
        nothing_hidden = torch.zeros(1, 1, 1, ids.shape[1])
        cross = encoder(laid, ids, rows, nothing_hidden)
        steps, first = torch.arange(written.shape[1])[None], torch.zeros(1, dtype=torch.int64)
        causal = torch.full((1, 1, written.shape[1], written.shape[1]), MASKED).triu(1)
        caches = [None] * len(cross)
        found.append(decoder(written, steps, steps, first, causal, nothing_hidden, steps, *caches, *cross)[0][0])
    return torch.cat(found)


@pytest.mark.parametrize(("kernels", "language"), [("native", "opt"), ("stock", "opt"), ("native", "t5")])
def test_the_command(
    kernels: str,
    language: str,
    checkpoint_maker: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Pictures and texts in, an int4 engine out that says so, proven as every engine is."""
    tiny_checkpoint = checkpoint_maker(tmp_path / "checkpoint", 1, language)
    if kernels == "stock":
        monkeypatch.setenv("BLIP2RT_KERNELS", "stock")
    rng = np.random.default_rng(1)
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(paths[-1])
    (tmp_path / "texts.txt").write_text("w1 w2\nw3\n\nw4 w5 w6\n")
    command = ["calibrate", *paths, "--model", str(tiny_checkpoint), "--output", str(tmp_path / "engine")]
    assert main([*command, "--texts", str(tmp_path / "texts.txt")]) == 0
    manifest = Manifest.read(tmp_path / "engine")
    assert (manifest.precision, manifest.kernels) == ("int4", kernels)
    assert manifest.toolchain["calibration"] == "GPTQ over 4 pictures"
    plain = Manifest.read(export_engine(tiny_checkpoint, tmp_path / "plain", precision="int4"))
    assert manifest.files["decoder.data"] != plain.files["decoder.data"]
    assert manifest.files["vision.data"] == plain.files["vision.data"]
    assert Pipeline(tmp_path / "engine").caption(paths[0], max_new_tokens=3).token_ids
    assert main(["verify", str(tmp_path / "engine"), "--model", str(tiny_checkpoint)]) == 0
    capsys.readouterr()
    (tmp_path / "texts.txt").write_text("w1\nw2\n")
    assert main([*command, "--force", "--texts", str(tmp_path / "texts.txt")]) == 2
    assert "2 texts for 4 pictures: give one for each, or one for all" in capsys.readouterr().err
    assert main([*command, "--force", "--texts", str(tmp_path / "none.txt")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main([*command, "--force", "--precision", "int8"]) == 2
    assert "calibrate the 4-bit weights of int4 on the CPU, not int8 on cpu" in capsys.readouterr().err
    Path(paths[1]).write_bytes(b"no picture")
    assert main([*command, "--force"]) == 2
    assert "1.png" in capsys.readouterr().err
    assert Manifest.read(tmp_path / "engine") == manifest


def test_a_retrieval_model_has_no_such_weights(tiny_retrieval_checkpoint: Path, tmp_path: Path) -> None:
    picture = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(InputError, match="of a language model, and a retrieval model has none"):
        export_engine(tiny_retrieval_checkpoint, tmp_path / "engine", precision="int4", pictures=[picture])

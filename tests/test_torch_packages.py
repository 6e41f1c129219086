"""`--device torch --compile`: packages of AOTInductor beside the modules they were compiled from, on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2rt import EngineError, ExportError, InputError, Pipeline
from blip2rt.cli import main
from blip2rt.export import export_engine, packages
from blip2rt.export.verify import verify_engine

RNG = np.random.default_rng(8)
IMAGES = [RNG.integers(0, 256, (11, 9, 3), np.uint8) for _ in range(4)]
OPTIONS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compiled") / "engine"
    arguments = ["export", "--model", tiny_checkpoint, "--device", "torch", "--precision", "fp32", "--compile"]
    assert main([str(argument) for argument in [*arguments, "--output", output]]) == 0
    return output


def test_it_says_what_the_cpu_says(compiled: Path, tiny_engine: Path, tiny_checkpoint: Path) -> None:
    """The same tokens for one picture and for several."""
    cpu, packaged = Pipeline(tiny_engine), Pipeline(compiled)
    assert {"vision.pt2", "qformer.pt2"} < set(packaged.manifest.files)
    for images in (IMAGES[:1], IMAGES):
        pairs = zip(cpu.caption(images, **OPTIONS), packaged.caption(images, **OPTIONS), strict=True)
        for expected, found in pairs:
            assert found.token_ids == expected.token_ids
            assert found.score == pytest.approx(expected.score, abs=1e-4)
        for left, right in zip(cpu.encode(images), packaged.encode(images), strict=True):
            assert np.abs(left.image_embeds - right.image_embeds).max() < 1e-4
    assert all(comparison.first_divergence is None for comparison in verify_engine(compiled, tiny_checkpoint))


def test_retrieval(tiny_retrieval_checkpoint: Path, tiny_retrieval_engine: Path, tmp_path: Path) -> None:
    """What reads texts stays a module."""
    engine = export_engine(
        tiny_retrieval_checkpoint, tmp_path / "engine", device="torch", precision="fp32", compiled=True
    )
    assert {path.name for path in engine.glob("*.pt2")} == {"vision.pt2", "qformer.pt2"}
    left, right = (Pipeline(path).match(IMAGES, ["w1 w2", "w3"]) for path in (tiny_retrieval_engine, engine))
    assert np.allclose(left.itc, right.itc, atol=1e-5)
    assert np.allclose(left.itm, right.itm, atol=1e-5)


def test_another_machine(compiled: Path, tmp_path: Path) -> None:
    """One sentence with both machines, and the command; `inspect` says what compiled it."""
    manifest = json.loads((compiled / "manifest.json").read_text())
    here = manifest["toolchain"]["compiled by"]
    assert here == f"torch {torch.__version__} for CPUs with {torch.backends.cpu.get_cpu_capability()}"
    other = tmp_path / "engine"
    other.mkdir()
    for path in compiled.iterdir():
        (other / path.name).symlink_to(path)
    (other / "manifest.json").unlink()
    manifest["toolchain"]["compiled by"] = "torch 2.12.0 for NVIDIA H200"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=r"by torch 2.12.0 for NVIDIA H200, and this is torch .* --compile`"):
        Pipeline(other)


def test_what_cannot_be_compiled(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another device; a machine without a compiler; a compiler that gets it wrong. No engine is left behind."""
    output = tmp_path / "engine"
    with pytest.raises(InputError, match="--compile is for the modules of --device torch, and device 'cpu' has none"):
        export_engine(tiny_checkpoint, output, compiled=True)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C++ compiler found\nlong story")

    with monkeypatch.context() as patch:
        patch.setattr(torch._inductor, "aoti_compile_and_package", fail)
        arguments = ["export", "--model", tiny_checkpoint, "--device", "torch", "--compile", "--output", output]
        assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert "stage 'vision' cannot be compiled here (no C++ compiler found): install a C++ compiler" in error
    assert "Traceback" not in error

    def wrong(directory: Path, manifest: Any, stage: str, module: Callable[..., torch.Tensor]) -> Any:
        return lambda *inputs: module(*inputs) * 1.01

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: None)
    monkeypatch.setattr(packages, "open_package", wrong)
    with pytest.raises(ExportError, match=r"compiled stage 'vision' is 1.0e-02 away from its module"):
        export_engine(tiny_checkpoint, output, device="torch", precision="fp32", compiled=True)
    assert list(tmp_path.iterdir()) == []

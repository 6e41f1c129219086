"""The program that trains the bundled model: all of its chain, in about two minutes, on a few shapes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

PROGRAM = Path(__file__).parents[1] / "training" / "train_small.py"
STAGES = ("vision", "language", "stage1", "stage2", "captioner", "retriever")
NAMES = ("dog", "cat", "bicycle", "umbrella", "tree", "house", "kite", "clock", "cup", "chair", "red car", "blue car")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the program, which drew its pictures from discs of twelve colours."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "sprites" / "plain").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        picture = Image.new("RGBA", (64, 64))
        fill = (255 * (i % 2), 255 * (i // 2 % 3) // 2, 255 * (i // 6), 255)
        ImageDraw.Draw(picture).ellipse([2, 2 + 2 * i, 61, 61 - 2 * i], fill=fill)
        picture.save(folder / "sprites" / "plain" / f"{name}.png")
    run_program(folder)
    return folder / "run"


def run_program(folder: Path) -> str:
    options: list[str | Path] = ["--output", folder / "run", "--sprites", folder / "sprites", "--part", "0.006"]
    done = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_every_stage_learns(trained: Path) -> None:
    for stage in STAGES:
        losses = [json.loads(line)["loss"] for line in (trained / stage / "log.jsonl").read_text().splitlines()]
        assert min(losses[len(losses) // 2 :]) < losses[0], stage


def test_frozen_parts_pass_through(trained: Path) -> None:
    """The captioner's language model learns at the end only, stage 1's image encoder never."""
    vision, stage1 = (load_file(trained / name / "checkpoint/model.safetensors") for name in ("vision", "stage1"))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert (vision[name].astype(stage1[name].dtype) == stage1[name]).all()
    language, stage2 = (load_file(trained / name / "checkpoint/model.safetensors") for name in ("language", "stage2"))
    frozen = [key for key in stage2 if key.startswith("language_model.") and "embed_tokens" in key]
    assert frozen
    for key in frozen:
        assert (language[key.removeprefix("language_model.")] == stage2[key]).all()


def test_key_biases_stay_zero(trained: Path) -> None:
    """Else LAVIS's format could not hold what is trained here."""
    for stage in ("vision", "captioner", "retriever"):
        weights = load_file(trained / stage / "checkpoint/model.safetensors")
        biases = [tensor for name, tensor in weights.items() if "vision" in name and name.endswith("qkv.bias")]
        assert len(biases) == 6
        for bias in biases:
            query, key, value = np.split(bias, 3)
            assert not key.any()
            assert query.any()
            assert value.any()


def test_tables_and_card(trained: Path) -> None:
    table = json.loads((trained / "tables/main/scenes-table.json").read_text())
    assert {"captions", "answers", "retrieval", "prior"} <= table.keys()
    blind = json.loads((trained / "tables/blind/scenes-table.json").read_text())
    assert blind["blind"]
    assert 0 <= blind["captions"]["captions true"] <= 100
    card = (trained / "card/tables.md").read_text()
    assert all(f"| {stage} |" in card for stage in STAGES)
    assert "grey pictures" in card
    assert "stage 2 without" in card
    assert (trained / "card/curves.svg").read_text().count("<polyline") >= len(STAGES)
    log = json.loads((trained / "card/log.json").read_text())
    assert all(len(log[stage]["sha256"]) == 64 and log[stage]["log"] for stage in STAGES)


def test_what_is_there_is_left_alone(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    assert "==" not in run_program(trained.parent)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")} == before

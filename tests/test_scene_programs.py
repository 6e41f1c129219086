"""The programs that draw sprites, write scenes and measure engines over them."""

import io
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt.data import read_captions
from blip2rt.data.scenes import Scenes, Sprites, write_scenes

TRAINING = Path(__file__).parents[1] / "training"
NAMES = ("apple", "ball", "bee", "box", "cup", "hat", "key", "kite", "mouse", "owl", "pen", "red car", "blue car")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sprites: squares of different colours."""
    path = tmp_path_factory.mktemp("sprites")
    (path / "flat").mkdir()
    for number, name in enumerate(NAMES):
        color = (37 * number % 256, 91 * number % 256, 151 * number % 256, 255)
        Image.new("RGBA", (40, 40), color).save(path / "flat" / f"{name}.png")
    return path


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TRAINING / f"{name}.py", *arguments]
    environment = {**os.environ, "PATH": ""}  # no Java, which is slow to start, and no npm
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def test_scenes_are_written(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scenes"
    arguments = ("--sprites", folder, "--output", output, "--size", 32)
    result = program("make_scenes", *arguments, "--count", 12, "--seed", 3)
    assert result.returncode == 0, result.stderr
    scenes = Scenes(Sprites.open(folder), "test", 3)
    captions = [item.captions for item in read_captions(output, "coco", "test")]
    assert captions == [tuple(scenes.captions(i, scenes.scene(i))) for i in range(12)]
    result = program("make_scenes", *arguments)
    assert (result.returncode, "is not empty: choose another" in result.stderr) == (1, True)
    result = program("make_scenes", "--sprites", tmp_path / "none", "--output", tmp_path / "x")
    assert (result.returncode, "make_sprites.py" in result.stderr) == (1, True)
    assert program("make_scenes", *arguments, "--count", 0).returncode == 2


@pytest.mark.slow
def test_measuring(tiny_engine: Path, tiny_retrieval_engine: Path, folder: Path, tmp_path: Path) -> None:
    """Random engines: the whole way, sheet and tables included; they say nothing that is true."""
    engines = tmp_path / "engines"
    engines.mkdir()
    (engines / "one").symlink_to(tiny_engine)
    (engines / "two").symlink_to(tiny_retrieval_engine)
    few = tmp_path / "few"
    write_scenes(Scenes(Sprites.open(folder), "test", 3, 32), few, 4, unique=True)
    arguments = ("--engine", engines, "--data", few, "--retrieval", few, "--num-beams", 1)
    result = program("evaluate_scenes", *arguments, "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "run" / "scenes-table.json").read_text())
    assert table["captions"]["captions true"] == table["captions"]["things named"] == 0
    assert table["captions"]["facts true, unreadable"] == 0
    assert table["answers"]["accuracy"] == 0
    assert {"ITC txt_r1", "ITC img_r1", "ITC+ITM txt_r1", "ITM true before almost true"} <= set(table["retrieval"])
    assert Image.open(tmp_path / "run" / "sheet.png").width > 400
    assert "captions true" in result.stdout
    assert "Java" in table["captions"]["not scored"]["CIDEr"]
    result = program(
        "evaluate_scenes", "--engine", engines, "--retrieval", few, "--blind", "--output", tmp_path / "blind"
    )
    blind = json.loads((tmp_path / "blind" / "scenes-table.json").read_text())
    assert blind["retrieval"]["ITC txt_r1"] == 25  # all pictures are the same: one text is right by chance
    assert program("evaluate_scenes", "--engine", engines, "--output", tmp_path / "no").returncode == 1


def package(path: Path, icons: dict[str, Any]) -> None:
    """An npm package as `npm pack` leaves it."""
    content = {"width": 10, "height": 10, "icons": {name: {"body": body} for name, body in icons.items()}}
    info = {"name": "Art", "author": {"name": "Nobody", "url": "https://example.org"}, "license": {"title": "MIT"}}
    with tarfile.open(path, "w:gz") as archive:
        for name, value in (("icons", content), ("info", info)):
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def test_sprites_are_drawn_from_packages(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg draws the sprites")
    styles = tomllib.loads((TRAINING / "sprites.toml").read_text())["styles"]
    icons = {"dog": '<path fill="#804000" d="M2 4h6v2h-6z"/>', "automobile": '<path fill="#d02020" d="M1 1h8v8h-8z"/>'}
    for name in styles.values():
        package(tmp_path / f"{name[1:].replace('/', '-').replace('@', '-')}.tgz", icons)
    output = tmp_path / "sprites"
    result = program("make_sprites", "--packages", tmp_path, "--output", output, "--size", 32)
    assert result.returncode == 0, result.stderr
    sprites = Sprites.open(output)
    assert set(sprites.names) == {"dog", "car", "circle", "square", "triangle", "star", "diamond"}
    assert len(sprites.colors["car"]) == len(sprites.colors["star"]) == 6
    dog = np.asarray(Image.open(output / "noto" / "dog.png"))
    assert dog[16, 16].tolist() == [128, 64, 0, 255]
    assert (dog[2, :, 3] == 0).all()  # cut to what is drawn, three times as wide as high, in the middle
    assert (dog[16, :, 3] > 200).all()
    for color, channel in (("red", 0), ("green", 1), ("blue", 2)):
        pixel = np.asarray(Image.open(output / "twemoji" / f"{color} car.png"))[16, 16]
        assert pixel[:3].argmax() == channel
    assert (output / "CREDITS.md").read_text().count("Art by Nobody, MIT") == len(styles)
    (tmp_path / "iconify-json-noto-1.2.9.tgz").unlink()
    result = program("make_sprites", "--packages", tmp_path, "--output", output)
    assert (result.returncode, "make it with `npm pack @iconify-json/noto@1.2.9`" in result.stderr) == (1, True)

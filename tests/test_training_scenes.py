"""Scenes that are composed while a model learns from them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip2rt.data.examples import BadRecords
from blip2rt.training.build import build
from blip2rt.training.pictures import View, patch_labels
from blip2rt.training.recipe import DataRecipe, read_recipe
from blip2rt.training.streams import open_streams

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs of many greys with names of things, and a car in two colours."""
    folder = tmp_path_factory.mktemp("sprites") / "plain"
    folder.mkdir()
    names = [
        "dog",
        "cat",
        "bicycle",
        "umbrella",
        "tree",
        "house",
        "kite",
        "clock",
        "cup",
        "chair",
        "red car",
        "blue car",
    ]
    for i, name in enumerate(names):
        picture = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(picture).ellipse([2, 2, 61, 61], fill=(20 * i, 255 - 20 * i, 90, 255))
        picture.save(folder / f"{name}.png")
    return folder.parent


def test_scenes_are_split_and_resumed(sprites: Path) -> None:
    data = [DataRecipe("scenes", str(sprites), size=48), DataRecipe("crowds", str(sprites), size=48)]
    whole = open_streams(data[:1], 3, BadRecords())
    examples = [next(whole)[2] for _ in range(6)]
    ranks = [open_streams(data[:1], 3, BadRecords(), rank, 2) for rank in range(2)]
    shared = [next(ranks[i % 2])[2] for i in range(6)]
    later = open_streams(data[:1], 3, BadRecords(), positions=[4])
    for found, expected in zip([*shared, *(next(later)[2] for _ in range(2))], [*examples, *examples[4:]], strict=True):
        assert found.id == expected.id
        assert (found.captions, found.questions, found.boxes) == (expected.captions, expected.questions, expected.boxes)
        assert np.array_equal(found.image, expected.image)  # type: ignore[arg-type]
    assert all(len(example.captions) == 5 and example.questions for example in examples)
    crowd = next(open_streams(data[1:], 3, BadRecords()))[2]
    assert len(crowd.boxes) >= 4
    assert crowd.captions == ()


def test_every_patch_of_a_scene_has_a_class(sprites: Path) -> None:
    recipe = read_recipe(
        RECIPES / "small-vision.toml",
        [
            f"data=[{{format='scenes', path='{sprites}'}}, {{format='crowds', path='{sprites}'}}]",
            f"model.config={RECIPES}/small.json",
        ],
    )
    built = build(recipe)
    examples = open_streams(recipe.data, 0, BadRecords())
    for _ in range(20):
        _, source, example = next(examples)
        row = built.rows.row(example, source, np.random.default_rng(0), View())
        batch = built.rows.batch([row])
        assert batch["labels"].shape == (1, 49)
        assert 0 < int(batch["is_background"].sum()) < 49
    assert patch_labels((), 3, {}, View(), 2).tolist() == [3] * 4

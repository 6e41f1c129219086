"""Scenes as data sets: the readers of real data sets read them."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2rt import InputError, OutputError
from blip2rt.data import read_captions, read_questions
from blip2rt.data.scenes import Scenes, Sprites, draw_sheet, read_scenes, write_blank_twin, write_scenes
from blip2rt.data.scenes.sheet import Cell
from blip2rt.evaluation import vqa_table

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


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty test scenes."""
    path = tmp_path_factory.mktemp("written")
    write_scenes(Scenes(Sprites.open(folder), "test", 3, 48), path, 40)
    return path


def test_the_readers_of_real_data_sets_read_scenes(folder: Path, written: Path) -> None:
    scenes = Scenes(Sprites.open(folder), "test", 3, 48)
    items, truth = read_captions(written, "coco", "test"), read_scenes(written)
    assert [item.id for item in items] == list(truth.scenes) == list(range(40))
    for item in items:
        scene = scenes.scene(item.id)
        assert truth.scenes[item.id] == scene
        assert list(item.captions) == scenes.captions(item.id, scene)
        assert list(truth.distractors[item.id]) == scenes.distractors(item.id, scene)
        with Image.open(item.path) as image:
            assert abs(np.asarray(image, float) - scenes.picture(scene)).mean() < 4  # JPEG
    questions = read_questions(written, "vqav2")
    expected = [item for i in range(40) for item in scenes.questions(i, scenes.scene(i))]
    assert [(q.question, q.answers, q.question_type) for q in questions] == [
        (item.question, (item.answer,) * 10, item.kind) for item in expected
    ]
    rows = [{"prediction": q.answers[0], "answers": q.answers, "question_type": q.question_type} for q in questions]
    table = vqa_table(rows)
    assert table["overall"] == 100
    assert set(table["perQuestionType"]) == {"yes/no", "count", "color", "where", "what"}
    official = json.loads((written / "annotations" / "captions_val2014.json").read_text())
    assert [row["caption"] for row in official["annotations"]] == [text for item in items for text in item.captions]


def test_distractors_are_false_and_near(folder: Path) -> None:
    scenes = Scenes(Sprites.open(folder), "test", 3)
    for i in range(150):
        scene = scenes.scene(i)
        found = scenes.distractors(i, scene)
        assert len(set(found)) == len(found) == 5
        for text in found:
            verdict = scenes.checker.check(text, scene)
            assert not verdict.is_true
            assert all(fact.kind != "unreadable" for fact, _ in verdict.facts)
            assert verdict.named or verdict.true_facts or len(scene.groups) == 1


def test_texts_for_retrieval_are_true_of_one_scene_only(folder: Path, tmp_path: Path) -> None:
    """Checked pair by pair, as the writer does not."""
    scenes = Scenes(Sprites.open(folder), "test", 3, 32)
    write_scenes(scenes, tmp_path / "unique", 40, unique=True)
    items, truth = read_captions(tmp_path / "unique", "coco", "test"), read_scenes(tmp_path / "unique")
    assert [item.id for item in items] != list(range(40))  # some were left out
    texts = [text for item in items for text in item.captions]
    assert len(set(texts)) == len(texts)
    for one, other in combinations(items, 2):
        assert not any(truth.checker.check(text, truth.scenes[other.id]).is_true for text in one.captions)
        assert not any(truth.checker.check(text, truth.scenes[one.id]).is_true for text in other.captions)


def test_training_scenes_have_the_names_of_training(folder: Path, tmp_path: Path) -> None:
    write_scenes(Scenes(Sprites.open(folder), "train", 3, 32), tmp_path, 3)
    assert len(read_captions(tmp_path, "coco", "train")) == 3
    assert (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").exists()


def test_a_blank_twin_shows_nothing(written: Path, tmp_path: Path) -> None:
    write_blank_twin(written, tmp_path / "blank")
    items = read_captions(tmp_path / "blank", "coco", "test")
    assert items[0].captions == read_captions(written, "coco", "test")[0].captions
    pixels = {np.asarray(Image.open(item.path)).tobytes() for item in items}
    assert len(pixels) == 1
    with pytest.raises(InputError, match="not empty"):
        write_blank_twin(written, tmp_path / "blank")


def test_what_is_wrong_is_said(folder: Path, written: Path, tmp_path: Path) -> None:
    scenes = Scenes(Sprites.open(folder))
    with pytest.raises(InputError, match="is not empty: choose another"):
        write_scenes(scenes, written, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_scenes(scenes, tmp_path / "file" / "below", 1)
    (tmp_path / "scenes.json").write_text('{"scenes": [{"id": 1}]}')
    with pytest.raises(InputError, match=r"not as `training/make_scenes\.py` writes it"):
        read_scenes(tmp_path)


def test_a_sheet_holds_its_pictures() -> None:
    pictures = [np.full((9, 9, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = np.asarray(draw_sheet([Cell(p, [("some words " * 9, "#ff0000")]) for p in pictures], columns=2, side=60))
    for picture in pictures:
        assert (sheet == picture[0, 0]).all(2).sum() >= 50 * 50
    assert ((sheet[..., 0] > 200) & (sheet[..., 1] < 100)).any()

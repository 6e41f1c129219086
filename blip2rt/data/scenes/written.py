"""Scenes in the layouts of COCO captions, VQAv2 and Karpathy, beside the truth about each.

FOLDER/val2014/COCO_val2014_000000000017.jpg          (train2014 for the training split)
FOLDER/annotations/captions_val2014.json              COCO's captions
FOLDER/dataset_coco.json                              Karpathy's split
FOLDER/v2_OpenEnded_mscoco_val2014_questions.json, FOLDER/v2_mscoco_val2014_annotations.json    VQAv2
FOLDER/scenes.json                                    seed, styles, nouns, and every scene with its distractors
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import InputError, OutputError
from ..files import read_json
from .collection import Scenes
from .questions import ANSWER_TYPES, QuestionAnswer
from .scene import Look, Scene, Thing
from .truth import TruthChecker
from .unique import UniqueTexts
from .words import Lexicon

ANSWERS = 10  # people in VQAv2
QUALITY = 95


@dataclass(frozen=True)
class WrittenScenes:
    """What `scenes.json` holds: by the id of its picture each scene, and captions that are almost true of it."""

    split: str
    lexicon: Lexicon
    scenes: dict[int, Scene]
    distractors: dict[int, tuple[str, ...]]

    @property
    def checker(self) -> TruthChecker:
        return TruthChecker(self.lexicon)


@dataclass(frozen=True)
class _Row:
    id: int
    scene: Scene
    captions: list[str]
    questions: list[QuestionAnswer]
    distractors: list[str]


def write_scenes(scenes: Scenes, output: Path, count: int, unique: bool = False) -> None:
    """Write the first `count` scenes of a split.

    Args:
        scenes: the split.
        output: a folder that is not there or empty.
        count: of pictures.
        unique: leave out scenes until every text is true of one picture only.

    Raises:
        InputError: the folder holds something.
        OutputError: it cannot be written.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty: choose another --output")
    year = f"{'train' if scenes.split == 'train' else 'val'}2014"
    try:
        (output / year).mkdir(parents=True, exist_ok=True)
        (output / "annotations").mkdir(exist_ok=True)
        rows = []
        for row in _rows(scenes, count, unique):
            picture = Image.fromarray(scenes.picture(row.scene))
            picture.save(output / year / _file(year, row.id), quality=QUALITY, subsampling=0)
            rows.append(row)
        _write_captions(output, year, scenes, rows)
        _write_questions(output, year, rows)
        _write_truth(output, scenes, rows)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written ({error}): the pictures that are there already are of no use"
        ) from None


def _rows(scenes: Scenes, count: int, unique: bool) -> Iterator[_Row]:
    texts, index, written = UniqueTexts(scenes.checker), 0, 0
    while written < count:
        scene = scenes.scene(index)
        captions = scenes.captions(index, scene)
        if not unique or texts.add(scene, captions):
            questions, distractors = scenes.questions(index, scene), scenes.distractors(index, scene)
            yield _Row(index, scene, captions, questions, distractors)
            written += 1
        index += 1


def _file(year: str, identifier: int) -> str:
    return f"COCO_{year}_{identifier:012}.jpg"


def _write_captions(output: Path, year: str, scenes: Scenes, rows: list[_Row]) -> None:
    size = {"width": scenes.size, "height": scenes.size}
    images = [{"id": row.id, "file_name": _file(year, row.id), **size} for row in rows]
    annotations = [
        {"id": 10 * row.id + n, "image_id": row.id, "caption": text}
        for row in rows
        for n, text in enumerate(row.captions)
    ]
    _write(output / "annotations" / f"captions_{year}.json", {"images": images, "annotations": annotations})
    karpathy = [
        {
            "split": scenes.split,
            "filepath": year,
            "filename": _file(year, row.id),
            "cocoid": row.id,
            "imgid": number,
            "sentids": [10 * row.id + n for n in range(len(row.captions))],
            "sentences": [
                {"raw": text, "tokens": text.split(), "imgid": number, "sentid": 10 * row.id + n}
                for n, text in enumerate(row.captions)
            ],
        }
        for number, row in enumerate(rows)
    ]
    _write(output / "dataset_coco.json", {"dataset": "coco", "images": karpathy})


def _write_questions(output: Path, year: str, rows: list[_Row]) -> None:
    numbered = [(row.id, 10 * row.id + n, item) for row in rows for n, item in enumerate(row.questions)]
    questions = [{"image_id": image, "question": item.question, "question_id": i} for image, i, item in numbered]
    annotations = [
        {
            "question_id": i,
            "image_id": image,
            "question_type": item.kind,
            "answer_type": ANSWER_TYPES[item.kind],
            "multiple_choice_answer": item.answer,
            "answers": [
                {"answer": item.answer, "answer_id": n + 1, "answer_confidence": "yes"} for n in range(ANSWERS)
            ],
        }
        for image, i, item in numbered
    ]
    about = {"data_type": "mscoco", "data_subtype": year}
    _write(output / f"v2_OpenEnded_mscoco_{year}_questions.json", {**about, "questions": questions})
    _write(output / f"v2_mscoco_{year}_annotations.json", {**about, "annotations": annotations})


def _write_truth(output: Path, scenes: Scenes, rows: list[_Row]) -> None:
    styles = sorted({style for style, _, _ in scenes.sprites.images})
    about = {"split": scenes.split, "seed": scenes.seed, "size": scenes.size, "styles": styles}
    listed = [{"id": row.id, **asdict(row.scene), "distractors": row.distractors} for row in rows]
    _write(output / "scenes.json", {**about, "names": list(scenes.sprites.names), "scenes": listed})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", "utf-8")


def read_scenes(folder: Path) -> WrittenScenes:
    """The truth about the pictures of a folder.

    Raises:
        InputError: no `scenes.json`, or not one of ours.
    """
    (content,) = read_json((folder / "scenes.json", dict))
    try:
        rows = {row["id"]: row for row in content["scenes"]}
        scenes = {
            i: Scene(row["place"], tuple(Thing(**thing) for thing in row["things"]), _look(row["look"]))
            for i, row in rows.items()
        }
        distractors = {i: tuple(row["distractors"]) for i, row in rows.items()}
        return WrittenScenes(content["split"], Lexicon(tuple(content["names"])), scenes, distractors)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'scenes.json'} is not as `training/make_scenes.py` writes it ({error!r}): make it anew"
        ) from None


def _look(row: dict[str, Any]) -> Look:
    return Look(**{**row, "tint": tuple(row["tint"])})


def write_blank_twin(folder: Path, output: Path) -> None:
    """The same folder with every picture grey: what a model says that cannot see.

    Raises:
        InputError: `output` holds something.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty: choose another folder")
    for path in sorted(folder.rglob("*")):
        twin = output / path.relative_to(folder)
        twin.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            with Image.open(path) as image:
                Image.fromarray(np.full((image.height, image.width, 3), 128, np.uint8)).save(twin)
        elif path.is_file():
            twin.write_bytes(path.read_bytes())

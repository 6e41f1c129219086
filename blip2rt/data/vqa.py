"""Questions about pictures, and what people answered: VQAv2 and OK-VQA, GQA.

Layouts, as published:
    vqav2  val: `v2_OpenEnded_mscoco_val2014_questions.json`, `v2_mscoco_val2014_annotations.json`
           testdev: `v2_OpenEnded_mscoco_test-dev2015_questions.json`; its answers are not public
    okvqa  val: `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json`
           {"questions": [{"question_id", "image_id", "question"}]}, {"annotations": [{"question_id", "question_type",
           "answer_type", "answers": [{"answer"}]}]}; pictures `COCO_val2014_%012d.jpg`, `COCO_test2015_%012d.jpg`
    gqa    testdev: `testdev_balanced_questions.json`: {id: {"imageId", "question", "answer", "types": {"structural"}}};
           pictures `<imageId>.jpg`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import find_picture
from .files import duplicates, find_file, objects, read_json, refuse

PREFIXES = {"vqav2": "v2_", "okvqa": ""}
SPLITS = {"train": "train2014", "val": "val2014", "testdev": "test-dev2015"}  # as in the names of files
FOLDERS = {"train": "train2014", "val": "val2014", "testdev": "test2015"}  # of pictures


@dataclass(frozen=True)
class Question:
    """One question: its id, its picture, and what people answered (GQA: one answer; test splits: none)."""

    id: int | str
    path: Path
    question: str
    answers: tuple[str, ...]
    question_type: str | None = None
    answer_type: str | None = None


def read_questions(folder: Path, data_set: str, split: str = "val") -> list[Question]:
    """The questions of a split, in the order of the file.

    Args:
        folder: where the files and the pictures lie.
        data_set: "vqav2", "okvqa" or "gqa".
        split: "val" or "testdev"; of GQA always testdev, balanced.

    Raises:
        InputError: a file that is not there; or all that is wrong at once: broken files; pictures and answers that are
            missing and ids that come twice.
    """
    problems: list[str] = []
    path, rows = question_rows(folder, data_set, split, problems)
    problems += [] if rows else ["no questions"]
    questions = [_question(folder, row, problems) for row in rows]
    problems += [f"question {identifier} comes twice" for identifier in duplicates(q.id for q in questions)]
    refuse(path, dict.fromkeys(problems))
    return questions


def question_rows(folder: Path, data_set: str, split: str, problems: list[str]) -> tuple[Path, list[dict[str, Any]]]:
    """The file of a split (GQA has one), and its questions as it has them, with `file`, their picture's name.

    What is not as published goes to `problems`.

    Raises:
        InputError: a file that is not there or broken.
    """
    if data_set == "gqa":
        path = find_file(folder, ["testdev_balanced_questions.json"], "questions of GQA")
        return path, _gqa(read_json((path, dict))[0], problems)
    prefix, name = PREFIXES[data_set], SPLITS[split]
    path = find_file(folder, [f"{prefix}OpenEnded_mscoco_{name}_questions.json"], f"questions of {data_set}")
    files: list[tuple[Path, type]] = [(path, dict)]
    if split != "testdev":
        truth = find_file(folder, [f"{prefix}mscoco_{name}_annotations.json"], f"answers of {data_set}")
        files.append((truth, dict))
    return path, _vqa(read_json(*files), FOLDERS[split], problems)


def _gqa(content: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    rows = []
    for identifier, row in content.items():
        for found in objects([row], f"question {identifier}", problems):
            types = found.get("types")
            rows.append(
                {
                    "question_id": identifier,
                    "file": f"{found.get('imageId')}.jpg",
                    "question": found.get("question"),
                    "answers": [{"answer": found.get("answer")}],
                    "answer_type": types.get("structural") if isinstance(types, dict) else None,
                }
            )
    return rows


def _vqa(contents: list[dict[str, Any]], pictures: str, problems: list[str]) -> list[dict[str, Any]]:
    annotations = None
    if len(contents) == 2:
        found = objects(contents[1].get("annotations"), "annotations", problems)
        annotations = {str(row.get("question_id")): row for row in found}
        twice = duplicates(str(row.get("question_id")) for row in found)
        problems += [f"question {identifier} is answered twice" for identifier in twice]
    rows = []
    for row in objects(contents[0].get("questions"), "questions", problems):
        image = row.get("image_id")
        file = f"{pictures}/COCO_{pictures}_{image:012}.jpg" if isinstance(image, int) else f"the picture {image!r}"
        truth = {"answers": None} if annotations is None else annotations.get(str(row.get("question_id")), {})
        rows.append(truth | row | {"file": file})
    return rows


def _question(folder: Path, row: dict[str, Any], problems: list[str]) -> Question:
    identifier, text = row.get("question_id"), row.get("question")
    if not isinstance(text, str) or not isinstance(identifier, int | str):
        problems.append(f"question {identifier!r} is not as published: {text!r}")
        identifier = repr(identifier)
    given = row.get("answers", [])
    answers: list[Any] = []
    if given is not None:  # a split whose answers are public
        answers = [answer.get("answer") for answer in objects(given, f"answers of question {identifier!r}", problems)]
        if not answers or not all(isinstance(answer, str) for answer in answers):
            problems.append(f"question {identifier!r} has no answers")
    path = find_picture(folder, row["file"])
    if path is None:
        problems.append(f"{row['file']} is missing")
    kinds = (row.get("question_type"), row.get("answer_type"))
    if not all(isinstance(kind, str | None) for kind in kinds):
        problems.append(f"question {identifier!r} has types {kinds}, which are no strings")
    return Question(identifier, path or folder, str(text), tuple(answers), *kinds)

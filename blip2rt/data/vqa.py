"""Questions about pictures, and what people answered: VQAv2 and OK-VQA, GQA.

Layouts, as published:
    vqav2  `v2_OpenEnded_mscoco_val2014_questions.json`, `v2_mscoco_val2014_annotations.json`
    okvqa  `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json`
           {"questions": [{"question_id", "image_id", "question"}]}, {"annotations": [{"question_id", "question_type",
           "answer_type", "answers": [{"answer"}]}]}; pictures `COCO_val2014_%012d.jpg`
    gqa    `testdev_balanced_questions.json`: {id: {"imageId", "question", "answer"}}; pictures `<imageId>.jpg`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import find_picture
from .files import duplicates, find_file, read_json, refuse

PREFIXES = {"vqav2": "v2_", "okvqa": ""}


@dataclass(frozen=True)
class Question:
    """One question: its id, its picture, and what people answered (GQA: the one answer)."""

    id: int | str
    path: Path
    question: str
    answers: tuple[str, ...]
    question_type: str | None = None
    answer_type: str | None = None


def read_questions(folder: Path, data_set: str) -> list[Question]:
    """The questions of the validation split (GQA: testdev, balanced), in the order of the file.

    Args:
        folder: where the files and the pictures lie.
        data_set: "vqav2", "okvqa" or "gqa".

    Raises:
        InputError: a file that is not there or broken; or pictures and answers that are missing and ids that come
            twice, all listed at once.
    """
    if data_set == "gqa":
        path = find_file(folder, ["testdev_balanced_questions.json"], "questions of GQA")
        rows = [
            {"question_id": identifier, "file": f"{row.get('imageId')}.jpg", "answers": [{"answer": row.get("answer")}]}
            | {"question": row.get("question")}
            for identifier, row in read_json(path, dict).items()
        ]
    else:
        prefix = PREFIXES[data_set]
        path = find_file(folder, [f"{prefix}OpenEnded_mscoco_val2014_questions.json"], f"questions of {data_set}")
        truth = find_file(folder, [f"{prefix}mscoco_val2014_annotations.json"], f"answers of {data_set}")
        annotations = {row.get("question_id"): row for row in read_json(truth, dict).get("annotations", [])}
        rows = [
            annotations.get(row.get("question_id"), {})
            | row
            | {"file": f"val2014/COCO_val2014_{row.get('image_id', 0):012}.jpg"}
            for row in read_json(path, dict).get("questions", [])
        ]
    problems: list[str] = [] if rows else ["no questions"]
    questions = [_question(folder, row, problems) for row in rows]
    problems += [f"question {identifier} comes twice" for identifier in duplicates(q.id for q in questions)]
    refuse(path, dict.fromkeys(problems))
    return questions


def _question(folder: Path, row: dict[str, Any], problems: list[str]) -> Question:
    identifier, text = row.get("question_id"), row.get("question")
    answers = [answer.get("answer") for answer in row.get("answers", [])]
    if not isinstance(text, str) or not isinstance(identifier, int | str):
        problems.append(f"question {identifier!r} is not as published: {text!r}")
    if not answers or not all(isinstance(answer, str) for answer in answers):
        problems.append(f"question {identifier!r} has no answers")
    path = find_picture(folder, row["file"])
    if path is None:
        problems.append(f"{row['file']} is missing")
    kinds = (row.get("question_type"), row.get("answer_type"))
    return Question(identifier, path or folder, text or "", tuple(answers), *kinds)  # type: ignore[arg-type]

"""What a training learns from, whatever format it lies in: pictures with captions, questions and boxes, or texts.

Layouts besides those of `captions.py` and `vqa.py`:
    jsonl       a JSON object a line: {"image": path beside the file, "captions"?: [...] or "caption"?, "questions"?:
                [{"question", "answers": [...] or "answer"}], "boxes"?: [{"label", "box": [x0, y0, x1, y1] in shares of
                width and height}], "background"?: label of what no box covers}
    webdataset  tar shards (`path` may be "shards-{000..099}.tar"): a picture, and the same object as .json, or a .txt
    text        documents with empty lines between them

Training on a million pictures must not end at the first bad one: those are counted and named (`BadRecords`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .captions import caption_rows, find_picture
from .vqa import question_rows

LISTED = 10  # bad records that are named; all are counted


@dataclass(frozen=True)
class Box:
    """A thing in a picture: its label, and its box in shares of the picture's width and height."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Example:
    """One picture with what is said of it, or a text alone.

    `image`: its file, the file's content, or its pixels, uint8 [h, w, 3].
    """

    id: str
    image: Path | bytes | np.ndarray[Any, Any] | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, tuple[str, ...]], ...] = ()  # with their answers
    boxes: tuple[Box, ...] = ()
    background: str = ""
    text: str = ""


@dataclass
class BadRecords:
    """Counts what cannot be learnt from, and names the first of them."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        """One more."""
        self.count += 1
        if len(self.named) < LISTED:
            self.named.append(what)

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.named)} more" if self.count > len(self.named) else ""
        return f"{self.count} bad records: {'; '.join(self.named)}{more}"


def read_examples(format: str, path: Path, split: str, bad: BadRecords) -> list[Example]:
    """A data set in files, in their order; what is unusable goes to `bad`.

    Args:
        format: "coco", "flickr30k", "vqav2", "okvqa", "jsonl" or "text".
        path: the folder, or for jsonl and text the file.
        split: of the first four.

    Raises:
        InputError: a file that is not there or broken, or no usable record at all.
    """
    if format in ("jsonl", "text"):
        examples = list((_jsonl if format == "jsonl" else _texts)(path, bad))
    elif format in ("coco", "flickr30k"):
        examples = list(_captions(path, format, split, bad))
    else:
        examples = list(_questions(path, format, split, bad))
    if not examples:
        raise InputError(f"{path} has no usable record; {bad}")
    return examples


def _captions(folder: Path, data_set: str, split: str, bad: BadRecords) -> Iterator[Example]:
    problems: list[str] = []
    rows = caption_rows(folder, data_set, split, problems)[1]
    for problem in problems:
        bad.add(problem)
    for row in rows:
        picture = find_picture(folder, row["file"]) if not row["error"] else None
        captions = tuple(text.strip() for text in row["captions"] if isinstance(text, str) and text.strip())
        if row["error"] or picture is None:
            bad.add(row["error"] or f"{row['file']} is missing")
        elif not captions:
            bad.add(f"{row['file']} has no caption")
        else:
            yield Example(str(row["id"]), picture, captions)


def _questions(folder: Path, data_set: str, split: str, bad: BadRecords) -> Iterator[Example]:
    """The questions of one picture stand together."""
    if split not in ("train", "val"):
        raise InputError(f"{data_set} has answers for the splits train and val, not {split!r}")
    problems: list[str] = []
    rows = question_rows(folder, data_set, split, problems)[1]
    for problem in problems:
        bad.add(problem)
    asked: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for row in rows:
        try:
            asked.setdefault(row["file"], []).append(_question(row))
        except ValueError as error:
            bad.add(f"question {row.get('question_id')!r}: {error}")
    for file, questions in asked.items():
        picture = find_picture(folder, file)
        if picture is None:
            bad.add(f"{file} is missing")
        else:
            yield Example(file, picture, questions=tuple(questions))


def _jsonl(path: Path, bad: BadRecords) -> Iterator[Example]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row.get("image") if isinstance(row, dict) else None
            if not isinstance(name, str):
                raise ValueError("it has no image")
            picture = find_picture(path.parent, name)
            if picture is None:
                raise ValueError(f"{name} is missing")
            yield parse_row(name, picture, row)
        except (ValueError, RecursionError) as error:
            bad.add(f"line {number}: {error}")


def _texts(path: Path, bad: BadRecords) -> Iterator[Example]:
    for number, document in enumerate(_read(path).split("\n\n"), 1):
        if document.strip():
            yield Example(f"document {number}", text=document.strip("\n"))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_row(identifier: str, image: Path | bytes, row: dict[str, Any]) -> Example:
    """The object of a JSONL line or a WebDataset sample.

    Raises:
        ValueError: a value of another type, or nothing that could be learnt.
    """
    captions = row.get("captions", [row["caption"]] if "caption" in row else [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"its captions are {captions!r:.100}, not a list of texts")
    questions, boxes = row.get("questions", []), row.get("boxes", [])
    if not isinstance(questions, list) or not isinstance(boxes, list):
        raise ValueError("its questions and boxes must be lists")
    example = Example(
        identifier,
        image,
        tuple(caption.strip() for caption in captions if caption.strip()),
        tuple(_question(question) for question in questions),
        tuple(_box(box) for box in boxes),
        str(row.get("background", "")),
    )
    if not (example.captions or example.questions or example.boxes or example.background):
        raise ValueError("it has no caption, no question and no box")
    return example


def _question(row: Any) -> tuple[str, tuple[str, ...]]:
    question = row.get("question") if isinstance(row, dict) else None
    answers = (row.get("answers") or [row.get("answer")]) if isinstance(row, dict) else []
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"its question is {question!r}")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"the answers to {question!r} are {answers!r:.100}")
    return question.strip(), tuple(answer.strip() for answer in answers)


def _box(row: Any) -> Box:
    label: Any = row.get("label") if isinstance(row, dict) else None
    box: Any = row.get("box") if isinstance(row, dict) else None
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not isinstance(label, str) or not label or not is_box:
        raise ValueError(f"a box is {row!r:.100}, not a label and four numbers")
    x0, y0, x1, y1 = map(float, box)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"the box of {label} is {box}, which holds nothing")
    return Box(label, x0, y0, x1, y1)

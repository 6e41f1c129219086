"""Pictures with captions by people: COCO and Flickr30k in Karpathy's split, NoCaps.

Layouts, as published:
    karpathy  `dataset_coco.json`, `dataset_flickr30k.json`: {"images": [{"split", "filename", "filepath"?, "cocoid"? or
              "imgid", "sentences": [{"raw"}]}]}
    lavis     `coco_karpathy_test.json`, `flickr30k_test.json`: [{"image": "val2014/....jpg", "caption": [...]}]
    nocaps    `nocaps_val_4500_captions.json`: {"images": [{"id", "file_name", "domain"}], "annotations": [{"image_id",
              "caption"}]}
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import duplicates, find_file, objects, read_json, refuse

PICTURES = ("images", "flickr30k-images")  # folders; the second is Flickr30k's
COCO_ID = re.compile(r"(\d+)\.\w+$")


@dataclass(frozen=True)
class CaptionItem:
    """One picture: its id in the data set, its file, what people wrote, and NoCaps' domain."""

    id: int
    path: Path
    captions: tuple[str, ...]
    domain: str | None = None


def read_captions(folder: Path, data_set: str, split: str) -> list[CaptionItem]:
    """The pictures of a split, in the order of the file.

    Args:
        folder: where the annotations and, beside them or in `PICTURES`, the pictures lie.
        data_set: "coco", "flickr30k" or "nocaps".
        split: "val" or "test".

    Raises:
        InputError: a file that is not there or broken; or pictures that are missing, ids that come twice, and pictures
            without a caption, all listed at once.
    """
    problems: list[str] = []
    path, rows = caption_rows(folder, data_set, split, problems)
    problems += [f"no pictures of split {split!r}"] * (not rows)
    items = []
    for row in rows:
        if row["error"]:
            problems.append(row["error"])
            continue
        found = find_picture(folder, row["file"])
        problems += [f"{row['file']} is missing"] if found is None else []
        problems += [f"{row['file']} has no caption"] if not row["captions"] else []
        items.append(CaptionItem(row["id"], found or folder, tuple(row["captions"]), row["domain"]))
    problems += [f"id {identifier} comes twice" for identifier in duplicates(item.id for item in items)]
    refuse(path, problems)
    return items


def caption_rows(folder: Path, data_set: str, split: str, problems: list[str]) -> tuple[Path, list[dict[str, Any]]]:
    """The file of a split, and its pictures as it has them: `id`, `file`, `captions`, `domain`, `error`.

    The split "train" is all that is left for training: COCO's "restval" belongs to it. What is not as published goes to
    `problems`.

    Raises:
        InputError: a file that is not there or broken.
    """
    if data_set == "nocaps":
        path = find_file(folder, ["nocaps_val_4500_captions.json"], "captions of NoCaps")
        return path, list(_nocaps(read_json((path, dict))[0], problems))
    lavis = f"coco_karpathy_{split}.json" if data_set == "coco" else f"flickr30k_{split}.json"
    path = find_file(folder, [f"dataset_{data_set}.json", lavis], f"Karpathy's split of {data_set}")
    if path.name.startswith("dataset_"):
        return path, list(_karpathy(read_json((path, dict))[0], split, problems))
    return path, list(_lavis(read_json((path, list))[0], problems))


def find_picture(folder: Path, name: str) -> Path | None:
    """A picture in the folder or one of its `PICTURES`, with or without the folders of its own name."""
    for base in (folder, *(folder / name for name in PICTURES)):
        for path in (base / name, base / Path(name).name):
            if path.is_file():
                return path
    return None


def _row(identifier: Any, file: Any, captions: Any, domain: Any = None) -> dict[str, Any]:
    is_right = isinstance(file, str) and type(identifier) is int and isinstance(captions, list)
    is_right = is_right and all(isinstance(caption, str) for caption in captions)
    error = None if is_right else f"a picture {file!r} with id {identifier!r} is not as published"
    return {"id": identifier, "file": file, "captions": captions, "domain": domain, "error": error}


def _karpathy(content: dict[str, Any], split: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    splits = ("train", "restval") if split == "train" else (split,)
    for image in objects(content.get("images"), "images", problems):
        if image.get("split") in splits:
            names = [image.get("filepath"), image.get("filename")]
            file = "/".join(filter(None, names)) if all(isinstance(n, str | None) for n in names) and names[1] else None
            sentences = objects(image.get("sentences"), f"sentences of {file}", problems)
            captions = [sentence.get("raw") for sentence in sentences]
            yield _row(image.get("cocoid", image.get("imgid")), file, captions)


def _lavis(content: list[Any], problems: list[str]) -> Iterator[dict[str, Any]]:
    for image in objects(content, "images", problems):
        file, captions = image.get("image"), image.get("caption", [])
        number = COCO_ID.search(file) if isinstance(file, str) else None
        yield _row(int(number[1]) if number else None, file, [captions] if isinstance(captions, str) else captions)


def _nocaps(content: dict[str, Any], problems: list[str]) -> Iterator[dict[str, Any]]:
    captions: dict[Any, list[Any]] = {}
    for annotation in objects(content.get("annotations"), "annotations", problems):
        captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    for image in objects(content.get("images"), "images", problems):
        found = captions.get(str(image.get("id")), [])
        yield _row(image.get("id"), image.get("file_name"), found, image.get("domain"))

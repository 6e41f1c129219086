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

from .files import duplicates, find_file, read_json, refuse

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
        folder: where the annotations and, under `images` or beside them, the pictures lie.
        data_set: "coco", "flickr30k" or "nocaps".
        split: "val" or "test".

    Raises:
        InputError: a file that is not there or broken; or pictures that are missing, ids that come twice, and pictures
            without a caption, all listed at once.
    """
    if data_set == "nocaps":
        path = find_file(folder, ["nocaps_val_4500_captions.json"], "captions of NoCaps")
        rows = list(_nocaps(read_json(path, dict)))
    else:
        lavis = f"coco_karpathy_{split}.json" if data_set == "coco" else f"flickr30k_{split}.json"
        path = find_file(folder, [f"dataset_{data_set}.json", lavis], f"Karpathy's split of {data_set}")
        is_karpathy = path.name.startswith("dataset_")
        rows = list(_karpathy(read_json(path, dict), split) if is_karpathy else _lavis(read_json(path, list)))
    problems = [f"no pictures of split {split!r}"] * (not rows)
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


def find_picture(folder: Path, name: str) -> Path | None:
    """A picture in the folder, or in its subfolder `images`, with or without the folders of its own name."""
    for base in (folder, folder / "images"):
        for path in (base / name, base / Path(name).name):
            if path.is_file():
                return path
    return None


def _row(identifier: Any, file: Any, captions: Any, domain: Any = None) -> dict[str, Any]:
    wrong = not isinstance(file, str) or type(identifier) is not int or not all(isinstance(c, str) for c in captions)
    error = f"a picture {file!r} with id {identifier!r} is not as published" if wrong else None
    return {"id": identifier, "file": file, "captions": captions, "domain": domain, "error": error}


def _karpathy(content: dict[str, Any], split: str) -> Iterator[dict[str, Any]]:
    for image in content.get("images", []):
        if image.get("split") == split:
            file = "/".join(filter(None, (image.get("filepath"), image.get("filename"))))
            captions = [sentence.get("raw") for sentence in image.get("sentences", [])]
            yield _row(image.get("cocoid", image.get("imgid")), file, captions)


def _lavis(content: list[Any]) -> Iterator[dict[str, Any]]:
    for image in content:
        file, captions = image.get("image"), image.get("caption", [])
        number = COCO_ID.search(file) if isinstance(file, str) else None
        yield _row(int(number[1]) if number else None, file, [captions] if isinstance(captions, str) else captions)


def _nocaps(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    captions: dict[Any, list[Any]] = {}
    for annotation in content.get("annotations", []):
        captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
    for image in content.get("images", []):
        yield _row(image.get("id"), image.get("file_name"), captions.get(image.get("id"), []), image.get("domain"))

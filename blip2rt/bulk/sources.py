"""Where pictures come from: a folder, a list, JSONL, CSV, parquet. WebDataset shards are in webdataset.py.

Every source gives its items in the same order in every run, one at a time, and never holds more than it is reading. An
input that is wrong is an item with an error; a source that cannot be read raises.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .items import Item
from .webdataset import ARCHIVE_ENDINGS, expand_shards, read_shards

PICTURE_ENDINGS = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
IMAGE_COLUMNS = ("image", "file_name", "path", "file", "filename", "img", "jpg")  # the first that a table has
ID_COLUMNS = ("id",)
PARQUET_ROWS = 64  # rows read at once: they may hold whole pictures


@dataclass(frozen=True)
class Columns:
    """Names of the columns (CSV, parquet) or keys (JSONL, a sample's .json); None: the usual names, see above."""

    image: str | None = None
    id: str | None = None
    text: str | None = None  # None: no text comes with the pictures


class Source:
    """A collection that can be read again and again.

    Raises:
        InputError: there is nothing of the kind, or no way to tell what it is.
    """

    def __init__(self, source: str, columns: Columns):
        self.name, self.columns = source, columns
        self._kind, self._files = _identify(source)
        if columns.text and self._kind in ("folder", "list"):
            raise InputError(
                f"{source} is a {self._kind} and holds no {columns.text!r} with its pictures: give one for all with "
                "--prompt or --question, or pass a JSONL, CSV, parquet or WebDataset source that has it"
            )
        if not source.startswith("pipe:"):
            self.name = os.path.abspath(source)

    def count(self) -> int | None:
        """How many items there are, where that can be told without reading them."""
        if self._kind == "folder":
            return sum(1 for _ in _walk(Path(self.name)))
        if self._kind in ("list", "jsonl"):
            with open(self.name, "rb") as file:
                return sum(1 for line in file if line.strip())
        if self._kind == "parquet":
            from pyarrow import parquet

            return sum(parquet.ParquetFile(file).metadata.num_rows for file in self._files)
        return None

    def files_with_pictures(self) -> list["Source"]:
        """Shards and parquet files, each a source of its own that can be read on another machine; else nothing."""
        if self._kind not in ("shards", "parquet"):
            return []
        names = [file if file.startswith("pipe:") else os.path.abspath(file) for file in self._files]
        return [Source(name, self.columns) for name in names]

    def __iter__(self) -> Iterator[Item]:
        if self._kind == "folder":
            return _walk(Path(self.name))
        if self._kind == "shards":
            return read_shards(self._files, self.columns.text)
        reader = {"list": _read_list, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}[self._kind]
        return reader(self._files, self.columns)


def _identify(source: str) -> tuple[str, list[str]]:
    """The kind of a source, and its files."""
    if source.startswith("pipe:"):
        return "shards", [source]
    if os.path.isdir(source):
        return "folder", []
    files = expand_shards(source)
    if not files:
        raise InputError(f"there is no {source}: pass a folder, a list, a table, or shards")
    ending = _ending(files[0])
    if any(_ending(file) != ending for file in files):
        raise InputError(f"{source} means files of several kinds, {files[0]} and others: pass one kind")
    if ending in ARCHIVE_ENDINGS:
        return "shards", files
    if ending == ".parquet":
        return "parquet", files
    kinds = {".txt": "list", ".lst": "list", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
    if len(files) > 1 or ending not in kinds:
        raise InputError(
            f"{source} is no collection that blip2rt knows: pass a folder, a list (.txt), .jsonl, .csv, .tsv, .parquet "
            "or WebDataset shards (.tar, also 'shards-{000..099}.tar', 'shards/*.tar' or 'pipe:COMMAND')"
        )
    return kinds[ending], files


def _ending(file: str) -> str:
    name = file.lower()
    return next((e for e in ARCHIVE_ENDINGS if name.endswith(e)), os.path.splitext(name)[1])


def _walk(folder: Path) -> Iterator[Item]:
    """Pictures under a folder by their endings, folder by folder in the order of names; nothing hidden, no links to
    folders. The id is the path under the folder, with slashes."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in PICTURE_ENDINGS and not name.startswith("."):
                path = Path(parent, name)
                yield Item(path.relative_to(folder).as_posix(), path, ending=path.suffix[1:].lower())


def _read_list(files: list[str], columns: Columns) -> Iterator[Item]:
    """A path a line, relative to the list's folder; the id is the path as it stands."""
    with open(files[0], "rb") as file:
        for line in file:
            if name := os.fsdecode(line.strip()):
                yield _path_item(name, name, files[0], None)


def _read_jsonl(files: list[str], columns: Columns) -> Iterator[Item]:
    with open(files[0], "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError is bad JSON and bad UTF-8 alike
                yield Item(f"{Path(files[0]).name}:{number}", error=f"line {number} is not JSON ({error})")
                continue
            yield _row_item(row, f"{Path(files[0]).name}:{number}", files[0], columns)


def _read_csv(files: list[str], columns: Columns) -> Iterator[Item]:
    delimiter = "\t" if files[0].lower().endswith(".tsv") else ","
    with open(files[0], encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        header = _try_header(rows, files[0])
        _check_columns(header, files[0], columns)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                place = f"{Path(files[0]).name}:{rows.line_num}"
                yield Item(place, error=f"line {rows.line_num} is not CSV ({error})")
                continue
            yield _row_item(row, f"{Path(files[0]).name}:{rows.line_num}", files[0], columns)


def _try_header(rows: "csv.DictReader[str]", file: str) -> list[str]:
    try:
        return list(rows.fieldnames or ())
    except csv.Error as error:
        raise InputError(f"{file} is not CSV ({error})") from error


def _read_parquet(files: list[str], columns: Columns) -> Iterator[Item]:
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            table = parquet.ParquetFile(file)
            _check_columns(table.schema_arrow.names, file, columns)
            wanted = {columns.image, columns.id, columns.text, *IMAGE_COLUMNS, *ID_COLUMNS}
            names = [name for name in table.schema_arrow.names if name in wanted]
            number = 0
            for batch in table.iter_batches(PARQUET_ROWS, columns=names):
                for row in batch.to_pylist():
                    yield _row_item(row, f"{Path(file).name}:{number}", file, columns)
                    number += 1
        except pyarrow.ArrowException as error:
            raise InputError(f"{file} is not parquet, or is damaged ({error}): write it again") from error


def _check_columns(header: Iterable[str], file: str, columns: Columns) -> None:
    header = list(header)
    if columns.image is None and not any(name in header for name in IMAGE_COLUMNS):
        raise InputError(f"{file} has no column {IMAGE_COLUMNS[0]!r}, it has {header}: name it with --image-column")
    for option, name in (("image", columns.image), ("id", columns.id), ("text", columns.text)):
        if name is not None and name not in header:
            raise InputError(f"{file} has no column {name!r}, it has {header}: name it with --{option}-column")


def _row_item(row: Any, place: str, file: str, columns: Columns) -> Item:
    """The item of one row of a table. An id that is not given is the picture's path, or else the row's place."""
    if not isinstance(row, dict):
        return Item(place, error=f"{place} should be an object, not {type(row).__name__}")
    image = _first(row, (columns.image,) if columns.image else IMAGE_COLUMNS)
    given_id = _first(row, (columns.id,) if columns.id else ID_COLUMNS)
    if given_id is None and columns.id:
        return Item(place, error=f"{place} has no {columns.id!r}")
    if isinstance(image, dict):  # as the `datasets` library writes pictures: {"bytes": ..., "path": ...}
        image = image.get("bytes") or image.get("path")
    if given_id is None:
        given_id = image if isinstance(image, str) and image else place
    if not isinstance(given_id, str | int) or isinstance(given_id, bool):
        return Item(place, error=f"{place}: the id should be text or a whole number, not {given_id!r:.60}")
    text = row.get(columns.text) if columns.text else None
    if columns.text and not isinstance(text, str):
        return Item(str(given_id), error=f"{place}: {columns.text!r} should be text, not {text!r:.60}")
    if isinstance(image, bytes) and image:
        return Item(str(given_id), data=image, text=text)
    if not isinstance(image, str) or not image:
        return Item(str(given_id), error=f"{place} has no picture: its image is {image!r:.60}")
    return _path_item(str(given_id), image, file, text)


def _path_item(item_id: str, name: str, file: str, text: str | None) -> Item:
    path = Path(os.path.dirname(os.path.abspath(file)), name)
    return Item(item_id, path, text=text, ending=path.suffix[1:].lower())


def _first(row: dict[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)

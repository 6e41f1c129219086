"""Finding the files of a data set, and telling all that is wrong with it in one error."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of these files that is there, in the folder or in its subfolder `annotations`.

    Raises:
        InputError: none is.
    """
    for name in names:
        for path in (folder / name, folder / "annotations" / name):
            if path.is_file():
                return path
    raise InputError(f"{folder} holds no {what}: put {' or '.join(names)} there (or into {folder / 'annotations'})")


def read_json(*files: tuple[Path, type]) -> list[Any]:
    """The contents of JSON files, whose outermost values are lists or objects as given.

    Raises:
        InputError: unreadable, broken, or another value; it names every such file.
    """
    contents, problems = [], []
    for path, kind in files:
        try:
            content = json.loads(path.read_text("utf-8"), object_pairs_hook=_object_with_unique_keys)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path} cannot be read as JSON ({error})")
            continue
        if not isinstance(content, kind):
            problems.append(f"{path} holds {type(content).__name__}, not {kind.__name__}")
        contents.append(content)
    if problems:
        raise InputError(f"{'; '.join(problems)}: fetch {'them' if len(problems) > 1 else 'it'} anew")
    return contents


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = ", ".join(repr(key) for key in duplicates(key for key, _ in pairs))
        raise ValueError(f"of an object, keys come twice: {twice}")
    return found


def objects(rows: Any, name: str, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of a list that are objects; the others become problems, and so does anything that is no list."""
    if not isinstance(rows, list):
        problems.append(f"{name} is {type(rows).__name__}, not a list")
        return []
    problems += [
        f"{name}[{i}] is {type(row).__name__}, not an object" for i, row in enumerate(rows) if not isinstance(row, dict)
    ]
    return [row for row in rows if isinstance(row, dict)]


def refuse(path: Path, problems: Iterable[str]) -> None:
    """All problems of a data set in one error.

    Raises:
        InputError: there are some.
    """
    found = list(problems)
    if found:
        raise InputError(f"{path}: {len(found)} problems: {'; '.join(found)}")


def duplicates(ids: Iterable[Any]) -> list[Any]:
    """Those that come more than once, in order."""
    return [identifier for identifier, count in Counter(ids).items() if count > 1]

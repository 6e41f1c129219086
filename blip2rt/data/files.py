"""Finding the files of a data set, and telling all that is wrong with it in one error."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

LISTED = 10  # problems that an error names; it counts all


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


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose outermost value is a list or an object.

    Raises:
        InputError: unreadable, broken, or another value.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): fetch it anew") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} holds {type(content).__name__}, not {kind.__name__}: fetch it anew")
    return content


def refuse(path: Path, problems: Iterable[str]) -> None:
    """All problems of a data set in one error.

    Raises:
        InputError: there are some.
    """
    found = list(problems)
    if found:
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise InputError(f"{path}: {len(found)} problems: {'; '.join(found[:LISTED])}{more}")


def duplicates(ids: Iterable[Any]) -> list[Any]:
    """Those that come more than once, in order."""
    return [identifier for identifier, count in Counter(ids).items() if count > 1]

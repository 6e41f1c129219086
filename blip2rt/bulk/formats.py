"""Which output a run has, where it lies, and what belongs to it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .journal import forget
from .sinks import CsvSink, JsonlSink, ParquetSink, SidecarSink, Sink, WebDatasetSink, telling
from .sources import PICTURE_ENDINGS
from .vectors import NpySink

FORMATS = ("jsonl", "csv", "parquet", "webdataset", "sidecar", "npy")
FILE_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
FOLDER_FILES = {
    "parquet": r"\.?part-\d+\.parquet(\.writing)?", "webdataset": r"shard-\d+\.tar", "sidecar": r"(?!)",
    "npy": r"embeddings\.npy|ids\.jsonl",
}  # fmt: skip
JOURNAL = ".blip2rt"  # in a folder of outputs, or the ending of what lies beside a file
ERRORS = "errors.jsonl"  # in a folder it begins with "_", which readers of parquet folders pass over


def pick_format(name: str | None, output: Path, extension: str) -> str:
    """The format that was named, or that the output's ending says.

    Raises:
        InputError: an unknown one, no way to tell, or an output that is in the way.
    """
    chosen = name or FILE_FORMATS.get(output.suffix.lower())
    if chosen is None:
        raise InputError(f"which format should {output} have? pass --format {', '.join(FORMATS)}")
    if chosen not in FORMATS:
        raise InputError(f"format {chosen!r} is none of {', '.join(FORMATS)}")
    if not re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*", extension) or f".{extension.lstrip('.').lower()}" in PICTURE_ENDINGS:
        raise InputError(f"{extension!r} is no ending for text files: pass for example --extension .txt or .caption")
    wants_folder = chosen in FOLDER_FILES
    if output.exists() and output.is_dir() != wants_folder:
        raise InputError(
            f"{output} is {'not ' * wants_folder}a folder, which --format {chosen} writes: choose another --output"
        )
    return chosen


def output_folder(output: Path, chosen: str) -> Path:
    """The folder of the journal.

    Raises:
        InputError: something is there that no run wrote.
    """
    folder = output / JOURNAL if chosen in FOLDER_FILES else Path(f"{output}{JOURNAL}")
    if chosen == "sidecar" or folder.exists() or not os.path.lexists(output):
        return folder
    if output.is_dir() and not any(output.iterdir()):
        return folder
    raise InputError(f"{output} exists and was not written by `blip2rt bulk`: choose another --output")


def errors_file(output: Path, chosen: str) -> Path:
    """Where the inputs that failed are listed."""
    return output / f"_{ERRORS}" if chosen in FOLDER_FILES else Path(f"{output}.{ERRORS}")


def start_anew(output: Path, chosen: str, journal: Path) -> None:
    """Remove what an earlier run wrote. Text files beside pictures stay: nobody can tell whose they are.

    Raises:
        InputError: a run is writing it just now.
        OutputError: it cannot be removed.
    """

    def remove() -> None:
        with telling(output):
            if chosen in FOLDER_FILES and output.is_dir():
                for path in output.iterdir():
                    if re.fullmatch(FOLDER_FILES[chosen], path.name):
                        path.unlink()
            elif chosen not in FOLDER_FILES:
                output.unlink(missing_ok=True)
            errors_file(output, chosen).unlink(missing_ok=True)

    forget(journal, remove)


def open_sink(
    chosen: str,
    output: Path,
    journal: Path,
    state: Any,
    *,
    columns: Mapping[str, str],
    num_alternatives: int,
    rows_per_file: int | None,
    extension: str,
    field: str,
) -> Sink:
    """The sink of a format, cut back to `state`.

    Args:
        chosen: the format.
        output: where to.
        journal: the journal's folder.
        state: what the sink said last, None at first.
        columns: of a table, names and kinds.
        num_alternatives: how many other texts a row has.
        rows_per_file: of parquet; None: as usual.
        extension: of sidecar files.
        field: of the members that are added to WebDataset samples.

    Raises:
        OutputError: it cannot be written, or holds less than `state` says.
    """
    if chosen in FOLDER_FILES:
        with telling(output):
            output.mkdir(parents=True, exist_ok=True)
    match chosen:
        case "jsonl":
            return JsonlSink(output, state)
        case "csv":
            flat = [name for name, kind in columns.items() if kind in ("text", "number")]
            return CsvSink(output, state, flat, num_alternatives)
        case "parquet":
            return ParquetSink(output, state, journal, columns, rows_per_file)
        case "npy":
            return NpySink(output, state)
        case "webdataset":
            return WebDatasetSink(output, state, field)
        case _:
            return SidecarSink(output, extension)

"""Where answers go: JSONL, CSV, parquet, WebDataset shards, or a text file beside every picture. vectors.py has npy.

Every sink can be cut back to a state that it once reported, and gives the same bytes however often that happens.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError
from .items import Item
from .webdataset import TAR_END, tar_member

Row = dict[str, Any]
ROWS_PER_FILE = 10_000  # of parquet
SAMPLES_PER_SHARD = 10_000  # of WebDataset


class AppendedFile:
    """A file that only grows, and can be cut back to where it counts."""

    def __init__(self, path: Path, size: int):
        """Open `path` and cut it back to `size` bytes.

        Raises:
            OutputError: it cannot be written, or holds less than that.
        """
        self.path = path
        with telling(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            found = os.fstat(self._descriptor).st_size
            if found < size:
                os.close(self._descriptor)
                raise OutputError(
                    f"{path} holds {found} bytes, but {size} were written: it was changed or cut short; add --force to "
                    "begin anew"
                )
            os.ftruncate(self._descriptor, size)
        self.size = size

    def append(self, data: bytes) -> None:
        with telling(self.path):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._descriptor, view, self.size)
                self.size += written
                view = view[written:]

    def rewrite_head(self, data: bytes) -> None:
        """Put `data` in the place of as many bytes at the file's beginning, for a header that counts what follows."""
        with telling(self.path):
            os.pwrite(self._descriptor, data, 0)

    def sync(self) -> None:
        with telling(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class Sink:
    """Takes rows. `state()` after `sync()` says how much of the output is on the disk."""

    needs_picture = False  # whether `write` wants the encoded picture in `item.data`

    def name(self, item: Item) -> str:
        """The name of the item's output, which must be its own.

        Raises:
            InputError: it can have none here.
        """
        return item.id

    def has(self, item: Item) -> bool:
        """Whether somebody else has answered this one, and the answer stays."""
        return False

    def write(self, item: Item, row: Row) -> None:
        """Add the answer to an item."""
        raise NotImplementedError

    def sync(self) -> None:
        """Wait until all is on the disk."""

    def state(self) -> Any:
        """What `__init__` wants of a later run, as JSON."""
        return None

    def committed(self) -> None:
        """What `state()` said last is in the journal."""

    def finish(self) -> None:
        """The run has come to its end; another may follow and add to it."""

    def close(self) -> None:
        """Give back what is open."""


class JsonlSink(Sink):
    """One JSON object a line."""

    def __init__(self, output: Path, state: Any):
        self._file = AppendedFile(output, state or 0)

    def write(self, item: Item, row: Row) -> None:
        self._file.append(json_line(row))

    def sync(self) -> None:
        self._file.sync()

    def state(self) -> Any:
        return self._file.size

    def close(self) -> None:
        self._file.close()


class CsvSink(JsonlSink):
    """Columns id, [the question or prompt], text, score, finish_reason, and text_2, score_2 ... of the alternatives."""

    def __init__(self, output: Path, state: Any, columns: Iterable[str], num_alternatives: int):
        super().__init__(output, state)
        others = [f"{key}_{number}" for number in range(2, num_alternatives + 2) for key in ("text", "score")]
        self._columns = [*columns, *others]
        if not self._file.size:
            self._file.append(self._line(self._columns))

    def write(self, item: Item, row: Row) -> None:
        flat = dict(row)
        for number, other in enumerate(row.get("alternatives", ()), 2):
            flat |= {f"text_{number}": other["text"], f"score_{number}": other["score"]}
        self._file.append(self._line([flat.get(name, "") for name in self._columns]))

    @staticmethod
    def _line(values: list[Any]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode("utf-8", "surrogateescape")


class SidecarSink(Sink):
    """A text file for every picture, under the output folder as the picture lies under its own; n captions: n lines.

    A file that is there already stays, as trainers of diffusion models expect.
    """

    def __init__(self, output: Path, ending: str):
        self._output, self._ending = output, "." + ending.lstrip(".")
        self._unsynced: list[Path] = []

    def name(self, item: Item) -> str:
        """The path of the text file: two pictures that differ in their ending alone would share it."""
        if os.path.isabs(item.id) or ".." in Path(item.id).parts:
            raise InputError(
                f"it does not lie under the source's folder, so it has no place under {self._output}: "
                "choose another --format"
            )
        stem, ending = os.path.splitext(item.id)
        return (stem if ending[1:].lower() == item.ending else item.id) + self._ending

    def has(self, item: Item) -> bool:
        return os.path.lexists(self._output / self.name(item))

    def write(self, item: Item, row: Row) -> None:
        path = self._output / self.name(item)
        with telling(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            private = path.with_name(f".{path.name}.writing")
            private.write_bytes(lines_of(row))
            os.replace(private, path)
        self._unsynced.append(path)

    def sync(self) -> None:
        for path in self._unsynced:
            sync_file(path)
        self._unsynced.clear()


class ParquetSink(Sink):
    """Files part-00000.parquet ... of ROWS_PER_FILE rows. Rows wait in a JSONL file until there are enough."""

    def __init__(
        self, output: Path, state: Any, spools: Path, columns: Mapping[str, str], rows_per_file: int | None = None
    ):
        """`spools`: a folder for the waiting rows; `columns`: names and kinds, see `table_of`."""
        self._output, self._spools, self._columns = output, spools, columns
        self._rows_per_file = rows_per_file or ROWS_PER_FILE
        self._part: int
        self._rows: int
        self._part, self._rows, size = state or (0, 0, 0)
        _remove_later(output, "part-*.parquet", self._part)
        self._spool = AppendedFile(self._spool_path(), size)

    def _spool_path(self) -> Path:
        return self._spools / f"rows-{self._part:05}.jsonl"

    def write(self, item: Item, row: Row) -> None:
        self._spool.append(json_line(row))
        self._rows += 1
        if self._rows == self._rows_per_file:
            self._write_part()
            self._spool.close()
            self._part, self._rows = self._part + 1, 0
            self._spool = AppendedFile(self._spool_path(), 0)

    def _write_part(self) -> None:
        from pyarrow import parquet

        table = table_of(self._spool.path.read_bytes().splitlines(), self._columns)
        path = self._output / f"part-{self._part:05}.parquet"
        private = self._output / f".{path.name}.writing"
        with telling(path):
            parquet.write_table(table, private)
            sync_file(private)
            os.replace(private, path)

    def sync(self) -> None:
        self._spool.sync()

    def state(self) -> Any:
        return [self._part, self._rows, self._spool.size]

    def committed(self) -> None:
        for path in self._spools.glob("rows-*.jsonl"):
            if path != self._spool.path:
                path.unlink()

    def finish(self) -> None:
        """The last part has fewer rows; a later run with more inputs writes it anew."""
        if self._rows:
            self._write_part()

    def close(self) -> None:
        self._spool.close()


class WebDatasetSink(Sink):
    """Shards shard-000000.tar ... with the picture, all that came with it, KEY.<field>.txt and KEY.<field>.json."""

    needs_picture = True

    def __init__(self, output: Path, state: Any, field: str):
        self._output, self._field = output, field
        self._shard: int
        self._samples: int
        self._shard, self._samples, size = state or (0, 0, 0)
        _remove_later(output, "shard-*.tar", self._shard)
        self._file = AppendedFile(self._path(), size)

    def _path(self) -> Path:
        return self._output / f"shard-{self._shard:06}.tar"

    def name(self, item: Item) -> str:
        """The sample's key: no dot in its last part, for there the ending begins; no way out of the folder."""
        parts = [part for part in item.id.split("/") if part not in ("", ".", "..")]
        stem = parts[-1] if parts else "_"
        if item.ending and stem.lower().endswith("." + item.ending):
            stem = stem[: -len(item.ending) - 1]
        return "/".join((*parts[:-1], stem.replace(".", "_") or "_"))

    def write(self, item: Item, row: Row) -> None:
        assert item.data is not None  # see needs_picture
        if self._samples == SAMPLES_PER_SHARD:
            self._file.append(TAR_END)
            self._file.sync()
            self._file.close()
            self._shard, self._samples = self._shard + 1, 0
            self._file = AppendedFile(self._path(), 0)
        members = {item.ending or "img": item.data, **item.members}
        members |= {f"{self._field}.txt": lines_of(row), f"{self._field}.json": json_line(row)}
        key = self.name(item)
        self._file.append(b"".join(tar_member(f"{key}.{ending}", data) for ending, data in members.items()))
        self._samples += 1

    def sync(self) -> None:
        self._file.sync()

    def state(self) -> Any:
        return [self._shard, self._samples, self._file.size]

    def finish(self) -> None:
        size = self._file.size
        self._file.append(TAR_END)
        self._file.sync()
        self._file.size = size  # a later run goes on before the end mark

    def close(self) -> None:
        self._file.close()


def table_of(lines: Iterable[bytes], columns: Mapping[str, str]) -> Any:
    """A pyarrow Table of rows as JSON; `columns` gives their names and kinds."""
    import pyarrow as pa

    other = pa.struct({"text": pa.string(), "score": pa.float64()})
    kinds = {
        "text": pa.string(), "number": pa.float64(), "integers": pa.list_(pa.int64()),
        "numbers": pa.list_(pa.float64()), "alternatives": pa.list_(other),
        "vector": pa.list_(pa.float32()), "vectors": pa.list_(pa.list_(pa.float32())),
    }  # fmt: skip
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["id"] = row["id"].encode("utf-8", "backslashreplace").decode()
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds[kind]) for name, kind in columns.items()]))


def json_line(row: Any) -> bytes:
    """A line of UTF-8 JSON. A file name that is no UTF-8 is escaped, as Python's json reads it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def lines_of(row: Row) -> bytes:
    """The text of a row and those of its alternatives, a line each, whatever the model said."""
    texts = [row["text"], *(other["text"] for other in row["alternatives"])]
    return "".join(" ".join(text.split()) + "\n" for text in texts).encode("utf-8", "replace")


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with telling(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turns what the system says into what a person can do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): see to the disk and its permissions, and run the "
            "same command again; what is done stays done"
        ) from error


def _remove_later(folder: Path, pattern: str, number: int) -> None:
    """Remove files that a killed run began and that do not count."""
    for path in folder.glob(pattern):
        digits = re.search(r"-(\d+)\.", path.name)
        if digits and int(digits[1]) > number:
            path.unlink()

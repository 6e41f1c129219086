"""The files of a gallery. gallery.py and text_gallery.py say what they are for.

    gallery.json          of which model, and the sizes
    journal.jsonl         one line for every change: {"add": [ids], "row": first} or {"remove": [ids]}
    itc-00000.f16 ...     ITC embeddings, `rows_per_shard` images each: [rows, Q, E] float16
    image-00000.f16 ...   image_embeds [rows, N+1, Dv] float16 of the same rows, where the gallery keeps features
    lock                  held by the one writer

Rows are only ever appended. An image that is replaced or removed leaves its row behind, and searches skip it. A change
counts once its line in the journal is whole, which is written after the rows are on the disk: killed at any moment, a
gallery holds what it held before the change or after it, and rows that no line names are written over.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from .errors import EngineError, InputError

Array = np.ndarray[Any, Any]
Identifier = str | int

FORMAT_REVISION = 1
HEADER, JOURNAL, LOCK = "gallery.json", "journal.jsonl", "lock"
SHARD_BYTES = 64 << 20  # of ITC embeddings: what a search maps at a time
ANEW = "make the gallery anew"


@dataclass(frozen=True)
class Header:
    """gallery.json."""

    model_sha256: str | None  # of the checkpoint; None: vectors of unknown origin
    itc: list[int]  # [Q, E]
    image: list[int] | None  # [N+1, Dv], or None: no features are kept
    rows_per_shard: int
    holds: str = "images"  # or "texts", whose ids are the texts and whose Q is 1
    format_revision: int = FORMAT_REVISION

    def shape(self, kind: str) -> tuple[int, ...]:
        """Of one row of a kind of shard."""
        return tuple((self.itc if kind == "itc" else self.image) or ())


class GalleryStore:
    """What is on disk, as of the last `refresh`.

    Attributes:
        guard: held by a thread while it reads, searches or writes: what it found stays true until it lets go.
        header: None where there is no gallery yet.
        ids: of every row; None where the image was replaced or removed.
        rows: where the images are, in the order in which they were added.
    """

    def __init__(self, path: Path):
        self._writer: int | None = None  # descriptor of the lock
        self.guard = RLock()
        self.path = path
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        """Know nothing of the gallery, as before the first `refresh`."""
        self._read = 0  # bytes of the journal
        self._stamp: tuple[int, int] | None = None  # of the header that was read
        self.header: Header | None = None
        self.ids: list[Identifier | None] = []
        self.rows: dict[Identifier, int] = {}

    def refresh(self) -> None:
        """Read what others have written since.

        Raises:
            EngineError: no gallery but something else there, a damaged one, or a newer one.
        """
        with self.guard:
            while (stamp := self._header_stamp()) != self._stamp or self.header is None:
                self._forget()
                self._stamp, self.header = stamp, self._read_header()
                if self.header is None:
                    return
            self._read_journal()

    def _header_stamp(self) -> tuple[int, int] | None:
        """What tells this gallery from one that is made anew in its place."""
        try:
            found = (self.path / HEADER).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read_journal(self) -> None:
        try:
            with (self.path / JOURNAL).open("rb") as stream:
                stream.seek(self._read)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # a change that is being written, or that its writer did not live to finish
                    self._apply(json.loads(line))
                    self._read += len(line)
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.path / JOURNAL} is damaged ({error!r}): {ANEW}") from None

    def lock(self) -> None:
        """Become the one writer, until `close`, and see what is there now.

        Raises:
            EngineError: there is another, or the folder cannot be written.
        """
        import fcntl  # not above: searching must work on Windows as well

        if self._writer is not None and not self._is_locked_here(self._writer):
            self.close()  # the folder was deleted, and with it the lock
        if self._writer is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise EngineError(f"{self.path} cannot be written ({error.strerror}): choose another path") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise EngineError(
                    f"another process or Gallery is writing to {self.path}: wait for its end, or close() it"
                ) from None
            self._writer = descriptor
        self.refresh()

    def _is_locked_here(self, descriptor: int) -> bool:
        """Whether a lock is still that of the folder."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path / LOCK))
        except OSError:
            return False

    def close(self) -> None:
        """Let others write. Garbage collection and the end of the process do the same."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def __del__(self) -> None:
        self.close()

    def create(
        self, model_sha256: str | None, itc: Sequence[int], image: Sequence[int] | None, holds: str = "images"
    ) -> None:
        """Write the header of a new gallery; the writer does."""
        rows_per_shard = max(1, SHARD_BYTES // (2 * int(np.prod(itc))))
        header = Header(model_sha256, list(itc), list(image) if image else None, rows_per_shard, holds)
        new = self.path / f".{HEADER}.new"
        new.write_text(json.dumps(asdict(header), indent=2) + "\n", "utf-8")
        os.replace(new, self.path / HEADER)
        self._stamp, self.header = self._header_stamp(), header

    def append(self, ids: list[Identifier], kinds: Mapping[str, Array]) -> None:
        """Add images, or put them in the place of those with the same ids; the writer does.

        Args:
            ids: of every row.
            kinds: "itc", and "image" where features are kept: rows of each.
        """
        with self._disk_errors():
            for kind, rows in kinds.items():
                self._write_rows(kind, rows)
            self._commit({"add": ids, "row": len(self.ids)})

    def remove(self, ids: list[Identifier]) -> None:
        """Remove images that are there; the writer does."""
        with self._disk_errors():
            self._commit({"remove": ids})

    def shards(self, kind: str) -> Iterator[tuple[int, Array]]:
        """First row and rows of every shard, mapped one at a time, while the next one is fetched from the disk."""
        per_shard, shape = self._sizes(kind)
        for first in range(0, len(self.ids), per_shard):
            _fetch(self._shard_path(kind, first // per_shard + 1))
            count = min(per_shard, len(self.ids) - first)
            yield first, self._map(kind, first // per_shard, 0, (count, *shape))

    def row(self, kind: str, row: int) -> Array:
        """One row."""
        per_shard, shape = self._sizes(kind)
        offset = row % per_shard * 2 * int(np.prod(shape))
        return self._map(kind, row // per_shard, offset, shape)

    def _sizes(self, kind: str) -> tuple[int, tuple[int, ...]]:
        assert self.header is not None, "there is no gallery yet"
        return self.header.rows_per_shard, self.header.shape(kind)

    def _read_header(self) -> Header | None:
        path = self.path / HEADER
        try:
            content = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            if self.path.exists() and (not self.path.is_dir() or any(_is_foreign(n) for n in os.listdir(self.path))):
                raise EngineError(f"{self.path} is no gallery, it has no {HEADER}: choose another path") from None
            return None
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be read ({error}): {ANEW}") from None
        revision = content.get("format_revision") if isinstance(content, dict) else None
        if type(revision) is int and revision != FORMAT_REVISION:
            raise EngineError(
                f"{path}: format revision {revision}, and this blip2rt reads {FORMAT_REVISION}: upgrade blip2rt, "
                f"or {ANEW}"
            )
        try:
            return Header(**content)
        except TypeError as error:
            raise EngineError(f"{path} is damaged ({error}): {ANEW}") from None

    def _apply(self, change: Mapping[str, Any]) -> None:
        for identifier in change.get("remove", ()):
            self.ids[self.rows.pop(identifier)] = None
        if "add" in change:
            if change["row"] != len(self.ids):
                raise ValueError(f"row {change['row']} where {len(self.ids)} is next")
            for identifier in change["add"]:
                if identifier in self.rows:
                    self.ids[self.rows.pop(identifier)] = None
                self.rows[identifier] = len(self.ids)
                self.ids.append(identifier)

    def _commit(self, change: dict[str, Any]) -> None:
        """Append a line to the journal; what a killed writer left half written is cut off first."""
        line = json.dumps(change).encode() + b"\n"
        with (self.path / JOURNAL).open("ab") as stream:
            stream.truncate(self._read)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._apply(change)
        self._read += len(line)

    def _write_rows(self, kind: str, rows: Array) -> None:
        """Write rows behind the last one, and wait until they are on the disk."""
        per_shard, shape = self._sizes(kind)
        stored = np.ascontiguousarray(rows, np.float16)
        done = 0
        while done < len(stored):
            shard, place = divmod(len(self.ids) + done, per_shard)
            part = stored[done : done + per_shard - place]
            path, offset = self._shard_path(kind, shard), place * 2 * int(np.prod(shape))
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                buffer = part.reshape(-1).view(np.uint8).data
                while buffer:
                    written = os.pwrite(descriptor, buffer, offset)
                    buffer, offset = buffer[written:], offset + written
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            done += len(part)

    def _shard_path(self, kind: str, shard: int) -> Path:
        return self.path / f"{kind}-{shard:05}.f16"

    def _map(self, kind: str, shard: int, offset: int, shape: tuple[int, ...]) -> Array:
        path = self._shard_path(kind, shard)
        try:
            return np.memmap(path, np.float16, "r", offset=offset, shape=shape)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter
            raise EngineError(f"{path} is damaged ({error}): {ANEW}") from None

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineError(f"{self.path} cannot be written ({error.strerror}): make room, then add again") from error


def _fetch(path: Path) -> None:
    """Ask the system to read a file into its cache, without waiting; what it cannot do does no harm."""
    if hasattr(os, "posix_fadvise") and path.exists():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)


def _is_foreign(name: str) -> bool:
    return name != LOCK and not name.startswith(".")


def checked_ids(ids: Any) -> list[Identifier]:
    """Ids as a list.

    Raises:
        InputError: no list, an empty one, an id of another type, or one that is given twice.
    """
    if not isinstance(ids, list | tuple) or not ids:
        raise InputError(f"ids must be a list that is not empty, not {type(ids).__name__} {ids!r:.40}")
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, str | int)]
    if wrong:
        raise InputError(f"an id must be a string or a whole number, not {wrong[0]!r}")
    twice = [identifier for identifier, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"ids that are given twice: {', '.join(map(repr, twice[:10]))}")
    return list(ids)

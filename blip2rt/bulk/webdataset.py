"""WebDataset shards: tar files in which the members of a sample follow each other and share a name up to the first dot.

(github.com/webdataset/webdataset; the format is what img2dataset, LAION and NeMo write.)
"""

import glob
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import Blip2rtError
from .items import Item

ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz")
PICTURES = frozenset({"avif", "bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"})
MAX_SAMPLE = 2**30  # bytes: what is larger is no sample, and would be held in memory
BLOCK = 512


def expand_shards(pattern: str) -> list[str]:
    """Files that a name, a glob or a brace range ("{000..012}", "{a,b}") means; those of a range need not exist."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces and not os.path.exists(pattern):
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        names = [before + part + after for part in _brace_parts(braces[1])]
        return [file for name in names for file in expand_shards(name) or [name]]
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern))


def _brace_parts(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not numbers:
        return inside.split(",")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    return [str(n).zfill(width) for n in range(int(numbers[1]), int(numbers[2]) + 1)]


def read_shards(shards: list[str], text: str | None) -> Iterator[Item]:
    """Samples of all shards. The id is "shard/key", the shard without its ending.

    Args:
        shards: paths, or one "pipe:COMMAND" whose output is a tar file.
        text: key of the sample's .json, or ending of a member, that holds its question or prompt.

    Raises:
        Blip2rtError: at the end, where shards could not be read to theirs. All that could be read has been given.
    """
    failures = []
    for shard in shards:
        name = "pipe" if shard.startswith("pipe:") else Path(shard).name.partition(".")[0]
        try:
            for key, members in itertools.groupby(_members(shard), key=lambda member: member[0]):
                yield _sample(f"{name}/{key}", {ending: data for _, ending, data in members}, text)
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            failures.append(f"{shard} ({getattr(error, 'strerror', None) or error})")
    if failures:
        raise Blip2rtError(
            f"{len(failures)} of {len(shards)} shards cannot be read to their end: {', '.join(failures[:20])}: mend "
            "them and run the same command again, what is done stays done"
        )


def _members(shard: str) -> Iterator[tuple[str, str, bytes]]:
    """Key, ending and content of every file in a shard."""
    with _opened(shard) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
        key, size = "", 0
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            stem, dot, ending = base.partition(".")
            if not member.isreg() or not stem or not dot:
                continue
            new_key = f"{folder}/{stem}" if folder else stem
            size = member.size + (size if new_key == key else 0)
            key = new_key
            if size > MAX_SAMPLE:
                raise tarfile.ReadError(f"sample {key} is larger than {MAX_SAMPLE} bytes")
            file = archive.extractfile(member)
            assert file is not None  # it is a regular file
            data = file.read()
            if len(data) < member.size:
                raise tarfile.ReadError(f"{member.name} is cut short")
            yield key, ending.lower(), data


@contextmanager
def _opened(shard: str) -> Iterator[IO[bytes]]:
    if not shard.startswith("pipe:"):
        with open(shard, "rb") as file:
            yield file
        return
    command = shard.removeprefix("pipe:")
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            shutil.copyfileobj(process.stdout, _Nowhere())  # else the command would die of a broken pipe
        except BaseException:
            process.kill()
            raise
        if process.wait():
            raise OSError(f"the command ended with status {process.returncode}")


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


def _sample(item_id: str, members: dict[str, bytes], text: str | None) -> Item:
    ending = next((ending for ending in members if ending.rpartition(".")[2] in PICTURES), None)
    error, found = None, None
    if text:
        try:
            found = members[text].decode() if text in members else json.loads(members.get("json", b"{}")).get(text)
        except (ValueError, AttributeError, RecursionError) as problem:
            error = f"its {text if text in members else 'json'} member cannot be read ({problem})"
        if error is None and not isinstance(found, str):
            error = f"it has no {text!r}, as a member or in its .json"
    if ending is None:
        error = f"the sample has no picture, only {', '.join(sorted(members))}"
    data = members.pop(ending) if ending else None
    if data is not None and not data:
        error = error or f"its {ending} member is empty"
    return Item(item_id, data=data, text=found, error=error, ending=ending or "", members=members)


def tar_member(name: str, data: bytes) -> bytes:
    """One file as it stands in a tar archive; nothing in it depends on when, where or by whom it is written."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
    return header + data + b"\0" * (-len(data) % BLOCK)


TAR_END = b"\0" * 2 * BLOCK

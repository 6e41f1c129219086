"""Whether an engine fits into the memory that this process may use: said before it is opened."""

import resource
import warnings
from os import PathLike
from pathlib import Path

from .errors import EngineError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
SMALLER = "build a smaller engine with `blip2rt export --precision int4`"


def check_memory(path: str | PathLike[str], size: int) -> None:
    """Refuse what cannot be mapped; warn of what will be read from the disk again and again.

    Args:
        path: the engine, or the folder of engines.
        size: bytes of their files, which are mapped.

    Raises:
        EngineError: the limit on this process's addresses (`ulimit -v`) leaves no room for them.
    """
    room = free_addresses()
    if room is not None and size > room:
        more = (size - room) // 1024 + 2**20  # and a GiB for the work itself
        raise EngineError(
            f"the files of {path} are {_gb(size)}, and the limit on this process's addresses leaves {_gb(room)}: raise "
            f"`ulimit -v` by {more} KiB, or {SMALLER}"
        )
    memory = usable_memory()
    if memory is not None and size > memory:
        warnings.warn(
            f"the files of {path} are {_gb(size)}, and {_gb(memory)} of memory can be had: every picture will wait for "
            f"the disk; free some, or {SMALLER}",
            stacklevel=3,  # who opens the Pipeline,
        )


def free_addresses() -> int | None:
    """Bytes that this process may still map; None: no limit is set, or the system does not tell."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _kilobytes(PROC / "self" / "status", "VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def usable_memory() -> int | None:
    """Bytes of memory that this process could have, by what is free and by its control group; None: unknown."""
    known = [_kilobytes(PROC / "meminfo", "MemAvailable")]
    try:
        group = (PROC / "self" / "cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        known.append(int((CGROUPS / group / "memory.max").read_text()))
    except (OSError, ValueError):  # no group of version 2, or "max"
        pass
    return min((size for size in known if size is not None), default=None)


def _kilobytes(file: Path, name: str) -> int | None:
    """Bytes behind a name in a file of `name: number kB` lines."""
    try:
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        return 1024 * int(lines[name].split()[0])
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _gb(size: int) -> str:
    return f"{max(size, 0) / 1e9:.3g} GB"

"""An engine directory as a whole: find it, check its files, and replace it in one step.

`find_engines` says which directories to open, `check_files` whether one is whole, and `with building(output) as new`
gives a directory to fill that takes the place of `output` at the end of the block.
"""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from .errors import EngineError, ExportError, InputError
from .manifest import CPU, DEVICES, GENERATIVE, MANIFEST_NAME, NATIVE, FileEntry, Manifest
from .native import native_path

HASHED_ON_OPENING = 16 * 2**20  # bytes: files below this are hashed whenever an engine is opened, larger ones are not
BUILD_ONE = "build one with `blip2rt export` (into engines/<model>-<precision>-<device> unless --output says otherwise)"
ELSEWHERE = "make room, or choose another --output; nothing was changed"

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)  # both are what rename says about a directory that is not empty
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # said by file systems, old kernels, and FUSE


def find_engine(path: str | PathLike[str], name: str | None = None) -> Path:
    """The one engine that is meant: of `find_engines` the one called `name`, else the generative one.

    Raises:
        EngineError: none there, or several; it lists what there is, or says how to build one.
    """
    engines = find_engines(path, name)
    named = [engine for engine in engines.values() if name in (engine.name, engine.resolve().name)]
    return named[0] if named else engines.get(GENERATIVE, next(iter(engines.values())))


def find_engines(path: str | PathLike[str], name: str | None = None) -> dict[str, Path]:
    """The engines at `path` by kind: itself where it has a manifest, else one of each kind among its subfolders.

    Args:
        path: an engine directory, or a folder of them.
        name: the subfolder to take, where there are several of its kind.

    Raises:
        EngineError: none there, or several of a kind; it lists what there is, or says how to build one.
    """
    if not isinstance(path, str | PathLike) or path == "":
        raise InputError(f"an engine is the path of a folder, not {path!r}")
    path = Path(path)
    if not os.path.exists(path):  # where Path.exists raises, this is False: no permission, a name too long
        raise EngineError(f"there is no {path}: {BUILD_ONE}")
    if not path.is_dir():
        raise EngineError(f"{path} is a file, an engine is a folder with a {MANIFEST_NAME}: {BUILD_ONE}")
    if os.path.exists(path / MANIFEST_NAME):
        if name not in (None, path.resolve().name):
            raise EngineError(f"{path} is itself an engine, so there is no {name!r} to pick in it: leave out the name")
        return {Manifest.read(path).kind: path}
    engines = _engines_in(path)
    if not engines:
        raise EngineError(f"there is no engine in {path}: {BUILD_ONE}")
    if name is not None and name not in engines:
        raise EngineError(f"there is no engine {name!r} in {path}, only {', '.join(engines)}: pick one of these")
    kinds: dict[str, list[str]] = {}
    for engine, directory in engines.items():
        kinds.setdefault(Manifest.read(directory).kind, []).append(engine)
    found = {}
    for kind, names in kinds.items():
        if len(names) == 1 or name in names:
            found[kind] = engines[name if name is not None and name in names else names[0]]
        elif name is None:
            raise EngineError(f"{path} has {len(names)} {kind} engines, {', '.join(names)}: pick one with name=...")
    return found


def _engines_in(folder: Path) -> dict[str, Path]:
    """Engines of a folder by name, sorted. Names that start with a dot are builds under way or their leftovers."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise EngineError(f"{folder} cannot be read ({error.strerror}): see to its permissions") from None
    return {p.name: p for p in paths if not p.name.startswith(".") and os.path.exists(p / MANIFEST_NAME)}


def checked_manifest(directory: Path, device: str | None) -> Manifest:
    """The manifest of an engine that is whole and was built for `device`; None: for whatever it was built.

    Raises:
        EngineError: damaged, newer than this program, or built for another device.
    """
    manifest = Manifest.read(directory)
    if device not in (None, manifest.device) or manifest.device not in DEVICES:
        raise EngineError(
            f"{directory} was built for {manifest.device!r}, not {device or CPU!r}: build one with "
            f"`blip2rt export --model {manifest.source_id} --device {device or CPU}`"
        )
    if manifest.kernels == NATIVE and native_path() is None:
        raise EngineError(
            f"{directory} runs on the native kernels, which this installation lacks: install blip2rt where there is a "
            "C++ compiler (and do not set BLIP2RT_KERNELS=stock), or build an engine without them here: "
            f"`blip2rt export --model {manifest.source_id} --precision {manifest.precision} --force`"
        )
    check_files(manifest, directory)
    return manifest


def check_files(manifest: Manifest, directory: str | PathLike[str], full: bool = False) -> None:
    """Compare the files of an engine with its manifest: the sizes of all, and the hashes of the small ones.

    Args:
        manifest: what the files should be.
        directory: where they are.
        full: hash the large ones, too; 2.7 GB cost 2 s.

    Raises:
        EngineError: names the first file that is missing or altered, and the command that mends the engine.
    """
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        problem = _compare(path, entry, full or entry.size < HASHED_ON_OPENING)
        if problem:
            model, folder = shlex.quote(manifest.source_id), shlex.quote(str(directory))
            mend = f"`blip2rt export --model {model} --output {folder} --force"
            mend += f" --precision {shlex.quote(manifest.precision)} --device {shlex.quote(manifest.device)}`"
            tell = "" if full else f" (`blip2rt verify {folder} --model {model}` looks at all its files in full)"
            raise EngineError(f"{path} {problem}: build the engine again with {mend}{tell}")


def _compare(path: Path, entry: FileEntry, hashed: bool) -> str:
    """What is wrong with a file, or the empty string."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before it is opened: reading a pipe would wait for ever
            return "is not a file"
        if status.st_size != entry.size:
            return f"has {status.st_size} bytes where the manifest says {entry.size}"
        if hashed and hash_file(path) != entry.sha256:
            return "was altered, its SHA-256 is not the manifest's"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def hash_file(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, lowercase hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(directory: str | PathLike[str]) -> dict[str, FileEntry]:
    """Size and hash of everything in a directory but its manifest, sorted by name: the manifest's `files`.

    Raises:
        ExportError: there is a folder or a link; an engine is one flat folder that can be copied anywhere.
    """
    entries = {}
    for path in sorted(Path(directory).iterdir()):
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{path} is a folder or a link, and an engine holds plain files only")
        if path.name != MANIFEST_NAME:
            entries[path.name] = FileEntry(path.stat().st_size, hash_file(path))
    return entries


@contextmanager
def building(output: str | PathLike[str], force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A new private directory beside `output` that takes its place, in one step, when the block ends without an error.

    Killed at any moment, even by a power cut, `output` is the old engine or the new one, whole, or absent if it was
    absent before. After an error the old engine is untouched and the private directory gone; what a killed build left
    behind is removed by the next build of the same output. Builds of one output at the same time all finish, and the
    last one stays. All that can be known beforehand is checked before the block runs. The exchange needs `renameat2`
    (Linux, and not every network file system): see `_rename_twice` for what happens elsewhere.

    Args:
        output: the engine directory; missing parents are made, and of a link the engine behind it is replaced.
        force: replace an engine that is there.
        needed: bytes of the new engine, as far as they are known; the old one makes no room, both exist until the end.

    Yields:
        The private directory; the block writes the engine into it, the manifest last.

    Raises:
        InputError: there is an engine and no `force`, or anything else but an empty directory, which is never replaced.
        ExportError: `output` cannot be written, the disk is full, or the new engine would not open.
    """
    target = Path(os.path.realpath(output))
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        _refuse(target, force)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise ExportError(f"{target} needs {needed} bytes and {target.parent} has {free} free: {ELSEWHERE}")
        private, lock = _private_directory(target)
    try:
        try:
            yield private
        except OSError as error:
            if error.errno in NO_SPACE:
                raise _disk_error(error, target) from error
            raise  # about some other file: not ours to explain
        try:
            check_files(Manifest.read(private), private)
        except EngineError as error:
            raise ExportError(f"the new engine would not open, so {target} was not touched: {error}") from error
        with _disk_errors(target):
            for path in private.iterdir():
                _sync(path)
            _sync(private)
            _refuse(target, force=True)  # hours may have passed; an engine that came meanwhile is another build's
            _install(private, target)
    finally:
        shutil.rmtree(private, ignore_errors=True)  # by now half a new engine, or the whole old one, or nothing
        os.close(lock)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into ExportError."""
    try:
        yield
    except OSError as error:
        raise _disk_error(error, target) from error


def _disk_error(error: OSError, target: Path) -> ExportError:
    """One sentence with the path and the free bytes, from any error of the file system."""
    folder = next(folder for folder in target.parents if os.path.exists(folder))
    try:
        free = f"{shutil.disk_usage(folder).free} bytes free"
    except OSError:
        free = "free space unknown"
    what = "there is no room" if error.errno in NO_SPACE else "it is not possible"
    return ExportError(f"{what} to build {target} ({error.strerror or error}; {free} in {folder}): {ELSEWHERE}")


def _refuse(target: Path, force: bool) -> None:
    """Raise InputError for everything that must not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} exists and is not a folder: choose another --output")
    if os.path.ismount(target):  # also the root directory; a mount point cannot be renamed
        raise InputError(f"{target} is a mount point and cannot be replaced: choose a folder in it as --output")
    contents = list(target.iterdir())
    if not contents:
        return
    if not _is_engine(target) or any(path.is_dir() and not path.is_symlink() for path in contents):
        raise InputError(f"{target} holds files that blip2rt did not write and never replaces: choose another --output")
    if not force:
        raise InputError(f"{target} already holds an engine: add --force to replace it, or choose another --output")
    if not os.access(target, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the old engine cannot be removed")


def _is_engine(directory: Path) -> bool:
    """Whether the manifest is one of ours, damaged or not: web pages and browser add-ons have a manifest.json, too."""
    try:
        with open(directory / MANIFEST_NAME, "rb") as file:
            return b'"format_revision"' in file.read(2**20)
    except OSError:
        return False


def _hidden(target: Path, role: str) -> Path:
    """A new name beside `target`: for an engine being built, or for an old one put aside."""
    return target.with_name(f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}")


def _private_directory(target: Path) -> tuple[Path, int]:
    """A new empty directory beside `target`, and the descriptor whose lock tells others that its builder lives."""
    while True:
        private = _hidden(target, "building")
        private.mkdir()
        try:
            lock = os.open(private, os.O_RDONLY)
        except FileNotFoundError:
            continue  # a build that starts at the same time took it for a leftover, see below
        _lock(lock, wait=True)
        if private.exists():
            return private, lock
        os.close(lock)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock a directory until its descriptor is closed or the process dies, however it dies; False if that fails.

    A lock and not the process id of the name: ids are used again, and differ between containers that share a disk.
    Where directories cannot be locked (NFS) every attempt fails, so nothing is ever taken for a leftover.
    """
    import fcntl  # not above: opening an engine must work on Windows as well

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove what killed builds of this output left beside it, or put it back (see `_rename_twice`)."""
    name = re.compile(re.escape(f".{target.name}.") + r"(building|replaced)-[0-9]+-[0-9a-f]{8}")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if not match:
            continue
        if match[1] == "replaced" and not target.exists():
            os.rename(path, target)
            continue
        with suppress(OSError):  # gone already, or another user's
            lock = os.open(path, os.O_RDONLY)
            if _lock(lock, wait=False):
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _install(private: Path, target: Path) -> None:
    """Put the new engine in its place. The old one, if any, is afterwards where the new one was built, or gone."""
    while True:  # again only where another build of the same output came in between
        try:
            os.rename(private, target)  # nothing there yet, or an empty directory
            break
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        try:
            _exchange(private, target)
            break
        except OSError as error:
            if error.errno == errno.ENOENT:
                continue
            if error.errno not in NO_EXCHANGE:
                raise
        try:
            _rename_twice(private, target)
            break
        except OSError as error:
            if error.errno not in (*OCCUPIED, errno.ENOENT):
                raise
    _sync(target.parent)  # before the old engine goes


def _exchange(first: Path, second: Path) -> None:
    """Let two paths of one file system change places in one step: renameat2(2) with RENAME_EXCHANGE."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2")
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), ctypes.c_uint(exchange)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))


def _rename_twice(private: Path, target: Path) -> None:
    """Where there is no exchange: the old engine steps aside, the new one moves in, the old one is removed.

    Between the two renames, some microseconds, there is no engine at `target`. A kill just then leaves the old one,
    whole, in a folder named `.<name>.replaced-...` beside it, and the next build of `target` begins by putting it back.
    Another build of `target` that looks just then stops with an error; nothing is damaged.
    """
    aside = _hidden(target, "replaced")
    os.rename(target, aside)
    try:
        os.rename(private, target)
        _sync(target.parent)
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory; there is nothing better to do
            raise
    finally:
        os.close(descriptor)

"""CONTRACT: manifest.json, what an engine directory says about itself. engines/README.md explains it field by field.

The dataclasses are the schema: reading follows their type hints and is strict both ways, so a missing, unknown or
mistyped field is an error that names it. What happens to the directory as a whole is in engine_directory.py.
"""

import hashlib
import json
import math
import re
import shlex
from dataclasses import asdict, dataclass, is_dataclass
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import EngineError, ExportError
from .stages import GENERATIVE_STAGES, RETRIEVAL_STAGES, StageSpec

FORMAT_REVISION = 1  # raise it when an older blip2rt would misread the directory
MANIFEST_NAME = "manifest.json"
GENERATIVE, RETRIEVAL = "generative", "retrieval"
# the stages that an engine of each kind cannot do without
STAGES_OF_KIND = {GENERATIVE: GENERATIVE_STAGES, RETRIEVAL: RETRIEVAL_STAGES}

CPU, TORCH, CUDA, TENSORRT = DEVICES = ("cpu", "torch", "cuda", "tensorrt")
STOCK, NATIVE = KERNELS = ("stock", "native")  # operators of ONNX Runtime alone, or the ones of native/ as well

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # no path, nothing hidden, fine on every file system
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes pixel values: `size` in pixels, square; `mean` and `std` of R, G, B on a scale of 0..1."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class TokenSpec:
    """Token ids of the inner language model. `image` stands for a query slot in the history that penalties see.

    `bos` starts what is generated: OPT's stands between query slots and prompt, T5's is the decoder's start token.
    Of a retrieval engine: ids of the Q-Former, whose texts begin with `bos` ([CLS]) and end with `stop` ([SEP]).
    """

    bos: int
    pad: int | None
    stop: tuple[int, ...]
    image: int | None


@dataclass(frozen=True)
class Stage:
    """One graph: its file, and the signature it was built with. In the file: {"file", "inputs", "outputs"}."""

    file: str
    signature: StageSpec


@dataclass(frozen=True)
class Parity:
    """Largest differences from the reference model, and the sizes (letters of the legend) they were measured at."""

    max_abs: float
    max_rel: float
    cosine: float
    sizes: dict[str, Any]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (lowercase hexadecimal) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime knows about an engine before it loads a graph. The fields stand in the order of the file.

    `question_tokens` are ids of the Q-Former where questions go there too, with question_tokenizer.json; null: it sees
    pictures only. `parameters` counts parameters per part of the model. `left_out` names tensors of the checkpoint that
    its own code does not use. `model` is the model config and holds JSON values only. `kernels` says what the graphs
    run on, one of KERNELS. `files` lists every file of the directory but the manifest.
    """

    format_revision: int = FORMAT_REVISION  # first, so that a damaged manifest can still be told from a foreign one
    kind: str = GENERATIVE
    name: str
    source_id: str
    source_sha256: str
    precision: str
    device: str
    kernels: str
    image: ImageSpec
    tokens: TokenSpec
    question_tokens: TokenSpec | None
    parameters: dict[str, int]
    left_out: tuple[str, ...]
    toolchain: dict[str, str]
    parity: dict[str, Parity]
    model: dict[str, Any]
    stages: dict[str, Stage]
    files: dict[str, FileEntry]

    def digest(self) -> str:
        """What tells this engine from every other, also of the same checkpoint: SHA-256 over those of its files."""
        hashes = {name: entry.sha256 for name, entry in self.files.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, directory: str | PathLike[str]) -> "Manifest":
        """The manifest of an engine directory.

        Raises:
            EngineError: names the field that is missing, unknown or wrong, and the command that mends the engine.
        """
        path = Path(directory) / MANIFEST_NAME
        try:
            content = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
        except (FileNotFoundError, NotADirectoryError):
            raise EngineError(
                f"{directory} is not an engine, it has no {MANIFEST_NAME}: build one with `blip2rt export`"
            ) from None
        except OSError as error:
            raise EngineError(
                f"{path} cannot be read ({error.strerror}): see to its permissions and its disk"
            ) from None
        except (ValueError, RecursionError) as error:  # ValueError is bad JSON and bad UTF-8 alike
            raise EngineError(
                f"{path} is not JSON ({error}): remove the folder and build the engine again with `blip2rt export`"
            ) from None
        try:
            return _parse_manifest(content)
        except _FieldError as error:
            raise EngineError(f"{path}: {error}: {_mend(content, directory)}") from None

    def write(self, directory: str | PathLike[str]) -> None:
        """Write manifest.json into a directory that is being built (see `building`), not into a finished engine.

        Raises:
            ExportError: names the field that `read` would refuse.
        """
        content = asdict(self)
        for stage in content["stages"].values():
            stage |= stage.pop("signature")
        try:
            _parse_manifest(json.loads(json.dumps(content)))
            text = _layout(content) + "\n"
        except (_FieldError, TypeError, ValueError) as error:
            raise ExportError(f"the manifest of {self.name} cannot be written: {error}") from None
        (Path(directory) / MANIFEST_NAME).write_text(text, "utf-8")


class _FieldError(Exception):
    """What is wrong with a field, by its name. `read` and `write` turn it into errors of the caller's."""


def _mend(content: Any, directory: str | PathLike[str]) -> str:
    """The end of an error message: the command that replaces a manifest nobody can use."""
    if not isinstance(content, dict) or "format_revision" not in content:  # --force would not replace it either
        return "this is no engine of blip2rt's, build one with `blip2rt export`"
    source, revision = content.get("source_id"), content["format_revision"]
    model = f"--model {shlex.quote(source)} " if isinstance(source, str) else ""
    command = f"`blip2rt export {model}--output {shlex.quote(str(directory))} --force`"
    newer = type(revision) is int and revision > FORMAT_REVISION
    newer |= isinstance(content.get("kind"), str) and content["kind"] not in STAGES_OF_KIND
    return f"upgrade blip2rt, or export again with {command}" if newer else f"build the engine again with {command}"


def _parse_manifest(content: Any) -> Manifest:
    """The manifest in a parsed JSON file: types first, then what types cannot say."""
    if not isinstance(content, dict):
        raise _FieldError(f"the file holds {_TYPE_NAMES[type(content)]}, not an object")
    if "format_revision" not in content:
        raise _FieldError("format_revision is missing")
    revision = _parse(int, content["format_revision"], "format_revision")
    if revision != FORMAT_REVISION:  # before the fields: another revision may have other ones
        raise _FieldError(f"format revision {revision}, and this blip2rt reads {FORMAT_REVISION}")
    manifest = _parse(Manifest, content, "")
    if manifest.kind not in STAGES_OF_KIND:
        raise _FieldError(f"kind {manifest.kind!r} is none of {', '.join(STAGES_OF_KIND)}")
    if manifest.kernels not in KERNELS:
        raise _FieldError(f"kernels {manifest.kernels!r} is none of {', '.join(KERNELS)}")
    for stage in STAGES_OF_KIND[manifest.kind]:
        if stage not in manifest.stages:
            raise _FieldError(f"stages.{stage} is missing")
    for name, entry in manifest.files.items():
        if not PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise _FieldError(f"files: {name!r} is not the plain name of a file in the directory")
        if entry.size < 0 or not SHA256.fullmatch(entry.sha256):
            raise _FieldError(f"files.{name} has no possible size and sha256: {entry.size}, {entry.sha256!r}")
    for name, stage in manifest.stages.items():
        if stage.file not in manifest.files:  # so it is a plain name, too
            raise _FieldError(f"stages.{name}.file: {stage.file!r} is not among the files of the directory")
    if manifest.image.size < 1 or len(manifest.image.mean) != 3 or len(manifest.image.std) != 3:
        raise _FieldError(f"image should have a size above 0 and three means and stds, not {manifest.image}")
    return manifest


def _parse(kind: Any, value: Any, where: str) -> Any:
    """`value`, from JSON, as the type hint `kind` says. `where` is its path in the file, for the error."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if NoneType in arguments and is_dataclass(arguments[0]):
        return None if value is None else _parse(arguments[0], value, where)
    if is_dataclass(kind):
        return _parse_object(kind, _expect(dict, value, where), where)
    if origin is tuple:
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, value, where)))
    if origin is dict:
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in _expect(dict, value, where).items()}
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)  # JSON tools like to write 1 for 1.0
    return _expect(arguments or kind, value, where)


def _parse_object(kind: Any, value: dict[str, Any], where: str) -> Any:
    """A dataclass from a JSON object with exactly its fields."""
    hints = get_type_hints(kind)
    if kind is Stage:  # the one object that is flatter in the file than in the program
        hints = {"file": str, **get_type_hints(StageSpec)}
    prefix = f"{where}." if where else ""
    for name in hints:
        if name not in value:
            raise _FieldError(f"{prefix}{name} is missing")
    for name in value:
        if name not in hints:
            raise _FieldError(f"{prefix}{name} is not a field of format revision {FORMAT_REVISION}")
    parsed = {name: _parse(hint, value[name], prefix + name) for name, hint in hints.items()}
    return Stage(parsed.pop("file"), StageSpec(**parsed)) if kind is Stage else kind(**parsed)


def _expect(kinds: Any, value: Any, where: str) -> Any:
    """`value` when its type is one of `kinds`; exactly, because True is an int to isinstance."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
        raise _FieldError(f"{where} should be {' or '.join(_TYPE_NAMES[kind] for kind in kinds)}, not {value!r:.60}")
    return value


_TYPE_NAMES = {
    str: "a string", int: "an integer", float: "a finite number", bool: "a truth value",
    NoneType: "null", list: "a list", dict: "an object",
}  # fmt: skip


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _layout(value: Any, indent: str = "") -> str:
    """JSON in which all that fits on one line stands on one line: a decoder has a hundred tensors."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(indent) + len(line) <= 100 or not isinstance(value, dict | list | tuple):
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        rows = [f"{json.dumps(key, ensure_ascii=False)}: {_layout(item, inner)}" for key, item in value.items()]
    else:
        rows = [_layout(item, inner) for item in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inner}" + f",\n{inner}".join(rows) + f"\n{indent}{end}"

"""Where the tensors of a checkpoint lie: a directory, a hub id, or a file and the parts that were saved apart."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, dtype

from ..errors import CheckpointError, InputError
from .formats import Contents, internal_names, recognise
from .named_configs import read_config
from .names import LANGUAGE_MODEL, LAVIS, TRANSFORMERS, VISION_PREFIXES
from .weight_files import WRAPPERS, TorchFile, WeightFile, open_weight_file, open_weight_files, read_json


@dataclass(frozen=True)
class CheckpointSource:
    """What a caller names: a checkpoint, and what its file does not say or hold itself.

    Attributes:
        model: a transformers directory, a hub id, or a file of LAVIS's or mmpretrain's.
        config: a `Blip2Config` as JSON, or one of `named_configs.NAMES`; None for transformers, which has its own.
        vision: file with the image encoder of a LAVIS model that was saved without it.
        llm: directory or hub id of the language model of a model that was saved without it.
        image_size: side of the pictures in pixels; position embeddings of another size are interpolated. None: theirs.
        via_image_size: interpolate them to this size first and to `image_size` then, as mmpretrain does where a model
            is built for other pictures than it is given (its VQA: 364, then 224), which changes them.
        vision_layers: blocks of the image encoder to use. None: as many as the format's own code.
    """

    model: str | Path
    config: str | Path | None = None
    vision: str | Path | None = None
    llm: str | Path | None = None
    image_size: int | None = None
    via_image_size: int | None = None
    vision_layers: int | None = None


class Tensors:
    """The stored tensors of a checkpoint under the names of this package, whatever files they lie in."""

    def __init__(self) -> None:
        self.files: list[WeightFile] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, dtype] = {}
        self.doubles: list[tuple[str, WeightFile, str]] = []  # those that a second file holds as well
        self._where: dict[str, tuple[WeightFile, str]] = {}

    def add(self, file: WeightFile, names: Mapping[str, str]) -> None:
        """Take tensors of a file: the name in this package -> the name in the file."""
        self.files.append(file)
        for name, stored in names.items():
            if name in self._where:
                self.doubles.append((name, file, stored))
            else:
                self._where[name] = file, stored
                self.shapes[name], self.dtypes[name] = file.shapes[stored], file.dtypes[stored]

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, its own memory."""
        file, stored = self._where[name]
        return file.read(stored)

    def place(self, name: str) -> str:
        """File and name in it, for messages."""
        file, stored = self._where[name]
        return f"{file.path.name}: {stored}"


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has been found. `directory` holds its processor and perhaps a tokenizer; None: nothing does."""

    contents: Contents
    tensors: Tensors
    config_json: dict[str, Any]
    directory: Path | None
    name: str
    llm_json: dict[str, Any] = field(default_factory=dict)


def open_source(source: CheckpointSource) -> Opened:
    """Find a checkpoint with all its parts.

    Raises:
        CheckpointError: not found, damaged, of no known format, or lacking a part: names the option that brings it.
        InputError: an option that the checkpoint has no use for.
    """
    path = Path(source.model)
    return _open_file(path, source) if path.is_file() else _open_directory(source)


def _open_directory(source: CheckpointSource) -> Opened:
    directory = find_directory(source.model)
    tensors = Tensors()
    for file in open_weight_files(directory):
        tensors.add(file, {name: name for name in file.shapes})
    contents = recognise(tensors.shapes, directory)
    if contents.format != TRANSFORMERS:
        raise CheckpointError(
            f"{directory} is laid out as a transformers checkpoint, but its tensors are {contents.format}'s "
            f"({tensors.place(min(tensors.shapes))}): pass the file itself to --model"
        )
    _refuse_superfluous(source, {"config": "has its own config.json", "vision": "is whole", "llm": "is whole"})
    return Opened(contents, tensors, read_json(directory / "config.json"), directory, directory.name)


def _open_file(path: Path, source: CheckpointSource) -> Opened:
    file = open_weight_file(path)
    contents = recognise(file.shapes, path)
    wrapper = file.wrapper if isinstance(file, TorchFile) else None
    if wrapper is not None and WRAPPERS[wrapper] != contents.format:
        raise CheckpointError(
            f"{path} is packed as {WRAPPERS[wrapper]} packs checkpoints (behind {wrapper!r}), but its tensors are "
            f"{contents.format}'s: take an original file, or unpack its state dict"
        )
    if contents.format == TRANSFORMERS:
        raise CheckpointError(f"{path} is a file of a transformers checkpoint: pass its directory to --model")
    own = {part: "holds it" for part in ("vision", "llm") if getattr(contents, f"has_{part}")}
    _refuse_superfluous(source, own)
    wanted = {"config": "its sizes (--config FILE, or a name such as --config blip2-opt-2.7b)"}
    if not contents.has_vision:
        wanted["vision"] = "the image encoder (--vision FILE)"
    if not contents.has_llm and not contents.is_retrieval:
        wanted["llm"] = "the language model (--llm DIR)"
    missing = [what for option, what in wanted.items() if getattr(source, option) is None]
    if missing:
        raise CheckpointError(f"{path} is {contents.format}'s and does not hold " + ", ".join(missing))
    tensors = Tensors()
    tensors.add(file, dict(zip(internal_names(file.shapes, contents.format), file.shapes, strict=True)))
    if source.vision is not None:
        _add_vision(tensors, Path(source.vision), contents.format)
    llm, llm_json = (None, {}) if source.llm is None else _add_language_model(tensors, source.llm)
    assert source.config is not None
    return Opened(contents, tensors, read_config(source.config), llm, path.stem, llm_json)


def _refuse_superfluous(source: CheckpointSource, reasons: Mapping[str, str]) -> None:
    for option, reason in reasons.items():
        if getattr(source, option) is not None:
            raise InputError(f"--{option} {getattr(source, option)}: {source.model} {reason}; leave --{option} out")


def _add_vision(tensors: Tensors, path: Path, format: str) -> None:
    """The image encoder of a file of its own (names without prefix), or of any LAVIS file that holds one."""
    if not path.is_file():
        raise CheckpointError(f"--vision {path}: there is no such file")
    file, prefix = open_weight_file(path), VISION_PREFIXES[LAVIS]
    prefixed = {name: name for name in file.shapes if name.startswith(prefix)}
    names = prefixed or {prefix + name: name for name in file.shapes}
    if format != LAVIS or not {prefix + "cls_token", prefix + "class_embedding"} & names.keys():
        raise CheckpointError(
            f"--vision {path} holds no image encoder in LAVIS's format (its tensors: "
            f"{', '.join(sorted(file.shapes)[:3])}): pass eva_vit_g.pth, clip_vit_L.pth, or a file that holds one"
        )
    tensors.add(file, names)


def _add_language_model(tensors: Tensors, source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The language model in a transformers directory; that directory and its config.json."""
    directory = find_directory(source, "--llm")
    config = read_json(directory / "config.json")
    for file in open_weight_files(directory):
        names = {}
        for name in file.shapes:
            # Meta's first OPT files leave out the outermost module
            inner = f"model.{name}" if config.get("model_type") == "opt" and name.startswith("decoder.") else name
            names[LANGUAGE_MODEL + inner] = name
        tensors.add(file, names)
    return directory, config


def find_directory(source: str | Path, option: str = "--model", *, with_weights: bool = True) -> Path:
    """The directory of a checkpoint or, without weights, of a tokenizer; a hub id is fetched into the hub's own cache.

    Raises:
        CheckpointError: neither a directory nor an id that the hub can serve from here.
    """
    path = Path(source)
    if source == "":  # Path takes it for the folder one is in
        raise CheckpointError(f"no directory or file is named, for {option}: it is empty")
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(
            f"{path} is no directory; pass the one that holds config.json and the weights to {option}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"no such directory or file: {source}, for {option} (a hub id looks like 'Salesforce/blip2-opt-2.7b')"
        )
    try:
        return _fetch(str(source), with_weights)
    except Exception as error:  # the hub's client raises a dozen unrelated types: no network, no such id, no rights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source!r} is no local directory and could not be fetched from the hub ({reason}); "
            "pass the path of a downloaded checkpoint"
        ) from error


def _fetch(hub_id: str, with_weights: bool) -> Path:
    """The snapshot of a hub id in the hub's cache: fetched, or, where the hub does not answer, what is there."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:  # first, because snapshot_download waits for ever for a hub that takes the call and says nothing
        siblings = HfApi().model_info(hub_id, timeout=constants.HF_HUB_ETAG_TIMEOUT).siblings or []
    except Exception:
        with suppress(Exception):
            return Path(snapshot_download(hub_id, local_files_only=True))
        raise
    is_safe = any(file.rfilename.endswith(".safetensors") for file in siblings)
    weights = ["*.safetensors" if is_safe else "*.bin"]  # many repositories hold the same weights twice
    files = ["*.json", "*.txt", *(weights if with_weights else [])]
    return Path(snapshot_download(hub_id, allow_patterns=files))

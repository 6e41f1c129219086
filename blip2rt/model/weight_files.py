"""The weight files of a checkpoint: safetensors or torch's zip of pickles, single, sharded, or wrapped by a trainer."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

WRAPPERS = {"model": "lavis", "state_dict": "mmpretrain"}  # where trainers put the state dict, and whose they are
DTYPES = {  # what safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
REMAP_BYTES = 512 << 20  # a mapped file's pages count as ours: map it anew after reading this much


class WeightFile:
    """One file of tensors. `shapes` and `dtypes` come from its header; `read` gives one tensor as it is stored."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, key: str) -> Tensor:
        """The stored tensor, its own memory."""
        raise NotImplementedError


class SafetensorsFile(WeightFile):
    """A `.safetensors` file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                self.shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                dtypes = {key: part.get_dtype() for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
        foreign = sorted(key for key, dtype in dtypes.items() if dtype not in DTYPES)
        if foreign:
            raise CheckpointError(f"{path}: {foreign[0]} is of type {dtypes[foreign[0]]}, which no BLIP-2 is stored in")
        self.dtypes = {key: DTYPES[dtype] for key, dtype in dtypes.items()}

    def read(self, key: str) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key).clone()
                return tensor
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error


class TorchFile(WeightFile):
    """A `.bin` or `.pth` file: tensors only, never code (`weights_only`).

    `wrapper` is the key behind which a trainer's checkpoint keeps the state dict; a plain file has none.
    """

    def __init__(self, path: Path, may_be_wrapped: bool = False):
        self.path = path
        self.wrapper: str | None = None
        self._may_be_wrapped = may_be_wrapped
        self._bytes_read = 0
        self._tensors = self._load()
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self.dtypes = {key: tensor.dtype for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        if self._bytes_read > REMAP_BYTES:
            self._tensors, self._bytes_read = self._load(), 0
        self._bytes_read += self._tensors[key].nbytes
        return self._tensors[key].clone()

    def _load(self) -> dict[str, Tensor]:
        try:
            with self.path.open("rb") as stream:
                is_zip = stream.read(2) == b"PK"  # files from before torch 1.6 are no zip and cannot be mapped
            content: Any = torch.load(self.path, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:  # its message advises to run the code
            raise CheckpointError(
                f"{self.path} is damaged, or holds code, which blip2rt does not run: "
                "take the safetensors of this checkpoint, or a .bin or .pth of tensors alone"
            ) from error
        except Exception as error:  # torch.load has no error type of its own: anything from EOFError to RuntimeError
            raise damaged(self.path, error) from error
        if self._may_be_wrapped and isinstance(content, dict):
            self.wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
            content = content[self.wrapper] if self.wrapper else content
        if not isinstance(content, dict) or not all(_is_plain(key, value) for key, value in content.items()):
            raise CheckpointError(f"{self.path} does not hold a dictionary of plain tensors: pass a state dict")
        return content


def _is_plain(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def open_weight_file(path: Path) -> SafetensorsFile | TorchFile:
    """A single file of tensors, told by its content.

    Raises:
        CheckpointError: neither torch's nor safetensors, damaged, or not what its name says.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    is_safetensors, is_torch = start[8:] == b"{", start[:2] in (b"PK", b"\x80\x02")
    if path.suffix == ".safetensors" and is_torch:
        raise CheckpointError(f"{path} is called safetensors and is a torch file: call it what it is, .pth")
    if is_safetensors:
        return SafetensorsFile(path)
    if is_torch:
        return TorchFile(path, may_be_wrapped=True)
    raise CheckpointError(
        f"{path} is a file that is neither torch's nor safetensors (it begins {start!r}): pass a .pth of LAVIS or "
        "mmpretrain, or the directory of a transformers checkpoint"
    )


def open_weight_files(directory: Path) -> list[WeightFile]:
    """The weight files of a checkpoint directory, in the order in which transformers looks for them.

    Raises:
        CheckpointError: none there, a shard missing, damaged, or not holding what the index says.
    """
    kinds: tuple[tuple[str, type[SafetensorsFile] | type[TorchFile]], ...] = (
        ("model.safetensors", SafetensorsFile),
        ("pytorch_model.bin", TorchFile),
    )
    for name, kind in kinds:
        if (directory / name).is_file():
            return [kind(directory / name)]
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{index} has no weight_map")
            shards = sorted(set(weight_map.values()))
            absent = [shard for shard in shards if not (directory / shard).is_file()]
            if absent:
                raise CheckpointError(f"{directory} lacks {', '.join(absent)}, named by {index.name}")
            files: list[WeightFile] = [kind(directory / shard) for shard in shards]
            stored = {key: file.path.name for file in files for key in file.shapes}
            strayed = sorted(key for key, shard in weight_map.items() if stored.get(key) != shard)
            if strayed:
                raise CheckpointError(
                    f"{index.name} and its shards disagree on {len(strayed)} tensors, first {strayed[0]}: "
                    "the shards are of different checkpoints"
                )
            return files
    raise CheckpointError(
        f"{directory} holds no weights: model.safetensors or pytorch_model.bin, single or with their index"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of a checkpoint.

    Raises:
        CheckpointError: absent, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: it is not a transformers checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object")
    return content


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that cannot be read."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"{path} is damaged or truncated ({reason}); copy it anew from its source")

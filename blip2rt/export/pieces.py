"""Pieces of an engine, run by themselves: so no stage has to fit in memory to be compared."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors import safe_open

from ..backends.ort import session_options
from ..backends.torch_modules import DTYPES, build, within
from ..errors import EngineError
from ..manifest import TORCH, Manifest
from ..model.retrieval import stored_name

Array = np.ndarray[Any, Any]

TOKEN_EMBEDDING = "embedding.token.weight"  # the head reads it where the two are tied
IR_VERSION = 11  # of the ONNX files that the pieces are made into


@dataclass(frozen=True)
class Piece:
    """A part of a stage: a module of the reference, and the names of what it reads and gives."""

    module: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]


class Pieces(Protocol):
    """The pieces of one stage of an engine."""

    def run(self, piece: Piece, known: Mapping[str, Array]) -> dict[str, Array]:
        """What a piece gives, from the values that are known; only its weights are read.

        Raises:
            EngineError: the engine cannot be used.
        """


def open_pieces(directory: Path, manifest: Manifest, stage: str) -> Pieces:
    """The pieces of a stage of an engine, wherever it was built for.

    Raises:
        EngineError: its file cannot be read.
    """
    kind = ModulePieces if manifest.device == TORCH else GraphPieces
    return kind(directory, manifest, stage)


class GraphPieces:
    """Of a graph, cut where `graphs.py` named the residual stream."""

    def __init__(self, directory: Path, manifest: Manifest, stage: str):
        self._path = directory / manifest.stages[stage].file
        with _engine_errors(self._path):
            self._graph = ir.load(self._path).graph

    def run(self, piece: Piece, known: Mapping[str, Array]) -> dict[str, Array]:
        """See `Pieces`."""
        with _engine_errors(self._path):
            return self._run(piece.outputs, known)

    def _run(self, outputs: tuple[str, ...], known: Mapping[str, Array]) -> dict[str, Array]:
        inputs: dict[str, ir.Value] = {}
        seen: set[ir.Value] = set()
        pending = [value for node in self._graph for value in node.outputs if value.name in outputs]
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.name in known:
                inputs[str(value.name)] = value
            elif (node := value.producer()) is not None:
                pending += [v for v in node.inputs if v is not None]
        cut = ir.Model(ir.convenience.extract(self._graph, list(inputs), list(outputs)), ir_version=IR_VERSION)
        options = session_options(None)
        folder = str(self._path.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        model = ir.to_proto(cut).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results = session.run(list(outputs), {name: known[name] for name in inputs})
        return dict(zip(outputs, results, strict=True))


class ModulePieces:
    """Of a stage that runs as a module: the modules of the pieces, in the engine's precision."""

    def __init__(self, directory: Path, manifest: Manifest, stage: str):
        self._path, self._stage = directory / manifest.stages[stage].file, stage
        self._manifest, self._dtype = manifest, DTYPES[manifest.precision]

    def run(self, piece: Piece, known: Mapping[str, Array]) -> dict[str, Array]:
        """See `Pieces`."""
        prefix = f"{self._stage}.{piece.module}"
        with _engine_errors(self._path), safe_open(self._path, "pt") as file, torch.inference_mode():
            model = build(self._manifest, file.get_tensor, prefix)
            inputs = [None if name is None else self._tensor(name, known, file.get_tensor) for name in piece.inputs]
            results = model.get_submodule(prefix)(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            return {name: value.float().numpy() for name, value in zip(piece.outputs, results, strict=True)}

    def _tensor(self, name: str, known: Mapping[str, Array], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if name == TOKEN_EMBEDDING:  # a weight, which the engine has of its own
            return read(stored_name(f"{self._stage}.{name}"))
        tensor = torch.from_numpy(known[name])
        return within(tensor, self._dtype).to(self._dtype) if tensor.is_floating_point() else tensor


@contextmanager
def _engine_errors(path: Path) -> Iterator[None]:
    """What onnx_ir, ONNX Runtime and torch say of an engine they cannot use, as one error; theirs share no base."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(f"{path} cannot be run ({reason}): build the engine again with `blip2rt export`") from error

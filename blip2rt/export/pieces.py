"""Pieces of an engine, run by themselves: so no stage has to fit in memory to be compared."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors import safe_open

from ..backends import tensorrt
from ..backends.device_memory import DeviceCache
from ..backends.ort import session_options
from ..backends.torch_modules import DTYPES, build, within
from ..errors import EngineError
from ..manifest import TENSORRT, TORCH, Manifest
from ..model.retrieval import stored_name
from ..stages import CROSS, KEYS_AND_VALUES, sizes_of

Array = np.ndarray[Any, Any]

TOKEN_EMBEDDING = "embedding.token.weight"  # the head reads it where the two are tied
IR_VERSION = 11  # of the ONNX files that the pieces are made into
NUMPY = {"float32": np.float32, "int64": np.int64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


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
    kinds: dict[str, Callable[..., Pieces]] = {TORCH: ModulePieces, TENSORRT: PlanPieces}
    return kinds.get(manifest.device, GraphPieces)(directory, manifest, stage)


class GraphPieces:
    """Of a graph, cut where `graphs.py` named the residual stream; on the CPU, whatever it was built for.

    There bf16 is computed in float32, with the weights of bf16.
    """

    def __init__(self, directory: Path, manifest: Manifest, stage: str):
        self._path, self._precision = directory / manifest.stages[stage].file, manifest.precision
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
            name = str(value.name).removesuffix(f"_{self._precision}")  # what is turned to float32 at the end
            if name in known:
                inputs[name] = value
            elif (node := value.producer()) is not None:
                pending += [v for v in node.inputs if v is not None]
        values = list(inputs.values())
        cut = ir.Model(ir.convenience.extract(self._graph, values, list(outputs)), ir_version=IR_VERSION)
        if self._precision == "bf16":
            _widen(cut.graph)
        options = session_options(None)
        folder = str(self._path.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        model = ir.to_proto(cut).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        types = {value.name: value.dtype.numpy() for value in cut.graph.inputs if value.dtype is not None}
        given = {value.name: known[name].astype(types[value.name]) for name, value in inputs.items()}
        results = session.run(list(outputs), given)
        # copies: arrays of ONNX Runtime's hold on to all memory of their session
        results = [r.astype(np.float32 if r.dtype == np.float16 else r.dtype) for r in results]
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


class PlanPieces:
    """Of a plan, which cannot be cut: the stage runs once, on its own inputs, and its outputs are handed out."""

    def __init__(self, directory: Path, manifest: Manifest, stage: str):
        self._spec = manifest.stages[stage].signature
        only = replace(manifest, stages={stage: manifest.stages[stage]})
        self._stage = tensorrt.open_stages(directory, only)[stage]
        self._outputs: dict[str, Array] = {}

    def run(self, piece: Piece, known: Mapping[str, Array]) -> dict[str, Array]:
        """See `Pieces`."""
        self._outputs = self._outputs or self._run(known)
        return {name: self._outputs[name] for name in piece.outputs if name in self._outputs}

    def _run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        binding = self._stage.bind()
        caches: dict[str, DeviceCache] = {}
        found: dict[str, Array] = {}
        sizes = sizes_of(self._spec.inputs, {name: array.shape for name, array in known.items()})
        for tensor in self._spec.inputs:
            array = np.ascontiguousarray(known[tensor.name])
            if tensor.name.startswith(KEYS_AND_VALUES):
                cache = caches[tensor.name.replace("past_", "present_")] = self._stage.cache(array.shape)
                cache.write(array.astype(NUMPY[tensor.dtype]))
                binding.input(tensor.name, cache)
            else:
                binding.input(tensor.name, array)
        for tensor in self._spec.outputs:
            shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
            if tensor.name.startswith(CROSS):
                caches[tensor.name] = self._stage.cache(tuple(shape))
            if tensor.name in caches:
                binding.output(tensor.name, caches[tensor.name])
            else:
                binding.output(tensor.name, found.setdefault(tensor.name, np.empty(shape, tensor.dtype)))
        binding.run()
        dtypes = {tensor.name: NUMPY[tensor.dtype] for tensor in self._spec.outputs}
        kept = {name: cache for name, cache in caches.items() if name in dtypes}
        return found | {name: cache.read(dtypes[name]).astype(np.float32) for name, cache in kept.items()}


def _widen(graph: ir.Graph) -> None:
    """Compute in float32 what is written in bf16: ONNX Runtime has no arithmetic for it on the CPU."""
    narrow = ir.DataType.BFLOAT16
    for value in [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.dtype != narrow:
            continue
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: the graph that this was cut from has the old
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)


@contextmanager
def _engine_errors(path: Path) -> Iterator[None]:
    """What onnx_ir, ONNX Runtime and torch say of an engine they cannot use, as one error; theirs share no base."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(f"{path} cannot be run ({reason}): build the engine again with `blip2rt export`") from error

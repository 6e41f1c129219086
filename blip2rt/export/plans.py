"""ONNX graphs -> TensorRT plans: which sizes each is built for, and the build.

A plan is tied to the GPU and the TensorRT that built it. Its weights can be exchanged (`refit_plan`): a model that was
trained further needs no new build.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import ExportError, InputError
from ..stages import DECODER, StageSpec

ROW_STEP = 16  # capacities are multiples of it
Sizes = Mapping[str, tuple[int, int, int]]  # letter of the legend -> least, usual, most


@dataclass(frozen=True)
class Limits:
    """The largest sizes that plans are built for.

    Attributes:
        max_batch: images at once.
        max_beams: rows of an image that are decoded side by side.
        max_prompt: tokens of a prompt, or of a text of the Q-Former's.
        capacity: rows of the cache of an image: picture, prompt and the beams' tokens, dead ones dropped. All are
            looked at in every step, so a large one costs time.
    """

    max_batch: int = 32
    max_beams: int = 32
    max_prompt: int = 64
    capacity: int = 256

    def __post_init__(self) -> None:
        # export measures plans with 3 images, 5 beams and 23 cached rows
        for name, least in (("max_batch", 4), ("max_beams", 5), ("max_prompt", 1), ("capacity", 32)):
            if getattr(self, name) < least:
                raise InputError(f"{name} of a plan must be at least {least}, not {getattr(self, name)}")


def plan_sizes(stage: str, spec: StageSpec, limits: Limits, num_queries: int) -> list[Sizes]:
    """The sizes of every profile of a stage: least, usual and most of each letter that its inputs have.

    Args:
        stage: its name.
        spec: its signature.
        limits: largest sizes.
        num_queries: Q, rows of a picture in front of a prompt.

    Raises:
        InputError: the prompt does not fit the cache.
    """
    letters = {size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    batch = (1, min(8, limits.max_batch), limits.max_batch)
    texts = (0, min(16, limits.max_prompt), limits.max_prompt)
    encoded = -(-(num_queries + limits.max_prompt) // ROW_STEP) * ROW_STEP
    common = {"C": (limits.capacity,) * 3, "B": batch, "L": texts, "E": (1, min(num_queries + 16, encoded), encoded)}
    profiles: list[Sizes] = [common]
    if stage == DECODER:
        longest = 1 if "E" in letters else num_queries + limits.max_prompt  # an encoder has read the prompt
        if longest + limits.max_beams > limits.capacity:
            raise InputError(
                f"a prompt of {longest} rows and {limits.max_beams} beams do not fit a cache of {limits.capacity} "
                "rows: raise --capacity, or lower --max-prompt or --max-beams"
            )
        one, rows = (1, 1, 1), (1, min(5, limits.max_beams), limits.max_beams)
        profiles = [
            {**common, "S": (1, min(num_queries + 8, longest), longest), "R": one},
            {**common, "S": rows, "R": rows},
        ]
    return [{letter: sizes[letter] for letter in sorted(letters)} for sizes in profiles]


def profile_shapes(spec: StageSpec, sizes: Sizes) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, usual and largest shape of every input whose shape varies."""
    return {
        tensor.name: tuple(
            tuple(sizes[size][place] if isinstance(size, str) else size for size in tensor.shape) for place in range(3)
        )
        for tensor in spec.inputs
        if any(isinstance(size, str) for size in tensor.shape)
    }


def fix_capacity(graph: ir.Graph, spec: StageSpec, capacity: int) -> StageSpec:
    """Give the cache of a decoder's graph a size: TensorRT updates it in place only so. The signature with it."""

    def fixed(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return tuple(capacity if size == "C" else size for size in shape)

    changed = []
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        changed.append(tuple(replace(tensor, shape=fixed(tensor.shape)) for tensor in tensors))
        for value, tensor in zip(values, changed[-1], strict=True):
            value.shape = ir.Shape(tensor.shape)
    return StageSpec(*changed)


def build_plan(
    trt: Any,
    graph: Path,
    spec: StageSpec,
    profiles: Sequence[Sizes],
    timings: Path | None = None,
    can_refit: bool = True,
) -> Any:
    """Build the plan of a graph, as bytes.

    Args:
        trt: the module `tensorrt`.
        graph: the .onnx file, with its weights beside it.
        spec: its signature.
        profiles: from `plan_sizes`.
        timings: file of the timing cache; read if there, and written.
        can_refit: whether weights can be exchanged later.

    Raises:
        ExportError: TensorRT takes the graph or the sizes not.
    """
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise ExportError(f"TensorRT {trt.__version__} does not take {graph.name}: {errors}")
    _let_decompose(trt, network)
    config = builder.create_builder_config()
    if can_refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in profile_shapes(spec, sizes).items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    known = timings.read_bytes() if timings and timings.exists() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT {trt.__version__} cannot build {graph.name}: {log.last_error}")
    if timings:
        timings.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return plan


def _let_decompose(trt: Any, network: Any) -> None:
    """Where no fused kernel takes an attention, as with T5's bias of every head, several may compute it."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # the bindings give it as an ILayer
            layer.attention.decomposable = True


def refit_plan(trt: Any, plan: Path, graph: Path) -> Any:
    """The plan with the weights of another graph of the same sizes, as bytes.

    Raises:
        ExportError: the plan or the weights do not fit.
    """
    log = _logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise ExportError(f"{plan} is no plan of this GPU and TensorRT {trt.__version__}: {log.last_error}")
    refitter = trt.Refitter(engine, log)
    reader = trt.OnnxParserRefitter(refitter, log)
    if not reader.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise ExportError(f"{plan} cannot be given the weights of {graph.name}: {log.last_error}")
    return engine.serialize()


def _logger(trt: Any) -> Any:
    """A logger of TensorRT's that keeps the last error, which it tells nowhere else."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "it says nothing"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = " ".join(message.split())

    return Logger()

"""Graphs for GPUs: halved, with a shortlist, and for TensorRT compiled into plans."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from ..backends.device_memory import CudaDevice
from ..backends.tensorrt import load_tensorrt
from ..errors import EngineError, InputError
from ..manifest import TENSORRT, Manifest
from ..progress import progress
from ..stages import DECODER, StageSpec
from .half import half_spec, halve
from .lower import StoredWeight
from .plans import Sizes, build_plan, fix_capacity, refit_plan
from .shortlist import add_shortlist

TIMINGS = "timings.cache"


def lower_for_gpu(
    model: ir.Model, stage: str, spec: StageSpec, precision: str, weights: Sequence[StoredWeight], capacity: int | None
) -> tuple[list[StoredWeight], StageSpec]:
    """Rewrite the lowered graph of a stage in place; what its initialisers are made of, and its signature.

    Args:
        model: the lowered graph.
        stage: its name.
        spec: its signature so far.
        precision: "fp32", "fp16" or "bf16".
        weights: what its initialisers are made of so far.
        capacity: rows of the cache; None: whatever is bound.
    """
    weights = list(weights)
    if precision != "fp32":
        weights, spec = halve(model, precision, weights), half_spec(spec, precision)
    if stage == DECODER:
        spec = add_shortlist(model.graph, spec)
        if capacity is not None:
            spec = fix_capacity(model.graph, spec, capacity)
    return weights, spec


def describe_gpu() -> dict[str, str]:
    """TensorRT and the GPU, as the toolchain of a manifest names them.

    Raises:
        EngineError: one of them is missing.
    """
    return {"tensorrt": load_tensorrt().__version__, **CudaDevice().describe()}


def write_plans(
    graphs: Path,
    specs: Mapping[str, StageSpec],
    profiles: Mapping[str, Sequence[Sizes]],
    directory: Path,
    old: Path | None,
) -> dict[str, str]:
    """Compile the graph of every stage; the names of the plans' files.

    Args:
        graphs: the folder of the .onnx files.
        specs: signatures by stage.
        profiles: the sizes that they take, by stage.
        directory: where the plans go.
        old: an engine whose plans are given the new weights instead; None: plans are built.

    Raises:
        ExportError: TensorRT cannot build them, or the old ones do not fit.
    """
    trt = load_tensorrt()
    old_plans = _plans_of(old, specs) if old else {}
    if old and (old / TIMINGS).exists():
        shutil.copy(old / TIMINGS, directory / TIMINGS)
    for stage, spec in progress(specs.items(), "refitting plans" if old else "building plans", total=len(specs)):
        graph = graphs / f"{stage}.onnx"
        if old:
            plan = refit_plan(trt, old_plans[stage], graph)
        else:
            plan = build_plan(trt, graph, spec, profiles[stage], directory / TIMINGS)
        (directory / f"{stage}.plan").write_bytes(memoryview(plan))
    return {stage: f"{stage}.plan" for stage in specs}


def _plans_of(engine: Path, specs: Mapping[str, StageSpec]) -> dict[str, Path]:
    """The plans of an engine of the same sizes.

    Raises:
        EngineError: it is none.
        InputError: it was built for another device, or its stages have other signatures.
    """
    manifest = Manifest.read(engine)
    if manifest.device != TENSORRT:
        raise InputError(f"--refit {engine}: an engine for {manifest.device!r} has no plans")
    for stage, spec in specs.items():
        if stage not in manifest.stages or manifest.stages[stage].signature != spec:
            raise InputError(
                f"--refit {engine}: its stage {stage!r} is of other sizes or precision than this model: build anew"
            )
    built, here = manifest.toolchain, describe_gpu()
    for what in ("gpu", "tensorrt"):
        if built.get(what) != here[what]:
            raise EngineError(f"--refit {engine}: built for {what} {built.get(what)}, and here is {here[what]}")
    return {stage: engine / entry.file for stage, entry in manifest.stages.items()}

"""checkpoint -> engine directory: graphs -> lower -> weights -> verify, and one exchange at the end."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import __version__
from ..engine_directory import building, describe_files
from ..errors import CheckpointError, ExportError, InputError
from ..manifest import (
    CPU,
    CUDA,
    GENERATIVE,
    RETRIEVAL,
    TENSORRT,
    TORCH,
    ImageSpec,
    Manifest,
    Parity,
    Stage,
    TokenSpec,
)
from ..model import Checkpoint, CheckpointSource
from ..model.config import Blip2Config, RetrievalConfig, T5Config, stop_token_ids
from ..model.retrieval import stored_name
from ..model.signatures import stage_specs
from ..model.sources import find_directory
from ..model.weight_files import read_json
from ..native import library_path
from ..preprocess import ImageSource, preprocess
from ..progress import Progress
from ..stages import VISION, StageSpec
from ..tokenizer import Tokenizer
from .calibrate import Calibration, check_calibration
from .fuse_attention import fuse_attention
from .gpu import describe_gpu, lower_for_gpu, write_plans
from .graphs import trace_stage
from .lower import lower
from .modules import MODULE_PRECISIONS, ROUNDED, write_modules
from .packages import write_packages
from .plans import Limits, plan_sizes
from .quantize import quantize
from .tokenizer_files import QUESTION_FOLDER, write_text_tokenizer, write_tokenizer
from .verify import compare_engine
from .weights import Written, write_stage

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # every BLIP-2's
PRECISIONS = {  # by device
    CPU: ("fp32", "int8", "int4"),
    TORCH: MODULE_PRECISIONS,
    CUDA: ("fp32", "fp16", "bf16"),
    TENSORRT: ("fp16", "bf16"),  # its fused attention has no float32
}
GRAPHS = "graphs"  # folder of what TensorRT's plans are built from, for as long as that takes
# of a parameter, the embeddings included
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1.5, "int8": 1.5, "int4": 1.0}


def export_engine(
    model: str | Path | CheckpointSource,
    output: str | Path | None = None,
    *,
    precision: str | None = None,
    device: str = "cpu",
    tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    pictures: Sequence[ImageSource] = (),
    texts: str | Sequence[str] = "a photo of",
    limits: Limits | None = None,
    refit: str | Path | None = None,
    compiled: bool = False,
    force: bool = False,
) -> Path:
    """Build the engine directory of a checkpoint and prove it against the reference model.

    Peak memory is a few tensors and one block of the model, not the model.

    Args:
        model: a transformers directory or hub id; or a `CheckpointSource`, for the files of LAVIS and mmpretrain.
        output: the engine directory; None: `engines/<model>-<precision>-<device>`.
        precision: "fp32"; on the CPU "int8", all linear layers, or "int4", those of the language model, the others
            int8; on GPUs "bf16" or "fp16"; on torch also "fp8", "int8" and "int4", the decoder's linear layers, the
            rest bf16. None: fp32 on the CPU, bf16 on a GPU.
        device: "cpu"; or on a GPU "torch", the reference's own modules, "cuda", ONNX Runtime's provider, or "tensorrt",
            which must be there to build.
        tokenizer: directory of the language model's tokenizer; None: the model's own, or that of `llm`.
        text_tokenizer: directory of the Q-Former's (BERT's) tokenizer, for a retrieval model or one whose Q-Former
            reads questions; None: the model's own.
        pictures: what int4's weights are calibrated with (GPTQ, `calibrate.py`); none: they are rounded by themselves.
        texts: what stands behind each picture then, or all.
        limits: the largest sizes that TensorRT's plans are built for; None: `Limits()`.
        refit: a TensorRT engine of the same sizes, whose plans are given these weights instead of building new ones.
        compiled: on torch, compile the stages that look at pictures ahead of time, for this machine (`packages.py`).
        force: replace an engine that is there.

    Returns:
        The engine directory.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        InputError: a wrong argument, or an output that is taken.
        ExportError: the disk is full or cannot be written, or the engines disagree with the reference.
    """
    if device not in PRECISIONS:
        raise InputError(f"device {device!r} is not one of {', '.join(PRECISIONS)}")
    precision = precision or ("fp32" if device == CPU else "bf16")
    if precision in ("fp16", "bf16") and device == CPU:
        raise InputError(f"the CPU has no {precision} kernels: use int8 and int4, which are fast there, or fp32")
    if precision not in PRECISIONS[device]:
        raise InputError(f"precision {precision!r} is not one of {', '.join(PRECISIONS[device])} (device {device})")
    if device != TENSORRT and (limits or refit):
        raise InputError(f"--refit and the sizes of plans are TensorRT's, device {device!r} takes any")
    if device != TORCH and compiled:
        raise InputError(f"--compile is for the modules of --device torch, and device {device!r} has none")
    limits = limits or Limits()
    checkpoint = Checkpoint(model)
    config = checkpoint.config
    is_retrieval = isinstance(config, RetrievalConfig)
    if pictures:
        if precision != "int4" or device != CPU:
            raise InputError(f"pictures calibrate the 4-bit weights of int4 on the CPU, not {precision} on {device}")
        texts = [texts] * len(pictures) if isinstance(texts, str) else list(texts)
        if len(texts) != len(pictures):
            raise InputError(f"{len(texts)} texts for {len(pictures)} pictures: give one for each, or one for all")
    if device == TORCH and precision in ROUNDED and is_retrieval:
        raise InputError(f"{precision} is for the decoder's layers, and a retrieval model has none: use bf16")
    if precision == "fp16" and isinstance(config, Blip2Config) and isinstance(config.text, T5Config):
        raise InputError("T5's feed-forward layers overflow in fp16: use bf16")
    if is_retrieval and tokenizer:
        raise InputError(
            f"{checkpoint.source.model} is a retrieval model without a language model: pass --text-tokenizer for BERT's"
        )
    reads_text = config.qformer.use_qformer_text_input
    if text_tokenizer and not reads_text:
        raise InputError(
            f"{checkpoint.source.model} has a Q-Former that reads no text: pass --tokenizer for the tokenizer of its "
            "language model"
        )
    if output is None:
        output = Path("engines") / f"{checkpoint.name}-{precision}-{device}"
    try:
        os.path.realpath(output).encode()  # what opens a tokenizer.json takes no other names
    except UnicodeEncodeError:
        raise InputError(f"the path of {str(output)!r} is not UTF-8: choose another --output") from None
    if pictures:
        check_calibration(config)
    tokenizers = _tokenizer_directories(checkpoint, tokenizer, text_tokenizer)
    normalisation = read_normalisation(checkpoint.directory)
    specs = stage_specs(config)
    parameters = checkpoint.count_parameters()
    gpu, profiles = {}, {}
    if device == TENSORRT:
        profiles = {name: plan_sizes(name, spec, limits, config.num_query_tokens) for name, spec in specs.items()}
        gpu = describe_gpu()
    with building(output, force=force, needed=int(BYTES[precision] * sum(parameters.values()))) as directory:
        question_tokens = None
        if isinstance(config, RetrievalConfig):
            tokens = write_text_tokenizer(tokenizers[1], directory / "tokenizer.json", config.qformer.vocab_size)
        else:
            tokens = _token_spec(config)
            write_tokenizer(tokenizers[0], directory, config.text.vocab_size)
            if reads_text:
                file = directory / "question_tokenizer.json"
                question_tokens = write_text_tokenizer(tokenizers[1], file, config.qformer.vocab_size)
        calibration, calibrated = None, {}
        if pictures:
            assert isinstance(config, Blip2Config)
            seen = [preprocess(picture, config.vision.image_size, *normalisation) for picture in pictures]
            reader = Tokenizer(directory / "tokenizer.json", tokens, config.text.vocab_size, False)
            calibrated = {"calibration": f"GPTQ over {len(pictures)} pictures"}
            calibration = Calibration(checkpoint, np.stack(seen), [reader.encode(text) for text in texts])
        reference = checkpoint.build()
        kernels = "native" if device == CPU and precision in ("int8", "int4") and library_path() else "stock"
        graphs = directory / GRAPHS if device == TENSORRT else directory
        if device == TORCH:
            files = dict.fromkeys(specs, write_modules(reference, specs, checkpoint, directory, precision))
        else:
            capacity = limits.capacity if device == TENSORRT else None
            specs = _write_graphs(
                reference, specs, checkpoint, graphs, precision, device, kernels, capacity, calibration
            )
            files = {stage: f"{stage}.onnx" for stage in specs}
        manifest = Manifest(
            kind=RETRIEVAL if is_retrieval else GENERATIVE,
            name=Path(output).name,
            source_id=str(checkpoint.source.model),
            source_sha256=checkpoint.sha256(),
            precision=precision,
            device=device,
            kernels=kernels,
            image=ImageSpec(config.vision.image_size, *normalisation),
            tokens=tokens,
            question_tokens=question_tokens,
            parameters=parameters,
            left_out=tuple(checkpoint.names.stored_as(name) for name in checkpoint.left_out),
            toolchain=_toolchain() | gpu | calibrated,
            parity={},
            model=config.to_dict(),
            stages={stage: Stage(files[stage], spec) for stage, spec in specs.items()},
            files={},
        )
        if device == TENSORRT:
            _prove(graphs, replace(manifest, device=CUDA), checkpoint)  # what is wrong here, no plan mends
            old = Path(refit) if refit else None
            files = write_plans(graphs, specs, profiles, directory, old)
            shutil.rmtree(graphs)
            manifest = replace(manifest, stages={stage: Stage(files[stage], spec) for stage, spec in specs.items()})
        if compiled:
            manifest = write_packages(directory, manifest)
        parity = _prove(directory, manifest, checkpoint)
        replace(manifest, parity=parity, files=describe_files(directory)).write(directory)
    return Path(output)


def _prove(directory: Path, manifest: Manifest, checkpoint: Checkpoint) -> dict[str, Parity]:
    """Compare all stages with the reference.

    Raises:
        ExportError: one is too far from it.
    """
    comparisons = list(compare_engine(directory, manifest, checkpoint))
    diverged = [c for c in comparisons if c.first_divergence]
    if diverged:
        raise ExportError(
            "the engines disagree with the reference model, nothing was written: " + "; ".join(map(str, diverged))
        )
    return {c.stage: c.parity for c in comparisons}


def _write_graphs(
    reference: nn.Module,
    specs: Mapping[str, StageSpec],
    checkpoint: Checkpoint,
    directory: Path,
    precision: str,
    device: str,
    kernels: str,
    capacity: int | None,
    calibration: Calibration | None,
) -> dict[str, StageSpec]:
    """A graph for every stage, and its weights beside it; the signatures."""
    directory.mkdir(exist_ok=True)
    written_specs: dict[str, StageSpec] = {}
    bar = Progress("writing weights", sum(1 for _ in reference.named_parameters()))
    written: Written = {}
    for stage, spec in specs.items():
        module = reference.get_submodule(stage)
        graph = trace_stage(module, spec)
        weights = lower(graph, {name for name, _ in module.named_parameters()})
        if device == CPU:
            by_pictures = {"rounding": partial(calibration.round, stage)} if calibration else {}
            weights = quantize(graph, stage, precision, weights, kernels, **by_pictures)
        else:
            weights, spec = lower_for_gpu(graph, stage, spec, precision, weights, capacity)
        if kernels == "native":
            fuse_attention(graph.graph, in_8_bits=stage == VISION)
        written_specs[stage] = spec
        path, read = directory / f"{stage}.onnx", partial(_read, checkpoint, stage)
        write_stage(graph, weights, read, path, written, partial(_stored_name, stage), bar.advance)
    bar.close()
    return written_specs


def _tokenizer_directories(
    checkpoint: Checkpoint, tokenizer: str | Path | None, text_tokenizer: str | Path | None
) -> tuple[Path, Path]:
    """Of the language model's and of the Q-Former's; what a model does not have is not looked for."""
    own, model = checkpoint.directory, checkpoint.source.model
    is_retrieval = isinstance(checkpoint.config, RetrievalConfig)
    language = find_directory(tokenizer, "--tokenizer", with_weights=False) if tokenizer else own
    text = own if is_retrieval or own is None else own / QUESTION_FOLDER
    if text_tokenizer:
        text = find_directory(text_tokenizer, "--text-tokenizer", with_weights=False)
    if language is None and not is_retrieval:
        raise CheckpointError(f"{model} holds no tokenizer: pass its directory with --tokenizer")
    if checkpoint.config.qformer.use_qformer_text_input and not text_tokenizer and (text is None or not text.is_dir()):
        reader = "" if is_retrieval else " of the Q-Former, which reads questions"
        raise CheckpointError(f"{model} holds no tokenizer{reader}: pass its directory with --text-tokenizer")
    return language or Path(), text or Path()


def _read(checkpoint: Checkpoint, stage: str, name: str) -> torch.Tensor:
    return checkpoint.parameter(f"{stage}.{name}")


def _stored_name(stage: str, name: str) -> str:
    return stored_name(f"{stage}.{name}")


def _token_spec(config: Blip2Config) -> TokenSpec:
    text = config.text
    start = text.start_token_id if isinstance(text, T5Config) else text.bos_token_id
    assert start is not None  # `Blip2Config` refuses a T5 without
    return TokenSpec(start, text.pad_token_id, stop_token_ids(text), config.image_token_id)


def read_normalisation(directory: Path | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the processor in a checkpoint's directory; CLIP's where there is none.

    Raises:
        ExportError: they are not three numbers each.
    """
    settings: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if directory and (directory / name).is_file():
            content = read_json(directory / name)
            own = content.get("image_processor") or content
            settings |= own if isinstance(own, dict) else {}
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    for what, values in (("image_mean", mean), ("image_std", std)):
        numbers = values if isinstance(values, list | tuple) else ()
        least = 0 if what == "image_std" else -10
        if len(numbers) != 3 or not all(type(v) in (int, float) and least < v < 10 for v in numbers):
            raise CheckpointError(
                f"{directory}: the processor's {what} is {values!r}, not three numbers above {least} and "
                "below 10: mend its preprocessor_config.json"
            )
    return tuple(map(float, mean)), tuple(map(float, std))


def _toolchain() -> dict[str, str]:
    packages = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "tokenizers")
    return {"blip2rt": __version__} | {package: version(package) for package in packages}

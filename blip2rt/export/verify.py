"""Engines against the reference model, piece by piece, so that neither has to fit in memory.

A stage is an embedding, blocks and a head. Each piece of the engine (`pieces.py`) runs beside the reference's module of
the same name. Both streams go their own way from the common input to the end, so the last numbers are those of the
whole stage. Sizes differ from those traced.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..engine_directory import check_files, find_engine
from ..errors import EngineError
from ..manifest import TENSORRT, Manifest, Parity
from ..model import Blip2Config, Checkpoint, CheckpointSource
from ..model.config import ModelConfig
from ..model.t5 import T5Decoder
from ..progress import progress
from ..stages import DECODER, ENCODER, ITM, MASKED, QFORMER, TEXT, VISION, StageSpec
from .pieces import TOKEN_EMBEDDING, Piece, open_pieces

Array = np.ndarray[Any, Any]
Value = TypeVar("Value")

# fp32: largest difference over the reference's largest value, after every piece, all errors before it included.
# Others: root mean square of the difference over that of the reference, of every piece by itself, on the reference's
# input. Rounding errors grow from block to block, in random models without bounds; a piece's own error does not.
LIMITS = {"fp32": 2e-4, "bf16": 0.03, "fp16": 0.005, "fp8": 0.1, "int8": 0.08, "int4": 0.35}

WHOLE = 10  # times as far from the reference may be a stage that cannot be cut into pieces, with all errors in it


@dataclass
class Comparison:
    """How far one stage is from the reference. Relative: largest difference over the reference's largest value."""

    stage: str
    limit: float
    sizes: dict[str, Any]
    max_abs: float = 0.0
    max_rel: float = 0.0
    cosine: float = 1.0
    pieces: dict[str, float] = field(default_factory=dict)  # relative difference after every piece, in order

    @property
    def first_divergence(self) -> str | None:
        """The first piece whose outputs are beyond the limit."""
        return next((piece for piece, relative in self.pieces.items() if not relative <= self.limit), None)

    @property
    def parity(self) -> Parity:
        """What the manifest keeps."""
        return Parity(self.max_abs, self.max_rel, self.cosine, self.sizes)

    def as_dict(self) -> dict[str, Any]:
        """The numbers for scripts; JSON has no infinity, null stands for it."""
        numbers = {"max_abs": self.max_abs, "max_rel": self.max_rel, "cosine": self.cosine}
        finite = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
        return {"stage": self.stage, **finite, "sizes": self.sizes, "first_divergence": self.first_divergence}

    def add(self, piece: str, engine: Array, reference: Tensor, is_output: bool, alone: Array | None = None) -> None:
        """Compare one tensor; outputs of the stage count for its totals.

        Args:
            piece: what gave it.
            engine: the engine's, computed from its own input to the piece.
            reference: the reference's.
            is_output: whether it is an output of the stage.
            alone: the engine's, computed from the reference's input to the piece; None: judge `engine`.
        """
        a, b = engine.astype(np.float64).ravel(), reference.numpy().astype(np.float64).ravel()
        absolute, relative, cosine = np.inf, np.inf, 0.0  # where one of them is NaN
        if np.isfinite(a).all() and np.isfinite(b).all():
            absolute = float(np.abs(a - b).max())
            relative = absolute / max(float(np.abs(b).max()), 1e-30)
            cosine = float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300)
        own = relative if alone is None else _relative_rms(alone.astype(np.float64).ravel(), b)
        self.pieces[piece] = max(self.pieces.get(piece, 0.0), own)
        if is_output:
            self.max_abs, self.max_rel = max(self.max_abs, absolute), max(self.max_rel, relative)
            self.cosine = min(self.cosine, cosine)

    def __str__(self) -> str:
        numbers = f"max {self.max_abs:.2e}, relative {self.max_rel:.2e}, cosine {self.cosine:.9f}"
        where = f", diverges first in {self.first_divergence} (limit {self.limit:g})" if self.first_divergence else ""
        return f"{self.stage}: {numbers}{where}"


def _relative_rms(a: Array, b: Array) -> float:
    """Root mean square of a - b over that of b; infinite where one of them is no number."""
    error = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
    return error if np.isfinite(error) else np.inf


def verify_engine(
    path: str | Path, model: str | Path | CheckpointSource, name: str | None = None
) -> Iterator[Comparison]:
    """Check all files of an engine directory, then compare its stages with the checkpoint it was built from.

    Args:
        path: an engine directory, or a folder that holds one.
        model: the checkpoint, as `export_engine` takes it.
        name: which engine of the folder.

    Raises:
        EngineError: a file is missing or altered, or the checkpoint is of another model.
        CheckpointError: the checkpoint cannot be used.
    """
    directory = find_engine(path, name)
    manifest = Manifest.read(directory)
    check_files(manifest, directory, full=True)
    checkpoint = Checkpoint(model)
    if json.loads(json.dumps(checkpoint.config.to_dict())) != manifest.model:  # as JSON knows it: no tuples
        raise EngineError(
            f"{directory} was built from {manifest.source_id}, a model of other sizes than {checkpoint.source.model}"
        )
    return compare_engine(directory, manifest, checkpoint)


def compare_engine(directory: Path, manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Comparison]:
    """Compare every stage, in order.

    Args:
        directory: where its files lie.
        manifest: its manifest, finished or not.
        checkpoint: what it was built from.
    """
    reference = checkpoint.build()
    exact = manifest.precision == "fp32"
    for stage, entry in manifest.stages.items():
        module, signature = reference.get_submodule(stage), entry.signature
        draw = {DECODER: _decoder_inputs, ENCODER: _encoder_inputs}.get(stage, _random_inputs)
        arrays = draw(signature, checkpoint.config)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        limit = LIMITS[manifest.precision] * (WHOLE if manifest.device == TENSORRT else 1)
        comparison = Comparison(stage, limit, _sizes(signature, arrays))
        engine = open_pieces(directory, manifest, stage)
        inputs, outputs = ({tensor.name for tensor in side} for side in (signature.inputs, signature.outputs))
        pieces = _pieces(stage, module, signature)
        for index, piece in enumerate(progress(pieces, f"verifying {stage}", total=len(pieces))):
            if TOKEN_EMBEDDING in piece.inputs:
                tensors[TOKEN_EMBEDDING] = checkpoint.parameter(f"{stage}.{TOKEN_EMBEDDING}")
            loaded = checkpoint.load(deepcopy(module.get_submodule(piece.module)), f"{stage}.{piece.module}")
            known = {name: array.numpy() for name, array in tensors.items()}
            with torch.no_grad():
                expected = loaded(*(None if name is None else tensors[name] for name in piece.inputs))
            expected = expected if isinstance(expected, tuple) else (expected,)
            tensors |= dict(zip(piece.outputs, expected, strict=True))
            found = engine.run(piece, arrays)
            arrays |= found
            alone = {} if exact else engine.run(piece, known)
            for name in found:
                comparison.add(piece.module, arrays[name], tensors[name], name in outputs, alone.get(name))
            wanted = inputs | {name for later in pieces[index + 1 :] for name in later.inputs}
            arrays, tensors = _only(wanted, arrays), _only(wanted, tensors)
        yield comparison


def _only(wanted: Collection[str | None], values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name in wanted}


def _pieces(stage: str, module: torch.nn.Module, signature: StageSpec) -> list[Piece]:
    """What a stage consists of, in order. A retrieval engine's Q-Former has other outputs than a generative one's."""
    outputs = [output.name for output in signature.outputs]
    blocks = range(len(list(module.get_submodule("blocks").children())))
    hidden = [f"hidden_{i}" for i in range(len(blocks) + 1)]
    if stage == VISION:
        return [
            Piece("embedding", ("pixel_values",), (hidden[0],)),
            *(Piece(f"blocks.{i}", (hidden[i],), (hidden[i + 1],)) for i in blocks),
            Piece("norm", (hidden[-1],), ("image_embeds",)),
        ]
    image, text, mask = ("image_embeds", "text_ids", "text_mask")
    has_text = any(tensor.name == text for tensor in signature.inputs)
    if stage == ITM or (stage == QFORMER and has_text):
        end = [Piece("head", (hidden[-1],), tuple(outputs))]
        if stage == QFORMER:
            end = [Piece("queries", (hidden[-1],), (outputs[0],)), Piece("projection", (outputs[0],), (outputs[1],))]
        return [
            Piece("embedding", (image, text), (hidden[0],)),
            *(Piece(f"blocks.{i}", (hidden[i], image, mask), (hidden[i + 1],)) for i in blocks),
            *end,
        ]
    if stage in (QFORMER, TEXT):
        hidden[-1] = outputs[0]
        return [
            Piece("embedding", (image,) if stage == QFORMER else (None, text), (hidden[0],)),
            *(
                Piece(f"blocks.{i}", (hidden[i], *((image,) if stage == QFORMER else (None, mask))), (hidden[i + 1],))
                for i in blocks
            ),
            Piece("projection" if outputs[1] == "prefix" else "itc", (hidden[-1],), (outputs[1],)),
        ]
    cross = [(f"cross_key_{i}", f"cross_value_{i}") for i in range(len(getattr(module, "cross", blocks)))]
    if stage == ENCODER:
        return [
            Piece("embedding", ("prefix", "input_ids"), (hidden[0],)),
            Piece("relative_bias", ("positions", "positions", "encoder_mask"), ("attention_bias",)),
            *(Piece(f"blocks.{i}", (hidden[i], "attention_bias"), (hidden[i + 1],)) for i in blocks),
            Piece("norm", (hidden[-1],), ("encoder_output",)),
            *(Piece(f"cross.{i}", ("encoder_output",), names) for i, names in enumerate(cross)),
        ]
    past = [(f"past_key_{i}", f"past_value_{i}") for i in blocks]
    present = [(f"present_key_{i}", f"present_value_{i}") for i in blocks]
    head = Piece("head", (hidden[-1], "logit_rows", TOKEN_EMBEDDING), ("logits",))
    if isinstance(module, T5Decoder):
        own = ("attention_bias", "write_indices", "encoder_mask")
        return [
            Piece("embedding", ("input_ids",), (hidden[0],)),
            Piece("relative_bias", ("positions", "cached_positions", "mask"), ("attention_bias",)),
            *(
                Piece(f"blocks.{i}", (hidden[i], *own, *past[i], *cross[i]), (hidden[i + 1], *present[i]))
                for i in blocks
            ),
            head,
        ]
    return [
        Piece("embedding", ("prefix", "input_ids", "positions"), (hidden[0],)),
        *(
            Piece(f"blocks.{i}", (hidden[i], "write_indices", "mask", *past[i]), (hidden[i + 1], *present[i]))
            for i in blocks
        ),
        head,
    ]


def _random_inputs(signature: StageSpec, config: ModelConfig) -> dict[str, Array]:
    """Normal noise for a batch of 3, and texts of unequal length; graphs are traced with 2."""
    rng = np.random.default_rng(0)
    qformer = config.qformer
    sizes = {"B": 3, "L": min(9, qformer.max_position_embeddings)}
    inputs: dict[str, Array] = {}
    for tensor in signature.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.name == "text_ids":
            inputs[tensor.name] = rng.integers(0, qformer.vocab_size, shape)
        elif tensor.name == "text_mask":
            lengths = np.array([sizes["L"], 1, sizes["L"] // 2 + 1]).reshape(3, 1, 1, 1)
            inputs[tensor.name] = np.where(np.arange(sizes["L"]) < lengths, np.float32(0), np.float32(MASKED))
        else:
            inputs[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


def _encoder_inputs(signature: StageSpec, config: ModelConfig) -> dict[str, Array]:
    """3 images with prompts of different lengths, right-padded."""
    assert isinstance(config, Blip2Config)
    rng = np.random.default_rng(0)
    width = int(signature.inputs[0].shape[-1])
    lengths = np.array([9, 4, 7])
    rows = np.arange(lengths.max())
    input_ids = rng.integers(0, config.text.vocab_size, (3, len(rows)))
    input_ids[:, :3] = -1  # rows of the picture
    visible = rows < lengths[:, None]
    return {
        "prefix": rng.standard_normal((3, len(rows), width), dtype=np.float32),
        "input_ids": input_ids,
        "positions": np.tile(rows, (3, 1)),
        "encoder_mask": np.where(visible, np.float32(0), np.float32(MASKED))[:, None, None],
    }


def _decoder_inputs(signature: StageSpec, config: ModelConfig) -> dict[str, Array]:
    """A step in the middle of a search: 3 images at different depths, 5 rows each, random ancestors."""
    assert isinstance(config, Blip2Config)
    rng = np.random.default_rng(0)
    capacity = signature.outputs[1].shape[2]  # of the caches; a number where a plan fixes it
    sizes = {"B": 3, "S": 5, "C": capacity if isinstance(capacity, int) else 23, "R": 2, "E": 11}
    inputs: dict[str, Array] = {}
    for tensor in signature.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype != "int64":
            inputs[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
    write_indices = np.array([9, 0, 18])
    own = write_indices[:, None] + np.arange(sizes["S"])  # [B, S] where each row is written
    visible = (rng.random((sizes["B"], sizes["S"], sizes["C"])) < 0.5) & (
        np.arange(sizes["C"]) < write_indices[:, None, None]
    )
    visible |= np.arange(sizes["C"]) == own[:, :, None]
    input_ids = rng.integers(0, config.text.vocab_size, own.shape)
    if "prefix" in inputs:
        input_ids[:, 0] = -1  # a row of the picture
    visible_rows = np.arange(sizes["E"]) < np.array([11, 5, 8])[:, None, None, None]
    given = {
        "input_ids": input_ids,
        "positions": own % getattr(config.text, "max_position_embeddings", sizes["C"]),
        "cached_positions": rng.permuted(np.tile(np.arange(sizes["C"]), (sizes["B"], 1)), axis=1),
        "encoder_mask": np.where(visible_rows, np.float32(0), np.float32(MASKED)).repeat(sizes["S"], axis=2),
        "write_indices": write_indices,
        "mask": np.where(visible, np.float32(0), np.float32(MASKED))[:, None],
        "logit_rows": rng.integers(0, sizes["S"], (sizes["B"], sizes["R"])),
    }
    return inputs | {tensor.name: given[tensor.name] for tensor in signature.inputs if tensor.name in given}


def _sizes(signature: StageSpec, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """The sizes of the legend that these inputs have."""
    return {
        size: int(inputs[tensor.name].shape[axis])
        for tensor in signature.inputs
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, str)
    }

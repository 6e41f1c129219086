"""Checkpoints of BLIP-2 in every format: found, checked strictly, and read one tensor at a time.

A checkpoint must hold exactly the tensors of its model: unused, missing and misshaped ones are listed in one error.
Reading never maps more of a file than a few tensors, so a model larger than the memory can be exported. What foreign
formats call a tensor is in `names.py`, what tells them apart in `formats.py`.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, InputError
from .blip2 import Blip2
from .config import Blip2Config, ModelConfig, RetrievalConfig, T5Config, TextConfig, VisionConfig
from .formats import NORM_EPS
from .names import LAVIS, TIED_HEAD, TOKEN_EMBEDDINGS, TRANSFORMERS, VISION_PREFIXES, Names, NoPlaceError
from .retrieval import Blip2Retrieval, stored_name
from .sources import CheckpointSource, open_source

Model = TypeVar("Model", bound=nn.Module)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights are stored as
POSITION = "vision.embedding.position"
TEMPERATURE = "temp"  # the files that hold it hold all that stage 1 trains
# In an image encoder's own file: what belongs to its pretraining, and no BLIP-2 uses.
PRETRAINING_PARTS = ("norm.", "fc_norm.", "head.", "lm_head.", "mask_token", "ln_post.", "proj")


class Checkpoint:
    """A BLIP-2 checkpoint on disk whose names and shapes have been checked; no weights in memory.

    Attributes:
        source: what the caller named.
        config: sizes of the model as it is used; `text.tie_word_embeddings` says what the file holds.
        config_json: the `Blip2Config` that it was read from, as JSON.
        contents: its format, and what else the names in it say.
        names: what its format calls our parameters.
        tensors: what is stored, under the names of this package.
        directory: where its processor and, unless the caller names another, its tokenizer lie; None: nowhere.
        name: its name as that of a folder.
        left_out: stored tensors that the model does not use on purpose: blocks behind the last one that counts, and
            what an image encoder's own file holds of its pretraining.
    """

    def __init__(self, source: str | Path | CheckpointSource, *, all_blocks: bool = False):
        """Find and check a checkpoint.

        Args:
            source: a transformers directory or hub id; or all there is to say.
            all_blocks: have all stored blocks of the image encoder, also those that the format's own code leaves out.

        Raises:
            CheckpointError: not found, damaged, of no known format, lacking a part, not BLIP-2 with OPT or T5, or not
                exactly the tensors of its model.
            InputError: an option that does not fit the checkpoint.
        """
        self.source = source if isinstance(source, CheckpointSource) else CheckpointSource(source)
        opened = open_source(self.source)
        self.directory, self.name = opened.directory, opened.name
        self.config_json, self.tensors, self.contents = opened.config_json, opened.tensors, opened.contents
        self._label = str(self.source.model if opened.contents.format != TRANSFORMERS else opened.directory)
        self._stored = self._read_config()
        self.config: ModelConfig = replace(self._stored, vision=self._vision_as_used(all_blocks))
        language_model, is_gated = "opt", True
        if isinstance(self.config, Blip2Config):
            self._check_language_model(self.config.text, opened.llm_json)
            text = replace(self.config.text, tie_word_embeddings=self._is_tied(self.config.text))
            self.config = replace(self.config, text=text)
            language_model, is_gated = text.model_type, not isinstance(text, T5Config) or text.is_gated_act
        self.names = Names(opened.contents.format, language_model, self.config.vision.pre_norm, is_gated)
        self._shapes = {name: tuple(p.shape) for name, p in self.build().named_parameters()}
        self.left_out: list[str] = []
        self._check_tensors()

    def build(self) -> Blip2 | Blip2Retrieval:
        """The reference model of these sizes, on the meta device: without weights."""
        with torch.device("meta"):
            return Blip2(self.config) if isinstance(self.config, Blip2Config) else Blip2Retrieval(self.config)

    def parameter(self, name: str) -> Tensor:
        """Our parameter `name` in float32, joined from the stored tensors.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file cannot be read.
        """
        name = stored_name(name)
        keys = self.names(name)
        stored = {key: self.stored(key).to(torch.float32) for key in keys if key is not None}
        zeros = torch.zeros_like(next(iter(stored.values())))  # for what is not stored; all parts have one shape
        parts = [zeros if key is None else stored[key] for key in keys]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if name == POSITION:
            tensor = tensor.flatten(0, -2)
            if self.source.via_image_size is not None:
                tensor = resize_position(tensor, replace(self.config.vision, image_size=self.source.via_image_size))
            tensor = resize_position(tensor, self.config.vision)
        return tensor.reshape(self._shapes[name])

    def stored(self, key: str) -> Tensor:
        """A tensor as it is stored, by its name in this package.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file cannot be read.
        """
        tensor = self.tensors.read(key)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self.tensors.place(key)} holds NaN or infinite values; take an undamaged checkpoint "
                "(fp16 copies overflow: try the original precision)"
            )
        return tensor

    def load(self, module: nn.Module, prefix: str) -> nn.Module:
        """Give `module` (built on the meta device) the parameters named `prefix.*`, or all; float32, eval mode."""
        prefix = f"{prefix}." if prefix else ""
        state = {name: self.parameter(prefix + name) for name, _ in module.named_parameters(remove_duplicate=False)}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def parameter_names(self) -> list[str]:
        """Our names of all parameters."""
        return list(self._shapes)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each stage; what several stages or layers share counts once."""
        counts: dict[str, int] = {}
        counted: set[str | None] = set()
        for name, shape in self._shapes.items():
            stage, keys = name.partition(".")[0], self.names(name)
            counts[stage] = counts.get(stage, 0) + (0 if counted.issuperset(keys) else torch.Size(shape).numel())
            counted.update(keys)
        return counts

    def sha256(self) -> str:
        """Hash over the weight files in order of their names."""
        digest = hashlib.sha256()
        for file in sorted(self.tensors.files, key=lambda file: file.path.name):
            with file.path.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def _read_config(self) -> ModelConfig:
        """The configuration as the file has it, with what the format's own code fixes."""
        # the tensors decide which model it describes: a configuration need not say it
        kind = RetrievalConfig if self.contents.is_retrieval else Blip2Config
        if kind is Blip2Config and self.source.config is not None and "text_config" not in self.config_json:
            raise CheckpointError(
                f"--config {self.source.config} is of a retrieval model, and {self._label} is of one that has a "
                "language model: pass the configuration of such a one"
            )
        try:
            config: ModelConfig = kind.from_transformers(self.config_json)
        except CheckpointError as error:
            if self.source.config is None:
                raise
            raise CheckpointError(f"--config {self.source.config}: {error}") from None
        format, vision = self.contents.format, config.vision
        is_clip = f"{VISION_PREFIXES[LAVIS]}class_embedding" in self.tensors.shapes
        if vision.pre_norm != is_clip:
            kinds = ("EVA's ViT-g", "CLIP's ViT-L (pre_norm)")
            raise CheckpointError(
                f"{self._label} holds {kinds[is_clip]} and its configuration is of {kinds[vision.pre_norm]}: "
                "pass the --config of the same, such as blip2-opt-2.7b or blip2-opt-2.7b-vitl"
            )
        if isinstance(config, RetrievalConfig):
            config = replace(config, has_training_parts=TEMPERATURE in self.tensors.shapes)
        return replace(config, vision=replace(vision, norm_eps=NORM_EPS.get(format, vision.norm_eps)))

    def _check_language_model(self, text: TextConfig, llm: Mapping[str, Any]) -> None:
        """The file, the configuration and the language model that was saved apart speak of the same one."""
        kind = text.model_type
        said = {self._label: self.contents.language_model, f"--llm {self.source.llm}": llm.get("model_type")}
        for where, other in said.items():
            if other not in (None, kind):
                raise CheckpointError(
                    f"{where} is of a language model {other!r}, --config {self.source.config} of {kind!r}: "
                    "pass a configuration and a language model that belong to the checkpoint"
                )
        differing = [
            f"{field.name} {llm[field.name]} (--config: {getattr(text, field.name)})"
            for field in fields(text)
            if type(llm.get(field.name)) is int
            and not field.name.endswith("_token_id")
            and llm[field.name] != getattr(text, field.name)
        ]
        if differing:
            raise CheckpointError(
                f"--llm {self.source.llm} is of other sizes than --config {self.source.config}: " + ", ".join(differing)
            )

    def _vision_as_used(self, all_blocks: bool) -> VisionConfig:
        """The image encoder with the blocks that count, at the size of the pictures."""
        vision, source = self._stored.vision, self.source
        stored = vision.num_hidden_layers
        layers = source.vision_layers
        if layers is None:
            layers = stored if all_blocks else stored - self.contents.unused_blocks
        if type(layers) is not int or not 1 <= layers <= stored:
            raise InputError(f"--vision-layers {layers}: the image encoder has {stored} blocks, so 1 to {stored}")
        size = vision.image_size if source.image_size is None else source.image_size
        for option, pixels in (("--image-size", size), ("--via-image-size", source.via_image_size)):
            if pixels is not None and (type(pixels) is not int or pixels < vision.patch_size):
                raise InputError(f"{option} {pixels}: a picture is at least one patch of {vision.patch_size} pixels")
        return replace(vision, num_hidden_layers=layers, image_size=size)

    def _is_tied(self, text: TextConfig) -> bool:
        """Whether the output layer is the token embedding. transformers unties them where a file holds two."""
        shapes = self.tensors.shapes
        token_embedding = TOKEN_EMBEDDINGS[text.model_type]
        stored = TIED_HEAD in shapes and token_embedding in shapes
        # T5's configurations say nothing about it, whatever the format: the file decides
        is_told = self.contents.format != TRANSFORMERS and not isinstance(text, T5Config)
        if not text.tie_word_embeddings or not stored or is_told:
            return text.tie_word_embeddings
        head, embedding = self.tensors.read(TIED_HEAD), self.tensors.read(token_embedding)
        return head.shape == embedding.shape and torch.equal(head, embedding)

    def _check_tensors(self) -> None:
        """Every stored tensor is used or left out on purpose, every parameter is stored, every shape fits.

        Or one error that lists all that is wrong.
        """
        shapes, missing, misshaped, used = self.tensors.shapes, [], [], set()
        for name, shape in self._shapes.items():
            keys = self._names_of(name)
            expected = (shape[0] // len(keys), *shape[1:]) if shape else ()
            for key in filter(None, keys):
                used.add(key)
                if key not in shapes:
                    missing.append(self.names.stored_as(key))
                elif self.tensors.dtypes[key] not in FLOATS:
                    misshaped.append(f"{self.names.stored_as(key)} is {self.tensors.dtypes[key]}, no weights")
                elif name == POSITION:
                    misshaped += self._position_problem(key)
                elif _without_ones(shapes[key]) != _without_ones(expected):
                    misshaped.append(f"{self.names.stored_as(key)} is {list(shapes[key])}, not {list(expected)}")
        originals = self.names.copies
        copies = {key for key in originals if key in shapes and originals[key] in shapes and key not in used}
        used |= copies
        # position_ids are buffers 0, 1, 2, ... that old versions of transformers saved
        unused = [key for key in shapes if key not in used and not key.endswith(".position_ids")]
        self.left_out = [key for key in unused if self._is_left_out(key)]
        unused = [self.names.stored_as(key) for key in unused if key not in self.left_out]
        problems = [
            f"{len(keys)} {what}: {_listed(sorted(keys))}"
            for what, keys in (("missing", missing), ("unused", unused), ("misshaped", misshaped))
            if keys
        ]
        if problems:
            config = f"--config {self.source.config}" if self.source.config else "its config.json"
            raise CheckpointError(f"{self._label} does not hold the model of {config}; tensors " + "; ".join(problems))
        self._check_copies(copies)

    def _names_of(self, parameter: str) -> tuple[str | None, ...]:
        try:
            return self.names(parameter)
        except NoPlaceError:
            raise CheckpointError(f"{self._label}: {self.contents.format}'s format has no {parameter}") from None

    def _position_problem(self, key: str) -> list[str]:
        """What is wrong with the position embeddings, unless they fit or `--image-size` asks to interpolate them."""
        vision, shape = self.config.vision, self.tensors.shapes[key]
        rows, width = _without_ones(shape)[-2:] if len(_without_ones(shape)) > 1 else (0, 0)
        side = math.isqrt(max(rows - 1, 0))
        if width != vision.hidden_size or side < 1 or side**2 + 1 != rows:
            return [f"{key} is {list(shape)}, not {[1, vision.num_tokens, vision.hidden_size]}"]
        if rows == vision.num_tokens or self.source.image_size is not None:
            return []
        size = side * vision.patch_size
        return [
            f"{key} is {list(shape)}, which is {size} px, and the configuration says {vision.image_size} px: pass "
            f"--image-size {size}, or --image-size {vision.image_size} to interpolate it"
        ]

    def _check_copies(self, copies: Iterable[str]) -> None:
        """What the files hold twice, tied to another tensor or in two files, is the same both times."""
        tensors = self.tensors
        pairs = [(key, tensors.read(key), self.names.copies[key]) for key in copies]
        pairs += [(name, file.read(stored), name) for name, file, stored in tensors.doubles]
        for copy, tensor, original in pairs:
            if not _same(tensor, tensors.read(original)):
                raise CheckpointError(
                    f"{self._label}: {self.names.stored_as(copy)} is a copy of {tensors.place(original)}, but they "
                    "differ: the parts are of different models"
                )

    def _is_left_out(self, key: str) -> bool:
        """Whether a tensor is of a block that does not count, or what an encoder's own file has of its pretraining."""
        prefix, blocks = VISION_PREFIXES[self.contents.format], self._stored.vision.num_hidden_layers
        number = re.search(r"\.(\d+)\.", key)
        if number and re.sub(r"\.\d+\.", ".{}.", key, count=1) in self.names.block_tensors():
            is_stored = self.source.vision is not None or int(number[1]) < blocks
            return is_stored and int(number[1]) >= self.config.vision.num_hidden_layers
        return self.source.vision is not None and key.removeprefix(prefix).startswith(PRETRAINING_PARTS)


def load_blip2(source: str | Path | CheckpointSource) -> Blip2:
    """The reference model with the weights of a checkpoint, float32, eval mode.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is one of a retrieval model.
    """
    return _load(source, Blip2, "a retrieval model, without a language model")


def load_retrieval(source: str | Path | CheckpointSource) -> Blip2Retrieval:
    """The same for a retrieval model.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is one with a language model.
    """
    return _load(source, Blip2Retrieval, "a model with a language model, without retrieval heads")


def _load(source: str | Path | CheckpointSource, kind: type[Model], otherwise: str) -> Model:
    checkpoint = Checkpoint(source)
    model = checkpoint.build()
    if not isinstance(model, kind):
        raise CheckpointError(f"{checkpoint.source.model} is {otherwise}")
    checkpoint.load(model, "")
    return model


def resize_position(position: Tensor, vision: VisionConfig) -> Tensor:
    """Position embeddings [N+1, Dv] of another picture size, interpolated; the class token's stays.

    Bicubic, as LAVIS's `interpolate_pos_embed` does it for each of its two encoders.
    """
    side, target = math.isqrt(len(position) - 1), vision.image_size // vision.patch_size
    if side == target:
        return position
    grid = position[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, Dv, side, side]
    grid = F.interpolate(grid, (target, target), mode="bicubic", align_corners=vision.pre_norm)
    return torch.cat((position[:1], grid[0].flatten(1).t()))  # [N+1, Dv]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, or one is the other's rounding to a shorter type."""
    return a.shape == b.shape and (torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype)))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """CLIP stores [D] what is [1, 1, D] here."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _listed(items: Iterable[str], most: int = 20) -> str:
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more

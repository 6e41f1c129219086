"""Checkpoints of BLIP-2: found, checked strictly, and read one tensor at a time.

All foreign weight names live in `TRANSFORMERS_NAMES`. A checkpoint must hold exactly the tensors of its model: unused,
missing and misshaped ones are listed in one error. Reading never maps more of a file than a few tensors, so a model
larger than the memory can be exported.
"""

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .blip2 import Blip2
from .config import Blip2Config, RetrievalConfig
from .retrieval import Blip2Retrieval, stored_name
from .weight_files import WeightFile, open_weight_files, read_json

Model = TypeVar("Model", bound=nn.Module)

# Ours -> transformers'. Modules stand for their weight and bias; several names are joined along the first axis.
TRANSFORMERS_NAMES: dict[str, str | tuple[str, ...]] = {
    "vision.embedding.class_token": "vision_model.embeddings.class_embedding",
    "vision.embedding.position": "vision_model.embeddings.position_embedding",
    "vision.embedding.patch": "vision_model.embeddings.patch_embedding",
    "vision.blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "vision.blocks.{}.qkv": "vision_model.encoder.layers.{}.self_attn.qkv",
    "vision.blocks.{}.proj": "vision_model.encoder.layers.{}.self_attn.projection",
    "vision.blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "vision.blocks.{}.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
    "vision.blocks.{}.fc2": "vision_model.encoder.layers.{}.mlp.fc2",
    "vision.norm": "vision_model.post_layernorm",
    "qformer.embedding.query_tokens": "query_tokens",
    "qformer.embedding.norm": "qformer.layernorm",
    "qformer.blocks.{}.self_attention.qkv": (
        "qformer.encoder.layer.{}.attention.attention.query",
        "qformer.encoder.layer.{}.attention.attention.key",
        "qformer.encoder.layer.{}.attention.attention.value",
    ),
    "qformer.blocks.{}.self_attention.proj": "qformer.encoder.layer.{}.attention.output.dense",
    "qformer.blocks.{}.self_attention.norm": "qformer.encoder.layer.{}.attention.output.LayerNorm",
    "qformer.blocks.{}.cross_attention.query": "qformer.encoder.layer.{}.crossattention.attention.query",
    "qformer.blocks.{}.cross_attention.kv": (
        "qformer.encoder.layer.{}.crossattention.attention.key",
        "qformer.encoder.layer.{}.crossattention.attention.value",
    ),
    "qformer.blocks.{}.cross_attention.proj": "qformer.encoder.layer.{}.crossattention.output.dense",
    "qformer.blocks.{}.cross_attention.norm": "qformer.encoder.layer.{}.crossattention.output.LayerNorm",
    "qformer.blocks.{}.query_ffn.fc1": "qformer.encoder.layer.{}.intermediate_query.dense",
    "qformer.blocks.{}.query_ffn.fc2": "qformer.encoder.layer.{}.output_query.dense",
    "qformer.blocks.{}.query_ffn.norm": "qformer.encoder.layer.{}.output_query.LayerNorm",
    "qformer.blocks.{}.text_ffn.fc1": "qformer.encoder.layer.{}.intermediate.dense",
    "qformer.blocks.{}.text_ffn.fc2": "qformer.encoder.layer.{}.output.dense",
    "qformer.blocks.{}.text_ffn.norm": "qformer.encoder.layer.{}.output.LayerNorm",
    "qformer.embedding.token": "embeddings.word_embeddings",
    "qformer.embedding.position": "embeddings.position_embeddings",
    "qformer.projection": "language_projection",
    "qformer.itc": "vision_projection",
    "text.itc": "text_projection",
    "itm.head": "itm_head",
    "decoder.embedding.token": "language_model.model.decoder.embed_tokens",
    "decoder.embedding.position": "language_model.model.decoder.embed_positions",
    "decoder.blocks.{}.norm1": "language_model.model.decoder.layers.{}.self_attn_layer_norm",
    "decoder.blocks.{}.qkv": (
        "language_model.model.decoder.layers.{}.self_attn.q_proj",
        "language_model.model.decoder.layers.{}.self_attn.k_proj",
        "language_model.model.decoder.layers.{}.self_attn.v_proj",
    ),
    "decoder.blocks.{}.proj": "language_model.model.decoder.layers.{}.self_attn.out_proj",
    "decoder.blocks.{}.norm2": "language_model.model.decoder.layers.{}.final_layer_norm",
    "decoder.blocks.{}.fc1": "language_model.model.decoder.layers.{}.fc1",
    "decoder.blocks.{}.fc2": "language_model.model.decoder.layers.{}.fc2",
    "decoder.head.norm": "language_model.model.decoder.final_layer_norm",
    "decoder.head.lm_head": "language_model.lm_head",
}
RETRIEVAL_HEAD = "itm_head.weight"  # no checkpoint with a language model has it
TIED_HEAD, TOKEN_EMBEDDING = "language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"


def transformers_names(parameter: str) -> tuple[str, ...]:
    """The tensors of a transformers checkpoint whose join is our parameter of this name."""
    parameter = stored_name(parameter)
    indices = re.findall(r"\.(\d+)\.", parameter)
    template = re.sub(r"\.\d+\.", ".{}.", parameter)
    module, _, leaf = template.rpartition(".")
    names, suffix = (
        (TRANSFORMERS_NAMES[template], "")
        if template in TRANSFORMERS_NAMES
        else (
            TRANSFORMERS_NAMES[module],
            "." + leaf,
        )
    )
    return tuple(name.format(*indices) + suffix for name in ((names,) if isinstance(names, str) else names))


class Checkpoint:
    """A transformers BLIP-2 checkpoint on disk whose names and shapes have been checked; no weights in memory.

    Attributes:
        config: sizes of the model; `text.tie_word_embeddings` says what the file holds, as transformers loads it.
        source_id: what the caller named: a hub id or the directory's name.
        directory: where config.json and the tokenizer lie.
    """

    def __init__(self, source: str | Path):
        """Find and check a checkpoint.

        Args:
            source: a directory as `save_pretrained` writes it (safetensors or `.bin`, single or sharded), or a hub id.

        Raises:
            CheckpointError: not found, damaged, not BLIP-2 with OPT, or not exactly the tensors of its model.
        """
        self.directory = find_directory(source)
        self.source_id = str(source) if not Path(source).exists() else self.directory.name
        self._files: list[WeightFile] = open_weight_files(self.directory)
        self._where = {key: file for file in self._files for key in file.shapes}
        self.config = self._read_config(read_json(self.directory / "config.json"))
        self._shapes = {name: tuple(p.shape) for name, p in self.build().named_parameters()}
        self._check_keys()

    def build(self) -> Blip2 | Blip2Retrieval:
        """The reference model of these sizes, on the meta device: without weights."""
        with torch.device("meta"):
            return Blip2(self.config) if isinstance(self.config, Blip2Config) else Blip2Retrieval(self.config)

    def _read_config(self, content: dict[str, Any]) -> Blip2Config | RetrievalConfig:
        """What the weights are decides which model the config describes: old config files do not say it."""
        if RETRIEVAL_HEAD in self._where:
            return RetrievalConfig.from_transformers(content)
        config = Blip2Config.from_transformers(content)
        return replace(config, text=replace(config.text, tie_word_embeddings=self._is_tied(config)))

    def parameter(self, name: str) -> Tensor:
        """Our parameter `name` in float32, joined from the stored tensors.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file cannot be read.
        """
        parts = [self._read(key) for key in transformers_names(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load(self, module: nn.Module, prefix: str) -> nn.Module:
        """Give `module` (built on the meta device) the parameters named `prefix.*`, or all; float32, eval mode."""
        prefix = f"{prefix}." if prefix else ""
        state = {name: self.parameter(prefix + name) for name, _ in module.named_parameters(remove_duplicate=False)}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each stage, tied ones once."""
        counts: dict[str, int] = {}
        for name, shape in self._shapes.items():
            stage = name.partition(".")[0]
            counts[stage] = counts.get(stage, 0) + torch.Size(shape).numel()
        return counts

    def sha256(self) -> str:
        """Hash over the weight files in order of their names."""
        digest = hashlib.sha256()
        for file in sorted(self._files, key=lambda file: file.path.name):
            with file.path.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def _read(self, key: str) -> Tensor:
        tensor = self._where[key].read(key).to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self._where[key].path.name}: {key} holds NaN or infinite values; take an undamaged checkpoint "
                "(fp16 copies overflow: try the original precision)"
            )
        return tensor

    def _is_tied(self, config: Blip2Config) -> bool:
        """Whether the output layer is the token embedding. transformers unties them where a file holds two."""
        stored = TIED_HEAD in self._where and TOKEN_EMBEDDING in self._where
        if not config.text.tie_word_embeddings or not stored:
            return config.text.tie_word_embeddings
        same_shape = self._where[TIED_HEAD].shapes[TIED_HEAD] == self._where[TOKEN_EMBEDDING].shapes[TOKEN_EMBEDDING]
        return same_shape and torch.equal(
            self._where[TIED_HEAD].read(TIED_HEAD), self._where[TOKEN_EMBEDDING].read(TOKEN_EMBEDDING)
        )

    def _check_keys(self) -> None:
        """Every stored tensor is used, every parameter is stored, every shape fits: or one error that lists all."""
        missing, misshaped, used = [], [], set()
        for name, shape in self._shapes.items():
            keys = transformers_names(name)
            expected = (shape[0] // len(keys), *shape[1:])
            for key in keys:
                used.add(key)
                if key not in self._where:
                    missing.append(key)
                elif self._where[key].shapes[key] != expected:
                    misshaped.append(
                        f"{key} is {list(self._where[key].shapes[key])}, config.json wants {list(expected)}"
                    )
        if isinstance(self.config, Blip2Config) and self.config.text.tie_word_embeddings:
            used.add(TIED_HEAD)
        # position_ids are buffers 0, 1, 2, ... that old versions of transformers saved
        unused = [key for key in self._where if key not in used and not key.endswith(".position_ids")]
        problems = [
            f"{len(keys)} {what}: {_listed(sorted(keys))}"
            for what, keys in (("missing", missing), ("unused", unused), ("misshaped", misshaped))
            if keys
        ]
        if problems:
            raise CheckpointError(
                f"{self.directory} does not hold the model of its config.json; tensors " + "; ".join(problems)
            )


def load_blip2(source: str | Path) -> Blip2:
    """The reference model with the weights of a checkpoint, float32, eval mode.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is one of a retrieval model.
    """
    return _load(source, Blip2, "a retrieval model, without a language model")


def load_retrieval(source: str | Path) -> Blip2Retrieval:
    """The same for a retrieval model.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is one with a language model.
    """
    return _load(source, Blip2Retrieval, "a model with a language model, without retrieval heads")


def _load(source: str | Path, kind: type[Model], otherwise: str) -> Model:
    checkpoint = Checkpoint(source)
    model = checkpoint.build()
    if not isinstance(model, kind):
        raise CheckpointError(f"{source} is {otherwise}")
    checkpoint.load(model, "")
    return model


def find_directory(source: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is fetched into the hub's own cache.

    Raises:
        CheckpointError: neither a directory nor an id that the hub can serve from here.
    """
    path = Path(source)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise CheckpointError(f"{path} is a file; pass the directory that holds config.json and the weights to --model")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"no such directory: {source} (a hub id looks like 'Salesforce/blip2-opt-2.7b')")
    try:
        return _fetch(str(source))
    except Exception as error:  # the hub's client raises a dozen unrelated types: no network, no such id, no rights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source!r} is no local directory and could not be fetched from the hub ({reason}); "
            "pass the path of a downloaded checkpoint"
        ) from error


def _fetch(hub_id: str) -> Path:
    """The snapshot of a hub id in the hub's cache: fetched, or, where the hub does not answer, what is there."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:  # first, because snapshot_download waits for ever for a hub that takes the call and says nothing
        siblings = HfApi().model_info(hub_id, timeout=constants.HF_HUB_ETAG_TIMEOUT).siblings or []
    except Exception:
        with suppress(Exception):
            return Path(snapshot_download(hub_id, local_files_only=True))
        raise
    is_safe = any(file.rfilename.endswith(".safetensors") for file in siblings)
    weights = "*.safetensors" if is_safe else "*.bin"  # many repositories hold the same weights twice
    return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", weights]))


def _listed(items: Iterable[str], most: int = 20) -> str:
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more

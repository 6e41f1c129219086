"""Checkpoints of BLIP-2: found, checked strictly, and read one tensor at a time.

All foreign weight names live in the tables below. A checkpoint must hold exactly the tensors of its model: unused,
missing and misshaped ones are listed in one error. Reading never maps more of a file than a few tensors, so a model
larger than the memory can be exported.
"""

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .blip2 import Blip2
from .config import Blip2Config, T5Config, TextConfig
from .weight_files import WeightFile, open_weight_files, read_json

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
    "qformer.projection": "language_projection",
}
OPT_NAMES: dict[str, str | tuple[str, ...]] = {
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
T5_NAMES: dict[str, str | tuple[str, ...]] = {
    "encoder.embedding.token": "language_model.shared",
    "encoder.relative_bias.bucket": "language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder.blocks.{}.norm": "language_model.encoder.block.{}.layer.0.layer_norm",
    "encoder.blocks.{}.qkv": (
        "language_model.encoder.block.{}.layer.0.SelfAttention.q",
        "language_model.encoder.block.{}.layer.0.SelfAttention.k",
        "language_model.encoder.block.{}.layer.0.SelfAttention.v",
    ),
    "encoder.blocks.{}.proj": "language_model.encoder.block.{}.layer.0.SelfAttention.o",
    "encoder.blocks.{}.ffn.norm": "language_model.encoder.block.{}.layer.1.layer_norm",
    "encoder.blocks.{}.ffn.gate": "language_model.encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "encoder.blocks.{}.ffn.fc1": "language_model.encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "encoder.blocks.{}.ffn.fc2": "language_model.encoder.block.{}.layer.1.DenseReluDense.wo",
    "encoder.norm": "language_model.encoder.final_layer_norm",
    "encoder.cross.{}.kv": (
        "language_model.decoder.block.{}.layer.1.EncDecAttention.k",
        "language_model.decoder.block.{}.layer.1.EncDecAttention.v",
    ),
    "decoder.embedding.token": "language_model.shared",
    "decoder.relative_bias.bucket": "language_model.decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder.blocks.{}.norm1": "language_model.decoder.block.{}.layer.0.layer_norm",
    "decoder.blocks.{}.qkv": (
        "language_model.decoder.block.{}.layer.0.SelfAttention.q",
        "language_model.decoder.block.{}.layer.0.SelfAttention.k",
        "language_model.decoder.block.{}.layer.0.SelfAttention.v",
    ),
    "decoder.blocks.{}.proj": "language_model.decoder.block.{}.layer.0.SelfAttention.o",
    "decoder.blocks.{}.norm2": "language_model.decoder.block.{}.layer.1.layer_norm",
    "decoder.blocks.{}.cross_query": "language_model.decoder.block.{}.layer.1.EncDecAttention.q",
    "decoder.blocks.{}.cross_proj": "language_model.decoder.block.{}.layer.1.EncDecAttention.o",
    "decoder.blocks.{}.ffn.norm": "language_model.decoder.block.{}.layer.2.layer_norm",
    "decoder.blocks.{}.ffn.gate": "language_model.decoder.block.{}.layer.2.DenseReluDense.wi_0",
    "decoder.blocks.{}.ffn.fc1": "language_model.decoder.block.{}.layer.2.DenseReluDense.wi_1",
    "decoder.blocks.{}.ffn.fc2": "language_model.decoder.block.{}.layer.2.DenseReluDense.wo",
    "decoder.head.norm": "language_model.decoder.final_layer_norm",
    "decoder.head.lm_head": "language_model.lm_head",
}
TIED_HEAD = "language_model.lm_head.weight"
T5_COPIES = ("language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight")  # of `shared`


def transformers_names(parameter: str, text: TextConfig) -> tuple[str, ...]:
    """The tensors of a transformers checkpoint with this language model whose join is our parameter of this name."""
    table = TRANSFORMERS_NAMES | (T5_NAMES if isinstance(text, T5Config) else OPT_NAMES)
    indices = re.findall(r"\.(\d+)\.", parameter)
    template = re.sub(r"\.\d+\.", ".{}.", parameter)
    module, _, leaf = template.rpartition(".")
    names, suffix = (table[template], "") if template in table else (table[module], "." + leaf)
    if isinstance(text, T5Config) and not text.is_gated_act and isinstance(names, str):
        names = names.replace(".wi_1", ".wi")
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
            CheckpointError: not found, damaged, not BLIP-2 with OPT or T5, or not exactly the tensors of its model.
        """
        self.directory = find_directory(source)
        self.source_id = str(source) if not Path(source).exists() else self.directory.name
        self._files: list[WeightFile] = open_weight_files(self.directory)
        self._where = {key: file for file in self._files for key in file.shapes}
        config = Blip2Config.from_transformers(read_json(self.directory / "config.json"))
        self.config = replace(config, text=replace(config.text, tie_word_embeddings=self._is_tied(config)))
        with torch.device("meta"):
            self._shapes = {name: tuple(p.shape) for name, p in Blip2(self.config).named_parameters()}
        self._check_keys()

    def parameter(self, name: str) -> Tensor:
        """Our parameter `name` in float32, joined from the stored tensors.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file cannot be read.
        """
        parts = [self._read(key) for key in transformers_names(name, self.config.text)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load(self, module: nn.Module, prefix: str) -> nn.Module:
        """Give `module` (built on the meta device) the parameters that are named `prefix.*`; float32, eval mode."""
        state = {name: self.parameter(f"{prefix}.{name}") for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each stage; what several stages or layers share counts once."""
        counts: dict[str, int] = {}
        counted: set[str] = set()
        for name, shape in self._shapes.items():
            stage, keys = name.partition(".")[0], transformers_names(name, self.config.text)
            counts[stage] = counts.get(stage, 0) + (0 if counted.issuperset(keys) else torch.Size(shape).numel())
            counted.update(keys)
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
        embedding = transformers_names("decoder.embedding.token.weight", config.text)[0]
        if not config.text.tie_word_embeddings or not {TIED_HEAD, embedding} <= self._where.keys():
            return config.text.tie_word_embeddings
        return self._equal(TIED_HEAD, embedding)

    def _equal(self, key: str, other: str) -> bool:
        """Whether two stored tensors are the same, shapes first."""
        same_shape = self._where[key].shapes[key] == self._where[other].shapes[other]
        return same_shape and torch.equal(self._where[key].read(key), self._where[other].read(other))

    def _check_keys(self) -> None:
        """Every stored tensor is used, every parameter is stored, every shape fits: or one error that lists all."""
        missing, misshaped, used = [], [], set()
        for name, shape in self._shapes.items():
            keys = transformers_names(name, self.config.text)
            expected = (shape[0] // len(keys), *shape[1:])
            for key in keys:
                used.add(key)
                if key not in self._where:
                    missing.append(key)
                elif self._where[key].shapes[key] != expected:
                    misshaped.append(
                        f"{key} is {list(self._where[key].shapes[key])}, config.json wants {list(expected)}"
                    )
        if self.config.text.tie_word_embeddings:
            used.add(TIED_HEAD)
        if isinstance(self.config.text, T5Config):
            shared = transformers_names("decoder.embedding.token.weight", self.config.text)[0]
            used.update(key for key in T5_COPIES if {key, shared} <= self._where.keys() and self._equal(key, shared))
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
    """The reference model with the weights of a checkpoint, float32, eval mode."""
    checkpoint = Checkpoint(source)
    with torch.device("meta"):
        model = Blip2(checkpoint.config)
    for stage, module in model.named_children():
        checkpoint.load(module, stage)
    return model.eval()


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

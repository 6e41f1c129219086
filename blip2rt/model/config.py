"""Sizes and constants of a BLIP-2 model, read from the JSON of a transformers `Blip2Config`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import CheckpointError

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


@dataclass(frozen=True)
class VisionConfig:
    """ViT. Field names and defaults are those of transformers' `Blip2VisionConfig` (EVA ViT-g/14 at 224 px)."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    norm_eps: float = None  # type: ignore[assignment]  # of the norm after the last block; None: layer_norm_eps
    pre_norm: bool = False  # CLIP's ViT-L: a norm before the first block, patches without a bias; not in transformers

    def __post_init__(self) -> None:
        if self.norm_eps is None:
            object.__setattr__(self, "norm_eps", self.layer_norm_eps)

    @property
    def num_tokens(self) -> int:
        """Patches and the class token: N+1."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class QFormerConfig:
    """Q-Former. Field names and defaults are those of transformers' `Blip2QFormerConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    cross_attention_frequency: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    use_qformer_text_input: bool = False  # the branch that reads text: retrieval, and questions in VQA
    vocab_size: int = 30522
    max_position_embeddings: int = 512


@dataclass(frozen=True)
class OPTConfig:
    """Decoder-only language model. Field names and defaults are those of transformers' `OPTConfig`."""

    model_type: str = "opt"
    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    _remove_final_layer_norm: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int = 2
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


@dataclass(frozen=True)
class T5Config:
    """Encoder-decoder language model. Field names and defaults are those of transformers' `T5Config`."""

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str = "relu"
    scale_decoder_outputs: bool = True
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, by the name that all parts share."""
        return self.d_model

    @property
    def is_gated_act(self) -> bool:
        """Whether the feed-forward layer is gated, as T5 1.1 and FLAN-T5 have it."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def start_token_id(self) -> int | None:
        """What the decoder starts from."""
        return self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id


TextConfig = OPTConfig | T5Config
TEXT_CONFIGS: dict[str, type[OPTConfig] | type[T5Config]] = {"opt": OPTConfig, "t5": T5Config}


def stop_token_ids(text: TextConfig) -> tuple[int, ...]:
    """`eos_token_id`, which may be absent, one id or several, as a tuple."""
    if text.eos_token_id is None:
        return ()
    return text.eos_token_id if isinstance(text.eos_token_id, tuple) else (text.eos_token_id,)


@dataclass(frozen=True)
class Blip2Config:
    """The whole model. `image_token_id` stands for a query slot in the text that transformers sees."""

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    text: TextConfig = OPTConfig()
    num_query_tokens: int = 32
    image_token_id: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for the manifest."""
        return asdict(self)

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "Blip2Config":
        """Read the parsed `config.json` of a transformers BLIP-2 checkpoint.

        Raises:
            CheckpointError: not a BLIP-2 configuration, a language model that is neither pre-norm OPT nor T5, or a
                value that the reference model cannot represent. All problems are listed in one message.
        """
        _check_model_type(config)
        text = _section(config, "text_config")
        language_model = text.get("model_type", "opt")
        if language_model not in TEXT_CONFIGS:
            raise CheckpointError(
                f"the language model is {language_model!r}; blip2rt exports BLIP-2 with an OPT or T5 language model: "
                "pass such a checkpoint to --model"
            )
        vision = _vision_section(config)
        qformer = _section(config, "qformer_config")

        problems: list[str] = []
        parsed = cls(
            vision=VisionConfig(**_known_fields(VisionConfig, vision, "vision_config", problems)),
            qformer=QFormerConfig(**_known_fields(QFormerConfig, qformer, "qformer_config", problems)),
            text=_text_config(TEXT_CONFIGS[language_model], text, problems),
            num_query_tokens=config.get("num_query_tokens", 32),
            image_token_id=config.get("image_token_index", config.get("image_token_id")),
        )
        if not problems:
            problems = _contradictions(parsed, text)
        if problems:
            raise CheckpointError("config.json cannot be used: " + "; ".join(problems))
        return parsed


def _text_config(kind: type[OPTConfig] | type[T5Config], section: Mapping[str, Any], problems: list[str]) -> TextConfig:
    """The language model's section. T5's derives fields from each other, as transformers' `T5Config` does."""
    text = kind(**_known_fields(kind, section, "text_config", problems))
    if isinstance(text, OPTConfig):
        return text
    if section.get("num_decoder_layers") is None:
        text = replace(text, num_decoder_layers=text.num_layers)
    if "dense_act_fn" not in section:
        name = text.feed_forward_proj.removeprefix("gated-")
        text = replace(text, dense_act_fn="gelu_new" if text.feed_forward_proj == "gated-gelu" else name)
    # transformers 5 always writes tied embeddings; the output layer is scaled only where they were meant to be
    scaled = section.get("scale_decoder_outputs", section.get("tie_word_embeddings") is not False)
    return replace(text, scale_decoder_outputs=scaled, tie_word_embeddings=True)


@dataclass(frozen=True)
class RetrievalConfig:
    """The model of stage 1. `has_training_parts`: its file also holds the temperature and the captioning head."""

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig(use_qformer_text_input=True, vocab_size=30523)
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    has_training_parts: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for the manifest."""
        return asdict(self)

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "RetrievalConfig":
        """Read the parsed `config.json` of a transformers `Blip2ForImageTextRetrieval`.

        Raises:
            CheckpointError: a value that the reference model cannot represent. All problems are listed in one message.
        """
        _check_model_type(config)
        problems: list[str] = []
        vision, qformer = _vision_section(config), _section(config, "qformer_config")
        parsed = cls(
            vision=VisionConfig(**_known_fields(VisionConfig, vision, "vision_config", problems)),
            qformer=QFormerConfig(**_known_fields(QFormerConfig, qformer, "qformer_config", problems)),
            num_query_tokens=config.get("num_query_tokens", 32),
            image_text_hidden_size=config.get("image_text_hidden_size", 256),
        )
        if not problems:
            problems = _part_problems(parsed.vision, parsed.qformer, parsed.num_query_tokens)
        if type(parsed.image_text_hidden_size) is not int or parsed.image_text_hidden_size < 1:
            problems.append(f"image_text_hidden_size is {parsed.image_text_hidden_size!r}")
        if not parsed.qformer.use_qformer_text_input:
            problems.append("qformer_config.use_qformer_text_input is false, and a retrieval model reads text")
        if problems:
            raise CheckpointError("config.json cannot be used: " + "; ".join(problems))
        return parsed


ModelConfig = Blip2Config | RetrievalConfig


def read_sizes(model: Mapping[str, Any]) -> ModelConfig:
    """The configuration that `to_dict` gave, out of a manifest.

    Raises:
        KeyError, TypeError: a part or a field is missing, or unknown.
    """

    def part(kind: Any, values: Mapping[str, Any]) -> Any:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    parts = {"vision": part(VisionConfig, model["vision"]), "qformer": part(QFormerConfig, model["qformer"])}
    if "text" not in model:
        return RetrievalConfig(**{**model, **parts})
    text = part(TEXT_CONFIGS[model["text"]["model_type"]], model["text"])
    return Blip2Config(**{**model, **parts, "text": text})


def _check_model_type(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "blip-2":
        raise CheckpointError(
            f"config.json says model_type {config.get('model_type')!r}, not 'blip-2': this is not a BLIP-2 "
            "checkpoint; pass the directory of one to --model"
        )


def _vision_section(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = dict(_section(config, "vision_config"))
    for name in ("image_size", "patch_size"):  # transformers allows [height, width]
        if isinstance(vision.get(name), (list, tuple)) and len(set(vision[name])) == 1:
            vision[name] = vision[name][0]
    return vision


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {name} must be an object, not {type(section).__name__}")
    return section


def _known_fields(kind: type, section: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """The fields of `kind` that `section` sets, type-checked against the defaults; wrong ones go to `problems`."""
    values: dict[str, Any] = {}
    for name, field in kind.__dataclass_fields__.items():  # type: ignore[attr-defined]
        if name not in section or (name == "num_decoder_layers" and section[name] is None):
            continue
        value, default = section[name], field.default
        if name in ("eos_token_id", "pad_token_id") or (kind is T5Config and name.endswith("_token_id")):
            ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            valid = all(type(i) is int and i >= 0 for i in ids) and (name == "eos_token_id" or ids != value)
            value = tuple(value) if isinstance(value, (list, tuple)) else value
        elif isinstance(default, (bool, str)):
            valid = type(value) is type(default)
        elif isinstance(default, int):
            valid = type(value) is int and value >= (0 if name == "bos_token_id" else 1)
        else:
            valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if valid:
            values[name] = value
        else:
            problems.append(f"{where}.{name} is {section[name]!r}")
    return values


def _contradictions(config: Blip2Config, text: Mapping[str, Any]) -> list[str]:
    problems = _part_problems(config.vision, config.qformer, config.num_query_tokens)
    if isinstance(config.text, T5Config):
        problems += _activation_problems("text_config.dense_act_fn", config.text.dense_act_fn)
        problems += _t5_contradictions(config.text)
    else:
        problems += _width_problems("text_config", config.text)
        problems += _activation_problems("text_config.activation_function", config.text.activation_function)
    if config.image_token_id is not None and (type(config.image_token_id) is not int or config.image_token_id < 0):
        problems.append(f"image_token_index is {config.image_token_id!r}")
    if text.get("do_layer_norm_before", True) is not True:
        problems.append("text_config.do_layer_norm_before is false: post-norm OPT (opt-350m) is not supported")
    if text.get("word_embed_proj_dim") not in (None, config.text.hidden_size):
        problems.append(
            f"text_config.word_embed_proj_dim {text['word_embed_proj_dim']} differs from hidden_size "
            f"{config.text.hidden_size}: projected embeddings (opt-350m) are not supported"
        )
    for name, token in (
        ("bos_token_id", config.text.bos_token_id),
        ("decoder_start_token_id", config.text.decoder_start_token_id if isinstance(config.text, T5Config) else None),
        *(("eos_token_id", i) for i in stop_token_ids(config.text)),
        ("pad_token_id", config.text.pad_token_id),
        ("image_token_index", config.image_token_id),
    ):
        if type(token) is int and token >= config.text.vocab_size:
            problems.append(f"{name} {token} is beyond the {config.text.vocab_size} embedding rows")
    return problems


def _t5_contradictions(text: T5Config) -> list[str]:
    problems = []
    if text.start_token_id is None:
        problems.append("text_config has neither decoder_start_token_id nor bos_token_id: the decoder cannot start")
    if text.feed_forward_proj.count("-") > 1 or ("-" in text.feed_forward_proj and not text.is_gated_act):
        problems.append(
            f"text_config.feed_forward_proj is {text.feed_forward_proj!r}, not 'gated-ACTIVATION' or one name"
        )
    if text.relative_attention_num_buckets < 4:  # the encoder halves them twice
        problems.append(f"text_config.relative_attention_num_buckets is {text.relative_attention_num_buckets}")
    if text.relative_attention_max_distance <= text.relative_attention_num_buckets // 2:
        problems.append(
            f"text_config.relative_attention_max_distance {text.relative_attention_max_distance} is within the "
            f"{text.relative_attention_num_buckets // 2} distances that have buckets of their own"
        )
    return problems


def _part_problems(vision: VisionConfig, qformer: QFormerConfig, num_query_tokens: Any) -> list[str]:
    """What contradicts itself in the parts that every BLIP-2 has."""
    problems = _width_problems("vision_config", vision) + _width_problems("qformer_config", qformer)
    problems += _activation_problems("vision_config.hidden_act", vision.hidden_act)
    problems += _activation_problems("qformer_config.hidden_act", qformer.hidden_act)
    if vision.image_size < vision.patch_size:
        problems.append(f"vision_config.image_size {vision.image_size} is smaller than patch_size {vision.patch_size}")
    if type(num_query_tokens) is not int or num_query_tokens < 1:
        problems.append(f"num_query_tokens is {num_query_tokens!r}")
    return problems


def _width_problems(where: str, part: Any) -> list[str]:
    if part.hidden_size % part.num_attention_heads == 0:
        return []
    return [
        f"{where}.hidden_size {part.hidden_size} is not a multiple of num_attention_heads {part.num_attention_heads}"
    ]


def _activation_problems(where: str, activation: str) -> list[str]:
    return [] if activation in ACTIVATIONS else [f"{where} is {activation!r}, not one of {', '.join(ACTIVATIONS)}"]

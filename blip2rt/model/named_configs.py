"""Configurations of the published models by name, for files that do not hold their own: LAVIS's and mmpretrain's."""

import difflib
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .weight_files import read_json

Json = dict[str, Any]


def _opt(width: int) -> Json:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "eos_token_id": 50118,  # "\n" ends a text, not </s>
    }


def _t5(width: int, ffn_width: int, heads: int) -> Json:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": ffn_width,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",  # FLAN-T5 was trained with gelu_new, BLIP-2 with gelu
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


LANGUAGE_MODELS: dict[str, Json | None] = {
    "blip2-opt-2.7b": _opt(2560),
    "blip2-opt-6.7b": _opt(4096),
    "blip2-flan-t5-xl": _t5(2048, 5120, 32),
    "blip2-flan-t5-xxl": _t5(4096, 10240, 64),
    "blip2": None,  # stage 1: a retrieval model
}
VISION: dict[str, Json] = {
    "": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16},
    "-vitl": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "pre_norm": True,
    },
}
IMAGE_SIZES = {"": 224, "-364": 364}
NAMES = [model + vision + size for model in LANGUAGE_MODELS for vision in VISION for size in IMAGE_SIZES]


def read_config(source: str | Path) -> Json:
    """A `Blip2Config` as transformers writes it to JSON.

    Args:
        source: such a file, or one of NAMES.

    Raises:
        CheckpointError: neither, or a file that is no JSON object.
    """
    if Path(source).is_file():
        return read_json(Path(source))
    for model, text in LANGUAGE_MODELS.items():
        for vision, vision_config in VISION.items():
            for size, image_size in IMAGE_SIZES.items():
                if source == model + vision + size:
                    return _config(text, vision_config | {"image_size": image_size})
    nearest = difflib.get_close_matches(str(source), NAMES, n=1)
    raise CheckpointError(
        f"--config {source} is neither a file nor a name"
        + (f" (did you mean {nearest[0]}?)" if nearest else "")
        + f": pass a Blip2Config as JSON, or one of {', '.join(NAMES)}"
    )


def _config(text: Json | None, vision: Json) -> Json:
    qformer: Json = {"encoder_hidden_size": vision["hidden_size"]}
    config: Json = {"model_type": "blip-2", "num_query_tokens": 32, "vision_config": vision, "qformer_config": qformer}
    if text is None:
        qformer |= {"use_qformer_text_input": True, "vocab_size": 30523}
        return config | {"architectures": ["Blip2ForImageTextRetrieval"], "image_text_hidden_size": 256}
    return config | {"architectures": ["Blip2ForConditionalGeneration"], "text_config": text}

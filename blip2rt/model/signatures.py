"""Sizes of a model -> the signatures of its stages."""

from ..stages import (
    DECODER,
    ENCODER,
    ITM,
    QFORMER,
    TEXT,
    VISION,
    StageSpec,
    cross_decoder_spec,
    decoder_spec,
    encoder_spec,
    image_embedding_spec,
    itm_spec,
    qformer_spec,
    text_embedding_spec,
    vision_spec,
)
from .config import ModelConfig, RetrievalConfig, T5Config, TextConfig


def stage_specs(config: ModelConfig) -> dict[str, StageSpec]:
    """The signature of every stage of a model of these sizes."""
    if isinstance(config, RetrievalConfig):
        return _retrieval_specs(config)
    vision, text = config.vision, config.text
    return {
        VISION: vision_spec(vision.image_size, vision.num_tokens, vision.hidden_size),
        QFORMER: qformer_spec(
            vision.num_tokens,
            vision.hidden_size,
            config.num_query_tokens,
            config.qformer.hidden_size,
            text.hidden_size,
            config.qformer.use_qformer_text_input,
        ),
        **_language_specs(text),
    }


def _language_specs(text: TextConfig) -> dict[str, StageSpec]:
    if isinstance(text, T5Config):
        layers, heads, head_width = text.num_decoder_layers, text.num_heads, text.d_kv
        return {
            ENCODER: encoder_spec(layers, heads, head_width, text.d_model),
            DECODER: cross_decoder_spec(layers, heads, head_width, text.vocab_size),
        }
    head_width = text.hidden_size // text.num_attention_heads
    return {
        DECODER: decoder_spec(
            text.num_hidden_layers, text.num_attention_heads, head_width, text.hidden_size, text.vocab_size
        )
    }


def _retrieval_specs(config: RetrievalConfig) -> dict[str, StageSpec]:
    vision, width, shared_width = config.vision, config.qformer.hidden_size, config.image_text_hidden_size
    image = (vision.num_tokens, vision.hidden_size, config.num_query_tokens, width)
    return {
        VISION: vision_spec(vision.image_size, vision.num_tokens, vision.hidden_size),
        QFORMER: image_embedding_spec(*image, shared_width),
        TEXT: text_embedding_spec(width, shared_width),
        ITM: itm_spec(*image),
    }

"""CONTRACT: the names, dtypes and shapes of every engine. The exporter writes them, the runtime binds them.

Shape legend, used in every comment of the project:
    B images, K beams, N patches, Q queries, P prompt tokens, S new rows, C cache capacity,
    E encoder rows, R rows that want logits, D width, H heads, d head width, V vocabulary,
    L text tokens of the Q-Former, E (of embeddings) width of the space that images and texts share.

A picture becomes text in three stages:

    pixel_values [B,3,S,S] -> vision  -> image_embeds [B,N+1,Dv]
    image_embeds           -> qformer -> query_embeds [B,Q,Dq], prefix [B,Q,D]
    prefix, input_ids      -> decoder -> logits [B,R,V]        once to prefill, then once a token

A Q-Former that was trained to read questions also takes text_ids [B,L] and text_mask; L may be 0.

With an encoder-decoder language model (T5) the encoder reads picture and prompt, and the decoder only generates:

    prefix, input_ids      -> encoder -> cross_key_i, cross_value_i [B,H,E,d]      once an image and prompt
    cross_*, input_ids     -> decoder -> logits [B,R,V]                            once a token

A row is a token, or, where its id is negative, a row of `prefix`. The decoder is one graph for prefill and step: the S
new rows are written to rows `write_indices[b] ...` of the cache, and `mask` says which cached rows each new row may
see: this is what lets the K beams of an image share one cache as the branches of a tree. T5 tells rows apart by their
depth in the tree: `positions` of the new ones, `cached_positions` of all.

A picture and a text are compared in four:

    pixel_values              -> vision  -> image_embeds
    image_embeds              -> qformer -> query_embeds [B,Q,Dq], itc_embeds [B,Q,E]        unit vectors
    text_ids [B,L], text_mask -> text    -> text_embeds [B,L,Dq], itc_embeds [B,E]
    image_embeds, text_ids .. -> itm     -> multimodal_embeds [B,Q,Dq], itm_logits [B,Q,2]   no match, match

Here B counts texts in the text stage and pairs in the itm stage. `text_mask` [B,1,1,L] is 0 for tokens and `MASKED` for
padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

VISION, QFORMER, ENCODER, DECODER = "vision", "qformer", "encoder", "decoder"
GENERATIVE_STAGES = (VISION, QFORMER, DECODER)
TEXT, ITM = "text", "itm"
RETRIEVAL_STAGES = (VISION, QFORMER, TEXT, ITM)

CROSS = "cross_"  # begins the names of keys and values that an encoder gives
KEYS_AND_VALUES = ("past_", "present_", CROSS)  # of all those that stay where a stage works, and in its precision

MASKED = -3.4028234663852886e38  # finfo(float32).min: -inf would give NaN in a row that sees nothing


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a stage: sizes are numbers, or names of the legend where they vary between calls."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StageSpec:
    """The signature of one engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def sizes_of(inputs: tuple[TensorSpec, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of the legend that inputs of these shapes have."""
    return {
        size: n
        for tensor in inputs
        for size, n in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(size, str)
    }


def cache_names(num_layers: int, prefix: str) -> list[str]:
    """Cache tensors in binding order: key and value of layer 0, key and value of layer 1, ..."""
    return [f"{prefix}_{kind}_{layer}" for layer in range(num_layers) for kind in ("key", "value")]


def vision_spec(image_size: int, num_tokens: int, width: int) -> StageSpec:
    """Encoder of pictures; `num_tokens` counts the class token (N+1)."""
    return StageSpec(
        inputs=(TensorSpec("pixel_values", "float32", ("B", 3, image_size, image_size)),),
        outputs=(TensorSpec("image_embeds", "float32", ("B", num_tokens, width)),),
    )


def qformer_spec(
    num_tokens: int,
    vision_width: int,
    num_queries: int,
    qformer_width: int,
    language_width: int,
    reads_questions: bool = False,
) -> StageSpec:
    """Q-Former with its query tokens and the projection to the language model."""
    image = TensorSpec("image_embeds", "float32", ("B", num_tokens, vision_width))
    return StageSpec(
        inputs=(image, *_TEXT_INPUTS) if reads_questions else (image,),
        outputs=(
            TensorSpec("query_embeds", "float32", ("B", num_queries, qformer_width)),
            TensorSpec("prefix", "float32", ("B", num_queries, language_width)),
        ),
    )


def image_embedding_spec(
    num_tokens: int, vision_width: int, num_queries: int, qformer_width: int, shared_width: int
) -> StageSpec:
    """Q-Former of a retrieval engine: what the queries saw, and as unit vectors in the space of the texts."""
    return StageSpec(
        inputs=(TensorSpec("image_embeds", "float32", ("B", num_tokens, vision_width)),),
        outputs=(
            TensorSpec("query_embeds", "float32", ("B", num_queries, qformer_width)),
            TensorSpec("itc_embeds", "float32", ("B", num_queries, shared_width)),
        ),
    )


def text_embedding_spec(qformer_width: int, shared_width: int) -> StageSpec:
    """Texts alone through the Q-Former; the unit vector is that of the first token."""
    return StageSpec(
        inputs=_TEXT_INPUTS,
        outputs=(
            TensorSpec("text_embeds", "float32", ("B", "L", qformer_width)),
            TensorSpec("itc_embeds", "float32", ("B", shared_width)),
        ),
    )


def itm_spec(num_tokens: int, vision_width: int, num_queries: int, qformer_width: int) -> StageSpec:
    """Queries and text together before a picture; the logit of a pair is the mean over its queries."""
    return StageSpec(
        inputs=(TensorSpec("image_embeds", "float32", ("B", num_tokens, vision_width)), *_TEXT_INPUTS),
        outputs=(
            TensorSpec("multimodal_embeds", "float32", ("B", num_queries, qformer_width)),
            TensorSpec("itm_logits", "float32", ("B", num_queries, 2)),
        ),
    )


_TEXT_INPUTS = (
    TensorSpec("text_ids", "int64", ("B", "L")),
    TensorSpec("text_mask", "float32", ("B", 1, 1, "L")),
)


def encoder_spec(num_layers: int, num_heads: int, head_width: int, width: int) -> StageSpec:
    """Encoder of an encoder-decoder language model, up to the keys and values that its decoder's layers look at."""
    return StageSpec(
        inputs=(
            TensorSpec("prefix", "float32", ("B", "E", width)),
            TensorSpec("input_ids", "int64", ("B", "E")),
            TensorSpec("positions", "int64", ("B", "E")),
            TensorSpec("encoder_mask", "float32", ("B", 1, 1, "E")),
        ),
        outputs=_cross_specs(num_layers, num_heads, head_width),
    )


def decoder_spec(num_layers: int, num_heads: int, head_width: int, width: int, vocab_size: int) -> StageSpec:
    """Decoder-only language model over a cache in place."""
    return _cached_spec(
        (
            TensorSpec("prefix", "float32", ("B", "S", width)),
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("positions", "int64", ("B", "S")),
            TensorSpec("write_indices", "int64", ("B",)),
            TensorSpec("mask", "float32", ("B", 1, "S", "C")),
            TensorSpec("logit_rows", "int64", ("B", "R")),
        ),
        cache=("B", num_heads, "C", head_width),
        num_layers=num_layers,
        vocab_size=vocab_size,
    )


def cross_decoder_spec(num_layers: int, num_heads: int, head_width: int, vocab_size: int) -> StageSpec:
    """Decoder of an encoder-decoder language model over a cache in place."""
    return _cached_spec(
        (
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("positions", "int64", ("B", "S")),
            TensorSpec("cached_positions", "int64", ("B", "C")),
            TensorSpec("write_indices", "int64", ("B",)),
            TensorSpec("mask", "float32", ("B", 1, "S", "C")),
            TensorSpec("encoder_mask", "float32", ("B", 1, "S", "E")),  # ONNX Runtime does not repeat it for each row
            TensorSpec("logit_rows", "int64", ("B", "R")),
        ),
        cache=("B", num_heads, "C", head_width),
        num_layers=num_layers,
        vocab_size=vocab_size,
        cross=_cross_specs(num_layers, num_heads, head_width),
    )


def _cross_specs(num_layers: int, num_heads: int, head_width: int) -> tuple[TensorSpec, ...]:
    shape = ("B", num_heads, "E", head_width)
    return tuple(TensorSpec(name, "float32", shape) for name in cache_names(num_layers, "cross"))


def _cached_spec(
    inputs: tuple[TensorSpec, ...],
    cache: tuple[int | str, ...],
    num_layers: int,
    vocab_size: int,
    cross: tuple[TensorSpec, ...] = (),
) -> StageSpec:
    """`inputs`, then the cache of every layer, then what the layers look at; logits, then the cache."""
    past, present = (
        tuple(TensorSpec(name, "float32", cache) for name in cache_names(num_layers, kind))
        for kind in ("past", "present")
    )
    logits = TensorSpec("logits", "float32", ("B", "R", vocab_size))
    return StageSpec(inputs=(*inputs, *past, *cross), outputs=(logits, *present))

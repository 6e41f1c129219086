"""CONTRACT: the names, dtypes and shapes of every engine. The exporter writes them, the runtime binds them.

Shape legend, used in every comment of the project:
    B images, K beams, N patches, Q queries, P prompt tokens, S new rows, C cache capacity,
    R rows that want logits, D width, H heads, d head width, V vocabulary.

A picture becomes text in three stages:

    pixel_values [B,3,S,S] -> vision  -> image_embeds [B,N+1,Dv]
    image_embeds           -> qformer -> query_embeds [B,Q,Dq], prefix [B,Q,D]
    prefix, input_ids      -> decoder -> logits [B,R,V]        once to prefill, then once a token

The decoder is one graph for prefill and step. A new row is a token, or, where its id is negative, a row of `prefix`.
The S new rows are written to rows `write_indices[b] ...` of the cache, and `mask` says which cached rows each new row
may see: this is what lets the K beams of an image share one cache as the branches of a tree.
"""

from dataclasses import dataclass

VISION, QFORMER, DECODER = "vision", "qformer", "decoder"
GENERATIVE_STAGES = (VISION, QFORMER, DECODER)

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
    num_tokens: int, vision_width: int, num_queries: int, qformer_width: int, language_width: int
) -> StageSpec:
    """Q-Former with its query tokens and the projection to the language model."""
    return StageSpec(
        inputs=(TensorSpec("image_embeds", "float32", ("B", num_tokens, vision_width)),),
        outputs=(
            TensorSpec("query_embeds", "float32", ("B", num_queries, qformer_width)),
            TensorSpec("prefix", "float32", ("B", num_queries, language_width)),
        ),
    )


def decoder_spec(num_layers: int, num_heads: int, head_width: int, width: int, vocab_size: int) -> StageSpec:
    """Decoder-only language model over a cache in place."""
    cache_shape = ("B", num_heads, "C", head_width)
    return StageSpec(
        inputs=(
            TensorSpec("prefix", "float32", ("B", "S", width)),
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("positions", "int64", ("B", "S")),
            TensorSpec("write_indices", "int64", ("B",)),
            TensorSpec("mask", "float32", ("B", 1, "S", "C")),
            TensorSpec("logit_rows", "int64", ("B", "R")),
            *(TensorSpec(name, "float32", cache_shape) for name in cache_names(num_layers, "past")),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("B", "R", vocab_size)),
            *(TensorSpec(name, "float32", cache_shape) for name in cache_names(num_layers, "present")),
        ),
    )

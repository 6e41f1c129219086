"""Foreign weight names: the one table from our parameters to the tensors of every format that people hold.

The language model stands in the table under its own names. What a format puts before them (`language_model.`,
`opt_model.`, `t5_model.`, `text_backbone.`) is taken off when a file is opened and put on when one is written, so that
inside this package its tensors are called as transformers calls them, whatever file they lie in.
"""

import re
from functools import cache
from typing import NamedTuple

FORMATS = TRANSFORMERS, LAVIS, MMPRETRAIN = "transformers", "lavis", "mmpretrain"

LANGUAGE_MODEL = "language_model."
LANGUAGE_PREFIXES = {
    TRANSFORMERS: {"opt": LANGUAGE_MODEL, "t5": LANGUAGE_MODEL},
    LAVIS: {"opt": "opt_model.", "t5": "t5_model."},
    MMPRETRAIN: {"opt": "text_backbone.", "t5": "text_backbone."},
}
VISION_PREFIXES = {TRANSFORMERS: "vision_model.", LAVIS: "visual_encoder.", MMPRETRAIN: "vision_backbone."}

QFORMER_PREFIXES = {LAVIS: "Qformer.", MMPRETRAIN: "multimodal_backbone."}

ZEROS = None  # a part of a parameter that a format does not store, because it is zero
Column = str | tuple[str | None, ...] | None  # None: the format has no place for it


class Section(NamedTuple):
    """Rows below common prefixes. Prefixes and rows: ours, then transformers, LAVIS, mmpretrain.

    A row that ends early goes on with its last column. Modules stand for their weight and bias, `{}` for the number of
    a block; several names are joined along the first axis.
    """

    prefixes: tuple[str, str, str, str]
    rows: tuple[tuple[str, *tuple[Column, ...]], ...]


EVA = (
    Section(
        ("vision.", "vision_model.", "visual_encoder.", "vision_backbone."),
        (
            ("embedding.class_token", "embeddings.class_embedding", "cls_token"),
            ("embedding.position", "embeddings.position_embedding", "pos_embed"),
            ("embedding.patch", "embeddings.patch_embedding", "patch_embed.proj", "patch_embed.projection"),
        ),
    ),
    Section(
        (
            "vision.blocks.{}.",
            "vision_model.encoder.layers.{}.",
            "visual_encoder.blocks.{}.",
            "vision_backbone.layers.{}.",
        ),
        (
            ("norm1", "layer_norm1", "norm1", "ln1"),
            ("qkv.weight", "self_attn.qkv.weight", "attn.qkv.weight"),
            ("qkv.bias", "self_attn.qkv.bias", ("attn.q_bias", ZEROS, "attn.v_bias")),
            ("proj", "self_attn.projection", "attn.proj"),
            ("norm2", "layer_norm2", "norm2", "ln2"),
            ("fc1", "mlp.fc1", "mlp.fc1", "ffn.layers.0.0"),
            ("fc2", "mlp.fc2", "mlp.fc2", "ffn.layers.1"),
        ),
    ),
)
CLIP = (  # LAVIS's ViT-L
    Section(
        ("vision.", "vision_model.", "visual_encoder.", "vision_backbone."),
        (
            ("embedding.class_token", None, "class_embedding", None),
            ("embedding.position", None, "positional_embedding", None),
            ("embedding.patch", None, "conv1", None),
            ("embedding.norm", None, "ln_pre", None),
        ),
    ),
    Section(
        ("vision.blocks.{}.", "", "visual_encoder.transformer.resblocks.{}.", ""),
        (
            ("norm1", None, "ln_1", None),
            ("qkv.weight", None, "attn.in_proj_weight", None),
            ("qkv.bias", None, "attn.in_proj_bias", None),
            ("proj", None, "attn.out_proj", None),
            ("norm2", None, "ln_2", None),
            ("fc1", None, "mlp.c_fc", None),
            ("fc2", None, "mlp.c_proj", None),
        ),
    ),
)
QFORMER = (
    Section(
        ("", "", "", ""),
        (
            ("vision.norm", "vision_model.post_layernorm", "ln_vision", "ln_vision_backbone"),
            ("qformer.embedding.query_tokens", "query_tokens"),
            ("qformer.projection", "language_projection", "{}_proj", "vision_neck.fc"),  # opt_proj, t5_proj
            ("qformer.itc", "vision_projection", "vision_proj", "vision_neck.fc"),
            ("text.itc", "text_projection", "text_proj", "text_neck.fc"),
            ("itm.head", "itm_head", "itm_head", "multimodal_head.fc"),
            ("temperature", None, "temp"),
        ),
    ),
    Section(
        ("qformer.embedding.", "", "Qformer.bert.embeddings.", "multimodal_backbone.bert.embeddings."),
        (
            ("norm", "qformer.layernorm", "LayerNorm"),
            ("token", "embeddings.word_embeddings", "word_embeddings"),
            ("position", "embeddings.position_embeddings", "position_embeddings"),
        ),
    ),
    Section(
        (
            "qformer.blocks.{}.",
            "qformer.encoder.layer.{}.",
            "Qformer.bert.encoder.layer.{}.",
            "multimodal_backbone.bert.encoder.layer.{}.",
        ),
        (
            (
                "self_attention.qkv",
                ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
                ("attention.self.query", "attention.self.key", "attention.self.value"),
            ),
            ("self_attention.proj", "attention.output.dense"),
            ("self_attention.norm", "attention.output.LayerNorm"),
            ("cross_attention.query", "crossattention.attention.query", "crossattention.self.query"),
            (
                "cross_attention.kv",
                ("crossattention.attention.key", "crossattention.attention.value"),
                ("crossattention.self.key", "crossattention.self.value"),
            ),
            ("cross_attention.proj", "crossattention.output.dense"),
            ("cross_attention.norm", "crossattention.output.LayerNorm"),
            ("query_ffn.fc1", "intermediate_query.dense"),
            ("query_ffn.fc2", "output_query.dense"),
            ("query_ffn.norm", "output_query.LayerNorm"),
            ("text_ffn.fc1", "intermediate.dense"),
            ("text_ffn.fc2", "output.dense"),
            ("text_ffn.norm", "output.LayerNorm"),
        ),
    ),
    Section(
        ("itg.", "", "Qformer.cls.predictions.", "multimodal_backbone.cls.predictions."),
        (
            ("dense", None, "transform.dense"),
            ("norm", None, "transform.LayerNorm"),
            ("bias", None, "bias"),
        ),
    ),
)
OPT = (
    Section(
        ("decoder.", LANGUAGE_MODEL, LANGUAGE_MODEL, LANGUAGE_MODEL),
        (
            ("embedding.token", "model.decoder.embed_tokens"),
            ("embedding.position", "model.decoder.embed_positions"),
            ("head.norm", "model.decoder.final_layer_norm"),
            ("head.lm_head", "lm_head"),
        ),
    ),
    Section(
        (
            "decoder.blocks.{}.",
            "language_model.model.decoder.layers.{}.",
            "language_model.model.decoder.layers.{}.",
            "language_model.model.decoder.layers.{}.",
        ),
        (
            ("norm1", "self_attn_layer_norm"),
            ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("proj", "self_attn.out_proj"),
            ("norm2", "final_layer_norm"),
            ("fc1", "fc1"),
            ("fc2", "fc2"),
        ),
    ),
)
T5 = (
    Section(
        ("", LANGUAGE_MODEL, LANGUAGE_MODEL, LANGUAGE_MODEL),
        (
            ("encoder.embedding.token", "shared"),
            ("encoder.relative_bias.bucket", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
            ("encoder.norm", "encoder.final_layer_norm"),
            ("decoder.embedding.token", "shared"),
            ("decoder.relative_bias.bucket", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
            ("decoder.head.norm", "decoder.final_layer_norm"),
            ("decoder.head.lm_head", "lm_head"),
            (
                "encoder.cross.{}.kv",
                ("decoder.block.{}.layer.1.EncDecAttention.k", "decoder.block.{}.layer.1.EncDecAttention.v"),
            ),
        ),
    ),
    Section(
        ("encoder.blocks.{}.", *["language_model.encoder.block.{}."] * 3),  # type: ignore[arg-type]
        (
            ("norm", "layer.0.layer_norm"),
            ("qkv", ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v")),
            ("proj", "layer.0.SelfAttention.o"),
            ("ffn.norm", "layer.1.layer_norm"),
            ("ffn.gate", "layer.1.DenseReluDense.wi_0"),
            ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
            ("ffn.fc2", "layer.1.DenseReluDense.wo"),
        ),
    ),
    Section(
        ("decoder.blocks.{}.", *["language_model.decoder.block.{}."] * 3),  # type: ignore[arg-type]
        (
            ("norm1", "layer.0.layer_norm"),
            ("qkv", ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v")),
            ("proj", "layer.0.SelfAttention.o"),
            ("norm2", "layer.1.layer_norm"),
            ("cross_query", "layer.1.EncDecAttention.q"),
            ("cross_proj", "layer.1.EncDecAttention.o"),
            ("ffn.norm", "layer.2.layer_norm"),
            ("ffn.gate", "layer.2.DenseReluDense.wi_0"),
            ("ffn.fc1", "layer.2.DenseReluDense.wi_1"),
            ("ffn.fc2", "layer.2.DenseReluDense.wo"),
        ),
    ),
)
LANGUAGE_MODELS = {"opt": OPT, "t5": T5}

TIED_HEAD = "language_model.lm_head.weight"
TOKEN_EMBEDDINGS = {
    "opt": "language_model.model.decoder.embed_tokens.weight",
    "t5": "language_model.shared.weight",
}
# Tensors that some files hold twice, under the name of each module that shares them: copy -> original.
COPIES = {
    "language_model.encoder.embed_tokens.weight": "language_model.shared.weight",
    "language_model.decoder.embed_tokens.weight": "language_model.shared.weight",
    **{
        f"{prefix}cls.predictions.decoder.{copy}": f"{prefix}{original}"
        for prefix in QFORMER_PREFIXES.values()
        for copy, original in (("weight", "bert.embeddings.word_embeddings.weight"), ("bias", "cls.predictions.bias"))
    },
}


class NoPlaceError(Exception):
    """A parameter that a format has no place for."""


class Names:
    """The names that a format has for the parameters of a model.

    Args:
        format: one of FORMATS.
        language_model: "opt" or "t5".
        pre_norm: whether the image encoder is CLIP's ViT-L.
        is_gated: whether T5's feed-forward layers are, whose tensors have other names then.
    """

    def __init__(self, format: str, language_model: str = "opt", pre_norm: bool = False, is_gated: bool = True):
        self.format, self.language_model = format, language_model
        self._pre_norm, self._is_gated = pre_norm, is_gated
        self.copies = COPIES | {TIED_HEAD: TOKEN_EMBEDDINGS[language_model]}
        self._table = _table(format, language_model, pre_norm)

    def __call__(self, parameter: str) -> tuple[str | None, ...]:
        """The tensors whose join along the first axis is our parameter of this name; ZEROS where nothing is stored.

        Raises:
            NoPlaceError: the format has no place for it.
        """
        indices = re.findall(r"\.(\d+)\.", parameter)
        template = re.sub(r"\.\d+\.", ".{}.", parameter)
        module, _, leaf = template.rpartition(".")
        column, suffix = (self._table[template], "") if template in self._table else (self._table[module], f".{leaf}")
        if column is None:
            raise NoPlaceError(parameter)
        if isinstance(column, str) and not self._is_gated:
            column = column.replace(".wi_1", ".wi")
        names = (column,) if isinstance(column, str) else column
        fill = indices or [self.language_model]  # of opt_proj and t5_proj
        return tuple(name if name is None else name.format(*fill) + suffix for name in names)

    def of(self, format: str) -> "Names":
        """The names that another format has for the same model."""
        return Names(format, self.language_model, self._pre_norm, self._is_gated)

    def stored_as(self, name: str) -> str:
        """The name in a file of what is called `name` in this package."""
        prefix = LANGUAGE_PREFIXES[self.format][self.language_model]
        return prefix + name.removeprefix(LANGUAGE_MODEL) if name.startswith(LANGUAGE_MODEL) else name

    def block_tensors(self) -> frozenset[str]:
        """Names of the tensors of a block of the image encoder, with `{}` for its number."""
        names: set[str] = set()
        for template, column in self._table.items():
            if template.startswith("vision.blocks.{}.") and column is not None:
                leaves = ("",) if template.endswith((".weight", ".bias")) else (".weight", ".bias")
                for name in (column,) if isinstance(column, str) else column:
                    names |= {name + leaf for leaf in leaves if name is not None}
        return frozenset(names)


@cache
def _table(format: str, language_model: str, pre_norm: bool) -> dict[str, Column]:
    """Ours -> the column of a format."""
    table: dict[str, Column] = {}
    for section in (*(CLIP if pre_norm else EVA), *QFORMER, *LANGUAGE_MODELS[language_model]):
        for row in section.rows:
            columns = [row[min(i, len(row) - 1)] for i in range(len(FORMATS) + 1)]
            place = 1 + FORMATS.index(format)
            prefix, column = section.prefixes[place], columns[place]
            if isinstance(column, str):
                column = prefix + column
            elif column is not None:
                column = tuple(name if name is None else prefix + name for name in column)
            table[f"{section.prefixes[0]}{row[0]}"] = column
    return table

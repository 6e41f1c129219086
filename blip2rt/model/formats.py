"""What a file of tensors is, told from the names in it: whose format, which model, which parts of it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import CheckpointError
from .names import (
    COPIES,
    FORMATS,
    LANGUAGE_MODEL,
    LANGUAGE_PREFIXES,
    LAVIS,
    MMPRETRAIN,
    TIED_HEAD,
    TRANSFORMERS,
    VISION_PREFIXES,
)

# Beginnings of names that only one format has. query_tokens, itm_head and temp are called so in several.
SIGNS = {
    TRANSFORMERS: (
        "vision_model.",
        "qformer.",
        "language_model.",
        "language_projection.",
        "vision_projection.",
        "text_projection.",
        "embeddings.",
    ),
    LAVIS: (
        "visual_encoder.",
        "ln_vision.",
        "Qformer.",
        "opt_model.",
        "opt_proj.",
        "t5_model.",
        "t5_proj.",
        "vision_proj.",
        "text_proj.",
    ),
    MMPRETRAIN: (
        "vision_backbone.",
        "ln_vision_backbone.",
        "multimodal_backbone.",
        "vision_neck.",
        "text_neck.",
        "multimodal_head.",
        "text_backbone.",
    ),
}
RETRIEVAL_SIGNS = ("itm_head.", "text_proj.", "multimodal_head.", "text_neck.", "text_projection.")
NORM_EPS = {LAVIS: 1e-5, MMPRETRAIN: 1e-5}  # of the norm after the image encoder; transformers' config says its own


@dataclass(frozen=True)
class Contents:
    """What the tensors of a file say about it. `language_model`: "opt", "t5", or None where they do not say."""

    format: str
    is_retrieval: bool
    language_model: str | None
    has_vision: bool
    has_llm: bool

    @property
    def unused_blocks(self) -> int:
        """`unused_blocks` of this format and model."""
        return unused_blocks(self.format, self.is_retrieval)


def unused_blocks(format: str, is_retrieval: bool) -> int:
    """Blocks at the end of the image encoder that a model of this format stores and its own code does not use.

    mmpretrain's generative configs take the output of the last but one (`out_indices=-2`).
    """
    return int(format == MMPRETRAIN and not is_retrieval)


def recognise(names: Collection[str], path: object) -> Contents:
    """Tell a BLIP-2 checkpoint from the names of its tensors.

    Raises:
        CheckpointError: of no format that is known, of several, or of models that exclude each other.
    """
    signs = {format: [name for name in names if name.startswith(SIGNS[format])] for format in FORMATS}
    found = {format: hits for format, hits in signs.items() if hits}
    if not found:
        some = ", ".join(sorted(names)[:3]) or "none"
        raise CheckpointError(
            f"{path} holds no BLIP-2 in the format of transformers, LAVIS or mmpretrain (its tensors: {some}): "
            "pass such a checkpoint to --model"
        )
    if len(found) > 1:
        counts = " and ".join(f"{len(hits)} of {format} ({min(hits)})" for format, hits in found.items())
        raise CheckpointError(f"{path} mixes formats: it holds tensors {counts}; pass a checkpoint of one format")
    (format,) = found
    # with their dots, because lm_head and opt_proj say which model it is, and opt_project would not
    kinds = {"opt": ("opt_model.", "opt_proj."), "t5": ("t5_model.", "t5_proj.")} if format == LAVIS else {}
    said = [kind for kind, prefixes in kinds.items() if any(name.startswith(prefixes) for name in names)]
    is_retrieval = any(name.startswith(RETRIEVAL_SIGNS) for name in names)
    if len(said) + is_retrieval > 1:
        models = " and of ".join([*said, *(["stage 1"] if is_retrieval else [])])
        raise CheckpointError(f"{path} holds tensors of {models}, which no BLIP-2 has together: it is a mixture")
    copies = {TIED_HEAD, *COPIES}  # these alone are no language model
    return Contents(
        format,
        is_retrieval,
        said[0] if said else None,
        any(name.startswith(VISION_PREFIXES[format]) for name in names),
        any(name.startswith(LANGUAGE_MODEL) and name not in copies for name in internal_names(names, format)),
    )


def internal_names(names: Iterable[str], format: str) -> list[str]:
    """Names as this package knows them: those of the language model behind `language_model.`."""
    prefixes = tuple(set(LANGUAGE_PREFIXES[format].values()))
    internal = []
    for name in names:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        internal.append(name if prefix is None else LANGUAGE_MODEL + name.removeprefix(prefix))
    return internal

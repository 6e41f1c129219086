"""Pictures and texts -> the tensors that `generate` takes, exactly as the engines see them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import transformers
from transformers import BatchFeature, ImageProcessingMixin, PreTrainedTokenizerFast

from ..engine_directory import find_engine
from ..errors import InputError
from ..manifest import ImageSpec, Manifest
from ..preprocess import preprocess
from ..tokenizer import Tokenizer


class EngineImageProcessor(ImageProcessingMixin):
    """The engine's own preprocessing."""

    model_input_names = ("pixel_values",)

    def __init__(self, spec: ImageSpec):
        super().__init__()  # type: ignore[no-untyped-call]
        self._spec = spec

    def __call__(self, images: Any, return_tensors: str | None = None, **unused: Any) -> BatchFeature:
        """`pixel_values` [B, 3, S, S] of one picture or a list of them: whatever `Pipeline.encode` takes."""
        listed = images if isinstance(images, list | tuple) else [images]
        flat = [image for entry in listed for image in (entry if isinstance(entry, list | tuple) else [entry])]
        spec = self._spec
        pixels = np.stack([preprocess(image, spec.size, spec.mean, spec.std) for image in flat])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    preprocess = __call__

    def to_dict(self) -> dict[str, Any]:
        """What is printed of it."""
        return asdict(self._spec)


class Blip2Processor(transformers.Blip2Processor):
    """Stands in for transformers' class of this name, over an engine directory."""

    def __init__(
        self,
        image_processor: EngineImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        encoder: Tokenizer,
        num_query_tokens: int,
    ):
        """`tokenizer` decodes; `encoder` reads prompts as the engine does."""
        self.encoder, self.num_query_tokens = encoder, num_query_tokens
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, name: str | None = None, **unused: Any) -> Self:  # type: ignore[override]
        """The processor of an engine directory, or of the generative engine of a folder.

        Raises:
            EngineError: none there, or damaged.
        """
        directory = find_engine(path, name)
        manifest = Manifest.read(directory)
        file, tokens, text = directory / "tokenizer.json", manifest.tokens, manifest.model["text"]
        encoder = Tokenizer(file, tokens, text["vocab_size"], for_encoder=text["model_type"] != "opt")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(file), padding_side="left", clean_up_tokenization_spaces=False
        )
        for kind, token_id in (("bos", tokens.bos), ("pad", tokens.pad), ("eos", next(iter(tokens.stop), None))):
            if token_id is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id))
        image_processor = EngineImageProcessor(manifest.image)
        return cls(image_processor, tokenizer, encoder, int(manifest.model["num_query_tokens"]))

    def to_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """What is printed of it; the engine directory is what it is kept in."""
        return {"processor_class": type(self).__name__, "num_query_tokens": self.num_query_tokens}

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: Any = None,
        **keywords: Any,
    ) -> BatchFeature:
        """`pixel_values` of pictures; `input_ids` and `attention_mask` [B, L] of texts, placeholders in front.

        Texts of several lengths are padded on the left, whatever `padding` says: a tensor has one length.

        Raises:
            InputError: neither pictures nor texts, a text that cannot be read, or another option of transformers'.
        """
        if images is None and text is None:
            raise InputError("give images, text, or both")
        given = sorted(name for name, value in keywords.items() if value is not None)
        if given:
            raise InputError(f"{', '.join(given)}: an engine's processor has no such option, leave it out")
        data: dict[str, Any] = {}
        if text is not None:
            tokens = self.encoder.tokens
            padding_id = tokens.bos if tokens.pad is None else tokens.pad
            slots = [] if images is None or tokens.image is None else [tokens.image] * self.num_query_tokens
            rows = [slots + self.encoder.encode(line) for line in ([text] if isinstance(text, str) else text)]
            width = max(map(len, rows))
            data["input_ids"] = [[padding_id] * (width - len(row)) + row for row in rows]
            data["attention_mask"] = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        if images is not None:
            data["pixel_values"] = self.image_processor(images)["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

"""`generate` with tensors in and out, over an engine directory."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from transformers import Blip2Config, GenerationConfig

from ..errors import InputError
from ..generative import Prompt
from ..manifest import TORCH, Manifest
from ..options import GenerationOptions, ResolvedOptions, resolve_options
from ..pipeline import GENERATE_DEFAULTS, Pipeline
from ..results import Generation
from ..stages import ENCODER

Tensor = torch.Tensor
OURS = tuple(field.name for field in fields(GenerationOptions))
# What transformers' own code hands on and that changes no token here, with the values that it may have; None: any.
WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "bos_token_id": None,
    "eos_token_id": None,
    "interpolate_pos_encoding": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "pad_token_id": None,
    "return_dict_in_generate": (None, False),
    "tokenizer": None,
    "use_cache": (None, True),
}


class EngineModel:
    """What a class over an engine directory needs to pass for a model of transformers."""

    main_input_name = "pixel_values"
    base_model_prefix = "engine"
    input_modalities = ("image", "text")
    output_modalities = ("text",)
    device = torch.device("cpu")
    dtype = torch.float32
    pipe: Pipeline
    config: Blip2Config
    generation_config: GenerationConfig

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, name: str | None = None, threads: int | None = None, **unused: Any
    ) -> Self:
        """Open an engine directory.

        Args:
            path, name, threads: as for `Pipeline`.
            unused: what transformers' method takes besides; an engine has its precision and device.

        Raises:
            EngineError: none there, damaged, or a retrieval engine.
        """
        model = cls.__new__(cls)
        model.open(Pipeline(path, name=name, threads=threads))
        return model

    def open(self, pipe: Pipeline) -> None:
        """Take a pipeline with a generative engine."""
        manifest = pipe.generative_engine.manifest
        self.pipe, self.config = pipe, config_of(manifest)
        self.has_encoder = ENCODER in manifest.stages
        tokens = manifest.tokens
        self.generation_config = GenerationConfig(
            bos_token_id=tokens.bos, pad_token_id=tokens.pad, eos_token_id=list(tokens.stop) or None
        )

    def save_pretrained(self, directory: str | Path, **unused: Any) -> None:
        """Copy the engine directory."""
        shutil.copytree(self.pipe.generative_engine.directory, directory, dirs_exist_ok=True)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> Self:
        return self

    def to(self, *args: Any, **keywords: Any) -> Self:
        """The same, where it is.

        Raises:
            InputError: another device is asked for.
        """
        device = keywords.get("device", next((a for a in args if isinstance(a, str | int | torch.device)), None))
        if device is not None and torch.device(device).type != "cpu":
            is_torch = self.pipe.generative_engine.manifest.device == TORCH
            which = "this engine" if is_torch else "an engine of `blip2rt export --device torch`"
            raise InputError(f"tensors go in and come out on the CPU, not on {device}: {which} uses a GPU by itself")
        return self

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Not there: an engine decodes with a cache of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("an engine gives texts and their log-probabilities, no logits: call generate()")

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.forward(*args, **keywords)

    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Token ids, as `Blip2ForConditionalGeneration.generate` of transformers returns them.

        Args:
            pixel_values: [B, 3, S, S], normalised.
            input_ids: [B, L], prompts with their image placeholders, padded on the left; None: no words, OPT only.
            attention_mask: [B, L], 0 where `input_ids` is padding; None: nothing is.
            generation_config: options; those among `keywords` win.
            keywords: generation options by transformers' names, and `seed`; sampling without one draws it from torch.

        Returns:
            [B * num_return_sequences, L + T] with the prompt in front (OPT), or [..., 1 + T] with the start token (T5);
            stop tokens included, padding behind.

        Raises:
            InputError: shapes that do not fit, a prompt that is too long, or an option that an engine has not.
        """
        options = _options(generation_config, keywords)
        engine = self.pipe.generative_engine
        prompts = self._prompts(len(pixel_values), input_ids, attention_mask, options)
        images = [image.detach().to(torch.float32).numpy() for image in pixel_values]
        results = []
        for start in range(0, len(images), 8):
            batch = slice(start, start + 8)
            results += engine.decode(Generation, engine.encode(images[batch], start), prompts[batch], options)
        return self._sequences(results, input_ids, prompts, options)

    def _prompts(
        self, num_images: int, input_ids: Tensor | None, attention_mask: Tensor | None, options: ResolvedOptions
    ) -> list[Prompt]:
        """What stands beside the pictures, without padding and placeholders."""
        engine = self.pipe.generative_engine
        tokens = engine.manifest.tokens
        if input_ids is None:
            if self.has_encoder:
                raise InputError("T5 needs a prompt: give input_ids, as Blip2Processor makes them of a text")
            return [engine.prompt_of_ids([tokens.bos], options)] * num_images
        if input_ids.ndim != 2 or len(input_ids) != num_images:
            raise InputError(f"input_ids {list(input_ids.shape)} for {num_images} pictures: give [{num_images}, L]")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise InputError(f"attention_mask {list(mask.shape)} for input_ids {list(input_ids.shape)}")
        rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        return [engine.prompt_of_ids([i for i in row if i != tokens.image], options) for row in rows]

    def _sequences(
        self, results: list[Generation], input_ids: Tensor | None, prompts: list[Prompt], options: ResolvedOptions
    ) -> Tensor:
        engine = self.pipe.generative_engine
        tokens = engine.manifest.tokens
        rows = []
        for place, result in enumerate(results):
            if self.has_encoder:
                before = [tokens.bos]
            elif input_ids is None:
                image = -1 if tokens.image is None else tokens.image
                before = [image] * engine.num_queries + prompts[place].ids
            else:
                before = input_ids[place].tolist()
            for sequence in (result, *result.alternatives):
                stop = list(tokens.stop[:1]) if sequence.finish_reason == "stop" else []
                rows.append([*before, *sequence.token_ids, *stop])
        width = max(map(len, rows))
        padding = tokens.pad if tokens.pad is not None else tokens.bos
        return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


class Blip2ForConditionalGeneration(EngineModel):
    """Stands in for transformers' class of this name, also in `pipeline("image-text-to-text", ...)`."""


def config_of(manifest: Manifest) -> Blip2Config:
    """Sizes of an engine's model, as transformers writes them."""
    model, tokens = manifest.model, manifest.tokens
    text = dict(model["text"])
    text.setdefault("bos_token_id", tokens.bos)
    return Blip2Config(
        vision_config=dict(model["vision"]),
        qformer_config=dict(model["qformer"]),
        text_config=text,
        num_query_tokens=model["num_query_tokens"],
        image_token_index=tokens.image,
    )


def _options(config: GenerationConfig | None, keywords: dict[str, Any]) -> ResolvedOptions:
    """transformers' options -> ours.

    Raises:
        InputError: one that changes the text there and cannot here.
    """
    given = dict(config.to_diff_dict()) if config is not None else {}
    given.pop("transformers_version", None)
    given |= keywords
    for name in [name for name in given if name in WITHOUT_EFFECT]:
        allowed, value = WITHOUT_EFFECT[name], given.pop(name)
        if allowed is not None and value not in allowed:
            raise InputError(f"{name}={value!r} is nothing that an engine can do: leave it out")
    given = {name: value for name, value in given.items() if value is not None or name in OURS}
    options = resolve_options(GENERATE_DEFAULTS, None, given)
    if options.do_sample and options.seed is None:  # so that torch.manual_seed decides, as it does in transformers
        options = resolve_options(GENERATE_DEFAULTS, None, given | {"seed": int(torch.randint(2**31, (1,)))})
    return options

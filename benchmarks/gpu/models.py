"""The two models that are measured: one set of random weights, ours as stages, and transformers' own classes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Blip2Config as TheirConfig
from transformers import Blip2ForConditionalGeneration

from blip2rt.backends.rounded_linears import LAYERS
from blip2rt.backends.torch_modules import Stage
from blip2rt.decoder import CONSTANT, CachedDecoder, run_encoder
from blip2rt.export.modules import round_linear
from blip2rt.model import Blip2, Blip2Config
from blip2rt.model.config import T5Config
from blip2rt.model.names import TRANSFORMERS, Names
from blip2rt.model.signatures import stage_specs
from blip2rt.options import ResolvedOptions
from blip2rt.scores import num_continuations
from blip2rt.search import run_searches, shortlist_size, start_search
from blip2rt.stages import DECODER, ENCODER, KEYS_AND_VALUES, QFORMER, VISION

Array = np.ndarray[Any, Any]

IMAGE = 5  # the token that stands for a query slot
BEGIN = [2, 7, 11, 13]  # BOS and three words


def make_models(
    vision: Mapping[str, Any],
    qformer: Mapping[str, Any],
    text: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple["Ours", "Transformers"]:
    """Both models on the device, over the same weights."""
    qformer = {**qformer, "encoder_hidden_size": vision.get("hidden_size", 1408)}
    theirs = TheirConfig(vision_config=dict(vision), qformer_config=qformer, text_config=dict(text))
    theirs.image_token_index = IMAGE
    config = Blip2Config.from_transformers(theirs.to_dict())
    with torch.device("meta"):
        model = Blip2(config)
        peer = Blip2ForConditionalGeneration(theirs)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    names = Names(TRANSFORMERS, text["model_type"])
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        keys = names(name)
        if keys[0] in weights:  # T5's encoder and decoder have one token embedding
            parameter.data = weights[keys[0]]
        weights |= {key: part for key, part in zip(keys, parameter.chunk(len(keys)), strict=True) if key is not None}
    shapes = {name: value.shape for name, value in peer.state_dict().items()}
    missing, _ = peer.load_state_dict(
        {name: weights[name].reshape(shapes[name]) for name in shapes.keys() & weights.keys()},
        strict=False,
        assign=True,
    )
    peer.tie_weights()
    left = [name for name, parameter in peer.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"transformers' model has weights that ours lacks: {left[:3]} (missing: {missing[:3]})")
    return Ours(model, config, device, dtype), Transformers(peer.eval().requires_grad_(False), device, dtype)


class Ours:
    """The stages of blip2rt, the search on the host."""

    def __init__(self, model: Blip2, config: Blip2Config, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self._model, self._specs = model, stage_specs(config)
        self._stages = {
            name: Stage(name, model.get_submodule(name), spec, dtype, device) for name, spec in self._specs.items()
        }

    @contextmanager
    def rounded_decoder(self, precision: str) -> Iterator[None]:
        """For as long as that the decoder's linear layers have fewer bits."""
        blocks, kind = self._model.decoder.blocks, LAYERS[precision]
        replaced = {name: layer for name, layer in blocks.named_modules() if kind.takes(layer)}
        try:
            for name, layer in replaced.items():
                rounded = kind(layer)
                for part, value in round_linear(layer.weight.float(), precision).items():
                    rounded.get_parameter(part).copy_(value)
                blocks.set_submodule(name, rounded)
            yield
        finally:
            for name, layer in replaced.items():
                blocks.set_submodule(name, layer)

    def pixels(self, batch: int) -> Array:
        """Random pixel values [B, 3, S, S]."""
        size = self.config.vision.image_size
        return np.random.default_rng(batch).standard_normal((batch, 3, size, size), dtype=np.float32)

    def captions(self, pixels: Array, beams: int, new_tokens: int) -> list[list[int]]:
        """Token ids of the best caption of every picture, all of one length."""
        image_embeds = self._stages[VISION](pixel_values=pixels)["image_embeds"]
        prefix = self._stages[QFORMER](image_embeds=image_embeds)["prefix"]
        options = ResolvedOptions(num_beams=beams, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        searches = [start_search(options, BEGIN, []) for _ in pixels]
        for _ in run_searches(self._decoder(prefix, beams, new_tokens, shortlist_size(options, [])), searches):
            pass
        return [search.sequences()[0].token_ids for search in searches]

    def logits(self, pixels: Array) -> Array:
        """Of the first token, [B, V]."""
        image_embeds = self._stages[VISION](pixel_values=pixels)["image_embeds"]
        prefix = self._stages[QFORMER](image_embeds=image_embeds)["prefix"]
        found = self._decoder(prefix, 1, 1, None).prefill()
        assert isinstance(found, np.ndarray)
        return np.asarray(found[:, 0])

    def float32_logits(self, pixels: Array) -> Array:
        """Of the first token, [B, V], with the same weights in float32."""
        with widened(self._model):
            return Ours(self._model, self.config, self.device, torch.float32).logits(pixels)

    def bound_vision(self, pixels: Array) -> Callable[[], None]:
        """The image encoder on bound pixel values; what it gives stays on the device."""
        binding = self._stages[VISION].bind()
        binding.input("pixel_values", pixels)
        return binding.run

    def bound_prefill(self, batch: int) -> Callable[[], object]:
        """The prefix of a batch of pictures through the language model: T5's encoder, OPT's decoder."""
        prefix = self._prefix(batch)
        if ENCODER in self._stages:
            prompts = [BEGIN] * batch
            return lambda: run_encoder(self._stages[ENCODER], prefix, prompts)
        return self._decoder(prefix, 1, 2, 1).prefill

    def bound_step(self, batch: int, rows: int) -> Callable[[], None]:
        """A step behind the prefix, again and again at the same place: its work and its bytes are always the same."""
        spec = self._specs[DECODER]
        sizes = {"B": batch, "S": rows, "R": rows, "C": 64, "E": 48}
        binding = self._stages[DECODER].bind()
        for tensor in spec.inputs:
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            is_cache = tensor.name.startswith(KEYS_AND_VALUES)
            dtype = np.int64 if tensor.dtype == "int64" else np.float32
            array = self._stages[DECODER].cache(shape) if is_cache else np.zeros(shape, dtype)
            binding.input(tensor.name, array, tensor.name in CONSTANT)
        binding.input("sums", np.zeros((batch, rows), np.float32))
        shape = (batch, num_continuations(2 * rows, rows, self.config.text.vocab_size))
        for name, dtype in (
            ("sums", np.float32),
            ("parents", np.int64),
            ("tokens", np.int64),
            ("logprobs", np.float32),
        ):
            binding.output(f"best_{name}", np.empty(shape, dtype))
        return binding.run

    def _prefix(self, batch: int) -> Array:
        shape = (batch, self.config.num_query_tokens, self.config.text.hidden_size)
        return np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)

    def _decoder(self, prefix: Array, rows: int, new_tokens: int, shortlist: int | None) -> CachedDecoder:
        prompts, encoded = [BEGIN] * len(prefix), None
        if isinstance(text := self.config.text, T5Config):
            encoded = run_encoder(self._stages[ENCODER], prefix, prompts)
            prefix, prompts = prefix[:, :0], [[text.start_token_id or 0]] * len(prefix)
        stage, spec = self._stages[DECODER], self._specs[DECODER]
        return CachedDecoder(stage, spec, prefix, prompts, rows, new_tokens, encoded, shortlist)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """For as long as that a module's weights are float32."""
    kept = {name: parameter.data for name, parameter in module.named_parameters()}
    try:
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = kept[name]


class Transformers:
    """transformers' own model and search."""

    def __init__(self, model: Blip2ForConditionalGeneration, device: torch.device, dtype: torch.dtype):
        self._model, self._device, self._dtype = model, device, dtype
        self._more: dict[str, Any] = {}

    def compile(self) -> None:
        """From now on with a static cache and compiled steps, as transformers offers it."""
        self._more = {"cache_implementation": "static"}
        self._model.language_model.forward = torch.compile(
            self._model.language_model.forward, mode="reduce-overhead", fullgraph=False
        )

    @torch.inference_mode()
    def captions(self, pixels: Array, beams: int, new_tokens: int) -> list[list[int]]:
        """Token ids of the best caption of every picture, all of one length."""
        found: Any = self._model.generate(
            **self._inputs(pixels),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=1,
            **self._more,
        )
        rows: list[list[int]] = found[:, -new_tokens:].tolist()
        return rows

    @torch.inference_mode()
    def logits(self, pixels: Array) -> Array:
        """Of the first token, [B, V]."""
        inputs = self._inputs(pixels)
        text: Any = self._model.config.text_config
        if text.is_encoder_decoder:
            start = torch.full((len(pixels), 1), text.decoder_start_token_id, device=self._device)
            inputs["decoder_input_ids"] = start
        found: Array = self._model(**inputs).logits[:, -1].float().cpu().numpy()
        return found

    def _inputs(self, pixels: Array) -> dict[str, Any]:
        queries = self._model.config.num_query_tokens
        ids = torch.tensor([[IMAGE] * queries + BEGIN] * len(pixels), device=self._device)
        images = torch.from_numpy(pixels).to(self._device, self._dtype)
        return {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

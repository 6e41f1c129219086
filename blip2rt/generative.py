"""The engines that write: what a picture and a prompt need to become a text, one method per arrow of pipeline.py.

image ── preprocess ──> pixel_values [B, 3, S, S]
      ── see ─────────> image_embeds [B, N+1, Dv], prefix [B, Q, D]
text  ── prompt ──────> ids, for the language model, and for a Q-Former that reads questions
both  ── open_decoder > `prefill` once, `step` many
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .backends import open_stages
from .candidates import rank_candidates
from .decoder import CachedDecoder, run_encoder
from .errors import EngineError, InputError
from .inputs import in_batches
from .manifest import MANIFEST_NAME, Manifest
from .options import ResolvedOptions
from .preprocess import ImageSource, preprocess
from .qformer_texts import padded_texts
from .results import Generation, ImageFeatures
from .search import RowSearch, TokenSequence, run_searches, shortlist_size, start_search
from .stages import DECODER, ENCODER, QFORMER, VISION
from .tokenizer import QUESTION_PROMPT, SHORT_QUESTION_PROMPT, TextTokenizer, Tokenizer

Array = np.ndarray[Any, Any]
Kind = TypeVar("Kind", bound=Generation)


@dataclass(frozen=True)
class Prompt:
    """What stands beside a picture: ids for the language model, and of the question for a Q-Former that reads it."""

    ids: list[int]
    question_ids: list[int] | None = None


def _sizes(manifest: Manifest, directory: Path, part: str) -> dict[str, Any]:
    """Sizes of a part of the model.

    Raises:
        EngineError: the manifest was altered.
    """
    sizes = manifest.model.get(part)
    if not isinstance(sizes, dict) or not isinstance(sizes.get("vocab_size"), int):
        raise EngineError(
            f"{directory / MANIFEST_NAME}: model.{part} does not say its vocab_size: build the engine again with "
            "`blip2rt export`"
        )
    return sizes


class GenerativeEngine:
    """The stages of a generative engine. Safe to call from several threads."""

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None):
        """Open the stages.

        Raises:
            EngineError: one of them, or a tokenizer, cannot be read.
        """
        self.directory, self.manifest = directory, manifest
        stages = open_stages(directory, manifest, threads)
        self.batch_size = min(stage.batch_size for stage in stages.values())
        self._vision, self._qformer, self._decoder = stages[VISION], stages[QFORMER], stages[DECODER]
        self._encoder = stages.get(ENCODER)  # None: a decoder-only language model
        text, qformer = (_sizes(manifest, directory, part) for part in ("text", "qformer"))
        self.tokenizer = Tokenizer(
            directory / "tokenizer.json", manifest.tokens, text["vocab_size"], self._encoder is not None
        )
        self._num_positions: int | None = text.get("max_position_embeddings")  # None: T5, whose positions are relative
        self._question_tokenizer = None  # None: a Q-Former that sees pictures only
        if manifest.question_tokens:
            self._question_tokenizer = TextTokenizer(
                directory / "question_tokenizer.json",
                manifest.question_tokens,
                qformer["vocab_size"],
                qformer["max_position_embeddings"],
            )
        self.num_queries = int(manifest.stages[QFORMER].signature.outputs[1].shape[1])

    def preprocess(self, image: ImageSource) -> Array:
        """Pixel values [3, S, S] of one picture.

        Raises:
            ImageError: the picture cannot be read.
        """
        spec = self.manifest.image
        return preprocess(image, spec.size, spec.mean, spec.std)

    def encode(self, images: Sequence[Any], first_index: int | None) -> list[ImageFeatures]:
        """Features of images; those that are features already are checked only.

        Raises:
            ImageError: a picture that cannot be read; it is called by its place after `first_index`.
            InputError: features of another model.
        """
        return in_batches(images, first_index, self.preprocess, self.see, self.checked_features, self.batch_size)

    def see(self, pixel_values: Array) -> list[ImageFeatures]:
        """[B, 3, S, S] -> features of B images, as they are seen without a question."""
        image_embeds = self._vision(pixel_values=pixel_values)["image_embeds"]  # [B, N+1, Dv]
        question: dict[str, Array] = {}
        if self._question_tokenizer:  # of no tokens
            rows = len(image_embeds)
            question = {
                "text_ids": np.empty((rows, 0), np.int64),
                "text_mask": np.empty((rows, 1, 1, 0), np.float32),
            }
        queries = self._qformer(image_embeds=image_embeds, **question)  # query_embeds [B, Q, Dq], prefix [B, Q, D]
        return list(map(ImageFeatures, image_embeds, queries["query_embeds"], queries["prefix"]))

    def checked_features(self, features: ImageFeatures) -> ImageFeatures:
        """The same.

        Raises:
            InputError: they are of another model.
        """
        qformer = self.manifest.stages[QFORMER].signature
        for name, spec in (("image_embeds", qformer.inputs[0]), ("prefix", qformer.outputs[1])):
            wanted, found = spec.shape[1:], getattr(getattr(features, name), "shape", None)  # [N+1, Dv], [Q, D]
            if found != wanted:
                raise InputError(
                    f"these ImageFeatures are of another model: {name} {found}, this engine wants {wanted}"
                )
        return features

    @property
    def question_template(self) -> str:
        """How the language model was asked in training."""
        return QUESTION_PROMPT if self._encoder is None else SHORT_QUESTION_PROMPT

    def question(self, text: Any, options: ResolvedOptions) -> Prompt:
        """A question as the models were trained to read it.

        Raises:
            InputError: as `prompt`.
        """
        if not isinstance(text, str):
            raise InputError(f"a question must be a string, not {type(text).__name__}")
        return self.prompt(self.question_template.format(text), options, text)

    def prompt(self, text: Any, options: ResolvedOptions, question: str | None = None) -> Prompt:
        """A prompt, read word for word; `question` is what a Q-Former that reads questions is told of it.

        Raises:
            InputError: no string, no possible text, or more tokens than the positions of the models.
        """
        prompt = self.prompt_of_ids(self.tokenizer.encode(text), options)
        if self._question_tokenizer is None or question is None:
            return prompt
        return replace(prompt, question_ids=self._question_tokenizer.encode(question, "the question"))

    def prompt_of_ids(self, ids: list[int], options: ResolvedOptions) -> Prompt:
        """A prompt as token ids, with what the tokenizer puts before and behind a text.

        Raises:
            InputError: none, one beyond the embedding rows, or more than the positions of the models.
        """
        beyond = [i for i in ids if not 0 <= i < self.tokenizer.vocab_size]
        if beyond or not ids:
            raise InputError(f"a prompt's ids must be some, from 0 to {self.tokenizer.vocab_size - 1}, not {ids!r:.80}")
        if self._num_positions and self.num_queries + len(ids) + options.max_new_tokens - 1 > self._num_positions:
            left = max(0, self._num_positions - self.num_queries - len(ids) + 1)
            raise InputError(
                f"{self.num_queries} image slots, a prompt of {len(ids)} tokens and max_new_tokens="
                f"{options.max_new_tokens} do not fit the model's {self._num_positions} positions: "
                + (f"max_new_tokens can be {left} at most" if left else "shorten the prompt")
            )
        return Prompt(ids)

    def open_decoder(
        self,
        features: Sequence[ImageFeatures],
        prompts: Sequence[Prompt],
        options: ResolvedOptions,
        all_logits: bool = False,
    ) -> CachedDecoder:
        """A decoder of B pictures, with their prompts, before its prefill; it may give only what `options` look at."""
        prefixes = self._prefixes(features, prompts)
        ids = [prompt.ids for prompt in prompts]
        spec = self.manifest.stages[DECODER].signature
        encoded = None
        if self._encoder is not None:
            encoded = run_encoder(self._encoder, prefixes, ids)
            prefixes, ids = prefixes[:, :0], [[self.manifest.tokens.bos]] * len(ids)
        best = None if all_logits else shortlist_size(options, self.manifest.tokens.stop)
        lengths = (options.num_rows, options.max_new_tokens)
        return CachedDecoder(self._decoder, spec, prefixes, ids, *lengths, encoded, best)

    def _prefixes(self, features: Sequence[ImageFeatures], prompts: Sequence[Prompt]) -> Array:
        """[B, Q, D]: where a question stands beside a picture, what the queries see in its light."""
        prefixes = np.stack([f.prefix for f in features if f.prefix is not None])
        asked = {b: prompt.question_ids for b, prompt in enumerate(prompts) if prompt.question_ids}
        if self._question_tokenizer and asked:
            places, rows = list(asked), list(asked.values())
            tokenizer = self._question_tokenizer
            for batch, ids, mask in padded_texts(rows, len(rows), tokenizer.tokens.pad or 0, tokenizer.num_positions):
                batch = [places[i] for i in batch]
                images = np.stack([features[b].image_embeds for b in batch])  # [B, N+1, Dv]
                prefixes[batch] = self._qformer(image_embeds=images, text_ids=ids, text_mask=mask)["prefix"]
        return prefixes

    def history(self, prompt: Prompt, options: ResolvedOptions) -> list[int]:
        """What the repetition and n-gram rules see before the first token.

        transformers: image slots, BOS and prompt; the start token alone with an encoder, and always in LAVIS.
        """
        if self._encoder is not None or options.rules == "lavis":
            return [self.manifest.tokens.bos]
        image = self.manifest.tokens.image
        return [-1 if image is None else image] * self.num_queries + prompt.ids

    def decode(
        self,
        kind: type[Kind],
        features: Sequence[ImageFeatures],
        prompts: Sequence[Prompt],
        options: ResolvedOptions,
        candidates: list[list[int]] | None = None,
    ) -> list[Kind]:
        """A text for each picture: generated, or the best of `candidates` (token ids of each)."""
        stop = self.manifest.tokens.stop
        if candidates is not None:
            decoders = (self.open_decoder(features, prompts, options, True) for _ in repeat(None))
            ranked = rank_candidates(candidates, options.num_rows, stop, len(features), decoders)
            return [self.result(kind, sequences) for sequences in ranked]
        searches = [start_search(options, self.history(prompt, options), stop) for prompt in prompts]
        for _ in run_searches(self.open_decoder(features, prompts, options), searches):
            pass
        return [self.result(kind, search.sequences()) for search in searches]

    def result(self, kind: type[Kind], sequences: list[TokenSequence]) -> Kind:
        """The best sequence, with the others as its alternatives."""
        best, *others = sequences
        alternatives: list[Generation] = [self.result(kind, [other]) for other in others]
        return kind(self.text(best), best.token_ids, best.token_logprobs, best.finish_reason, best.score, alternatives)

    def stream(self, features: ImageFeatures, prompt: Prompt, options: ResolvedOptions) -> Iterator[str]:
        """Pieces of the text of one sequence, as they come."""
        search = RowSearch(options, self.history(prompt, options), self.manifest.tokens.stop)
        given = ""
        for _ in run_searches(self.open_decoder([features], [prompt], options), [search]):
            text = self.text(search.sequences()[0])
            # half a character decodes to U+FFFD: wait for the rest
            if len(text) > len(given) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(given) :]
                given = text
        text = self.text(search.sequences()[0])
        if len(text) > len(given):
            yield text[len(given) :]

    def text(self, sequence: TokenSequence) -> str:
        """Special tokens skipped, stripped."""
        return self.tokenizer.decode(sequence.token_ids).strip()

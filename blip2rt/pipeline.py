"""START HERE: a picture becomes text.

image ── preprocess ──> pixel_values [B, 3, S, S]
      ── vision ──────> image_embeds [B, N+1, Dv]     \\ `encode`: once an image
      ── qformer ─────> prefix       [B, Q, D]        /
prompt ── tokenizer ──> prompts      B lists of ids
     (── encoder ─────> keys, values [B, H, E, d]       T5 only: picture and prompt, read once)
      ── decoder ─────> logits, cache                   `prefill` once, `step` many
      ── search ──────> token ids    ── tokenizer ──> text
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from .backends import Stage
from .decoder import CachedDecoder, padded
from .engine_directory import check_files, find_engine
from .errors import EngineError, ImageError, InputError
from .manifest import NATIVE, Manifest
from .native import native_path
from .options import GenerationOptions, ResolvedOptions, resolve_options
from .preprocess import ImageSource, preprocess
from .progress import progress
from .results import Answer, Caption, Generation, ImageFeatures
from .search import RowSearch, TokenSequence, run_searches, start_search
from .stages import DECODER, ENCODER, MASKED, QFORMER, VISION
from .tokenizer import CAPTION_PROMPT, QUESTION_PROMPT, SHORT_QUESTION_PROMPT, Tokenizer

Array = np.ndarray[Any, Any]
Image = ImageSource | ImageFeatures
Kind = TypeVar("Kind", bound=Generation)

CAPTION_DEFAULTS = {"num_beams": 5, "max_new_tokens": 30}
ANSWER_DEFAULTS = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0}
GENERATE_DEFAULTS = {"max_new_tokens": 20}
BATCH_SIZE = 8  # images that go through the engines together; answers do not depend on it


class Pipeline:
    """The engines of a directory, ready to caption, answer and follow instructions.

    Every method takes one image or a list of images (a list in gives a list out, order kept). An image is a path,
    encoded bytes, a `PIL.Image`, a uint8 array [h, w, 3], a float32 array [3, S, S] of normalised pixel values, or the
    `ImageFeatures` that `encode` gave. A single prompt serves all images; a list of prompts has the list's length.
    Options are keywords or `options=GenerationOptions(...)`. A pipeline may be used from several threads.
    """

    def __init__(
        self,
        path: str | Path = "engines",
        *,
        name: str | None = None,
        threads: int | None = None,
        device: str | None = None,
    ):
        """Open an engine directory, or the one engine in a folder of them.

        Args:
            path: an engine directory, or a folder that holds one.
            name: which engine of the folder, where it holds several.
            threads: cores to use; None: all that this process may use.
            device: None: what the engine was built for.

        Raises:
            EngineError: none there, several, damaged, newer than this program, or built for another device.
            InputError: a wrong argument.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads must be a whole number of at least 1, not {threads!r}")
        self.directory = find_engine(path, name)
        self.manifest = Manifest.read(self.directory)
        if device not in (None, self.manifest.device) or self.manifest.device != "cpu":
            raise EngineError(
                f"{self.directory} was built for {self.manifest.device!r}, not {device or 'cpu'!r}: build one with "
                f"`blip2rt export --model {self.manifest.source_id} --device {device or 'cpu'}`"
            )
        if self.manifest.kernels == NATIVE and native_path() is None:
            raise EngineError(
                f"{self.directory} runs on the native kernels, which this installation lacks: install blip2rt where "
                "there is a C++ compiler (and do not set BLIP2RT_KERNELS=stock), or build an engine without them here: "
                f"`blip2rt export --model {self.manifest.source_id} --precision {self.manifest.precision} --force`"
            )
        check_files(self.manifest, self.directory)
        stages = {
            stage: Stage(stage, self.directory / entry.file, threads) for stage, entry in self.manifest.stages.items()
        }
        self._vision, self._qformer, self._decoder = stages[VISION], stages[QFORMER], stages[DECODER]
        self._encoder = stages.get(ENCODER)  # None: a decoder-only language model
        text = self.manifest.model["text"]
        self._tokenizer = Tokenizer(
            self.directory / "tokenizer.json", self.manifest.tokens, text["vocab_size"], self._encoder is not None
        )
        self._num_positions: int | None = text.get("max_position_embeddings")  # None: T5, whose positions are relative

    def preprocess(self, image: ImageSource) -> Array:
        """Pixel values [3, S, S] of one picture, which every call takes in its place.

        Raises:
            ImageError: the picture cannot be read.
        """
        spec = self.manifest.image
        return preprocess(image, spec.size, spec.mean, spec.std)

    @overload
    def encode(self, images: list[Any] | tuple[Any, ...]) -> list[ImageFeatures]: ...
    @overload
    def encode(self, images: Image) -> ImageFeatures: ...
    def encode(self, images: Any) -> Any:
        """Run vision tower and Q-Former once; the result stands in for the image in every other call.

        Raises:
            ImageError: a picture that cannot be read; in a list it names the index.
        """
        features = self._encode(_as_list(images), 0 if _is_list(images) else None)
        return features if _is_list(images) else features[0]

    def caption(
        self,
        images: Any,
        prompt: str | Sequence[str] = CAPTION_PROMPT,
        *,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Caption: by default 5 beams and at most 30 tokens after "a photo of". Returns `Caption` or a list of them.

        Raises:
            InputError: wrong images (`ImageError`), prompts or options.
        """
        return self._generate(Caption, images, prompt, resolve_options(CAPTION_DEFAULTS, options, keywords))

    def answer(
        self,
        images: Any,
        question: str | Sequence[str],
        *,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Answer: 5 beams, 10 tokens, length penalty -1, as the paper's VQA. Returns `Answer` or a list of them.

        Raises:
            InputError: wrong images (`ImageError`), questions or options.
        """
        resolved = resolve_options(ANSWER_DEFAULTS, options, keywords)
        template = QUESTION_PROMPT if self._encoder is None else SHORT_QUESTION_PROMPT
        if isinstance(question, str):
            prompts: str | list[str] = template.format(question)
        else:
            prompts = [template.format(_checked_text(text)) for text in _checked_texts(question)]
        return self._generate(Answer, images, prompts, resolved)

    def generate(
        self,
        images: Any,
        prompt: str | Sequence[str],
        *,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Any instruction, used verbatim; greedy and 20 tokens by default. Returns `Generation` or a list of them.

        Raises:
            InputError: wrong images (`ImageError`), prompts or options.
        """
        return self._generate(Generation, images, prompt, resolve_options(GENERATE_DEFAULTS, options, keywords))

    def stream(
        self, image: Image, prompt: str = CAPTION_PROMPT, *, options: GenerationOptions | None = None, **keywords: Any
    ) -> Iterator[str]:
        """Pieces of the text as they are generated, greedy or sampled; joined they are `generate(...).text`.

        Raises:
            InputError: a wrong image (`ImageError`), prompt or option; more than one image, beam or sequence.
        """
        resolved = resolve_options(GENERATE_DEFAULTS, options, keywords)
        if resolved.num_rows > 1:
            option = "num_beams" if resolved.num_beams > 1 else "num_return_sequences"
            raise InputError(f"{option}={resolved.num_rows} cannot be streamed: a stream is one sequence")
        if _is_list(image):
            raise InputError("stream takes one image, not a list")
        prompts = self._prompts(prompt, 1, resolved)
        return self._stream(self._encode([image], None), prompts, resolved)

    def _generate(self, kind: type[Kind], images: Any, prompt: Any, options: ResolvedOptions) -> Any:
        images_list = _as_list(images)
        if not _is_list(images) and not isinstance(prompt, str):
            raise InputError(f"one image takes one prompt (a string), not {type(prompt).__name__}")
        prompts = self._prompts(prompt, len(images_list), options)
        results: list[Kind] = []
        starts = range(0, len(images_list), BATCH_SIZE)
        for start in progress(starts, "images", total=len(images_list), step=BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            features = self._encode(images_list[batch], start if _is_list(images) else None)
            results += self._decode(kind, features, prompts[batch], options)
        return results if _is_list(images) else results[0]

    def _encode(self, images: Sequence[Any], first_index: int | None) -> list[ImageFeatures]:
        """Features of images, `BATCH_SIZE` pictures at a time; those that are features already are checked only."""
        features: dict[int, ImageFeatures] = {}
        pictures = [i for i, image in enumerate(images) if not isinstance(image, ImageFeatures)]
        for start in range(0, len(pictures), BATCH_SIZE):
            places = pictures[start : start + BATCH_SIZE]
            pixel_values = np.stack([self._preprocess(images[i], i, first_index) for i in places])  # [B, 3, S, S]
            image_embeds = self._vision(pixel_values=pixel_values)["image_embeds"]  # [B, N+1, Dv]
            queries = self._qformer(image_embeds=image_embeds)  # query_embeds [B, Q, Dq], prefix [B, Q, D]
            for row, i in enumerate(places):
                features[i] = ImageFeatures(image_embeds[row], queries["query_embeds"][row], queries["prefix"][row])
        return [features.get(i) or self._checked_features(image) for i, image in enumerate(images)]

    def _preprocess(self, image: Any, place: int, first_index: int | None) -> Array:
        try:
            return self.preprocess(image)
        except ImageError as error:
            raise ImageError(error.reason, None if first_index is None else first_index + place) from error

    def _checked_features(self, features: ImageFeatures) -> ImageFeatures:
        wanted = self.manifest.stages[QFORMER].signature.outputs[1].shape[1:]  # (Q, D)
        found = None if features.prefix is None else features.prefix.shape
        if found != wanted:
            raise InputError(f"these ImageFeatures are of another model: prefix {found}, this engine wants {wanted}")
        return features

    def _prompts(self, prompt: Any, num_images: int, options: ResolvedOptions) -> list[list[int]]:
        """Token ids of the prompt of every image, checked against the positions that the model has."""
        if not isinstance(prompt, str) and len(_checked_texts(prompt)) != num_images:
            raise InputError(f"{len(prompt)} prompts for {num_images} images: give one prompt, or one for every image")
        ids = [self._tokenizer.encode(text) for text in ([prompt] * num_images if isinstance(prompt, str) else prompt)]
        num_queries = self._num_queries
        longest = max(len(prompt_ids) for prompt_ids in ids)
        if self._num_positions and num_queries + longest + options.max_new_tokens - 1 > self._num_positions:
            left = max(0, self._num_positions - num_queries - longest + 1)
            raise InputError(
                f"{num_queries} image slots, a prompt of {longest} tokens and max_new_tokens="
                f"{options.max_new_tokens} do not fit the model's {self._num_positions} positions: "
                + (f"max_new_tokens can be {left} at most" if left else "shorten the prompt")
            )
        return ids

    def _decode(
        self, kind: type[Kind], features: list[ImageFeatures], prompts: list[list[int]], options: ResolvedOptions
    ) -> list[Kind]:
        stop = self.manifest.tokens.stop
        searches = [start_search(options, self._history(prompt, options), stop) for prompt in prompts]
        for _ in run_searches(self._open_decoder(features, prompts, options), searches):
            pass
        return [self._result(kind, search.sequences()) for search in searches]

    def _result(self, kind: type[Kind], sequences: list[TokenSequence]) -> Kind:
        best, *others = sequences
        text = self._tokenizer.decode(best.token_ids).strip()
        alternatives: list[Generation] = [self._result(kind, [other]) for other in others]
        return kind(text, best.token_ids, best.token_logprobs, best.finish_reason, best.score, alternatives)

    def _stream(
        self, features: list[ImageFeatures], prompts: list[list[int]], options: ResolvedOptions
    ) -> Iterator[str]:
        search = RowSearch(options, self._history(prompts[0], options), self.manifest.tokens.stop)
        given = ""
        for _ in run_searches(self._open_decoder(features, prompts, options), [search]):
            text = self._tokenizer.decode(search.sequences()[0].token_ids).strip()
            # half a character decodes to U+FFFD: wait for the rest
            if len(text) > len(given) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(given) :]
                given = text
        text = self._tokenizer.decode(search.sequences()[0].token_ids).strip()
        if len(text) > len(given):
            yield text[len(given) :]

    def _open_decoder(
        self, features: list[ImageFeatures], prompts: list[list[int]], options: ResolvedOptions
    ) -> CachedDecoder:
        prefixes = np.stack([f.prefix for f in features if f.prefix is not None])  # [B, Q, D]
        spec = self.manifest.stages[DECODER].signature
        encoded = None
        if self._encoder is not None:
            encoded = self._encode_prompts(prefixes, prompts)
            prefixes, prompts = prefixes[:, :0], [[self.manifest.tokens.bos]] * len(prompts)
        return CachedDecoder(self._decoder, spec, prefixes, prompts, options.num_rows, options.max_new_tokens, encoded)

    def _encode_prompts(self, prefixes: Array, prompts: list[list[int]]) -> dict[str, Array]:
        """Run the encoder over [prefix, prompt] of every image, right-padded: what the decoder looks at."""
        assert self._encoder is not None
        batch, num_queries, width = prefixes.shape
        lengths = np.array([num_queries + len(prompt) for prompt in prompts])
        num_rows = padded(int(lengths.max()))  # E
        prefix = np.zeros((batch, num_rows, width), np.float32)
        prefix[:, :num_queries] = prefixes
        input_ids = np.zeros((batch, num_rows), np.int64)
        input_ids[:, :num_queries] = -1  # rows of the prefix
        for b, prompt in enumerate(prompts):
            input_ids[b, num_queries : lengths[b]] = prompt
        rows = np.arange(num_rows)
        mask = np.where(rows < lengths[:, None], np.float32(0), np.float32(MASKED))[:, None, None]  # [B, 1, 1, E]
        keys_and_values = self._encoder(
            prefix=prefix, input_ids=input_ids, positions=np.tile(rows, (batch, 1)), encoder_mask=mask
        )
        return {**keys_and_values, "encoder_mask": mask}

    def _history(self, prompt: list[int], options: ResolvedOptions) -> list[int]:
        """What the repetition and n-gram rules see before the first token.

        transformers: image slots, BOS and prompt; the start token alone with an encoder, and always in LAVIS.
        """
        if self._encoder is not None or options.rules == "lavis":
            return [self.manifest.tokens.bos]
        image = self.manifest.tokens.image
        return [-1 if image is None else image] * self._num_queries + prompt

    @property
    def _num_queries(self) -> int:
        return int(self.manifest.stages[QFORMER].signature.outputs[1].shape[1])


def _is_list(images: Any) -> bool:
    return isinstance(images, list | tuple)


def _as_list(images: Any) -> list[Any]:
    """One image as a list of one.

    Raises:
        InputError: an empty list.
    """
    if not _is_list(images):
        return [images]
    if not images:
        raise InputError("the list of images is empty")
    return list(images)


def _checked_texts(texts: Any) -> list[Any]:
    if not _is_list(texts):
        raise InputError(f"prompts must be a string or a list of strings, not {type(texts).__name__}")
    return list(texts)


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise InputError(f"a prompt must be a string, not {type(text).__name__}")
    return text

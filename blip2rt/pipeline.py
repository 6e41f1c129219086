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
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from .backends import Stage
from .candidates import CANDIDATE_ROWS, checked_candidates, rank_candidates
from .decoder import CachedDecoder, run_encoder
from .engine_directory import checked_manifest, find_engines
from .errors import EngineError, InputError
from .inputs import BATCH_SIZE, as_list, checked_text, checked_texts, in_batches, is_list
from .manifest import GENERATIVE, RETRIEVAL
from .options import GenerationOptions, ResolvedOptions, resolve_options
from .preprocess import ImageSource, preprocess
from .progress import progress
from .results import Answer, Caption, Generation, ImageFeatures, MatchScores
from .retrieval import RetrievalEngine
from .search import RowSearch, TokenSequence, run_searches, start_search
from .stages import DECODER, ENCODER, QFORMER, VISION
from .tokenizer import CAPTION_PROMPT, QUESTION_PROMPT, SHORT_QUESTION_PROMPT, Tokenizer

Array = np.ndarray[Any, Any]
Image = ImageSource | ImageFeatures
Kind = TypeVar("Kind", bound=Generation)

CAPTION_DEFAULTS = {"num_beams": 5, "max_new_tokens": 30}
ANSWER_DEFAULTS = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0}
GENERATE_DEFAULTS = {"max_new_tokens": 20}


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
        """Open an engine directory, or of a folder of them the one generative and the one retrieval engine.

        Args:
            path: an engine directory, or a folder that holds some.
            name: which engine of the folder, where it holds several of a kind.
            threads: cores to use; None: all that this process may use.
            device: None: what the engine was built for.

        Raises:
            EngineError: none there, several of a kind, damaged, newer than this program, or built for another device.
            InputError: a wrong argument.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads must be a whole number of at least 1, not {threads!r}")
        engines = find_engines(path, name)
        manifests = {kind: checked_manifest(directory, device) for kind, directory in engines.items()}
        self._retrieval = (
            RetrievalEngine(engines[RETRIEVAL], manifests[RETRIEVAL], threads) if RETRIEVAL in engines else None
        )
        kind = GENERATIVE if GENERATIVE in engines else RETRIEVAL
        self.directory, self.manifest = engines[kind], manifests[kind]
        if kind == GENERATIVE:
            self._open_generative(threads)

    def _open_generative(self, threads: int | None) -> None:
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
        sources, first_index = as_list(images), 0 if is_list(images) else None
        features = seen = self.retrieval_features(sources, first_index) if self._retrieval else []
        if self.manifest.kind == GENERATIVE:
            features = self._encode(sources, first_index)
            features = [replace(f, retrieval=r) for f, r in zip(features, seen, strict=True)] if seen else features
        return features if is_list(images) else features[0]

    def embed_images(self, images: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """ITC embeddings [I, Q, E] of one image or a list of images: unit vectors, one for each query.

        Raises:
            ImageError: a picture that cannot be read.
            EngineError: no retrieval engine is open.
        """
        seen = self.retrieval_features(as_list(images), 0 if is_list(images) else None)
        return np.stack([f.itc_embeds for f in seen if f.itc_embeds is not None])

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """ITC embeddings [T, E] of one text or a list of texts: unit vectors.

        Raises:
            InputError: empty texts, or ones longer than the model's positions.
            EngineError: no retrieval engine is open.
        """
        engine = self.retrieval_engine
        return engine.embed(engine.token_ids(texts))

    def match(self, images: Any, texts: str | Sequence[str]) -> MatchScores:
        """Scores of every image with every text, each [I, T].

        Raises:
            InputError: wrong images (`ImageError`), empty texts, or ones longer than the model's positions.
            EngineError: no retrieval engine is open.
        """
        engine = self.retrieval_engine
        ids = engine.token_ids(texts)  # wrong ones are refused before a picture is looked at
        return engine.match(self.retrieval_features(as_list(images), 0 if is_list(images) else None), ids)

    def retrieval_features(self, images: Sequence[Any], first_index: int | None = 0) -> list[ImageFeatures]:
        """What the retrieval engine sees in a list of images; errors call the first of them `first_index`.

        Raises:
            ImageError: a picture that cannot be read.
            EngineError: no retrieval engine is open.
        """
        engine = self.retrieval_engine
        return in_batches(images, first_index, engine.preprocess, engine.see, engine.checked_features)

    @property
    def retrieval_engine(self) -> RetrievalEngine:
        """The retrieval engine; EngineError where none is open."""
        if self._retrieval is None:
            raise EngineError(
                f"{self.directory} is a {GENERATIVE} engine, without ITC and ITM heads: build a {RETRIEVAL} engine "
                "beside it with `blip2rt export --model CHECKPOINT` (of stage 1) and open the folder that holds both"
            )
        return self._retrieval

    def caption(
        self,
        images: Any,
        prompt: str | Sequence[str] = CAPTION_PROMPT,
        *,
        rerank: str | None = None,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Caption: by default 5 beams and at most 30 tokens after "a photo of". Returns `Caption` or a list of them.

        With rerank="itm" and a retrieval engine beside, all sequences that are found (by default as many as beams) are
        ordered by how well ITM finds that they match the image.

        Raises:
            InputError: wrong images (`ImageError`), prompts or options.
            EngineError: no retrieval engine to re-rank with.
        """
        resolved = resolve_options(CAPTION_DEFAULTS, options, keywords)
        if rerank is None:
            return self._generate(Caption, images, prompt, resolved)
        if rerank != "itm":
            raise InputError(f"rerank must be 'itm' or None, not {rerank!r}")
        engine = self.retrieval_engine
        self._check_generative()
        if resolved.num_return_sequences == 1:
            resolved = replace(resolved, num_return_sequences=resolved.num_beams)
        features = self.encode(as_list(images))
        captions = self._generate(Caption, features, prompt, resolved)
        captions = engine.rerank([engine.checked_features(f) for f in features], captions)
        return captions if is_list(images) else captions[0]

    def answer(
        self,
        images: Any,
        question: str | Sequence[str],
        *,
        candidates: Sequence[str] | None = None,
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Answer: 5 beams, 10 tokens, length penalty -1, as the paper's VQA. Returns `Answer` or a list of them.

        With `candidates`, a closed list, nothing is generated: they are ranked by their mean token log-probability,
        stop token included; the best is the answer, the others are its alternatives. OPT reads a candidate as the next
        word, with a space before it.

        Raises:
            InputError: wrong images (`ImageError`), questions, candidates or options.
        """
        resolved = resolve_options(ANSWER_DEFAULTS, options, keywords)
        self._check_generative()
        if candidates is not None and (options is not None or keywords):
            given = "options" if options is not None else next(iter(keywords))
            raise InputError(f"{given}= has no effect with candidates=, which are ranked and not generated")
        template = QUESTION_PROMPT if self._encoder is None else SHORT_QUESTION_PROMPT
        if isinstance(question, str):
            prompts: str | list[str] = template.format(question)
        else:
            prompts = [template.format(checked_text(text)) for text in checked_texts(question)]
        if candidates is None:
            return self._generate(Answer, images, prompts, resolved)
        texts = checked_candidates(candidates)
        ids = [self._tokenizer.encode_answer(text) for text in texts]
        rows = min(CANDIDATE_ROWS, len(ids))
        options = GenerationOptions(do_sample=True, num_return_sequences=rows, max_new_tokens=max(map(len, ids)) + 1)
        return self._generate(Answer, images, prompts, resolve_options({}, options, {}), ids)

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
        if is_list(image):
            raise InputError("stream takes one image, not a list")
        self._check_generative()
        prompts = self._prompts(prompt, 1, resolved)
        return self._stream(self._encode([image], None), prompts, resolved)

    def _generate(
        self,
        kind: type[Kind],
        images: Any,
        prompt: Any,
        options: ResolvedOptions,
        candidates: list[list[int]] | None = None,
    ) -> Any:
        self._check_generative()
        images_list = as_list(images)
        if not is_list(images) and not isinstance(prompt, str):
            raise InputError(f"one image takes one prompt (a string), not {type(prompt).__name__}")
        prompts = self._prompts(prompt, len(images_list), options)
        results: list[Kind] = []
        starts = range(0, len(images_list), BATCH_SIZE)
        for start in progress(starts, "images", total=len(images_list), step=BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            features = self._encode(images_list[batch], start if is_list(images) else None)
            results += self._decode(kind, features, prompts[batch], options, candidates)
        return results if is_list(images) else results[0]

    def _check_generative(self) -> None:
        if self.manifest.kind != GENERATIVE:
            raise EngineError(
                f"{self.directory} is a {RETRIEVAL} engine, without a language model: build a {GENERATIVE} engine "
                "beside it with `blip2rt export --model CHECKPOINT` (of stage 2) and open the folder that holds both"
            )

    def _encode(self, images: Sequence[Any], first_index: int | None) -> list[ImageFeatures]:
        """Features of images for the language model; those that are features already are checked only."""

        def run(pixel_values: np.ndarray[Any, Any]) -> list[ImageFeatures]:
            image_embeds = self._vision(pixel_values=pixel_values)["image_embeds"]  # [B, N+1, Dv]
            queries = self._qformer(image_embeds=image_embeds)  # query_embeds [B, Q, Dq], prefix [B, Q, D]
            return list(map(ImageFeatures, image_embeds, queries["query_embeds"], queries["prefix"]))

        return in_batches(images, first_index, self.preprocess, run, self._checked_features)

    def _checked_features(self, features: ImageFeatures) -> ImageFeatures:
        wanted = self.manifest.stages[QFORMER].signature.outputs[1].shape[1:]  # (Q, D)
        found = None if features.prefix is None else features.prefix.shape
        if found != wanted:
            raise InputError(f"these ImageFeatures are of another model: prefix {found}, this engine wants {wanted}")
        return features

    def _prompts(self, prompt: Any, num_images: int, options: ResolvedOptions) -> list[list[int]]:
        """Token ids of the prompt of every image, checked against the positions that the model has."""
        if not isinstance(prompt, str) and len(checked_texts(prompt)) != num_images:
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
        self,
        kind: type[Kind],
        features: list[ImageFeatures],
        prompts: list[list[int]],
        options: ResolvedOptions,
        candidates: list[list[int]] | None = None,
    ) -> list[Kind]:
        stop = self.manifest.tokens.stop
        if candidates is not None:
            decoders = (self._open_decoder(features, prompts, options) for _ in repeat(None))
            ranked = rank_candidates(candidates, options.num_rows, stop, len(features), decoders)
            return [self._result(kind, sequences) for sequences in ranked]
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
            encoded = run_encoder(self._encoder, prefixes, prompts)
            prefixes, prompts = prefixes[:, :0], [[self.manifest.tokens.bos]] * len(prompts)
        return CachedDecoder(self._decoder, spec, prefixes, prompts, options.num_rows, options.max_new_tokens, encoded)

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

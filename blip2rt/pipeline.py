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
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from .candidates import CANDIDATE_ROWS, checked_candidates
from .engine_directory import checked_manifest, find_engines
from .errors import EngineError, InputError
from .generative import GenerativeEngine, Kind, Prompt
from .inputs import ahead, as_list, in_batches, is_list
from .manifest import CPU, GENERATIVE, RETRIEVAL
from .memory import check_memory
from .options import GenerationOptions, ResolvedOptions, resolve_options
from .prefixes import checked_prefixes, without_prefix
from .preprocess import ImageSource, preprocess
from .progress import progress
from .results import Answer, Caption, Generation, ImageFeatures, MatchScores
from .retrieval import RetrievalEngine
from .tokenizer import CAPTION_PROMPT

Array = np.ndarray[Any, Any]
Image = ImageSource | ImageFeatures

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
        self.threads = threads
        engines = find_engines(path, name)
        manifests = {kind: checked_manifest(directory, device) for kind, directory in engines.items()}
        check_memory(path, sum(entry.size for manifest in manifests.values() for entry in manifest.files.values()))
        self._retrieval = (
            RetrievalEngine(engines[RETRIEVAL], manifests[RETRIEVAL], threads) if RETRIEVAL in engines else None
        )
        kind = GENERATIVE if GENERATIVE in engines else RETRIEVAL
        self.directory, self.manifest = engines[kind], manifests[kind]
        self._generative = GenerativeEngine(self.directory, self.manifest, threads) if kind == GENERATIVE else None

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
        if self._generative:
            features = self._generative.encode(sources, first_index)
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

    def embed_multimodal(self, images: Any, texts: str | Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What the queries hold [P, Q, Dq] once they have seen each image together with its text; not normalised.

        LAVIS's `extract_features(mode="multimodal")`, whose first query alone is the usual feature of a pair.

        Args:
            images: one image or a list of them.
            texts: as many; one text is taken for every image.

        Raises:
            InputError: wrong images (`ImageError`), texts that are empty, too long, or of another number.
            EngineError: no retrieval engine is open.
        """
        engine, given = self.retrieval_engine, as_list(images)
        ids = engine.token_ids([texts] * len(given) if isinstance(texts, str) else texts)
        if len(ids) != len(given):
            raise InputError(f"{len(given)} images and {len(ids)} texts: give one text, or one for each image")
        features = self.retrieval_features(given, 0 if is_list(images) else None)
        return engine.multimodal_embeds([f.image_embeds for f in features], ids)

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
        return in_batches(
            images, first_index, engine.preprocess, engine.see, engine.checked_features, engine.batch_size
        )

    @property
    def has_retrieval(self) -> bool:
        """Whether a retrieval engine is open."""
        return self._retrieval is not None

    @property
    def retrieval_engine(self) -> RetrievalEngine:
        """The retrieval engine; EngineError where none is open."""
        if self._retrieval is None:
            raise EngineError(
                f"{self.directory} is a {GENERATIVE} engine, without ITC and ITM heads: build a {RETRIEVAL} engine "
                "beside it with `blip2rt export --model CHECKPOINT` (of stage 1) and open the folder that holds both"
            )
        return self._retrieval

    @property
    def generative_engine(self) -> GenerativeEngine:
        """The generative engine; EngineError where none is open."""
        if self._generative is None:
            raise EngineError(
                f"{self.directory} is a {RETRIEVAL} engine, without a language model: build a {GENERATIVE} engine "
                "beside it with `blip2rt export --model CHECKPOINT` (of stage 2) and open the folder that holds both"
            )
        return self._generative

    def caption(
        self,
        images: Any,
        prompt: str | Sequence[str] = CAPTION_PROMPT,
        *,
        rerank: str | None = None,
        strip_prefix: str | Sequence[str] = (),
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Caption: by default 5 beams and at most 30 tokens after "a photo of". Returns `Caption` or a list of them.

        With rerank="itm" and a retrieval engine beside, all sequences that are found (by default as many as beams) are
        ordered by how well ITM finds that they match the image (`RankedCaption.itm`). `strip_prefix`, one text or
        several, is taken off the beginning of the texts, whatever its case.

        Raises:
            InputError: wrong images (`ImageError`), prompts or options.
            EngineError: no retrieval engine to re-rank with.
        """
        resolved, prefixes = resolve_options(CAPTION_DEFAULTS, options, keywords), checked_prefixes(strip_prefix)
        if rerank is None:
            captions = self._generate(Caption, images, self._prompts(images, prompt, resolved), resolved)
            return without_prefix(captions, prefixes)
        if rerank != "itm":
            raise InputError(f"rerank must be 'itm' or None, not {rerank!r}")
        engine = self.retrieval_engine
        prompts = self._prompts(images, prompt, resolved)
        if resolved.num_return_sequences == 1:
            resolved = replace(resolved, num_return_sequences=resolved.num_beams)
        features = self.encode(as_list(images))
        captions = without_prefix(self._generate(Caption, features, prompts, resolved), prefixes)
        captions = engine.rerank([engine.checked_features(f) for f in features], captions)
        return captions if is_list(images) else captions[0]

    def answer(
        self,
        images: Any,
        question: str | Sequence[str],
        *,
        candidates: Sequence[str] | None = None,
        strip_prefix: str | Sequence[str] = (),
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
        resolved, prefixes = resolve_options(ANSWER_DEFAULTS, options, keywords), checked_prefixes(strip_prefix)
        if candidates is not None and (options is not None or keywords or prefixes):
            given = "options" if options is not None else next(iter(keywords), "strip_prefix")
            raise InputError(f"{given}= has no effect with candidates=, which are ranked and not generated")
        if candidates is None:
            prompts = self._prompts(images, question, resolved, is_question=True)
            return without_prefix(self._generate(Answer, images, prompts, resolved), prefixes)
        tokenizer = self.generative_engine.tokenizer
        ids = [tokenizer.encode_answer(text) for text in checked_candidates(candidates)]
        rows = min(CANDIDATE_ROWS, len(ids))
        wanted = GenerationOptions(do_sample=True, num_return_sequences=rows, max_new_tokens=max(map(len, ids)) + 1)
        resolved = resolve_options({}, wanted, {})
        return self._generate(
            Answer, images, self._prompts(images, question, resolved, is_question=True), resolved, ids
        )

    def generate(
        self,
        images: Any,
        prompt: str | Sequence[str],
        *,
        strip_prefix: str | Sequence[str] = (),
        options: GenerationOptions | None = None,
        **keywords: Any,
    ) -> Any:
        """Any instruction, used verbatim; greedy and 20 tokens by default. Returns `Generation` or a list of them.

        Raises:
            InputError: wrong images (`ImageError`), prompts or options.
        """
        resolved, prefixes = resolve_options(GENERATE_DEFAULTS, options, keywords), checked_prefixes(strip_prefix)
        results = self._generate(Generation, images, self._prompts(images, prompt, resolved), resolved)
        return without_prefix(results, prefixes)

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
        engine = self.generative_engine
        checked = engine.prompt(prompt, resolved)
        return engine.stream(engine.encode([image], None)[0], checked, resolved)

    def _prompts(self, images: Any, texts: Any, options: ResolvedOptions, is_question: bool = False) -> list[Prompt]:
        """One for every image, checked before a picture is looked at."""
        engine = self.generative_engine
        num_images = len(as_list(images))
        read = engine.question if is_question else engine.prompt
        if isinstance(texts, str):
            return [read(texts, options)] * num_images
        if not is_list(images):
            raise InputError(f"one image takes one prompt (a string), not {type(texts).__name__}")
        if not is_list(texts):
            raise InputError(f"prompts must be a string or a list of strings, not {type(texts).__name__}")
        if len(texts) != num_images:
            raise InputError(f"{len(texts)} prompts for {num_images} images: give one prompt, or one for every image")
        return [read(text, options) for text in texts]

    def _generate(
        self,
        kind: type[Kind],
        images: Any,
        prompts: list[Prompt],
        options: ResolvedOptions,
        candidates: list[list[int]] | None = None,
    ) -> Any:
        engine, sources = self.generative_engine, as_list(images)
        results: list[Kind] = []
        size = engine.batch_size
        batches = [slice(start, start + size) for start in range(0, len(sources), size)]
        encode = [partial(engine.encode, sources[batch], batch.start if is_list(images) else None) for batch in batches]
        features = ahead(encode, is_worth=engine.manifest.device != CPU)  # where the GPU decodes, the CPU is free
        for batch, seen in zip(progress(batches, "images", total=len(sources), step=size), features, strict=True):
            results += engine.decode(kind, seen, prompts[batch], options, candidates)
        return results if is_list(images) else results[0]

"""A gallery on disk: images are added once, and found by texts.

image ── Pipeline ──> itc_embeds [Q, E], image_embeds [N+1, Dv]   `add`: once an image, float16 on disk
text  ── Pipeline ──> itc_embeds [T, E]
      ── nearest ───> rows [T, k] by the largest cosine           one pass over the gallery for all texts
      ── itm ───────> the same rows by ITM logit + cosine         one pass over the candidates for all texts
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import EngineError, InputError
from .gallery_store import GalleryStore, Header, Identifier, checked_ids
from .pipeline import Pipeline
from .progress import progress

Array = np.ndarray[Any, Any]

BLOCK_IMAGES = 32  # whose embeddings a core widens to float32 at a time: they stay in its cache
# Multiplications of a matrix product up to which OpenBLAS stays on the thread that calls it. Its own threads would wait
# for each other beside those of a search, and burn ten times the processor time.
ONE_THREAD = 1 << 18
ADD_BATCH = 64  # images that are embedded and committed together, and whose features are re-ranked together
RERANKED = 128  # candidates that ITM looks at: LAVIS's k_test


class Ranking(NamedTuple):
    """What a search found, best first: of one text a list of ids and their scores, of several a list of each."""

    ids: Any
    scores: Any


class Gallery:
    """Images on disk, searched by text. One process may add and remove; any number may search."""

    def __init__(
        self,
        path: str | Path,
        pipeline: Pipeline | str | Path = "engines",
        *,
        features: bool = True,
    ):
        """Open a gallery, or, where there is none, name the place of a new one.

        Args:
            path: its folder.
            pipeline: a pipeline with a retrieval engine, or where its engines lie; opened when first needed.
            features: of a new gallery: keep what ITM looks at (0.7 MB an image at full size), so that candidates can be
                re-ranked. Without, searches rank by ITC alone (16 KB an image).

        Raises:
            EngineError: damaged, newer than this program, or of another model than the pipeline that is given.
        """
        self._store = GalleryStore(Path(path))
        self._pipeline = pipeline
        self._features = features
        if isinstance(pipeline, Pipeline):
            self._check_model(pipeline)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._store.path

    @property
    def ids(self) -> list[Identifier]:
        """Ids of all images, in the order in which they were added."""
        self._store.refresh()
        return list(self._store.rows)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that embeds images and texts.

        Raises:
            EngineError: no retrieval engine there, or one of another model.
        """
        if not isinstance(self._pipeline, Pipeline):
            pipeline = Pipeline(self._pipeline)
            self._check_model(pipeline)
            self._pipeline = pipeline
        return self._pipeline

    def close(self) -> None:
        """Let others write. Garbage collection and the end of the process do the same."""
        self._store.close()

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, images: Sequence[Any], ids: Sequence[Identifier]) -> None:
        """Add images, `ADD_BATCH` at a time; one whose id is there already takes its place.

        Args:
            images: whatever `Pipeline.encode` takes.
            ids: strings or whole numbers, one for each image and all different.

        Raises:
            InputError: wrong ids, or a picture that cannot be read (`ImageError`); batches before it are added.
            EngineError: another process is writing, or the disk is full.
        """
        identifiers = checked_ids(ids)
        if not isinstance(images, list | tuple) or len(images) != len(identifiers):
            count = len(images) if isinstance(images, list | tuple) else f"one {type(images).__name__} for"
            raise InputError(f"{count} images and {len(identifiers)} ids: give two lists of the same length")
        pipe = self.pipeline
        self._store.lock()
        for start in progress(range(0, len(images), ADD_BATCH), "images", total=len(images), step=ADD_BATCH):
            batch = slice(start, start + ADD_BATCH)
            features = pipe.retrieval_features(images[batch], first_index=start)
            itc = np.stack([f.itc_embeds for f in features if f.itc_embeds is not None])  # [B, Q, E]
            self.add_embeddings(itc, identifiers[batch], np.stack([f.image_embeds for f in features]))

    def add_embeddings(self, itc_embeds: Array, ids: Sequence[Identifier], image_embeds: Array | None = None) -> None:
        """Add images by what `add` computes of them.

        Args:
            itc_embeds: [I, Q, E], unit vectors.
            ids: as in `add`.
            image_embeds: [I, N+1, Dv]; needed where the gallery keeps features, ignored where it does not.

        Raises:
            InputError: wrong ids or shapes.
            EngineError: another process is writing, or the disk is full.
        """
        identifiers = checked_ids(ids)
        self._store.lock()
        if self._store.header is None:
            model = self.pipeline.retrieval_engine.manifest.source_sha256 if image_embeds is not None else None
            image = image_embeds.shape[1:] if self._features and image_embeds is not None else None
            self._store.create(model, itc_embeds.shape[1:], image)
        header = self._store.header
        assert header is not None
        kinds = {"itc": itc_embeds}
        if header.image is not None:
            if image_embeds is None:
                raise InputError(f"{self.path} keeps image features: give image_embeds as well")
            kinds["image"] = image_embeds
        for kind, rows in kinds.items():
            wanted = (len(identifiers), *header.shape(kind))
            if rows.shape != wanted:
                raise InputError(f"{kind}_embeds {list(rows.shape)}, and {self.path} wants {list(wanted)}")
        self._store.append(identifiers, kinds)

    def remove(self, ids: Sequence[Identifier]) -> None:
        """Remove images.

        Raises:
            InputError: an id that is not there; nothing is removed then.
            EngineError: another process is writing.
        """
        identifiers = checked_ids(ids)
        self._store.lock()
        absent = [identifier for identifier in identifiers if identifier not in self._store.rows]
        if absent:
            raise InputError(f"not in the gallery: {', '.join(map(repr, absent[:10]))} ({len(absent)} ids)")
        self._store.remove(identifiers)

    def search(self, texts: str | Sequence[str], k: int = 10, *, rerank: int | None = None) -> Ranking:
        """The k images that fit each text best.

        The gallery is read once for all texts. Candidates by ITC (the cosine, largest over the queries) are re-ranked
        by the sum of ITM logit and cosine, as LAVIS does.

        Args:
            texts: one text or a list of them.
            k: how many; fewer where the gallery has fewer.
            rerank: how many candidates ITM looks at, k at least; 0: none, the score is the cosine. Default: 128 where
                the gallery keeps features, else 0.

        Returns:
            ids and scores, best first; of a list of texts, a list of each.

        Raises:
            InputError: wrong texts, or a number that is none.
            EngineError: the gallery is empty or of another model, or keeps no features to re-rank with.
        """
        engine = self.pipeline.retrieval_engine
        token_ids = engine.token_ids(texts)
        has_features = self._filled().image is not None
        pool = (RERANKED if has_features else 0) if rerank is None else _checked_count("rerank", rerank, 0)
        if pool and not has_features:
            raise EngineError(f"{self.path} was made without image features: search with rerank=0, or make it anew")
        rows, scores = self.nearest(engine.embed(token_ids), max(_checked_count("k", k, 1), pool))
        if pool:
            rows, scores = self._rerank(token_ids, rows, scores)
        ids = [[self._store.ids[row] for row in ranked[:k]] for ranked in rows.tolist()]
        return Ranking(ids[0], scores[0, :k]) if isinstance(texts, str) else Ranking(ids, list(scores[:, :k]))

    def nearest(self, text_embeds: Array, k: int) -> tuple[Array, Array]:
        """Rows [T, k] and cosines [T, k] of the images nearest to text embeddings [T, E], best first; exact.

        Of equal cosines the image that was added first comes first. A shard is mapped at a time, so that the memory in
        use does not grow with the gallery.
        """
        self._filled()
        alive = np.array([identifier is not None for identifier in self._store.ids])
        k = min(k, len(self._store.rows))
        best = np.empty((len(text_embeds), 0), np.float32)
        rows = np.empty((len(text_embeds), 0), np.int64)
        for first, cosines in self._cosines(text_embeds):
            living = np.flatnonzero(alive[first : first + len(cosines)])
            found, places = top(cosines[living].T, k)
            best = np.concatenate((best, found), axis=1)
            rows = np.concatenate((rows, first + living[places]), axis=1)
            best, places = top(best, k)
            rows = np.take_along_axis(rows, places, axis=1)
        return rows, best

    def cosines(self, text_embeds: Array, ids: Sequence[Identifier]) -> Array:
        """The cosine [I, T], largest over the queries, of images and of text embeddings [T, E].

        Raises:
            InputError: an id that is not there.
            EngineError: the gallery is empty.
        """
        self._filled()
        found = np.concatenate([cosines for _, cosines in self._cosines(text_embeds)])
        return found[[self._row_of(identifier) for identifier in ids]]

    def image_embeds(self, identifier: Identifier) -> Array:
        """What ITM looks at in an image, [N+1, Dv] float32.

        Raises:
            InputError: the id is not there.
            EngineError: the gallery is empty or keeps no features.
        """
        if self._filled().image is None:
            raise EngineError(f"{self.path} was made without image features: make it anew")
        return self._store.row("image", self._row_of(identifier)).astype(np.float32)

    def _row_of(self, identifier: Identifier) -> int:
        if identifier not in self._store.rows:
            raise InputError(f"{identifier!r} is not in the gallery {self.path}")
        return self._store.rows[identifier]

    def _cosines(self, text_embeds: Array) -> Iterator[tuple[int, Array]]:
        """First row and cosines [n, T] of every shard, dead rows included."""
        num_queries, width = self._filled().shape("itc")
        step = max(1, ONE_THREAD // (num_queries * width))
        starts = range(0, len(text_embeds), step)
        groups = [np.ascontiguousarray(text_embeds[s : s + step].T, np.float32) for s in starts]  # [E, T] each

        def compare(half: Array) -> Array:
            block = widened(half)  # [n, Q, E]
            return np.concatenate([(block @ texts).max(axis=1) for texts in groups], axis=1)  # [n, T]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for first, shard in self._store.shards("itc"):
                blocks = (shard[start : start + BLOCK_IMAGES] for start in range(0, len(shard), BLOCK_IMAGES))
                yield first, np.concatenate(list(pool.map(compare, blocks)))

    def _rerank(self, token_ids: list[list[int]], rows: Array, cosines: Array) -> tuple[Array, Array]:
        """The same rows by ITM logit + cosine; the features of an image are read once for all texts."""
        engine = self.pipeline.retrieval_engine
        places: dict[int, list[tuple[int, int]]] = {}  # row -> (text, place in its ranking)
        for text, ranked in enumerate(rows.tolist()):
            for place, row in enumerate(ranked):
                places.setdefault(row, []).append((text, place))
        scores = cosines.copy()
        wanted = sorted(places)
        for start in range(0, len(wanted), ADD_BATCH):
            batch = wanted[start : start + ADD_BATCH]
            images = [self._store.row("image", row).astype(np.float32) for row in batch]
            pairs = [(image, text) for image, row in enumerate(batch) for text, _ in places[row]]
            logits = engine.itm_logits(images, token_ids, pairs)[:, 1]
            scores[tuple(zip(*(place for row in batch for place in places[row]), strict=True))] += logits
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def _filled(self) -> Header:
        """The header of a gallery that holds something."""
        self._store.refresh()
        if self._store.header is None or not self._store.rows:
            raise EngineError(f"the gallery {self.path} is empty: add images with Gallery.add or `blip2rt embed`")
        return self._store.header

    def _check_model(self, pipeline: Pipeline) -> None:
        expected = self._store.header.model_sha256 if self._store.header else None
        found = pipeline.retrieval_engine.manifest.source_sha256
        if expected not in (None, found):
            raise EngineError(
                f"{self.path} is a gallery of another model (checkpoint {str(expected)[:16]}..., this engine's is "
                f"{found[:16]}...): open it with the engine it was made with, or make it anew"
            )


def top(scores: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row [T, n] and their places, best first; of equal ones the first."""
    if scores.shape[1] > k:
        least = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
        chosen = []
        for row, bound in zip(scores, least, strict=True):
            above = np.flatnonzero(row > bound)
            equal = np.flatnonzero(row == bound)[: k - len(above)]
            either = np.sort(np.concatenate((above, equal)))
            chosen.append(either[np.argsort(-row[either], kind="stable")])
        places = np.stack(chosen)
    else:
        places = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, places, axis=1), places


def widened(half: Array) -> Array:
    """float16 as float32, exactly; finite values. Four passes of whole registers, where numpy takes 3 times as long.

    Exponent and fraction move to where float32 has them, and a product with 2 ** 112 makes up for the other bias.
    """
    bits = half.view(np.int16).astype(np.int32)  # the sign fills the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, ~0x70000000, out=bits)  # of the sign, one bit is to stay
    wide: Array = bits.view(np.float32)
    return np.multiply(wide, np.float32(2.0**112), out=wide)


def _checked_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value

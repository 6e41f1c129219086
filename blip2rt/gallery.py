"""A gallery on disk: images are added once, and found by texts.

image ── Pipeline ──> itc_embeds [Q, E], image_embeds [N+1, Dv]   `add`: once an image, float16 on disk
text  ── Pipeline ──> itc_embeds [T, E]
      ── nearest ───> rows [T, k] by the largest cosine           one pass over the gallery for all texts
      ── itm ───────> the same rows by ITM logit + cosine         one pass over the candidates for all texts

text_gallery.py is the other way round.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EngineError, InputError
from .gallery_base import ADD_BATCH, RERANKED, GalleryBase, Ranking, checked_count, guarded, in_order
from .gallery_scan import cosines, nearest
from .gallery_store import Identifier, checked_ids
from .pipeline import Pipeline
from .progress import progress

Array = np.ndarray[Any, Any]


class Gallery(GalleryBase):
    """Images on disk, searched by text. One process may add and remove; any number may search."""

    HOLDS = "images"

    def __init__(self, path: str | Path, pipeline: Pipeline | str | Path = "engines", *, features: bool = True):
        """Open a gallery, or, where there is none, name the place of a new one.

        Args:
            path: its folder.
            pipeline: a pipeline with a retrieval engine, or where its engines lie; opened when first needed.
            features: of a new gallery: keep what ITM looks at (0.7 MB an image at full size), so that candidates can be
                re-ranked. Without, searches rank by ITC alone (16 KB an image).

        Raises:
            EngineError: damaged, newer than this program, of texts, or of another model than the given pipeline.
        """
        super().__init__(path, pipeline)
        self._features = features

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
        self._lock()
        for start in progress(range(0, len(images), ADD_BATCH), "images", total=len(images), step=ADD_BATCH):
            batch = slice(start, start + ADD_BATCH)
            features = pipe.retrieval_features(images[batch], first_index=start)
            itc = np.stack([f.itc_embeds for f in features if f.itc_embeds is not None])  # [B, Q, E]
            self.add_embeddings(itc, identifiers[batch], np.stack([f.image_embeds for f in features]))

    @guarded
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
        _check_rows("itc_embeds", itc_embeds, len(identifiers))
        if image_embeds is not None:
            _check_rows("image_embeds", image_embeds, len(identifiers))
        self._lock()
        if self._store.header is None:
            model = self.engine.manifest.source_sha256 if image_embeds is not None else None
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

    @guarded
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
        token_ids = self.engine.token_ids(texts)
        has_features = self._filled().image is not None
        pool = (RERANKED if has_features else 0) if rerank is None else checked_count("rerank", rerank, 0)
        if pool and not has_features:
            raise EngineError(f"{self.path} was made without image features: search with rerank=0, or make it anew")
        rows, scores = self.nearest(self.engine.embed(token_ids), max(checked_count("k", k, 1), pool))
        if pool:
            rows, scores = self._rerank(token_ids, rows, scores)
        ids = self._ids_of(rows, k)
        return Ranking(ids[0], scores[0, :k]) if isinstance(texts, str) else Ranking(ids, list(scores[:, :k]))

    @guarded
    def nearest(self, text_embeds: Array, k: int) -> tuple[Array, Array]:
        """Rows [T, k] and cosines [T, k] of the images nearest to text embeddings [T, E], best first; exact.

        Of equal cosines the image that was added first comes first.
        """
        self._filled()
        return nearest(self._store, text_embeds[:, None], k, self.threads)

    @guarded
    def cosines(self, text_embeds: Array, ids: Sequence[Identifier]) -> Array:
        """The cosine [I, T], largest over the queries, of images and of text embeddings [T, E].

        Raises:
            InputError: an id that is not there.
            EngineError: the gallery is empty.
        """
        self._filled()
        found = np.concatenate([part for _, part in cosines(self._store, text_embeds[:, None], self.threads)])
        return found[[self.row_of(identifier) for identifier in ids]]

    @guarded
    def image_embeds(self, identifier: Identifier) -> Array:
        """What ITM looks at in an image, [N+1, Dv] float32.

        Raises:
            InputError: the id is not there.
            EngineError: the gallery is empty or keeps no features.
        """
        if self._filled().image is None:
            raise EngineError(f"{self.path} was made without image features: make it anew")
        return self._store.row("image", self.row_of(identifier)).astype(np.float32)

    @property
    def has_features(self) -> bool:
        """Whether it keeps what ITM looks at; of an empty one: whether it will."""
        header = self._store.header
        return self._features if header is None else header.image is not None

    @guarded
    def row_of(self, identifier: Identifier) -> int:
        """Where an image lies; no other image ever gets its row, nor does it, once it is replaced.

        Raises:
            InputError: the id is not there.
        """
        if identifier not in self._store.rows:
            raise InputError(f"{identifier!r} is not in the gallery {self.path}")
        return self._store.rows[identifier]

    @guarded
    def id_at(self, row: int) -> Identifier | None:
        """The id of the image in a row; None where it was replaced or removed, or never was."""
        return self._store.ids[row] if 0 <= row < len(self._store.ids) else None

    def _rerank(self, token_ids: list[list[int]], rows: Array, cosines: Array) -> tuple[Array, Array]:
        """The same rows by ITM logit + cosine; the features of an image are read once for all texts."""
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
            logits = self.engine.itm_logits(images, token_ids, pairs)[:, 1]
            scores[tuple(zip(*(place for row in batch for place in places[row]), strict=True))] += logits
        return in_order(rows, scores)


def _check_rows(name: str, rows: Any, count: int) -> None:
    """Refuse what would begin a gallery that nobody can use: before anything is written."""
    if not isinstance(rows, np.ndarray) or rows.ndim != 3 or len(rows) != count or 0 in rows.shape:
        found = list(rows.shape) if isinstance(rows, np.ndarray) else type(rows).__name__
        raise InputError(f"{name} must be an array [{count}, ...] of three dimensions, a row for every id, not {found}")
    if not np.isfinite(rows.astype(np.float16)).all():
        raise InputError(f"{name} holds values that are no finite float16 numbers")

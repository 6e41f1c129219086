"""A gallery of texts on disk, found by images: captions, labels, names, each known by its own words.

text  ── Pipeline ──> itc_embeds [1, E]                           `add`: once a text, float16 on disk
image ── Pipeline ──> itc_embeds [I, Q, E], image_embeds [I, N+1, Dv]
      ── nearest ───> rows [I, k] by the largest cosine           one pass over the gallery for all images
      ── itm ───────> the same rows by ITM logit + cosine
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .gallery_base import ADD_BATCH, RERANKED, GalleryBase, Ranking, checked_count, guarded, in_order
from .gallery_scan import nearest
from .gallery_store import checked_ids
from .inputs import as_list, is_list
from .progress import progress

TEXT_BATCH = 16 * ADD_BATCH  # texts that are embedded and committed together


class TextGallery(GalleryBase):
    """Texts on disk, searched by image. One process may add and remove; any number may search.

    The id of a text is the text: a text that is added again is still there once.
    """

    HOLDS = "texts"

    @guarded
    def add(self, texts: str | Sequence[str]) -> None:
        """Add one text or a list of them; those that it has already are left as they are.

        Raises:
            InputError: no texts, empty ones, or ones longer than the model's positions; nothing is added then.
            EngineError: another process is writing, or the disk is full.
        """
        given = [texts] if isinstance(texts, str) else texts
        token_ids = dict(zip(given, self.engine.token_ids(given), strict=True))
        self._lock()
        new = [text for text in token_ids if text not in self._store.rows]
        for start in progress(range(0, len(new), TEXT_BATCH), "texts", total=len(new), step=TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            embeds = self.engine.embed([token_ids[text] for text in batch])  # [T, E]
            if self._store.header is None:
                self._store.create(self.engine.manifest.source_sha256, (1, embeds.shape[1]), None, self.HOLDS)
            self._store.append(checked_ids(batch), {"itc": embeds[:, None]})

    @guarded
    def search(self, images: Any, k: int = 10, *, rerank: int | None = None) -> Ranking:
        """The k texts that fit each image best.

        Args:
            images: one image or a list of them, whatever `Pipeline.encode` takes.
            k: how many; fewer where the gallery has fewer.
            rerank: how many candidates ITM looks at, k at least; 0: none, the score is the cosine. Default: 128.

        Returns:
            texts and scores, best first; of a list of images, a list of each.

        Raises:
            InputError: wrong images (`ImageError`), or a number that is none.
            EngineError: the gallery is empty or of another model.
        """
        self._filled()
        pool = RERANKED if rerank is None else checked_count("rerank", rerank, 0)
        features = self.pipeline.retrieval_features(as_list(images), 0 if is_list(images) else None)
        queries = np.stack([f.itc_embeds for f in features if f.itc_embeds is not None])  # [I, Q, E]
        rows, scores = nearest(self._store, queries, max(checked_count("k", k, 1), pool), self.threads)
        if pool:
            wanted = {row: place for place, row in enumerate(np.unique(rows).tolist())}
            token_ids = self.engine.token_ids([str(self._store.ids[row]) for row in wanted])
            pairs = [(image, wanted[row]) for image, ranked in enumerate(rows.tolist()) for row in ranked]
            logits = self.engine.itm_logits([f.image_embeds for f in features], token_ids, pairs)[:, 1]
            rows, scores = in_order(rows, scores + logits.reshape(rows.shape))
        ids = self._ids_of(rows, k)
        return Ranking(list(ids), list(scores[:, :k])) if is_list(images) else Ranking(ids[0], scores[0, :k])

"""Images and texts compared: ITC, by the angle of their embeddings, and ITM, by looking at both together.

image ── preprocess ──> pixel_values [B, 3, S, S]
      ── vision ──────> image_embeds [B, N+1, Dv]  ── qformer ──> itc_embeds [B, Q, E]
text  ── tokenizer ───> text_ids [B, L]            ── text ─────> itc_embeds [B, E]
image_embeds, text_ids  ── itm ──> itm_logits [B, Q, 2]          one row for each pair
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .backends import open_stages
from .errors import InputError
from .manifest import Manifest
from .preprocess import ImageSource, preprocess
from .qformer_texts import padded_texts
from .results import Caption, ImageFeatures, MatchScores, RankedCaption
from .stages import ITM, QFORMER, TEXT, VISION
from .tokenizer import TextTokenizer

Array = np.ndarray[Any, Any]

TEXT_BATCH = 64  # texts that go through the engine together; embeddings do not depend on it
PAIR_BATCH = 16  # pairs likewise
POOLINGS = ("mean", "none")


class RetrievalEngine:
    """The stages of a retrieval engine. Safe to call from several threads."""

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None):
        """Open the stages.

        Raises:
            EngineError: one of them, or the tokenizer, cannot be read.
        """
        self.directory, self.manifest = directory, manifest
        stages = open_stages(directory, manifest, threads)
        self.batch_size = min(stage.batch_size for stage in stages.values())
        self._vision, self._qformer, self._text, self._itm = (stages[s] for s in (VISION, QFORMER, TEXT, ITM))
        qformer = manifest.model["qformer"]
        self._tokenizer = TextTokenizer(
            directory / "tokenizer.json", manifest.tokens, qformer["vocab_size"], qformer["max_position_embeddings"]
        )
        self._shape = manifest.stages[QFORMER].signature.outputs[1].shape[1:]  # (Q, E)

    def preprocess(self, image: ImageSource) -> Array:
        """Pixel values [3, S, S] of one picture.

        Raises:
            ImageError: the picture cannot be read.
        """
        spec = self.manifest.image
        return preprocess(image, spec.size, spec.mean, spec.std)

    def see(self, pixel_values: Array) -> list[ImageFeatures]:
        """[B, 3, S, S] -> features of B images, with their ITC embeddings."""
        image_embeds = self._vision(pixel_values=pixel_values)["image_embeds"]  # [B, N+1, Dv]
        queries = self._qformer(image_embeds=image_embeds)  # query_embeds [B, Q, Dq], itc_embeds [B, Q, E]
        rows = zip(image_embeds, queries["query_embeds"], queries["itc_embeds"], strict=True)
        return [ImageFeatures(image, query, itc_embeds=itc) for image, query, itc in rows]

    def checked_features(self, features: ImageFeatures) -> ImageFeatures:
        """The features that this engine works with, out of what `Pipeline.encode` gave.

        Raises:
            InputError: they were encoded without a retrieval engine, or by another one.
        """
        own = features.retrieval or features
        if own.itc_embeds is None:
            raise InputError(
                "these ImageFeatures were encoded without a retrieval engine: encode the images with this pipeline"
            )
        if own.itc_embeds.shape != self._shape:
            raise InputError(
                f"these ImageFeatures are of another model: ITC embeddings {own.itc_embeds.shape}, this engine has "
                f"{self._shape}"
            )
        return own

    def token_ids(self, texts: str | Sequence[str]) -> list[list[int]]:
        """Ids of one text or a list of texts, [CLS] first and [SEP] last.

        Raises:
            InputError: neither a string nor a list of them; empty, or longer than the positions of the model.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list | tuple):
            raise InputError(f"texts must be a string or a list of strings, not {type(texts).__name__}")
        if not texts:
            raise InputError("the list of texts is empty")
        return [self._tokenizer.encode(text, f"text {i}") for i, text in enumerate(texts)]

    def embed(self, ids: Sequence[list[int]]) -> Array:
        """ITC embeddings [T, E] of texts."""
        embeds = np.empty((len(ids), int(self._shape[1])), np.float32)
        for places, text_ids, text_mask in self._batches(ids, TEXT_BATCH):
            embeds[places] = self._text(text_ids=text_ids, text_mask=text_mask)["itc_embeds"]
        return embeds

    def itm_logits(
        self, image_embeds: Sequence[Array], ids: Sequence[list[int]], pairs: Sequence[tuple[int, int]]
    ) -> Array:
        """Logits [P, 2] (no match, match) of pairs of places: one in `image_embeds`, one in `ids`."""
        logits = np.empty((len(pairs), 2), np.float32)
        for places, outputs in self._pairs(image_embeds, ids, pairs):
            logits[places] = outputs["itm_logits"].mean(axis=1, dtype=np.float64)  # [B, Q, 2] -> [B, 2]
        return logits

    def multimodal_embeds(self, image_embeds: Sequence[Array], ids: Sequence[list[int]]) -> Array:
        """What the queries hold [P, Q, Dq] once they have seen an image and its text; as many texts as images."""
        queries, width = self._shape[0], self.manifest.model["qformer"]["hidden_size"]
        embeds = np.empty((len(ids), int(queries), width), np.float32)
        for places, outputs in self._pairs(image_embeds, ids, [(place, place) for place in range(len(ids))]):
            embeds[places] = outputs["multimodal_embeds"]
        return embeds

    def _pairs(
        self, image_embeds: Sequence[Array], ids: Sequence[list[int]], pairs: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """The itm stage over pairs, in batches of texts of like length: places in `pairs`, and its outputs."""
        for places, text_ids, text_mask in self._batches([ids[text] for _, text in pairs], PAIR_BATCH):
            images = np.stack([image_embeds[pairs[place][0]] for place in places])  # [B, N+1, Dv]
            yield places, self._itm(image_embeds=images, text_ids=text_ids, text_mask=text_mask)

    def match(self, features: Sequence[ImageFeatures], ids: Sequence[list[int]]) -> MatchScores:
        """Every image with every text."""
        itc_embeds = np.stack([f.itc_embeds for f in features if f.itc_embeds is not None])  # [I, Q, E]
        # not a matrix product, whose last bits depend on how many texts there are
        itc = np.einsum("iqe,te->iqt", itc_embeds, self.embed(ids)).max(axis=1)  # [I, T]
        pairs = [(image, text) for image in range(len(features)) for text in range(len(ids))]
        logits = self.itm_logits([f.image_embeds for f in features], ids, pairs)
        logits = logits.reshape(*itc.shape, 2)  # [I, T, 2]
        return MatchScores(itc, logits[..., 1], match_probability(logits))

    def rerank(self, features: Sequence[ImageFeatures], captions: Sequence[Caption]) -> list[RankedCaption]:
        """Each caption and its alternatives in the order of their ITM logits, which they then carry.

        A text that the model cannot read, without tokens or longer than its positions, has none and comes last.
        """
        reordered = []
        for seen, caption in zip(features, captions, strict=True):
            sequences = [caption, *caption.alternatives]
            readable = {place: ids for place, found in enumerate(sequences) if (ids := self._readable_ids(found.text))}
            pairs = [(0, text) for text in range(len(readable))]
            found = self.itm_logits([seen.image_embeds], list(readable.values()), pairs)[:, 1].tolist()
            logits = dict(zip(readable, found, strict=True))
            order = sorted(range(len(sequences)), key=lambda place: -logits.get(place, -np.inf))
            ranked = [
                RankedCaption(**vars(sequences[place]) | {"alternatives": [], "itm": logits.get(place)})
                for place in order
            ]
            reordered.append(replace(ranked[0], alternatives=list(ranked[1:])))
        return reordered

    def _readable_ids(self, text: str) -> list[int] | None:
        try:
            return self._tokenizer.encode(text, "caption")
        except InputError:
            return None

    def _batches(self, rows: Sequence[list[int]], batch_size: int) -> Iterator[tuple[list[int], Array, Array]]:
        return padded_texts(rows, batch_size, self.manifest.tokens.pad or 0, self._tokenizer.num_positions)


def pooled(image_embeds: Array, pooling: str) -> Array:
    """ITC embeddings of images [I, Q, E] as they are ("none"), or one unit vector an image [I, E]: the mean's ("mean").

    The mean is for stores that keep one vector an image. Its cosine with a text approximates the largest over the
    queries, which ITC goes by.
    """
    if pooling == "none":
        return image_embeds
    mean = image_embeds.mean(axis=1, dtype=np.float64)
    return (mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def match_probability(logits: Array) -> Array:
    """Softmax over the last axis (no match, match), its second half."""
    difference = logits[..., 0].astype(np.float64) - logits[..., 1]
    return (1 / (1 + np.exp(np.minimum(difference, 700)))).astype(np.float32)

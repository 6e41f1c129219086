"""Retrieval both ways over a data set: ITC for all pairs, ITM for the nearest, as LAVIS's evaluation does it.

Features of the images lie in a gallery in the folder of the run, and what ITM said of an image is a line of
`itm.jsonl`: a run that was killed goes on with the image after the last line.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data import CaptionItem
from .data.cleaning import clean_caption
from .errors import InputError
from .evaluation import retrieval_table
from .evaluation.recall import NOT_RANKED
from .gallery import Gallery
from .gallery_base import ADD_BATCH
from .gallery_scan import top
from .pipeline import Pipeline
from .presets import Preset
from .progress import Progress
from .retrieval import RetrievalEngine

Array = np.ndarray[Any, Any]


def evaluate_retrieval(pipe: Pipeline, items: Sequence[CaptionItem], output: Path, preset: Preset) -> dict[str, float]:
    """Recall in percent, by the names of `retrieval_table`.

    Args:
        pipe: with a retrieval engine.
        items: pictures with their captions.
        output: folder of the run.
        preset: how captions are cleaned and cut, and how many candidates ITM looks at for each query.
    """
    engine = pipe.retrieval_engine
    ids = _cut(_token_ids(engine, items, preset), preset.text_length)
    with Gallery(output / "gallery", pipe) as gallery:
        known = set(gallery.ids)
        left = [item for item in items if item.id not in known]
        bar = Progress("images", len(items))
        bar.advance(len(items) - len(left))
        for start in range(0, len(left), ADD_BATCH):
            batch = left[start : start + ADD_BATCH]
            gallery.add([item.path for item in batch], [item.id for item in batch])
            bar.advance(len(batch))
        bar.close()
        image_of_text = [image for image, item in enumerate(items) for _ in item.captions]
        itc = gallery.cosines(engine.embed(ids), [item.id for item in items])  # [I, T]
        i2t, t2i = np.full(itc.shape, NOT_RANKED, np.float32), np.full(itc.T.shape, NOT_RANKED, np.float32)
        texts_of = top(itc, min(preset.candidates, len(ids)))[1]
        images_of = top(np.ascontiguousarray(itc.T), min(preset.candidates, len(items)))[1]
        wanted: list[set[int]] = [set(texts) for texts in texts_of.tolist()]
        for text, images in enumerate(images_of.tolist()):
            for image in images:
                wanted[image].add(text)
        logits = _itm_logits(engine, gallery, items, ids, wanted, output / "itm.jsonl")
    for image, texts in enumerate(texts_of.tolist()):
        i2t[image, texts] = [itc[image, text] + logits[image][text] for text in texts]
    for text, images in enumerate(images_of.tolist()):
        t2i[text, images] = [itc[image, text] + logits[image][text] for image in images]
    return {name: round(value, 2) for name, value in retrieval_table(i2t, t2i, image_of_text).items()}


def _itm_logits(
    engine: RetrievalEngine,
    gallery: Gallery,
    items: Sequence[CaptionItem],
    ids: Sequence[list[int]],
    wanted: Sequence[set[int]],
    path: Path,
) -> list[dict[int, float]]:
    """Of each image, the logits of the texts that are wanted of it."""
    found: list[dict[int, float]] = []
    whole = 0
    if path.exists():
        with path.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # its writer was killed
                found.append(_read_line(line, wanted, len(found), path))
                whole += len(line)
        os.truncate(path, whole)
    bar = Progress("ITM", len(items))
    bar.advance(len(found))
    with path.open("a", encoding="utf-8") as stream:
        for image in range(len(found), len(items)):
            texts = sorted(wanted[image])
            seen = gallery.image_embeds(items[image].id)
            logits = engine.itm_logits([seen], ids, [(0, text) for text in texts])[:, 1].tolist()
            found.append(dict(zip(texts, logits, strict=True)))
            stream.write(json.dumps(found[-1]) + "\n")
            stream.flush()
            bar.advance()
    bar.close()
    return found


def _read_line(line: bytes, wanted: Sequence[set[int]], image: int, path: Path) -> dict[int, float]:
    """A whole line of an earlier run."""
    try:
        logits = {int(text): float(logit) for text, logit in json.loads(line).items()}
        if image >= len(wanted) or logits.keys() != wanted[image]:
            raise ValueError("other texts than this image's")
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}, line {image + 1} is damaged ({error}): delete the file, and run it again") from None
    return logits


def _token_ids(engine: RetrievalEngine, items: Sequence[CaptionItem], preset: Preset) -> list[list[int]]:
    """Of every caption as the preset's source cleans it."""
    cleaned = [(clean_caption(text, preset.style), text, item) for item in items for text in item.captions]
    empty = [f"{text!r} of {item.path.name}" for words, text, item in cleaned if not words]
    if empty:
        raise InputError(f"captions without a word: {', '.join(empty)}")
    return engine.token_ids([words for words, _, _ in cleaned])


def _cut(rows: Sequence[list[int]], length: int) -> list[list[int]]:
    """Texts of at most `length` tokens; the last one stays the end."""
    return [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]

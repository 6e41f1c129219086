"""What LAVIS's and mmpretrain's retrieval code computed from their files, through the engines, texts and all.

`pytest tests/test_retrieval_fixtures.py -rP` prints every array with its difference.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2rt import InputError, Pipeline
from blip2rt.export import export_engine
from blip2rt.model import CheckpointSource

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"the recorded outputs are not at {FIXTURES}")

Array = np.ndarray[Any, Any]
LAVIS, MMPRETRAIN = FIXTURES / "lavis", FIXTURES / "mmpretrain"
CONFIG = LAVIS / "configs" / "stage1.json"  # mmpretrain's model has the same sizes
FEATURES, SCORES = 2e-5, 1e-5
NOT_RANKED = -100  # what both write where ITM did not look


def same(what: str, found: Array, expected: Array, relative: bool = False) -> None:
    """Largest difference, of scores over the largest value."""
    difference = float(np.abs(found - expected).max()) / (float(np.abs(expected).max()) if relative else 1)
    print(f"{what:<50} {'rel' if relative else 'abs'} {difference:.1e}")
    assert found.shape == expected.shape
    assert difference <= (SCORES if relative else FEATURES), what


def same_ranks(what: str, itc: Array, scores: Array, expected: Array) -> None:
    """Each row: the candidates by ITC, their scores, and their order are those recorded."""
    ranked = expected != NOT_RANKED
    same(what, np.where(ranked, scores, 0), np.where(ranked, expected, 0), relative=True)
    for row in range(len(expected)):
        candidates = np.flatnonzero(expected[row] != NOT_RANKED)
        nearest = np.argsort(-itc[row], kind="stable")[: len(candidates)]
        assert set(nearest.tolist()) == set(candidates.tolist()), what
        assert np.argsort(-scores[row, candidates]).tolist() == np.argsort(-expected[row, candidates]).tolist()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both engines."""
    folder = tmp_path_factory.mktemp("engines")
    return {
        name: export_engine(CheckpointSource(file, CONFIG), folder / name, text_tokenizer=tokenizer)
        for name, file, tokenizer in (
            ("lavis", LAVIS / "lavis" / "stage1.pth", LAVIS / "tokenizers" / "bert"),
            ("mmpretrain", MMPRETRAIN / "retrieval.pth", MMPRETRAIN / "tokenizers" / "bert"),
        )
    }


def pictures(folder: Path) -> list[Array]:
    return list(np.load(folder / "images.npz")["pixel_values"])


def test_lavis(engines: dict[str, Path]) -> None:
    pipe, images = Pipeline(engines["lavis"]), pictures(LAVIS)
    expected = dict(np.load(LAVIS / "lavis" / "stage1.npz"))
    texts = json.loads((LAVIS / "lavis" / "texts.json").read_text())["stage1"]["texts"]
    features = pipe.encode(images)
    same("image_embeds", np.stack([f.image_embeds for f in features]), expected["ln_vision_output"])
    same("query_embeds", np.stack([f.query_embeds for f in features]), expected["query_output"])
    same("image embeddings", pipe.embed_images(features), expected["image_feats"])

    retrieval_texts = texts["retrieval_texts"]
    ids = pipe.retrieval_engine.token_ids(retrieval_texts)
    assert ids == [
        row[mask == 1].tolist()
        for row, mask in zip(expected["score_input_ids"], expected["score_attention_mask"], strict=True)
    ]
    same("text embeddings", pipe.embed_texts(retrieval_texts), expected["score_text_feat"])
    scores = pipe.match(features, retrieval_texts)
    same("ITC", scores.itc, expected["score_itc_sim"], relative=True)
    both = scores.itm + scores.itc
    same_ranks("image to text", scores.itc, both, expected["score_i2t"])
    same_ranks("text to image", scores.itc.T, both.T, expected["score_t2i"])

    ids = pipe.retrieval_engine.token_ids(texts["stage1_texts"])
    assert ids == [
        row[mask == 1].tolist()
        for row, mask in zip(expected["ext_input_ids"], expected["ext_attention_mask"], strict=True)
    ]
    multimodal = pipe.embed_multimodal(features, texts["stage1_texts"])
    same("multimodal", multimodal, expected["ext_multimodal_multimodal_embeds"])
    one = pipe.embed_multimodal(features[:2], texts["stage1_texts"][0])
    same("multimodal, one text", one[:1], multimodal[:1])
    with pytest.raises(InputError, match="4 images and 2 texts: give one text, or one for each"):
        pipe.embed_multimodal(features, texts["stage1_texts"][:2])


def test_mmpretrain(engines: dict[str, Path]) -> None:
    pipe, images = Pipeline(engines["mmpretrain"]), pictures(MMPRETRAIN)
    expected = dict(np.load(MMPRETRAIN / "retrieval.npz"))
    features = pipe.encode(images)
    same("image_embeds", np.stack([f.image_embeds for f in features]), expected["image_embeds"])
    same("image embeddings", pipe.embed_images(features), expected["image_feat"])
    engine = pipe.retrieval_engine
    ids = [row[mask == 1].tolist() for row, mask in zip(expected["text_ids"], expected["text_attn_mask"], strict=True)]
    texts = json.loads((MMPRETRAIN / "texts.json").read_text())["retrieval"]["texts"]
    assert engine.token_ids(texts) == ids
    same("text embeddings", engine.embed(ids), expected["text_feat"])
    scores = engine.match(features, ids)
    same("ITC", scores.itc, expected["sim_i2t"], relative=True)
    pairs = [(image, text) for image in range(len(images)) for text in range(len(ids))]
    logits = engine.itm_logits([f.image_embeds for f in features], ids, pairs).reshape(
        expected["itm_logits_mean"].shape
    )
    same("ITM", logits, expected["itm_logits_mean"], relative=True)
    both = scores.itm + scores.itc
    for name, itc, found in (("i2t", scores.itc, both), ("t2i", scores.itc.T, both.T)):
        for k in (1, 3):
            same_ranks(f"{name}, k={k}", itc, found, expected[f"predict_all_{name}_k{k}"])
            labels = np.where(expected[f"predict_all_{name}_k{k}"] == NOT_RANKED, NOT_RANKED, found).argmax(axis=1)
            assert labels.tolist() == expected[f"predict_all_{name}_label_k{k}"].tolist()
    same("i2t, all", both, expected["score_i2t_topk_all"], relative=True)
    same("t2i, all", both.T, expected["score_t2i_topk_all_images"], relative=True)

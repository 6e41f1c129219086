"""Stage 1 of LAVIS and mmpretrain: what their own code computed, through the reference that their files load into."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2rt.model import Blip2Retrieval, CheckpointSource, load_retrieval
from blip2rt.stages import MASKED

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
CONFIG = FIXTURES / "lavis" / "configs" / "stage1.json"
FEATURES, LOGITS = 2e-5, 1e-5  # absolute; relative to the array's largest value

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"the recorded outputs are not at {FIXTURES}")


def load(file: str) -> tuple[Blip2Retrieval, torch.Tensor, Any]:
    """The model of a fixture file, its pictures, and what was recorded."""
    path = FIXTURES / file
    images = np.load(FIXTURES / file.partition("/")[0] / "images.npz")["pixel_values"]
    return load_retrieval(CheckpointSource(path, CONFIG)), torch.from_numpy(images), np.load(path.with_suffix(".npz"))


def text_mask(attention_mask: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.where(torch.from_numpy(attention_mask)[:, None, None] > 0, 0.0, MASKED)


def close(found: torch.Tensor, expected: Any, limit: float) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=limit)


@torch.no_grad()
def test_lavis() -> None:
    """Every head of stage 1: features, ITC, ITM over all pairs, and the captioning head."""
    model, pictures, recorded = load("lavis/lavis/stage1.pth")
    image_embeds = model.vision(pictures)
    query_embeds, image_feats = model.qformer(image_embeds)
    ids, mask = torch.from_numpy(recorded["input_ids"]), text_mask(recorded["attention_mask"])
    text_embeds, text_feats = model.text(ids, mask)
    close(image_embeds, recorded["ln_vision_output"], FEATURES)
    close(query_embeds, recorded["query_output"], FEATURES)
    close(image_feats, recorded["image_feats"], FEATURES)
    close(text_embeds, recorded["text_output"], FEATURES)
    close(text_feats, recorded["text_feat"], FEATURES)
    itc = torch.einsum("iqe,te->itq", image_feats, text_feats)
    close(itc, recorded["itc_sim_per_query"], LOGITS)

    count = len(pictures)
    pairs = image_embeds.repeat_interleave(count, 0), ids.repeat(count, 1), mask.repeat(count, 1, 1, 1)
    _, itm_logits = model.itm(*pairs)
    expected = recorded["itm_logits"]
    close(itm_logits.unflatten(0, (count, count)), expected, LOGITS * np.abs(expected).max())

    itg_logits = model.itg_logits(image_embeds, torch.from_numpy(recorded["train_lm_input_ids"]), mask)
    expected, real = recorded["train_lm_logits"], recorded["attention_mask"].astype(bool)
    close(itg_logits[torch.from_numpy(real)], expected[real], LOGITS * np.abs(expected).max())


@torch.no_grad()
def test_mmpretrain() -> None:
    """Its retrieval model uses all stored blocks of the image encoder, unlike its generative ones."""
    model, pictures, recorded = load("mmpretrain/retrieval.pth")
    image_embeds = model.vision(pictures)
    query_embeds, image_feats = model.qformer(image_embeds)
    ids, mask = torch.from_numpy(recorded["text_ids"]), text_mask(recorded["text_attn_mask"])
    text_embeds, text_feats = model.text(ids, mask)
    close(image_embeds, recorded["ln_vision_out"], FEATURES)
    close(query_embeds, recorded["query_output"], FEATURES)
    close(image_feats, recorded["image_feat"], FEATURES)
    close(text_embeds, recorded["text_embeds"], FEATURES)
    close(text_feats, recorded["text_feat"], FEATURES)
    expected = recorded["itm_logits_mean"]  # [N, M, 2]
    images, texts = expected.shape[:2]
    pairs = image_embeds.repeat_interleave(texts, 0), ids.repeat(images, 1), mask.repeat(images, 1, 1, 1)
    _, itm_logits = model.itm(*pairs)
    close(itm_logits.unflatten(0, (images, texts)), expected, LOGITS * np.abs(expected).max())

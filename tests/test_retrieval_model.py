"""The reference model of stage 1: what transformers, LAVIS and mmpretrain compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Blip2ForImageTextRetrieval

from blip2rt.errors import CheckpointError
from blip2rt.model import Blip2, Blip2Config, Blip2Retrieval, CheckpointSource, load_blip2, load_retrieval
from blip2rt.model.config import OPTConfig, QFormerConfig, RetrievalConfig, VisionConfig
from blip2rt.model.retrieval import stored_name
from blip2rt.stages import MASKED
from blip2rt.training.tasks import Contrastive, drop_out

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
LAVIS, MMPRETRAIN = FIXTURES / "lavis" / "lavis", FIXTURES / "mmpretrain"


def text_mask(lengths: list[int]) -> Tensor:
    """Additive mask [B, 1, 1, L] of texts of these lengths."""
    hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return torch.where(hidden, MASKED, 0.0).double()[:, None, None]


def assert_exact(found: Tensor, expected: Tensor) -> None:
    """In float64 anything but the same formula shows."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_equals_transformers(seed: int, tmp_path: Path, retrieval_checkpoint_maker: Callable[..., Path]) -> None:
    """Both heads and all embeddings in float64, texts of unequal length in one batch."""
    directory = retrieval_checkpoint_maker(tmp_path, seed)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(directory, dtype=torch.float64).eval()
    ours = load_retrieval(directory).double()
    config, generator = ours.config, torch.Generator().manual_seed(seed)
    size, lengths = config.vision.image_size, [5, 2, 9]
    pictures = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, config.qformer.vocab_size, (3, max(lengths)), generator=generator)
    mask = text_mask(lengths)
    attention_mask = (mask[:, 0, 0] == 0).long()

    itc = theirs(pictures, ids, attention_mask)
    image_embeds = ours.vision(pictures)
    query_embeds, image_itc = ours.qformer(image_embeds)
    text_embeds, text_itc = ours.text(ids, mask)
    assert_exact(image_embeds, itc.vision_model_output.last_hidden_state)
    assert_exact(image_itc, itc.image_embeds)
    assert_exact(text_itc, itc.text_embeds)
    assert_exact(text_embeds, itc.text_model_output.last_hidden_state)
    assert_exact((image_itc @ text_itc.T).amax(1), itc.logits_per_image)
    assert query_embeds.shape == (3, config.num_query_tokens, config.qformer.hidden_size)

    itm = theirs(pictures, ids, attention_mask, use_image_text_matching_head=True)
    queries, logits = ours.itm(image_embeds, ids, mask)
    assert_exact(logits.mean(1), itm.logits_per_image)
    assert_exact(queries, itm.text_model_output.last_hidden_state[:, : config.num_query_tokens])


def test_dropout_is_where_transformers_has_it(
    tmp_path: Path, retrieval_checkpoint_maker: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place of it, told by a twin of dropout that scales instead of drawing."""

    def scaled(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return x * (1 - p) if training else x

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        scores = query @ key.mT / query.shape[-1] ** 0.5
        mask = options["attn_mask"]
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return scaled(weights, options["dropout_p"]) @ value

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    directory = retrieval_checkpoint_maker(tmp_path)
    theirs: Any = Blip2ForImageTextRetrieval.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    ).train()
    assert theirs.config.qformer_config.hidden_dropout_prob == 0.1
    task = Contrastive(load_retrieval(directory).double(), decode_id=1)
    drop_out(task, 0.1)
    ours: Any = task.model
    size = ours.config.vision.image_size
    pictures, ids = torch.randn(2, 3, size, size, dtype=torch.float64), torch.randint(0, 9, (2, 5))
    found = ours.itm(ours.vision(pictures), ids, text_mask([5, 5]))[1].mean(1)
    given = (pictures, ids, torch.ones_like(ids))
    assert_exact(found, theirs(*given, use_image_text_matching_head=True).logits_per_image)
    assert (found - theirs.eval()(*given, use_image_text_matching_head=True).logits_per_image).abs().max() > 1e-4


def test_a_checkpoint_is_of_one_kind(
    tmp_path: Path, tiny_checkpoint: Path, retrieval_checkpoint_maker: Callable[..., Path]
) -> None:
    directory = retrieval_checkpoint_maker(tmp_path)
    with pytest.raises(CheckpointError, match="is a retrieval model"):
        load_blip2(directory)
    with pytest.raises(CheckpointError, match="without retrieval heads"):
        load_retrieval(tiny_checkpoint)


def test_stages_share_their_weights(tmp_path: Path, retrieval_checkpoint_maker: Callable[..., Path]) -> None:
    """One Q-Former, whichever stage it is reached by; names of shared parameters lead to the stored ones."""
    model = load_retrieval(retrieval_checkpoint_maker(tmp_path))
    stored = dict(model.named_parameters())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert stored[stored_name(name)].data_ptr() == parameter.data_ptr()


@torch.no_grad()
def test_qformer_with_a_question() -> None:
    """The generative Q-Former in the light of a question: as the itm stage, but for the last projection."""
    qformer = QFormerConfig(12, 20, 3, 2, use_qformer_text_input=True, vocab_size=50, max_position_embeddings=9)
    vision = VisionConfig(10, 20, 1, 2, 14, 7)
    torch.manual_seed(0)
    model = Blip2(Blip2Config(vision, qformer, OPTConfig("opt", 50, 8, 20, 1, 2), num_query_tokens=4)).double()
    twin = Blip2Retrieval(RetrievalConfig(vision, qformer, num_query_tokens=4)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    shared = {n: p for n, p in model.qformer.state_dict().items() if not n.startswith("projection")}
    assert not twin.qformer.load_state_dict(shared, strict=False).unexpected_keys
    image_embeds = torch.randn(2, 5, 10, dtype=torch.float64)
    ids, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), text_mask([3, 4])
    queries, prefix = model.qformer(image_embeds, ids, mask)
    assert_exact(queries, twin.itm(image_embeds, ids, mask)[0])
    assert_exact(prefix, model.qformer.projection(queries))
    alone, _ = model.qformer(image_embeds[:1], ids[:1, :3], text_mask([3]))
    assert_exact(queries[:1], alone)  # padding changes nothing
    assert (queries - model.qformer(image_embeds)[0]).abs().max() > 0.01  # and the question matters


@torch.no_grad()
def test_equals_lavis() -> None:
    """Every recorded output of LAVIS's stage 1, the captioning head included."""
    if not LAVIS.is_dir():
        pytest.skip(f"LAVIS's recorded outputs are not at {LAVIS}")
    model = load_retrieval(CheckpointSource(LAVIS / "stage1.pth", LAVIS.parent / "configs" / "stage1.json"))
    arrays = dict(np.load(LAVIS / "stage1.npz"))
    pictures = torch.from_numpy(np.load(LAVIS.parent / "images.npz")["pixel_values"])

    def close(found: Tensor, name: str, tolerance: float = 2e-5) -> None:
        expected = torch.from_numpy(arrays[name])
        assert (found - expected).abs().max() <= tolerance, (name, (found - expected).abs().max())

    def close_scores(found: Tensor, name: str) -> None:
        close(found, name, 1e-5 * float(np.abs(arrays[name]).max()))

    image_embeds = model.vision(pictures)
    ids, attention_mask = (torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask"))
    mask = torch.where(attention_mask == 0, MASKED, 0.0)[:, None, None]
    query_embeds, image_itc = model.qformer(image_embeds)
    text_embeds, text_itc = model.text(ids, mask)
    close(image_embeds, "ln_vision_output")
    close(query_embeds, "query_output")
    seen = attention_mask[..., None].float()
    assert ((text_embeds - torch.from_numpy(arrays["text_output"])) * seen).abs().max() <= 2e-5
    close(image_itc, "image_feats")
    close(text_itc, "text_feat")
    per_query = torch.einsum("iqe,te->itq", image_itc, text_itc)
    close_scores(per_query, "itc_sim_per_query")
    close_scores(per_query.amax(2), "itc_sim")
    count = len(pictures)
    pairs = [(i, t) for i in range(count) for t in range(count)]
    of_image, of_text = (torch.tensor(places) for places in zip(*pairs, strict=True))
    _, logits = model.itm(image_embeds[of_image], ids[of_text], mask[of_text])
    close_scores(logits.unflatten(0, (count, count)), "itm_logits_per_query")
    close_scores(logits.mean(1).unflatten(0, (count, count)), "itm_logits")

    ext_ids, ext_mask = (torch.from_numpy(arrays[f"ext_{name}"]) for name in ("input_ids", "attention_mask"))
    multimodal, _ = model.itm(image_embeds, ext_ids, torch.where(ext_mask == 0, MASKED, 0.0)[:, None, None])
    close(multimodal, "ext_multimodal_multimodal_embeds")
    lm_logits = model.itg_logits(image_embeds, torch.from_numpy(arrays["train_lm_input_ids"]), mask)
    expected = torch.from_numpy(arrays["train_lm_logits"])
    assert ((lm_logits - expected) * seen).abs().max() <= 1e-5 * expected.abs().max()
    assert model.temperature is not None
    assert abs(float(model.temperature) - 0.083) < 1e-6


@torch.no_grad()
def test_equals_mmpretrain() -> None:
    """mmpretrain's retrieval model, which uses all stored blocks of the image encoder, unlike its generative ones."""
    if not MMPRETRAIN.is_dir():
        pytest.skip(f"mmpretrain's recorded outputs are not at {MMPRETRAIN}")
    model = load_retrieval(CheckpointSource(MMPRETRAIN / "retrieval.pth", LAVIS.parent / "configs" / "stage1.json"))
    arrays = {name: torch.from_numpy(array) for name, array in np.load(MMPRETRAIN / "retrieval.npz").items()}
    image_embeds = model.vision(torch.from_numpy(np.load(MMPRETRAIN / "images.npz")["pixel_values"]))
    ids, mask = arrays["text_ids"], torch.where(arrays["text_attn_mask"] == 0, MASKED, 0.0)[:, None, None]
    query_embeds, image_itc = model.qformer(image_embeds)
    text_embeds, text_itc = model.text(ids, mask)
    for found, name in (
        (image_embeds, "ln_vision_out"),
        (query_embeds, "query_output"),
        (image_itc, "image_feat"),
        (text_embeds, "text_embeds"),
        (text_itc, "text_feat"),
    ):
        assert (found - arrays[name]).abs().max() <= 2e-5, name
    expected = arrays["itm_logits_per_query"]  # [N, M, Q, 2]
    images, texts = expected.shape[:2]
    _, logits = model.itm(image_embeds.repeat_interleave(texts, 0), ids.repeat(images, 1), mask.repeat(images, 1, 1, 1))
    assert (logits.unflatten(0, (images, texts)) - expected).abs().max() <= 1e-5 * expected.abs().max()

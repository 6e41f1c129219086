"""The losses that BLIP-2 is trained with: LAVIS's own numbers, finite differences, and two processes against one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import in_two_processes

from blip2rt.model import Blip2, Blip2Config, Blip2Retrieval, CheckpointSource, RetrievalConfig, load_retrieval
from blip2rt.model import objectives as objectives_module
from blip2rt.model.checkpoint import load_blip2
from blip2rt.model.config import OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2rt.model.names import LAVIS as LAVIS_NAMES
from blip2rt.model.names import Names
from blip2rt.model.objectives import (
    IGNORED,
    Similarities,
    draw_negatives,
    itc_loss,
    itc_similarities,
    itg_loss,
    itm_loss,
    mask_prompt,
    opt_loss,
    t5_loss,
)
from blip2rt.model.retrieval import stored_name

LAVIS = Path(__file__).parents[2] / "shared" / "fixtures" / "lavis"
needs_lavis = pytest.mark.skipif(not LAVIS.is_dir(), reason=f"LAVIS's recorded outputs are not at {LAVIS}")
TOLERANCE = 1e-5  # of the largest value
NOISE = 1e-6  # gradients that are zero in theory


def close(found: Tensor, expected: Any, what: str) -> None:
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape, what
    difference, largest = (found.detach() - expected).abs().max(), expected.abs().max()
    assert difference <= TOLERANCE * largest or largest < NOISE, (what, float(difference), float(largest))


def compare_gradients(model: nn.Module, names: Names, arrays: dict[str, Any], prefix: str) -> int:
    """Every recorded gradient against the part of ours that it is; the number of them."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        keys = names(stored_name(name))
        for i, key in enumerate(keys):
            if key is not None and parameter.grad is not None:
                found[key] = parameter.grad.chunk(len(keys))[i] if parameter.ndim else parameter.grad
    recorded = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    for key, array in recorded.items():
        close(found[key].reshape(array.shape), array, key)
    return len(recorded)


def lavis(file: str, config: str) -> CheckpointSource:
    return CheckpointSource(LAVIS / "lavis" / file, LAVIS / "configs" / f"{config}.json")


def pictures() -> Tensor:
    return torch.from_numpy(np.load(LAVIS / "images.npz")["pixel_values"])


@needs_lavis
@pytest.mark.parametrize("variant", ["train_", "train_ids_"])
def test_stage1_equals_lavis(variant: str) -> None:
    """Losses, the weights that negatives are drawn by, logits, and gradients where they were recorded."""
    model = load_retrieval(lavis("stage1.pth", "stage1"))
    model.requires_grad_(True)
    arrays = dict(np.load(LAVIS / "lavis" / "stage1.npz"))
    ids = torch.from_numpy(arrays["input_ids"])
    mask = torch.from_numpy(arrays["attention_mask"]).bool()
    image_ids = torch.from_numpy(arrays["train_ids_image_id"]) if variant == "train_ids_" else None
    image_embeds = model.vision(pictures())
    _, image_itc = model.qformer(image_embeds)
    _, text_itc = model.text(ids, objectives_module.additive_mask(mask, image_embeds))
    assert model.temperature is not None
    similarities = itc_similarities(image_itc, text_itc, model.temperature, image_ids)
    negatives = tuple(torch.from_numpy(arrays[f"{variant}neg_{side}_idx"]) for side in ("image", "text"))
    itc = itc_loss(similarities)
    itm, itm_logits = itm_loss(model, image_embeds, ids, mask, negatives)  # type: ignore[arg-type]
    itg = itg_loss(model, image_embeds, ids, mask, decode_id=int(arrays["train_lm_input_ids"][0, 0]))
    for loss, name in ((itc, "itc"), (itm, "itm"), (itg, "lm"), (itc + itm + itg, "")):
        close(loss, arrays[f"{variant}loss_{name}".rstrip("_")], name)
    close(itm_logits, arrays[f"{variant}itm_logits"], "itm logits")
    for scores, side in ((similarities.text_to_image, "image"), (similarities.image_to_text, "text")):
        close(
            scores.masked_fill(similarities.same, -10000).softmax(1), arrays[f"{variant}neg_{side}_weights"], f"{side}s"
        )
    if variant == "train_":
        (itc + itm + itg).backward()
        assert compare_gradients(model, Names(LAVIS_NAMES), arrays, "train_grad.") == 14


@needs_lavis
def test_stage2_of_opt_equals_lavis() -> None:
    model = load_blip2(lavis("opt_full.pth", "opt"))
    model.requires_grad_(True)
    arrays = dict(np.load(LAVIS / "lavis" / "opt.npz"))
    ids = torch.from_numpy(arrays["loss_input_ids"])
    *_, prefix = model.encode_image(pictures())
    queries = prefix.shape[1]
    mask = torch.from_numpy(arrays["loss_attention_mask"])[:, queries:].bool()
    labels = mask_prompt(ids, mask, torch.full((len(ids),), int(arrays["loss_prompt_length"][0])))
    assert torch.equal(labels, torch.from_numpy(arrays["loss_labels"])[:, queries:])
    loss = opt_loss(model.decoder, prefix, ids, labels)  # type: ignore[arg-type]
    close(loss, arrays["loss"], "loss")
    loss.backward()
    assert compare_gradients(model, Names(LAVIS_NAMES), arrays, "grad.") == 3


@needs_lavis
def test_stage2_of_t5_equals_lavis() -> None:
    model = load_blip2(lavis("t5_full.pth", "t5"))
    model.requires_grad_(True)
    arrays = dict(np.load(LAVIS / "lavis" / "t5.npz"))
    *_, prefix = model.encode_image(pictures())
    prompt_mask = torch.from_numpy(arrays["loss_attention_mask"])[:, prefix.shape[1] :].bool()
    ids, output_ids = (torch.from_numpy(arrays[f"loss_{side}_ids"]) for side in ("input", "output"))
    output_mask = torch.from_numpy(arrays["loss_decoder_attention_mask"]).bool()
    loss = t5_loss(model, prefix, ids, prompt_mask, output_ids, output_mask)
    close(loss, arrays["loss"], "loss")
    loss.backward()
    assert compare_gradients(model, Names(LAVIS_NAMES, "t5"), arrays, "grad.") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Finite differences, in float64

VISION = VisionConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
)
TEXTS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 7, 10, 11, 3], [2, 12, 3, 0, 0, 0], [2, 5, 6, 13, 3, 0]])


def qformer(reads_text: bool) -> QFormerConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
    }
    return QFormerConfig(use_qformer_text_input=reads_text, vocab_size=15, max_position_embeddings=8, **sizes)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((parameter.ndim == 1 and name.endswith("weight")) + 0.4 * noise)
    return model


def small_retrieval() -> Blip2Retrieval:
    config = RetrievalConfig(VISION, qformer(True), 3, 6, has_training_parts=True)
    model: Blip2Retrieval = randomised(Blip2Retrieval(config).double())
    assert model.temperature is not None
    model.temperature.data.fill_(0.3)
    return model


def small_blip2(text: OPTConfig | T5Config) -> Blip2:
    model: Blip2 = randomised(Blip2(Blip2Config(VISION, qformer(False), text, 3)).double())
    return model


def small_pictures() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stage1_losses(model: Blip2Retrieval, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """ITC, ITM and ITG of the four texts, or of the part of them that one process has."""
    ids = TEXTS[part]
    mask, wrong = ids != 0, (torch.tensor([1, 0, 3, 2])[part], torch.tensor([2, 3, 0, 1])[part])
    image_embeds = model.vision(small_pictures()[part])
    _, image_itc = model.qformer(image_embeds)
    _, text_itc = model.text(ids, objectives_module.additive_mask(mask, image_embeds))
    assert model.temperature is not None
    itc = itc_loss(itc_similarities(image_itc, text_itc, model.temperature, torch.tensor([5, 6, 5, 8])[part]))
    return itc, itm_loss(model, image_embeds, ids, mask, wrong)[0], itg_loss(model, image_embeds, ids, mask, 14)


def lm_loss(model: Blip2) -> Tensor:
    *_, prefix = model.encode_image(small_pictures())
    mask = TEXTS != 0
    if isinstance(model.config.text, T5Config):
        return t5_loss(model, prefix, TEXTS, mask, TEXTS.flip(0), mask.flip(0))
    labels = mask_prompt(TEXTS, mask, torch.tensor([2, 3, 1, 2]))
    return opt_loss(model.decoder, prefix, TEXTS, labels)  # type: ignore[arg-type]


OPT = OPTConfig(vocab_size=16, hidden_size=10, ffn_dim=14, num_hidden_layers=2, num_attention_heads=2)
T5 = T5Config(
    vocab_size=16,
    d_model=10,
    d_kv=4,
    d_ff=14,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
    dense_act_fn="gelu",
    decoder_start_token_id=0,
)
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "itc": (small_retrieval, lambda model: stage1_losses(model)[0]),
    "itm": (small_retrieval, lambda model: stage1_losses(model)[1]),
    "itg": (small_retrieval, lambda model: stage1_losses(model)[2]),
    "opt": (lambda: small_blip2(OPT), lm_loss),
    "t5": (lambda: small_blip2(T5), lm_loss),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each parameter along a random direction. What is gathered without gradient stays as it was."""
    build, loss_of = CASES[name]
    model = build()
    first: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        first.append(x.detach().clone())
        return first[-1]

    monkeypatch.setattr(objectives_module, "gather", record)
    loss_of(model).backward()
    replayed: list[Tensor] = []
    monkeypatch.setattr(objectives_module, "gather", lambda _: replayed.pop(0))
    generator, step, compared = torch.Generator().manual_seed(2), 1e-6, 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            replayed[:] = first
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(float(loss_of(model)))
                parameter.sub_(sign * step * direction)
        slope, expected = float((parameter.grad * direction).sum()), (values[0] - values[1]) / (2 * step)
        assert abs(slope - expected) <= 1e-6 * max(1.0, abs(expected)), (parameter_name, slope, expected)
        compared += 1
    assert compared > 20


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def half_of_the_batch(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean ITC and ITM losses and gradients of two processes with two pairs each."""
    model = small_retrieval()
    itc, itm, _ = stage1_losses(model, slice(2 * rank, 2 * rank + 2))
    (itc + itm).backward()
    losses = torch.stack((itc, itm)).detach()
    dist.all_reduce(losses)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / 2
    return losses / 2, gradients


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The mean of two processes' ITC and ITM losses and gradients is that of one process with the joined batch."""
    model = small_retrieval()
    itc, itm, _ = stage1_losses(model)
    (itc + itm).backward()
    for losses, gradients in in_two_processes(__file__, "half_of_the_batch", tmp_path):
        assert torch.allclose(losses, torch.stack((itc, itm)), rtol=1e-12)
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-12 * max(1.0, float(gradient.abs().max())), name


def test_negatives_are_drawn_by_likeness_and_never_match() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 2)
    same = torch.tensor([[True, False, False, True], [False, True, False, False]])
    similarities = Similarities(scores, scores.flip(1), same)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.stack(draw_negatives(similarities, generator)) for _ in range(3000)]
    share = torch.stack([(torch.stack(draws) == column).double().mean(0) for column in range(4)], -1)  # [2, B, 4]
    for side, weights in enumerate((similarities.text_to_image, similarities.image_to_text)):
        assert (share[side] - weights.masked_fill(same, -10000).softmax(1)).abs().max() < 0.03
        assert share[side][same].max() == 0


def test_labels_and_text_alone() -> None:
    """Padding and the prompt do not count; without a picture the language model's loss is that of its text."""
    labels = mask_prompt(TEXTS, TEXTS != 0, torch.tensor([2, 1, 3, 9]))
    assert json.loads(str(labels.tolist())) == [
        [IGNORED, IGNORED, 8, 3, IGNORED, IGNORED],
        [IGNORED, 9, 7, 10, 11, 3],
        [IGNORED] * 6,
        [IGNORED] * 6,
    ]
    model = small_blip2(OPT)
    decoder: Any = model.decoder
    whole = [row[None, : int((row != 0).sum())] for row in TEXTS]
    alone = [opt_loss(decoder, None, row, row) for row in whole]
    counts = (TEXTS != 0).sum(1) - 1
    together = opt_loss(decoder, None, TEXTS, TEXTS.masked_fill(TEXTS == 0, IGNORED))
    assert torch.allclose(together, (torch.stack(alone) * counts).sum() / counts.sum(), rtol=1e-12)


def test_texts_of_one_picture_are_branches_of_one_row() -> None:
    """Three texts behind one picture and one behind another: loss and gradients as if each had a picture of its own."""
    model = small_blip2(OPT)
    decoder: Any = model.decoder
    owner = torch.tensor([0, 0, 0, 1])
    labels = mask_prompt(TEXTS, TEXTS != 0, torch.tensor([2, 1, 0, 2]))
    prefix = torch.randn(2, 3, OPT.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for given, owners in ((prefix.clone().requires_grad_(), owner), (prefix.clone().requires_grad_(), None)):
        loss = opt_loss(decoder, given if owners is not None else given[owner], TEXTS, labels, owners)
        results.append((loss, *torch.autograd.grad(loss, (given, decoder.embedding.token.weight))))
    for together, alone in zip(*results, strict=True):
        assert torch.allclose(together, alone, rtol=1e-12, atol=1e-14)

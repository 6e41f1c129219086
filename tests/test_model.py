"""The reference model: what transformers computes, whatever way the rows are cut into calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from blip2rt.model import Blip2, load_blip2
from blip2rt.model.config import ACTIVATIONS
from blip2rt.model.opt import OPT
from blip2rt.stages import MASKED


def assert_exact(found: Tensor, expected: Tensor) -> None:
    """In float64 anything but the same formula shows."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Cache:
    """A decoder with the rows it was given so far: R rows of B images a call, [B, H, C, d] a layer."""

    def __init__(self, decoder: nn.Module, batch: int, capacity: int):
        assert isinstance(decoder, OPT)
        weight = decoder.embedding.token.weight
        heads = int(decoder.blocks[0].num_heads)  # type: ignore[arg-type]  # a Module, to mypy
        self.decoder, self.width = decoder, weight.shape[1]
        shape = (batch, heads, capacity, weight.shape[1] // heads)
        self.layers = [weight.new_zeros(shape) for _ in range(2 * len(decoder.blocks))]

    def __call__(
        self, input_ids: Tensor, positions: Tensor, write_indices: Tensor, visible: Tensor, prefix: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of all rows; `visible` [B, S, C] says what each may see."""
        batch, rows = input_ids.shape
        given = self.layers[0].new_zeros(batch, rows, self.width)
        if prefix is not None:
            given[:, : prefix.shape[1]] = prefix
        mask = torch.where(visible, 0.0, MASKED)[:, None].to(given.dtype)
        wanted = torch.arange(rows).expand(batch, -1)
        logits, *self.layers = self.decoder(given, input_ids, positions, write_indices, mask, wanted, *self.layers)
        return logits

    def causal(self, input_ids: Tensor, start: int = 0, prefix: Tensor | None = None) -> Tensor:
        """Rows start, start+1, ... of every image, each after all before it."""
        batch, rows = input_ids.shape
        positions = torch.arange(start, start + rows)
        visible = torch.arange(self.layers[0].shape[2]) <= positions[:, None]
        expanded = visible.expand(batch, -1, -1)
        return self(input_ids, positions.expand(batch, -1), torch.full((batch,), start), expanded, prefix)


def rows_of(prefix: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """Input ids of query slots and text, [B, Q+P]."""
    return torch.cat((torch.full(prefix.shape[:2], -1), torch.tensor(ids)), dim=1)


def random_ids(model: Blip2, batch: int, length: int, seed: int = 0) -> Tensor:
    """Text that holds no image slot."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.text.vocab_size - 1, (batch, length), generator=generator)


def random_pictures(model: Blip2, batch: int = 2) -> Tensor:
    size = model.config.vision.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
def assert_same_as_transformers(directory: Path) -> None:
    """All three stages in float64, the decoder as one prefill and two cached steps."""
    theirs = Blip2ForConditionalGeneration.from_pretrained(
        directory,
        dtype=torch.float64,
        attn_implementation="sdpa",  # "eager" rounds to float32 in OPT
    ).eval()
    ours = load_blip2(directory).double()
    pictures, image_token = random_pictures(ours), int(ours.config.image_token_id or 0)
    image_embeds, query_embeds, prefix = ours.encode_image(pictures)
    text = random_ids(ours, 2, 7)
    slots = torch.full(prefix.shape[:2], image_token)
    expected = theirs(pixel_values=pictures, input_ids=torch.cat((slots, text), dim=1))
    assert_exact(image_embeds, expected.vision_outputs.last_hidden_state)
    assert_exact(query_embeds, expected.qformer_outputs.last_hidden_state)
    assert_exact(prefix, theirs.language_projection(query_embeds))

    num_queries = prefix.shape[1]
    cache = Cache(ours.decoder, 2, num_queries + 9)
    logits = [cache.causal(rows_of(prefix, text[:, :5].tolist()), prefix=prefix)]
    logits += [cache.causal(text[:, i : i + 1], start=num_queries + i) for i in (5, 6)]
    assert_exact(torch.cat(logits, dim=1), expected.logits)


@pytest.mark.parametrize("seed", range(6))
def test_equals_transformers(seed: int, tmp_path: Path, checkpoint_maker: Callable[..., Path]) -> None:
    assert_same_as_transformers(checkpoint_maker(tmp_path, seed))


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    **{
        name: {
            "vision_config": {"hidden_act": name},
            "qformer_config": {"hidden_act": name},
            "text_config": {"activation_function": name},
        }
        for name in ACTIVATIONS
    },
    "eps": {"vision_config": {"layer_norm_eps": 1e-2}, "qformer_config": {"layer_norm_eps": 1e-3}},
    "no biases": {"vision_config": {"qkv_bias": False}, "text_config": {"enable_bias": False}},
    "no gains": {"text_config": {"layer_norm_elementwise_affine": False}},
    "no last norm": {"text_config": {"_remove_final_layer_norm": True}},
    "own head": {"text_config": {"tie_word_embeddings": False}},
    "uneven patches": {"vision_config": {"image_size": 33, "patch_size": 14}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_transformers(name: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Every field of the config that changes the computation."""
    config = Blip2Config.from_pretrained(tiny_checkpoint)
    for section, values in VARIANTS[name].items():
        for field, value in values.items():
            setattr(getattr(config, section), field, value)
    if name == "own head":
        config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    model.save_pretrained(tmp_path)
    assert_same_as_transformers(tmp_path)


@torch.no_grad()
def test_float32_is_close_to_its_float64_twin(tiny_checkpoint: Path) -> None:
    single, double = load_blip2(tiny_checkpoint), load_blip2(tiny_checkpoint).double()
    pictures, text = random_pictures(single), random_ids(single, 2, 7)
    encoded = [model.encode_image(pictures.to(dtype)) for model, dtype in ((single, torch.float32), (double, None))]
    outputs = [
        (*stages, Cache(model.decoder, 2, 30).causal(rows_of(stages[2], text.tolist()), prefix=stages[2]))
        for model, stages in zip((single, double), encoded, strict=True)
    ]
    for a, b in zip(*outputs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@torch.no_grad()
def test_steps_equal_one_pass(tiny_checkpoint: Path) -> None:
    """However the rows are cut into calls, and whatever the capacity."""
    model = load_blip2(tiny_checkpoint).double()
    prefix, text = model.encode_image(random_pictures(model))[2], random_ids(model, 2, 8)
    rows = rows_of(prefix, text.tolist())
    whole = Cache(model.decoder, 2, rows.shape[1]).causal(rows, prefix=prefix)
    for cuts in ([rows.shape[1] - 8, 8], [rows.shape[1] - 7, *[1] * 7], [rows.shape[1] - 5, 2, 3]):
        cache = Cache(model.decoder, 2, rows.shape[1] + 6)
        pieces, start = [], 0
        for piece in rows.split(cuts, dim=1):
            pieces.append(cache.causal(piece, start, prefix if start == 0 else None))
            start += piece.shape[1]
        assert_exact(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_tree_equals_separate_sequences(tiny_checkpoint: Path) -> None:
    """Four branches an image over one cache, reordered at every step, images at different lengths."""
    model = load_blip2(tiny_checkpoint).double()
    prefix = model.encode_image(random_pictures(model))[2]
    generator = torch.Generator().manual_seed(1)
    num_queries, beams, steps = prefix.shape[1], 4, 6
    prompts = [random_ids(model, 1, length, seed=length)[0].tolist() for length in (2, 5)]
    lengths = torch.tensor([num_queries + len(prompt) for prompt in prompts])
    longest = max(len(prompt) for prompt in prompts)
    cache = Cache(model.decoder, 2, int(lengths.max()) + beams * steps)
    cache.causal(rows_of(prefix, [prompt + [0] * (longest - len(prompt)) for prompt in prompts]), prefix=prefix)

    texts = [[list(prompt) for _ in range(beams)] for prompt in prompts]
    columns = torch.arange(cache.layers[0].shape[2])
    visible = (columns < lengths[:, None, None]).repeat(1, beams, 1)  # [B, K, C]
    for step in range(steps):
        parents = torch.randint(0, beams, (2, beams), generator=generator)
        tokens = torch.randint(0, model.config.text.vocab_size - 1, (2, beams), generator=generator)
        texts = [[[*texts[b][parents[b, k]], int(tokens[b, k])] for k in range(beams)] for b in range(2)]
        written = lengths + step * beams
        visible = visible.gather(1, parents[:, :, None].expand_as(visible))
        visible |= columns == (written[:, None] + torch.arange(beams))[:, :, None]
        logits = cache(tokens, (lengths + step)[:, None].expand(-1, beams), written, visible)
        for b, rows in enumerate(texts):
            alone = prefix[b : b + 1].expand(beams, -1, -1)
            inputs = rows_of(alone, rows)
            expected = Cache(model.decoder, beams, inputs.shape[1]).causal(inputs, prefix=alone)[:, -1]
            assert_exact(logits[b], expected)

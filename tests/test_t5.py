"""T5: the reference is transformers' T5, rows of a tree in a cache are its texts, and engines give both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Blip2Config, Blip2ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from blip2rt import GenerationOptions, InputError, Pipeline
from blip2rt.errors import CheckpointError
from blip2rt.export import export_engine
from blip2rt.model import Blip2, load_blip2
from blip2rt.model.config import Blip2Config as OurConfig
from blip2rt.model.t5 import T5Decoder, relative_bucket
from blip2rt.stages import MASKED
from blip2rt.tokenizer import SHORT_QUESTION_PROMPT

VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {"feed_forward_proj": "gated-gelu"},
    "FLAN-T5 of LAVIS": {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False},
    "first T5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "few buckets": {"relative_attention_num_buckets": 5, "relative_attention_max_distance": 11},
    "deep decoder": {"num_layers": 1, "num_decoder_layers": 4},
    "wide heads": {"d_model": 18, "num_heads": 3, "d_kv": 13, "layer_norm_epsilon": 1e-2},
}


@torch.no_grad()
def tree_logits(model: Blip2, prefix: torch.Tensor, text: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Logits [1, len(rows), V] after the token of every row, decoded as a shuffled tree in one cache.

    `rows[i]` is a text; every proper beginning of it stands among the rows before it. The rows lie in the cache in
    another order than they were made in, and rows of other texts lie between them.
    """
    decoder = model.decoder
    assert isinstance(decoder, T5Decoder)
    ids = torch.cat((torch.full(prefix.shape[:2], -1), text), 1)
    filler = prefix.new_zeros(1, text.shape[1], prefix.shape[2])
    positions = torch.arange(ids.shape[1])[None]
    open_mask = prefix.new_zeros(1, 1, 1, ids.shape[1])
    cross = model.encoder(torch.cat((prefix, filler), 1), ids, positions, open_mask)
    places = np.random.default_rng(0).permutation(len(rows)).tolist()
    text_config: Any = model.config.text
    shape = (1, text_config.num_heads, len(rows), text_config.d_kv)
    past = [prefix.new_zeros(shape) for _ in range(2 * text_config.num_decoder_layers)]
    cached_positions = torch.zeros(1, len(rows), dtype=torch.int64)
    logits = []
    for i, row in enumerate(rows):
        ancestors = [places[j] for j in range(i + 1) if rows[j] == row[: len(rows[j])]]
        mask = prefix.new_full((1, 1, 1, len(rows)), MASKED)
        mask[..., ancestors] = 0
        depth = torch.tensor([[len(row) - 1]])
        cached_positions[0, places[i]] = depth
        place = torch.tensor([places[i]])
        new = torch.tensor([[row[-1]]])
        output, *past = decoder(
            new, depth, cached_positions, place, mask, open_mask, torch.zeros_like(new), *past, *cross
        )
        logits.append(output)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_transformers(
    name: str, tmp_path: Path, checkpoint_maker: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: two beams that share a beginning, as a tree, against each text alone without a cache."""
    # theirs squares in float32 whatever it is given
    monkeypatch.setattr(
        T5LayerNorm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    )
    directory = checkpoint_maker(tmp_path, len(name), "t5", **VARIANTS[name])
    theirs = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
    ours = load_blip2(directory).double()
    size = ours.config.vision.image_size
    picture = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    *_, prefix = ours.encode_image(picture)
    text = torch.tensor([[7, 9, 11, 2]])
    slots = torch.full(prefix.shape[:2], int(ours.config.image_token_id or 0))
    shared, texts = [1, 5, 8], [[1, 5, 8, 30, 31, 12], [1, 5, 8, 21, 4]]
    rows = [shared[:1], shared[:2], shared, texts[0][:4], texts[1][:4], texts[0][:5], texts[1], texts[0]]
    found = tree_logits(ours, prefix, text, rows)
    for row in texts:
        expected = theirs(
            pixel_values=picture,
            input_ids=torch.cat((slots, text), 1),
            attention_mask=torch.ones(1, slots.shape[1] + text.shape[1]),
            decoder_input_ids=torch.tensor([row]),
            use_cache=False,
        ).logits
        path = [i for i, r in enumerate(rows) if r == row[: len(r)]]
        torch.testing.assert_close(found[:, path], expected, rtol=1e-9, atol=1e-9)


@given(
    num_buckets=st.integers(4, 64),
    extra=st.integers(1, 300),
    bidirectional=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_buckets_are_those_of_transformers(num_buckets: int, extra: int, bidirectional: bool) -> None:
    max_distance = num_buckets // 2 + extra
    distance = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(relative_bucket(distance, num_buckets, max_distance, bidirectional), expected)
    beyond = distance.abs() >= max_distance  # the exporter's table ends there
    clamped = relative_bucket(distance.clamp(-max_distance, max_distance), num_buckets, max_distance, bidirectional)
    assert torch.equal(clamped[beyond], expected[beyond])


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory, checkpoint_maker: Callable[..., Path]) -> Pipeline:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = checkpoint_maker(folder / "checkpoint", 1, "t5", num_layers=2, num_decoder_layers=2)
    return Pipeline(export_engine(checkpoint, folder / "engine"))


def test_alone_equals_in_a_batch(pipe: Pipeline) -> None:
    """Bit for bit, though prompts of other lengths change how far the encoder's rows are padded."""
    size = pipe.manifest.image.size
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((3, size, size), dtype=np.float32) for _ in range(6)]
    prompts = ["w1 w2 w3", "", "w5 w8 w9 w10", "w7 " * 40, "w3", "w2 w4"]
    for options in (
        GenerationOptions(max_new_tokens=20),
        GenerationOptions(num_beams=5, max_new_tokens=40, num_return_sequences=2),
    ):
        together = pipe.generate(images, prompts, options=options)
        assert together == [pipe.generate(i, p, options=options) for i, p in zip(images, prompts, strict=True)]
        backwards = pipe.generate(images[::-1], prompts[::-1], options=options)
        assert together == backwards[::-1]


def test_streams_and_answers(pipe: Pipeline) -> None:
    features = pipe.encode(np.zeros((30, 40, 3), np.uint8))
    streamed = "".join(pipe.stream(features, "w1", max_new_tokens=12))
    assert streamed == pipe.generate(features, "w1", max_new_tokens=12).text
    asked = SHORT_QUESTION_PROMPT.format("w9 w8")
    answer = pipe.answer(features, "w9 w8")
    generated = pipe.generate(features, asked, num_beams=5, max_new_tokens=10, length_penalty=-1.0)
    assert (answer.token_ids, answer.score) == (generated.token_ids, generated.score)
    assert pipe.generate(features, "w1", max_new_tokens=300)  # relative positions have no end
    with pytest.raises(InputError, match="image"):
        pipe.generate(features, "<image>")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"decoder_start_token_id": None, "bos_token_id": None}, "decoder cannot start"),
        ({"decoder_start_token_id": 99}, "beyond the 50 embedding rows"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets is 2"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance 16"),
        ({"dense_act_fn": "tan"}, "dense_act_fn is 'tan'"),
        ({"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
    ],
)
def test_impossible_sizes(text: dict[str, Any], reason: str) -> None:
    plain = {"model_type": "t5", "vocab_size": 50, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
    OurConfig.from_transformers({"model_type": "blip-2", "text_config": plain})
    with pytest.raises(CheckpointError, match=reason):
        OurConfig.from_transformers({"model_type": "blip-2", "text_config": plain | text})


def test_config_as_transformers_reads_it() -> None:
    """Fields that T5 derives from each other, through a round of transformers' own files."""
    for given_fields, activation, is_scaled in (
        ({"feed_forward_proj": "gated-gelu"}, "gelu_new", True),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}, "gelu", False),
        ({"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}, "silu", False),
        ({}, "relu", True),
    ):
        text = {"model_type": "t5", "decoder_start_token_id": 0, "num_layers": 3, **given_fields}
        written = Blip2Config(text_config=text).to_dict()
        for config in ({"model_type": "blip-2", "text_config": text}, written):
            ours: Any = OurConfig.from_transformers(config).text
            assert (ours.dense_act_fn, ours.scale_decoder_outputs) == (activation, is_scaled)
            assert (ours.num_layers, ours.num_decoder_layers) == (3, 3)

"""Retrieval engines: what transformers' `Blip2ForImageTextRetrieval` gives, every pair of a picture and a text alone.

2 random checkpoints; BLIP2RT_RETRIEVAL=20 asks for more.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Blip2ForImageTextRetrieval

from blip2rt import EngineError, InputError, Pipeline
from blip2rt.errors import CheckpointError
from blip2rt.export import export_engine
from blip2rt.export.verify import verify_engine

Array = np.ndarray[Any, Any]

CHECKPOINTS = int(os.environ.get("BLIP2RT_RETRIEVAL", "2"))
TOLERANCE = 2e-5  # of features, absolute, and of scores relative to the largest


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Models this small lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tiny_retrieval_checkpoint: Path) -> Path:
    return tiny_retrieval_checkpoint


@pytest.fixture(scope="module")
def engine(tiny_retrieval_engine: Path) -> Path:
    return tiny_retrieval_engine


@pytest.fixture(scope="module")
def pipe(engine: Path) -> Pipeline:
    return Pipeline(engine, threads=1)


@pytest.fixture(scope="module")
def pictures(pipe: Pipeline) -> list[Array]:
    return random_pictures(pipe, 5)


def random_pictures(pipe: Pipeline, count: int, seed: int = 0) -> list[Array]:
    size = pipe.manifest.image.size
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((3, size, size), dtype=np.float32) for _ in range(count)]


def random_texts(pipe: Pipeline, count: int, seed: int = 0) -> list[str]:
    """Texts of one token up to all positions of the model."""
    draw = random.Random(seed)
    qformer = pipe.manifest.model["qformer"]
    longest = qformer["max_position_embeddings"] - 2
    lengths = [1, longest, *(draw.randint(1, min(12, longest)) for _ in range(count))][:count]
    words = [f"w{i}" for i in range(qformer["vocab_size"] - 5)]
    return [" ".join(draw.choices(words, k=length)) for length in lengths]


@pytest.mark.parametrize("seed", range(CHECKPOINTS))
@torch.no_grad()
def test_equals_transformers(seed: int, tmp_path: Path, retrieval_checkpoint_maker: Callable[..., Path]) -> None:
    checkpoint = retrieval_checkpoint_maker(tmp_path / "checkpoint", seed)
    pipe = Pipeline(export_engine(checkpoint, tmp_path / "engine"), threads=1)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(checkpoint).eval()
    images, texts = random_pictures(pipe, 2, seed), random_texts(pipe, 4, seed)
    scores = pipe.match(images, texts)
    embeds, text_embeds = pipe.embed_images(images), pipe.embed_texts(texts)
    assert scores.itc.shape == scores.itm.shape == scores.itm_probability.shape == (2, 4)
    expected_itm = np.empty((2, 4, 2), np.float32)
    for t, text in enumerate(texts):
        ids = torch.tensor([[2, *(int(word[1:]) + 4 for word in text.split()), 3]])
        for i, image in enumerate(images):
            inputs = {"pixel_values": torch.from_numpy(image)[None], "input_ids": ids}
            inputs["attention_mask"] = torch.ones_like(ids)
            itc = theirs(**inputs)
            assert np.abs(embeds[i] - itc.image_embeds[0].numpy()).max() <= TOLERANCE
            assert np.abs(text_embeds[t] - itc.text_embeds[0].numpy()).max() <= TOLERANCE
            assert abs(scores.itc[i, t] - float(itc.logits_per_image)) <= TOLERANCE
            expected_itm[i, t] = theirs(**inputs, use_image_text_matching_head=True).logits_per_image[0]
    assert np.abs(scores.itm - expected_itm[..., 1]).max() <= TOLERANCE * max(1, np.abs(expected_itm).max())
    probabilities = torch.from_numpy(expected_itm).softmax(-1)[..., 1].numpy()
    assert np.abs(scores.itm_probability - probabilities).max() <= 1e-4


def test_an_answer_does_not_depend_on_its_batch(pipe: Pipeline, pictures: list[Array]) -> None:
    """Bit for bit: texts of any length, more of them than one batch holds."""
    texts = random_texts(pipe, 70)
    together = pipe.match(pictures[:2], texts[:20])
    for i, t in ((0, 0), (1, 1), (0, 13), (1, 19)):
        alone = pipe.match(pictures[i], texts[t])
        for found, expected in ((alone.itc, together.itc), (alone.itm, together.itm)):
            assert found.shape == (1, 1)
            assert found[0, 0] == expected[i, t]
    embeds = pipe.embed_texts(texts)
    assert embeds.dtype == np.float32
    assert np.abs(np.linalg.norm(embeds, axis=-1) - 1).max() < 1e-5
    for t in (0, 1, 64, 69):
        assert (pipe.embed_texts(texts[t]) == embeds[t]).all()
    images = pipe.embed_images(pictures)
    assert np.abs(np.linalg.norm(images, axis=-1) - 1).max() < 1e-5
    assert (pipe.embed_images(pictures[3]) == images[3]).all()


def test_features_stand_in_for_images(pipe: Pipeline, pictures: list[Array], monkeypatch: pytest.MonkeyPatch) -> None:
    features = pipe.encode(pictures)
    assert all(f.prefix is None and f.itc_embeds is not None for f in features)
    texts = random_texts(pipe, 3)
    expected = pipe.match(pictures, texts)
    monkeypatch.setattr(pipe.retrieval_engine, "_vision", None)  # the tower does not run again
    found = pipe.match(features, texts)
    assert (found.itm == expected.itm).all()
    assert (found.itc == expected.itc).all()
    assert (pipe.embed_images(features[0])[0] == features[0].itc_embeds).all()
    with pytest.raises(InputError, match="another model"):
        pipe.match(replace(features[0], itc_embeds=np.zeros((1, 1), np.float32)), texts)


def test_wrong_calls(pipe: Pipeline, pictures: list[Array]) -> None:
    longest = pipe.manifest.model["qformer"]["max_position_embeddings"] - 2
    for texts, message in (
        ([], "is empty"),
        ("", "text 0 is empty"),
        (["w1", "  "], "text 1 is empty"),
        ("w1 " * (longest + 1), f"text 0 has {longest + 3} tokens and the model {longest + 2} positions"),
        (["w1", 3], "text 1 must be a string, not int"),
        ({"w1"}, "not set"),
        ("\ud800", "not valid text"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.match(pictures, texts)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            pipe.embed_texts(texts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="list of images is empty"):
        pipe.embed_images([])


def test_calls_for_a_head_that_is_absent(pipe: Pipeline, pictures: list[Array], tiny_pipeline: Pipeline) -> None:
    for call in (
        lambda: pipe.caption(pictures[0]),
        lambda: pipe.answer(pictures, "w1"),
        lambda: pipe.generate(pictures[0], "w1"),
        lambda: pipe.stream(pictures[0]),
    ):
        with pytest.raises(EngineError, match="retrieval engine, without a language model: build a generative engine"):
            call()
    features = tiny_pipeline.encode(random_pictures(tiny_pipeline, 1))
    for call in (
        lambda: tiny_pipeline.match(features, "w1"),
        lambda: tiny_pipeline.embed_images(features),
        lambda: tiny_pipeline.embed_texts("w1"),
    ):
        with pytest.raises(EngineError, match="generative engine, without ITC and ITM heads: build a retrieval engine"):
            call()


def test_both_engines_of_a_folder(engine: Path, tiny_engine: Path, tmp_path: Path, pipe: Pipeline) -> None:
    """One of each kind opens together; encode sees for both."""
    (tmp_path / "captioner").symlink_to(tiny_engine)
    (tmp_path / "itm").symlink_to(engine)
    both, generative = Pipeline(tmp_path, threads=1), Pipeline(tiny_engine, threads=1)
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    features = both.encode(picture)
    assert both.caption(features).token_ids == generative.caption(picture).token_ids
    assert both.manifest.kind == "generative"
    texts = random_texts(pipe, 2)
    expected = pipe.match(picture, texts)
    for given in (picture, features):
        assert (both.match(given, texts).itm == expected.itm).all()
    plain = both.caption(picture, num_beams=4, num_return_sequences=4, max_new_tokens=5)
    ranked = both.caption([picture, features], rerank="itm", num_beams=4, max_new_tokens=5)
    for caption in ranked:
        found = [caption, *caption.alternatives]
        assert sorted(c.token_ids for c in found) == sorted(c.token_ids for c in [plain, *plain.alternatives])
        assert [c.itm for c in found if c.text] == both.match(picture, [c.text for c in found if c.text]).itm[
            0
        ].tolist()
        texts_in_order = [c.text for c in found if c.text]
        assert texts_in_order == [c.text for c in found][: len(texts_in_order)]
        assert (np.diff(both.match(picture, texts_in_order).itm[0]) <= 0).all()
    with pytest.raises(InputError, match="rerank must be 'itm' or None, not 'itc'"):
        both.caption(picture, rerank="itc")
    with pytest.raises(EngineError, match="without ITC and ITM heads"):
        generative.caption(picture, rerank="itm")
    with pytest.raises(InputError, match="encoded without a retrieval engine"):
        both.match(generative.encode(picture), texts)
    (tmp_path / "itm2").symlink_to(engine)
    with pytest.raises(EngineError, match="2 retrieval engines, itm, itm2: pick one with name="):
        Pipeline(tmp_path)
    assert Pipeline(tmp_path, name="itm2").retrieval_engine.directory == tmp_path / "itm2"


def test_verify_finds_a_changed_weight(engine: Path, checkpoint: Path) -> None:
    assert [c.stage for c in verify_engine(engine, checkpoint)] == ["vision", "qformer", "text", "itm"]
    manifest = Pipeline(engine, threads=1).manifest
    assert all(p.max_rel < 2e-5 for p in manifest.parity.values())
    assert manifest.parity["itm"].sizes == {"B": 3, "L": 9}
    assert (manifest.tokens.bos, manifest.tokens.stop, manifest.tokens.pad) == (2, (3,), 0)


def test_stages_share_one_copy_of_the_weights(engine: Path) -> None:
    """The itm stage runs through weights that the two stages before it have written, but for its head."""
    manifest = Pipeline(engine, threads=1).manifest
    head = 2 * manifest.model["qformer"]["hidden_size"] + 2
    assert manifest.parameters["itm"] == head
    assert manifest.files["itm.data"].size < 2 * 4096 + 4 * head
    assert manifest.files["qformer.data"].size > 4 * manifest.parameters["qformer"] / 2


def test_tokenizer_options(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--text-tokenizer"):
        export_engine(checkpoint, tmp_path / "e", tokenizer=tiny_checkpoint)
    with pytest.raises(InputError, match="--tokenizer"):
        export_engine(tiny_checkpoint, tmp_path / "e", text_tokenizer=checkpoint)
    with pytest.raises(CheckpointError, match=r"has no \[CLS\], \[SEP\].*--text-tokenizer"):
        export_engine(checkpoint, tmp_path / "e", text_tokenizer=tiny_checkpoint)


def test_match_command(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from blip2rt.cli import main

    pictures = [tmp_path / name for name in ("a.png", "b.png")]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)).save(pictures[0])
    pictures[1].write_bytes(b"no picture")
    command = ["match", *map(str, pictures), "--text", "w1 w2", "--text", "w3", "--engine", str(engine)]
    assert main([*command, "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = Pipeline(engine, threads=1).match(pictures[0], ["w1 w2", "w3"])
    assert [row["text"] for row in rows] == ["w1 w2", "w3", None]
    assert [row["itm"] for row in rows[:2]] == scores.itm[0].tolist()
    assert rows[0]["score"] == rows[0]["itm"] + rows[0]["itc"]
    assert "no picture" in rows[2]["error"] or "b.png" in rows[2]["error"]
    assert main([*command[:2], "--text", " ", "--engine", str(engine)]) == 2

"""A closed list is ranked by what transformers' forward pass says of every candidate, stop token included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from blip2rt import InputError, Pipeline, pipeline
from blip2rt.export import export_engine

Array = np.ndarray[Any, Any]
CANDIDATES = ["w1", "w1 w2 w3", "w4 w5", "w6", "w7 w8 w9 w1 w2", "w2", "w2 w3"]


@pytest.fixture(scope="module", params=["opt", "t5"])
def model(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint_maker: Callable[..., Path],
    tiny_checkpoint: Path,
    tiny_pipeline: Pipeline,
) -> tuple[Path, Pipeline]:
    if request.param == "opt":
        return tiny_checkpoint, tiny_pipeline
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = checkpoint_maker(folder / "checkpoint", 1, "t5", num_layers=2, num_decoder_layers=2)
    return checkpoint, Pipeline(export_engine(checkpoint, folder / "engine"))


@torch.no_grad()
def logprobs(checkpoint: Path, pixel_values: Array, prompt: str, candidate: str) -> list[float]:
    """Of every token of the candidate and of the stop token, in one forward pass."""
    theirs = Blip2ForConditionalGeneration.from_pretrained(checkpoint).eval()
    tokenizer, text = AutoTokenizer.from_pretrained(checkpoint), theirs.config.text_config
    slots = [theirs.config.image_token_index] * theirs.config.num_query_tokens
    words = [*tokenizer(candidate, add_special_tokens=False).input_ids, text.eos_token_id]
    inputs: dict[str, Any] = {"pixel_values": torch.from_numpy(pixel_values)[None]}
    if text.model_type == "t5":
        inputs["input_ids"] = torch.tensor([[*slots, *tokenizer(prompt).input_ids]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["decoder_input_ids"] = torch.tensor([[text.decoder_start_token_id, *words[:-1]]])
        rows = theirs(**inputs).logits[0]
    else:
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        inputs["input_ids"] = torch.tensor([[*slots, text.bos_token_id, *prompt_ids, *words[:-1]]])
        rows = theirs(**inputs).logits[0, -len(words) :]
    return rows.double().log_softmax(-1)[torch.arange(len(words)), words].tolist()


def test_scores_are_those_of_transformers(model: tuple[Path, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, pipe = model
    monkeypatch.setattr(pipeline, "CANDIDATE_ROWS", 3)
    size = pipe.manifest.image.size
    images = [np.random.default_rng(i).standard_normal((3, size, size), np.float32) for i in range(2)]
    questions = ["w1 w2", "w3"]
    answers = pipe.answer(images, questions, candidates=CANDIDATES)
    template = "Question: {} Short answer:" if "encoder" in pipe.manifest.stages else "Question: {} Answer:"
    for image, question, answer in zip(images, questions, answers, strict=True):
        ranked = [answer, *answer.alternatives]
        assert sorted(a.text for a in ranked) == sorted(CANDIDATES)
        assert [a.score for a in ranked] == sorted((a.score for a in ranked), reverse=True)
        for found in ranked:
            expected = logprobs(checkpoint, image, template.format(question), found.text)
            assert found.score == pytest.approx(np.mean(expected), rel=1e-5, abs=1e-5)
            assert found.token_logprobs == pytest.approx(expected[:-1], rel=1e-4, abs=1e-4)
            assert found.finish_reason == "stop"
    alone = pipe.answer(pipe.encode(images[1]), questions[1], candidates=CANDIDATES)
    assert (alone.text, alone.score) == (answers[1].text, answers[1].score)
    turned = pipe.answer(images[1], questions[1], candidates=CANDIDATES[::-1])  # other rows, other last bits
    assert (turned.text, turned.score) == (answers[1].text, pytest.approx(answers[1].score, rel=1e-6))


def test_wrong_candidates(tiny_pipeline: Pipeline, tiny_images: list[Array]) -> None:
    for given, message in (
        ([], "not empty, not \\[\\]"),
        ("w1", "must be a list"),
        (["w1", " "], "not ' '"),
        (["w1", "w1"], "given twice: 'w1'"),
    ):
        with pytest.raises(InputError, match=message):
            tiny_pipeline.answer(tiny_images[0], "w1", candidates=given)
    with pytest.raises(InputError, match=r"num_beams.* no effect .*candidates"):
        tiny_pipeline.answer(tiny_images[0], "w1", candidates=["w1"], num_beams=3)
    with pytest.raises(InputError, match="positions"):
        tiny_pipeline.answer(tiny_images[0], "w1", candidates=["w1 " * 200])

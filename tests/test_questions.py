"""A Q-Former that reads questions: what transformers' own modules, put together by hand, generate from it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from blip2rt import Answer, CheckpointError, InputError, Pipeline
from blip2rt.cli import main
from blip2rt.export import export_engine
from blip2rt.export.convert import convert_checkpoint
from blip2rt.export.verify import verify_engine
from blip2rt.model import CheckpointSource

Array = np.ndarray[Any, Any]
QUESTIONS = ["w1", "w3 w4 w1 w9", " ".join(f"w{i % 30}" for i in range(50)), "w7 w2"]
TEMPLATES = {"opt": "Question: {} Answer:", "t5": "Question: {} Short answer:"}


class Theirs:
    """transformers' model, whose Q-Former is given the rows of a question behind its queries."""

    def __init__(self, checkpoint: Path):
        self.model = Blip2ForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.question_tokenizer = AutoTokenizer.from_pretrained(checkpoint / "qformer_tokenizer")
        self.embeddings = Blip2TextEmbeddings(self.model.config.qformer_config)
        prefix, tensors = "embeddings.", load_file(checkpoint / "model.safetensors")
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.embeddings.load_state_dict(own, strict=False)

    @contextmanager
    def asked(self, question: str | None) -> Iterator[None]:
        qformer = self.model.qformer
        forward = qformer.forward

        def with_question(query_embeds: torch.Tensor, **keywords: Any) -> Any:
            queries = query_embeds.shape[1]
            if question is None:
                return forward(query_embeds=query_embeds, **keywords)
            ids = self.question_tokenizer(question, return_tensors="pt").input_ids
            rows = torch.cat((query_embeds, self.embeddings(ids)), dim=1)
            output = forward(query_embeds=rows, query_length=queries, **keywords)
            output.last_hidden_state = output.last_hidden_state[:, :queries]
            return output

        qformer.forward = with_question
        try:
            yield
        finally:
            qformer.forward = forward

    @torch.no_grad()
    def generate(self, pixel_values: Array, prompt: str, question: str | None, **options: Any) -> list[int]:
        config = self.model.config
        slots = [config.image_token_index] * config.num_query_tokens
        ids = self.tokenizer(prompt, add_special_tokens=config.text_config.model_type == "t5").input_ids
        start = [] if config.text_config.model_type == "t5" else [config.text_config.bos_token_id]
        inputs = torch.tensor([[*slots, *start, *ids]])
        with self.asked(question):
            row = self.model.generate(
                pixel_values=torch.from_numpy(pixel_values)[None],
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **options,
            )[0].tolist()
        row = row[1:] if config.text_config.model_type == "t5" else row[inputs.shape[1] :]
        stop = config.text_config.eos_token_id
        return row[: row.index(stop)] if stop in row else row


@pytest.fixture(scope="module", params=["opt", "t5"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, asking_checkpoint_maker: Any
) -> tuple[Path, Path]:
    """Checkpoint and engine."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = asking_checkpoint_maker(folder / "checkpoint", 2, request.param)
    return checkpoint, export_engine(checkpoint, folder / "engine")


def pictures(pipe: Pipeline) -> list[Array]:
    size = pipe.manifest.image.size
    return [np.random.default_rng(i).standard_normal((3, size, size), np.float32) for i in range(len(QUESTIONS))]


def test_answers_equal_transformers(model: tuple[Path, Path]) -> None:
    """Questions of unequal length in one batch; captions see no question; an answer alone is the same, bit for bit."""
    checkpoint, engine = model
    pipe, theirs = Pipeline(engine), Theirs(checkpoint)
    images = pictures(pipe)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8}
    template = TEMPLATES[theirs.model.config.text_config.model_type]
    answers = pipe.answer(images, QUESTIONS, length_penalty=1.0, **options)
    untold = [pipe.generate(image, template.format(q), **options) for image, q in zip(images, QUESTIONS, strict=True)]
    for image, question, answer, other in zip(images, QUESTIONS, answers, untold, strict=True):
        prompt = template.format(question)
        assert answer.token_ids == theirs.generate(image, prompt, question, **options)
        assert other.token_ids == theirs.generate(image, prompt, None, **options)
        assert pipe.answer(pipe.encode(image), question, length_penalty=1.0, **options) == answer
    assert any(a.token_logprobs != o.token_logprobs for a, o in zip(answers, untold, strict=True))
    ranked = pipe.answer(images[:2], QUESTIONS[:2], candidates=["w1", "w2 w3"])
    assert ranked[1] == pipe.answer(images[1], QUESTIONS[1], candidates=["w1", "w2 w3"])


def test_the_stage_is_verified_with_text(model: tuple[Path, Path]) -> None:
    checkpoint, engine = model
    (qformer,) = (c for c in verify_engine(engine, checkpoint) if c.stage == "qformer")
    assert qformer.first_divergence is None
    assert qformer.sizes == {"B": 3, "L": 9}
    assert {"embedding", "queries", "projection"} <= qformer.pieces.keys()


def test_wrong_questions(model: tuple[Path, Path]) -> None:
    pipe = Pipeline(model[1])
    image = pictures(pipe)[0]
    with pytest.raises(InputError, match="the question is empty"):
        pipe.answer(image, " ")
    positions = pipe.manifest.model["qformer"]["max_position_embeddings"]
    with pytest.raises(InputError, match=rf"the question has \d+ tokens and the model {positions} positions"):
        pipe.answer(image, "w1 " * positions, max_new_tokens=1)


def test_it_is_told(model: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model[1])]) == 0
    assert "questions   go to the Q-Former as well" in capsys.readouterr().out
    assert main(["inspect", str(model[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reads_questions"] is True


def test_its_tokenizer(asking_checkpoint_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Without one the option is named; with the option, and through LAVIS's format, it is the same engine."""
    checkpoint = asking_checkpoint_maker(tmp_path / "checkpoint", 4)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("qkv.bias"):  # LAVIS has no place for the keys' part
            tensor.view(3, -1)[1] = 0
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    moved = (checkpoint / "qformer_tokenizer").rename(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"no tokenizer of the Q-Former, which reads questions.*--text-tokenizer"):
        export_engine(checkpoint, tmp_path / "engine")
    convert_checkpoint(checkpoint, tmp_path / "lavis.pth", "lavis")
    source = CheckpointSource(tmp_path / "lavis.pth", config=tmp_path / "lavis.json")
    ours = Pipeline(export_engine(checkpoint, tmp_path / "ours", text_tokenizer=moved))
    theirs = Pipeline(export_engine(source, tmp_path / "theirs", tokenizer=checkpoint, text_tokenizer=moved))
    image = pictures(ours)[0]
    found: Answer = ours.answer(image, "w1 w2")
    assert found.score == pytest.approx(theirs.answer(image, "w1 w2").score, rel=1e-3)  # another eps of the vision norm

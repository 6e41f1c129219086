"""An engine in transformers' and optimum's clothes says what the Pipeline says, in transformers' own layout."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from blip2rt import EngineError, InputError, Pipeline
from blip2rt.export import export_engine
from blip2rt.huggingface import Blip2ForConditionalGeneration, Blip2Processor
from blip2rt.manifest import Manifest

PROMPTS = ["w1", "w2 w3 w4", "w5 w1"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 7, "repetition_penalty": 1.4},
    {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "length_penalty": -1.0},
    {"min_new_tokens": 3, "max_new_tokens": 5, "no_repeat_ngram_size": 2, "use_cache": True, "output_scores": False},
]


@pytest.fixture(scope="module", params=["opt", "t5"])
def both(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_engine: Path,
    checkpoint_maker: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A checkpoint and its engine."""
    if request.param == "opt":
        return tiny_checkpoint, tiny_engine
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = checkpoint_maker(folder / "checkpoint", seed=11, model_type="t5")
    return checkpoint, export_engine(checkpoint, folder / "engine")


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)) for i in range(count)]


def test_generate_gives_transformers_tensors(both: tuple[Path, Path]) -> None:
    """The same tensors go in, the same come out: prompts padded on the left, stop tokens, padding behind."""
    checkpoint, engine = both
    reference = transformers.Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model = Blip2ForConditionalGeneration.from_pretrained(engine, threads=1)
    processor = Blip2Processor.from_pretrained(engine)
    inputs = processor(images=pictures(3), text=PROMPTS, return_tensors="pt")
    assert inputs["attention_mask"].min() == 0  # prompts of several lengths
    for options in OPTIONS:
        expected = reference.generate(**inputs, **options)
        found = model.generate(**inputs, **options)
        assert torch.equal(found, expected), (options, found, expected)
    config = transformers.GenerationConfig(max_new_tokens=3, num_beams=2)
    expected = reference.generate(**inputs, max_new_tokens=3, num_beams=2)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    again = processor.post_process_image_text_to_text(expected)  # type: ignore[no-untyped-call]
    assert [text.strip() for text in again] == [text.strip() for text in processor.tokenizer.batch_decode(
        expected, skip_special_tokens=True
    )]  # fmt: skip


def test_the_pipeline_of_transformers(both: tuple[Path, Path]) -> None:
    """`pipeline("image-text-to-text")` gives the texts of ours; sampling follows torch's seed."""
    _, engine = both
    ours = Pipeline(engine)
    pipe: Any = transformers.pipeline(  # type: ignore[call-overload]
        "image-text-to-text",
        model=Blip2ForConditionalGeneration.from_pretrained(engine),
        processor=Blip2Processor.from_pretrained(engine),
    )
    images = pictures(2)
    for image, prompt in zip(images, PROMPTS, strict=False):
        [row] = pipe(images=image, text=prompt, max_new_tokens=5, return_full_text=False)
        assert row["generated_text"].strip() == ours.generate(image, prompt, max_new_tokens=5).text
    rows = pipe(images=images, text=PROMPTS[:2], max_new_tokens=4, generate_kwargs={"num_beams": 2})
    expected = ours.generate(images, PROMPTS[:2], max_new_tokens=4, num_beams=2)
    texts = [row[0]["generated_text"] if isinstance(row, list) else row["generated_text"] for row in rows]
    assert [text.removeprefix(p).strip() for text, p in zip(texts, PROMPTS, strict=False)] == [r.text for r in expected]
    sampled = {"do_sample": True, "temperature": 2.0}
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(pipe(images=images[0], text="w1", max_new_tokens=8, generate_kwargs=sampled))
    assert drawn[0] == drawn[1]


def test_wrong_calls(tiny_engine: Path, tiny_retrieval_engine: Path, tmp_path: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(tiny_engine)
    processor = Blip2Processor.from_pretrained(tiny_engine)
    inputs = processor(images=pictures(2), text=PROMPTS[:2], return_tensors="pt")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_beem": 2}, "did you mean 'num_beams'"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"output_scores": True}, "output_scores=True"),
        ({"max_new_tokens": 10_000}, "positions"),
        ({"attention_mask": inputs["attention_mask"][:1]}, "attention_mask"),
        ({"input_ids": inputs["input_ids"][:1]}, "input_ids"),
        ({"attention_mask": torch.zeros_like(inputs["attention_mask"])}, "a prompt's ids must be some"),
    ]
    for change, expected in wrong:
        with pytest.raises(InputError, match=expected):
            model.generate(**{**inputs, **change})
    with pytest.raises(InputError, match="truncation"):
        processor(images=pictures(1), text="w1", truncation=True)
    with pytest.raises(InputError, match="give images"):
        processor()
    assert str(processor.num_query_tokens) in repr(processor)
    with pytest.raises(InputError, match="come out on the CPU, not on cuda: an engine of"):
        model.to("cuda")
    assert model.to(torch.float32) is model
    with pytest.raises(NotImplementedError, match="generate"):
        model(**inputs)
    with pytest.raises(EngineError, match="without a language model"):
        Blip2ForConditionalGeneration.from_pretrained(tiny_retrieval_engine)
    model.save_pretrained(tmp_path / "copy")
    copy = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.generate(**inputs), model.generate(**inputs))
    tokens = model.pipe.manifest.tokens
    empty = torch.tensor([[tokens.image] * processor.num_query_tokens + [tokens.bos]] * 2)
    assert torch.equal(model.generate(inputs["pixel_values"]), model.generate(inputs["pixel_values"], empty))


def test_optimum_cli(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`optimum-cli export blip2rt` builds what `blip2rt export` builds, and fails as it does."""
    pytest.importorskip("optimum.commands.base", reason="pip install 'blip2rt[optimum]'")
    program = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "export", "blip2rt"]
    command: list[str | Path] = [*program, "--model", tiny_checkpoint, "--output", tmp_path / "engine"]
    subprocess.run(command, check=True, cwd=tmp_path)
    direct = Manifest.read(export_engine(tiny_checkpoint, tmp_path / "direct"))
    assert Manifest.read(tmp_path / "engine").digest() == direct.digest()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert "Traceback" not in again.stderr


def test_optimum(tiny_engine: Path, tmp_path: Path) -> None:
    """An OptimizedModel over an engine directory."""
    base = pytest.importorskip("optimum.modeling_base", reason="pip install 'blip2rt[optimum]'")
    from blip2rt.huggingface.optimized import Blip2rtModelForImageTextToText

    model = Blip2rtModelForImageTextToText.from_pretrained(tiny_engine)
    assert isinstance(model, base.OptimizedModel)
    image = pictures(1)[0]
    inputs = Blip2Processor.from_pretrained(tiny_engine)(images=image, text="w1 w2", return_tensors="pt")
    ids = model.generate(**inputs, num_beams=3, max_new_tokens=6)
    expected = Pipeline(tiny_engine).generate(image, "w1 w2", num_beams=3, max_new_tokens=6)
    end = [*expected.token_ids, *([model.config.text_config.eos_token_id] if expected.finish_reason == "stop" else [])]
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == end
    model.save_pretrained(tmp_path / "saved")
    opened = Blip2rtModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(opened.generate(**inputs), model.generate(**inputs))

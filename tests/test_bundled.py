"""The bundled model: what transformers loads, what its card says it is, and that it sees."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
)

from blip2rt import Pipeline, bundled

HOME = bundled.CHECKPOINT.parent
WEIGHTS = {name: HOME / name / "model.safetensors" for name in ("captioner", "retriever")}
SOUGHT = {"beach": "three pineapples on a beach", "night": "a sheep and an axe at night", "stage": "three purple cars"}
SEEN = {"beach": "pineapples", "night": "sheep", "stage": "cars", "street": "stars", "photograph": "sailboat"}


@pytest.fixture(scope="module")
def pipe(bundled_engines: Path) -> Pipeline:
    """Both engines."""
    return Pipeline(bundled_engines, threads=1)


def upright(file: Path) -> Image.Image:
    """As the pipeline sees it, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def test_small() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.values()) < 30e6
    assert sum(file.stat().st_size for file in bundled.IMAGES) < 200e3


def test_weights_are_those_of_the_log() -> None:
    """A training that nobody can name is no training."""
    log, card = json.loads((HOME / "log.json").read_text()), (HOME / "README.md").read_text()
    for name, file in WEIGHTS.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert log[name]["sha256"] == digest
        assert digest[:16] in card
    for stage in log.values():
        assert {"recipe", "seed", "commit", "minutes", "log"} <= stage.keys()
        losses, tenth = [row["loss"] for row in stage["log"]], len(stage["log"]) // 10
        assert np.mean(losses[-tenth:]) < np.mean(losses[:tenth])
    assert all(f"]({name})" in card and (HOME / name).is_file() for name in ("sheet.png", "curves.svg"))


def test_pictures_cover_what_surprises_readers() -> None:
    opened = [Image.open(file) for file in bundled.IMAGES]
    assert {image.mode for image in opened} == {"RGB", "P"}
    assert any("transparency" in image.info for image in opened)
    assert any(image.getexif().get(0x0112, 1) != 1 for image in opened)


def test_tokenizer_is_like_opt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.CHECKPOINT, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer("").input_ids == [2]
    assert tokenizer("a photo of").input_ids[0] == 2
    for text in ("a photo of a house\n", "Question: où est le château 🏰? Answer:"):
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text


def test_transformers_says_the_same(pipe: Pipeline) -> None:
    """Every picture, three prompts: the engine's tokens are transformers' in float32."""
    processor = Blip2Processor.from_pretrained(bundled.CHECKPOINT, local_files_only=True)
    model = Blip2ForConditionalGeneration.from_pretrained(bundled.CHECKPOINT, local_files_only=True, dtype="float32")
    stop = processor.tokenizer.convert_tokens_to_ids("\u010a")  # a newline, as byte-level BPE writes it
    assert model.language_model.config.eos_token_id == stop
    assert processor.tokenizer.decode([stop]) == "\n"
    for file in bundled.IMAGES:
        features = pipe.encode(file)
        for prompt in ("a photo of", "Question: how many things are there? Answer:", ""):
            inputs = processor(images=upright(file), text=prompt, return_tensors="pt")
            ids = model.eval().generate(**inputs, num_beams=5, max_new_tokens=30)[0].tolist()
            said = ids[inputs.input_ids.shape[1] :]
            assert said[: said.index(stop) if stop in said else None] == (
                pipe.generate(features, prompt, num_beams=5, max_new_tokens=30).token_ids
            )


def test_transformers_finds_the_same(pipe: Pipeline) -> None:
    model = Blip2ForImageTextRetrieval.from_pretrained(bundled.RETRIEVER, local_files_only=True, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(bundled.RETRIEVER, local_files_only=True)
    texts = ["three pineapples on a beach", "a sheep and an axe at night"]
    pixels = torch.from_numpy(np.stack([pipe.retrieval_engine.preprocess(file) for file in bundled.IMAGES]))
    scores = pipe.match(list(bundled.IMAGES), texts)
    for place, text in enumerate(texts):
        inputs = tokenizer([text] * len(pixels), return_tensors="pt")
        for key, found in (("itm", scores.itm), ("itc", scores.itc)):
            with torch.no_grad():
                out = model(pixel_values=pixels, use_image_text_matching_head=key == "itm", **inputs)
            wanted = out.logits_per_image.numpy()
            wanted = wanted[:, 1] if key == "itm" else wanted.max(axis=1) if wanted.ndim > 1 else wanted
            assert np.abs(found[:, place] - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


def test_it_sees(pipe: Pipeline) -> None:
    """Captions name what is there, and a search finds the picture."""
    images = {file.stem: file for file in bundled.IMAGES}
    captions = dict(zip(images, pipe.caption(list(images.values())), strict=True))
    assert all(word in captions[name].text for name, word in SEEN.items()), captions
    scores = pipe.match(list(images.values()), list(SOUGHT.values()))
    for place, name in enumerate(SOUGHT):
        assert list(images)[int((scores.itm + scores.itc)[:, place].argmax())] == name

"""The bundled checkpoint and pictures: made by the committed program, and what transformers loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

from blip2rt import bundled

PROGRAM = Path(__file__).parents[1] / "training" / "make_bundled.py"


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program writes today, in a process of its own: hash seeds and thread orders are new."""
    directory = tmp_path_factory.mktemp("bundled")
    subprocess.run([sys.executable, PROGRAM, "--output", directory], check=True)
    return directory


def test_same_files(remade: Path) -> None:
    committed = bundled.CHECKPOINT.parent
    for folder in ("captioner", "images"):
        names = sorted(file.name for file in (committed / folder).iterdir())
        assert sorted(file.name for file in (remade / folder).iterdir()) == names


def test_same_weights(remade: Path) -> None:
    committed = load_file(bundled.CHECKPOINT / "model.safetensors")
    again = load_file(remade / "captioner" / "model.safetensors")
    assert again.keys() == committed.keys()
    for name, tensor in committed.items():
        assert torch.equal(again[name], tensor), name


def test_same_tokenizer(remade: Path) -> None:
    again = remade / "captioner" / "tokenizer.json"
    assert again.read_bytes() == (bundled.CHECKPOINT / "tokenizer.json").read_bytes()


def test_same_configuration(remade: Path) -> None:
    for file in bundled.CHECKPOINT.glob("*config.json"):
        committed, again = json.loads(file.read_text()), json.loads((remade / "captioner" / file.name).read_text())
        for content in (committed, again):
            content.pop("transformers_version", None)
        assert again == committed, file.name


def test_same_pictures(remade: Path) -> None:
    """Compared as pictures: compression differs between versions of Pillow."""
    for file in bundled.IMAGES:
        with Image.open(file) as committed, Image.open(remade / "images" / file.name) as again:
            assert (again.mode, again.size, again.getexif()) == (committed.mode, committed.size, committed.getexif())
            assert np.abs(np.asarray(again, np.int16) - np.asarray(committed, np.int16)).max() <= 2, file.name


def test_pictures_cover_what_surprises_readers() -> None:
    opened = [Image.open(file) for file in bundled.IMAGES]
    assert {image.mode for image in opened} == {"RGB", "RGBA", "L"}
    assert any(ImageOps.exif_transpose(image).size != image.size for image in opened)


def test_small() -> None:
    assert (bundled.CHECKPOINT / "model.safetensors").stat().st_size < 2e6
    assert sum(file.stat().st_size for file in bundled.IMAGES) < 200e3


def test_tokenizer_is_like_opt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.CHECKPOINT, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer("").input_ids == [2]
    assert tokenizer("a photo of").input_ids[0] == 2
    for text in ("a photo of a house\n", "Question: où est le château 🏰? Answer:"):
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text


def test_transformers_generates_from_it() -> None:
    """Another text for every picture and prompt, some of them ended: else a test that compares texts is blind."""
    processor = Blip2Processor.from_pretrained(bundled.CHECKPOINT, local_files_only=True)
    model = Blip2ForConditionalGeneration.from_pretrained(bundled.CHECKPOINT, local_files_only=True).eval()
    stop = model.config.text_config.eos_token_id
    assert processor.tokenizer.decode([stop]) == "\n"
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    generated = []
    for file in bundled.IMAGES:
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        for prompt in ("a photo of", "Question: what color is the ball? Answer:", ""):
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            ids = model.generate(**inputs, num_beams=5, max_new_tokens=30)[0].tolist()
            generated.append(ids[inputs.input_ids.shape[1] :])
    assert len({tuple(ids) for ids in generated}) == len(generated)
    assert {ids[-1] == stop for ids in generated} == {True, False}

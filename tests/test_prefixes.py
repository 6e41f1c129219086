"""Texts without the beginning that a reader does not want."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt import InputError, Pipeline
from blip2rt.cli import main
from blip2rt.prefixes import strip_prefix

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize(
    ("text", "prefixes", "expected"),
    [
        ("a painting of a cat", ["a painting of"], "a cat"),
        ("A Photo Of a cat", ["a photo of ", "a"], "a cat"),
        ("apple", ["a"], "apple"),
        ("a", ["a"], ""),
        ("a, b", ["a,"], "b"),
        ("cat", ["", "dog"], "cat"),
    ],
)
def test_strip_prefix(text: str, prefixes: list[str], expected: str) -> None:
    assert strip_prefix(text, prefixes) == expected


def test_the_pipeline_strips_prefixes(tiny_pipeline: Pipeline, tiny_images: list[Array]) -> None:
    """Of texts and alternatives, tokens and scores untouched; before captions are compared with their picture."""
    plain = tiny_pipeline.caption(tiny_images[:2], "w1", num_beams=4, num_return_sequences=4, max_new_tokens=6)
    first = plain[0].text.split()[0]
    found = tiny_pipeline.caption(
        tiny_images[:2], "w1", strip_prefix=["zzz", first], num_beams=4, num_return_sequences=4, max_new_tokens=6
    )
    changed = 0
    for before, after in zip(plain, found, strict=True):
        for old, new in zip([before, *before.alternatives], [after, *after.alternatives], strict=True):
            assert new.text == strip_prefix(old.text, [first])
            assert (new.token_ids, new.score) == (old.token_ids, old.score)
            changed += new.text != old.text
    assert changed > 0
    for call in (tiny_pipeline.answer, tiny_pipeline.generate):
        text = call(tiny_images[0], "w1").text
        assert call(tiny_images[0], "w1", strip_prefix=text.split()[0]).text == strip_prefix(text, [text.split()[0]])
    with pytest.raises(InputError, match="strip_prefix must be a string or a list of strings"):
        tiny_pipeline.generate(tiny_images[0], "w1", strip_prefix=[1])  # type: ignore[list-item]
    with pytest.raises(InputError, match="strip_prefix= has no effect with candidates="):
        tiny_pipeline.answer(tiny_images[0], "w1", candidates=["w1"], strip_prefix="w1")


def test_commands_strip_prefixes(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)).save(tmp_path / "a.png")
    command = ["caption", str(tmp_path / "a.png"), "--engine", str(tiny_engine), "--prompt", "w1", "--json"]
    assert main(command) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert main([*command, "--strip-prefix", "zzz", "--strip-prefix", text.split()[0].upper()]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text.partition(" ")[2].strip()

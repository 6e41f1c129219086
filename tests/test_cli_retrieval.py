"""`blip2rt embed` and `search`, as people call them: both directions, and all that can be wrong with a call.

`match` is in test_retrieval.py, `eval` in test_evaluate.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt import Gallery, Pipeline, TextGallery
from blip2rt.cli import main

Call = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def call(tiny_retrieval_engine: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command with the tiny engine: its status, the rows that it prints, what it says on stderr."""

    def run(*arguments: object, engine: Path = tiny_retrieval_engine) -> tuple[int, list[dict[str, Any]], str]:
        status = main([*map(str, arguments), "--engine", str(engine), "--threads", "1", "--json"])
        printed = capsys.readouterr()
        return status, [json.loads(line) for line in printed.out.splitlines()], printed.err

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"picture {i}.png" for i in range(5)]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def test_pictures_are_added_and_found(
    call: Call, pictures: list[Path], tmp_path: Path, tiny_retrieval_engine: Path
) -> None:
    """In two steps, with a broken picture among them; then ranked as `match` ranks them."""
    gallery, broken = tmp_path / "gallery", tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    status, rows, said = call("embed", *pictures[:2], broken, pictures[0], "--gallery", gallery)
    assert status == 1
    assert [(row["image"], row["error"] is None) for row in rows] == [
        (str(broken), False),
        (str(pictures[0]), True),
        (str(pictures[1]), True),
    ]
    assert "holds 2 pictures" in said
    status, rows, said = call("embed", *pictures, "--gallery", gallery)
    assert (status, [row["image"] for row in rows]) == (0, [str(path) for path in pictures[2:]])
    Image.open(pictures[3]).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(pictures[4])
    assert call("embed", pictures[4], "--gallery", gallery, "--replace")[0] == 0
    texts = ["w1 w2", "w3 w4 w5"]
    status, rows, _ = call("search", *texts, "--gallery", gallery, "--k", 3)
    scores = Pipeline(tiny_retrieval_engine, threads=1).match(pictures, texts)
    both = scores.itm + scores.itc
    assert [(row["text"], row["rank"]) for row in rows] == [(text, rank) for text in texts for rank in (1, 2, 3)]
    found = np.array([row["score"] for row in rows]).reshape(2, 3)
    assert np.abs(found - np.sort(both, axis=0)[::-1][:3].T).max() < 0.02 * max(1, np.abs(scores.itm).max())
    itc = call("search", texts[0], "--gallery", gallery, "--k", 9, "--rerank", 0)[1]
    assert len(itc) == 5
    assert np.abs(np.array([row["score"] for row in itc]) - np.sort(scores.itc[:, 0])[::-1]).max() < 2e-3


def test_texts_are_added_and_found(
    call: Call, pictures: list[Path], tmp_path: Path, tiny_retrieval_engine: Path
) -> None:
    gallery, broken, lines = tmp_path / "gallery", tmp_path / "broken.png", tmp_path / "texts.txt"
    broken.write_bytes(b"no picture")
    texts = [f"w{i} w{i + 1}" for i in range(12)]
    lines.write_text("\n".join([*texts[:6], "", f"  {texts[0]} "]))
    assert "holds 6 texts" in call("embed", "--texts", lines, "--gallery", gallery)[2]
    lines.write_text("\n".join(texts))
    assert "holds 12 texts" in call("embed", "--texts", lines, "--gallery", gallery)[2]
    status, rows, _ = call("search", "--image", *pictures[:2], broken, "--gallery", gallery, "--k", 4)
    assert status == 1
    assert (rows[0]["image"], rows[0]["text"]) == (str(broken), None)
    scores = Pipeline(tiny_retrieval_engine, threads=1).match(pictures[:2], texts)
    both = scores.itm + scores.itc
    assert [(row["image"], row["rank"]) for row in rows[1:]] == [
        (str(path), rank) for path in pictures[:2] for rank in (1, 2, 3, 4)
    ]
    found = np.array([row["score"] for row in rows[1:]]).reshape(2, 4)
    assert np.abs(found - np.sort(both, axis=1)[:, ::-1][:, :4]).max() < 2e-3 * max(1, np.abs(both).max())


def test_captions_are_reranked_and_answers_ranked(
    call: Call, pictures: list[Path], tmp_path: Path, tiny_engine: Path, tiny_retrieval_engine: Path
) -> None:
    """`caption --rerank` and `answer --candidates` are what the pipeline gives."""
    (tmp_path / "captioner").symlink_to(tiny_engine)
    (tmp_path / "itm").symlink_to(tiny_retrieval_engine)
    both = Pipeline(tmp_path, threads=1)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4}
    flags = ("--num-beams", 3, "--max-new-tokens", 4, "--prompt", "w1")
    _, rows, _ = call("caption", *pictures[:2], "--rerank", "itm", *flags, engine=tmp_path)
    expected = both.caption([str(path) for path in pictures[:2]], "w1", rerank="itm", **options)
    for row, caption in zip(rows, expected, strict=True):
        assert (row["text"], row["itm"]) == (caption.text, caption.itm)
        assert [other["itm"] for other in row["alternatives"]] == [other.itm for other in caption.alternatives]
    (tmp_path / "answers.txt").write_text("w1\n\n w2 w3 \nw4\n")
    closed = ("answer", pictures[0], "--question", "w5", "--candidates", tmp_path / "answers.txt")
    _, (row,), _ = call(*closed, engine=tmp_path)
    answer = both.answer(str(pictures[0]), "w5", candidates=["w1", "w2 w3", "w4"])
    assert (row["text"], row["score"]) == (answer.text, answer.score)
    assert [other["text"] for other in row["alternatives"]] == [other.text for other in answer.alternatives]
    assert call(*closed, "--num-beams", 2, engine=tmp_path)[::2] == (
        2,
        "blip2rt: options= has no effect with candidates=, which are ranked and not generated\n",
    )
    assert call(*closed[:-1], tmp_path / "none", engine=tmp_path)[0] == 2


def test_wrong_calls(
    call: Call,
    pictures: list[Path],
    tmp_path: Path,
    tiny_engine: Path,
    tiny_retrieval_engine: Path,
) -> None:
    pipe = Pipeline(tiny_retrieval_engine, threads=1)
    images, texts, lines = tmp_path / "images", tmp_path / "texts", tmp_path / "lines.txt"
    Gallery(images, pipe).add([str(pictures[0])], ["a"])
    TextGallery(texts, pipe).add(["w1", "w2"])
    lines.write_text("w1\n")
    long, of = tmp_path / "long.txt", ("--gallery", images)
    long.write_text("w1 " * pipe.manifest.model["qformer"]["max_position_embeddings"])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for arguments, status, message in (
        (("embed", *of), 2, "give pictures for a gallery of images, or --texts FILE"),
        (("embed", pictures[0], "--texts", lines, *of), 2, "give pictures for a gallery of images, or --texts FILE"),
        (("embed", "--texts", lines, "--replace", *of), 2, "--replace is for pictures"),
        (("embed", "--texts", tmp_path / "none.txt", *of), 2, "none.txt cannot be read"),
        (("embed", "--texts", tmp_path / "bytes.txt", "--gallery", texts), 2, "one text a line, in UTF-8"),
        (("embed", "--texts", long, "--gallery", texts), 2, "positions: shorten it"),
        (("embed", "--texts", lines, *of), 1, "is a gallery of images, not of texts: search it by text"),
        (("embed", pictures[1], "--gallery", texts), 1, "is a gallery of texts, not of images"),
        (("embed", pictures[1], "--gallery", tmp_path), 1, "is no gallery, it has no gallery.json"),
        (("search", *of), 2, "give texts to search a gallery of images, or --image FILE"),
        (("search", "w1", "--image", pictures[0], "--gallery", texts), 2, "give texts to search a gallery of images"),
        (("search", "w1", " ", *of), 2, "text 1 is empty: ' '"),
        (("search", long.read_text(), *of), 2, "positions: shorten it"),
        (("search", "w1", "--k", 0, *of), 2, "k must be a whole number of at least 1, not 0"),
        (("search", "w1", "--rerank", -1, *of), 2, "rerank must be a whole number of at least 0, not -1"),
        (("search", "w1", "--gallery", tmp_path / "absent"), 1, "absent is empty: add images with"),
        (("search", "w1", "--gallery", texts), 1, "search it by image (`TextGallery`"),
        (("match", pictures[0], "--text", ""), 2, "text 0 is empty"),
    ):
        found, rows, said = call(*arguments)
        assert (found, rows) == (status, []), (arguments, said)
        assert message in said, (arguments, said)
    commands: list[tuple[object, ...]] = [("embed", pictures[1], *of), ("search", "w1", *of)]
    for command in (*commands, ("match", pictures[0], "--text", "w1")):
        status, rows, said = call(*command, engine=tiny_engine)
        assert (status, rows) == (1, [])
        assert "without ITC and ITM heads: build a retrieval engine beside it with `blip2rt export" in said
    header = (images / "gallery.json").read_text()
    (images / "gallery.json").write_text(json.dumps(json.loads(header) | {"model_sha256": "0" * 64}))
    for command in commands:
        status, rows, said = call(*command)
        assert (status, rows) == (1, [])
        assert "is a gallery of another model (checkpoint 0000000000000000" in said
    (images / "gallery.json").write_text(header)
    with Gallery(images, pipe) as writer:
        writer.add([str(pictures[1])], ["b"])
        status, rows, said = call("embed", pictures[2], *of)
        assert (status, rows) == (1, [])
        assert "another process or Gallery is writing to" in said
    assert Gallery(images).ids == ["a", "b"]

"""Collections through a retrieval engine: embeddings, matches, captions that ITM likes; each exactly once."""

import csv
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt import EngineError, GenerationOptions, InputError, Pipeline
from blip2rt.bulk import run as bulk_run
from blip2rt.bulk import sinks
from blip2rt.bulk.job import BulkJob, BulkReport
from blip2rt.bulk.journal import Journal
from blip2rt.bulk.run import run_bulk
from blip2rt.cli import main

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'blip2rt[parquet]'")
NUM = 20
Bulk = Callable[..., BulkReport]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, one that is none, and a table with a text for each; the last but one has no text worth it."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "pictures").mkdir()
    rows = []
    for i in range(NUM):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02}.png")
        rows.append({"image": f"pictures/{i:02}.png", "text": "" if i == NUM - 2 else f"w{i} w{i % 3}"})
    (folder / "pictures" / "broken.png").write_text("no picture")
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_retrieval_engine: Path) -> Pipeline:
    return Pipeline(tiny_retrieval_engine)


@pytest.fixture
def bulk(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Bulk:
    """A run in this process, with the engine that is open already."""
    monkeypatch.setattr(bulk_run, "Pipeline", lambda *_, **__: pipe)

    def run(source: Path, output: Path, **job: Any) -> BulkReport:
        return run_bulk(BulkJob(source=str(source), output=output, workers=0, **job))

    return run


def read_vectors(output: Path, chosen: str) -> dict[str, Any]:
    """Id -> embedding, of any format."""
    if chosen == "npy":
        ids = [json.loads(line) for line in (output / "ids.jsonl").read_text().splitlines()]
        vectors = np.load(output / "embeddings.npy", mmap_mode="r")
        assert vectors.dtype == np.float32
        assert vectors.flags.aligned
        return dict(zip(ids, vectors, strict=True))
    if chosen == "parquet":
        rows = parquet.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    return {row["id"]: np.array(row["embedding"], np.float32) for row in rows}


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("chosen", ["npy", "parquet", "jsonl"])
def test_embeddings(chosen: str, pooling: str, folder: Path, pipe: Pipeline, bulk: Bulk, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = bulk(folder / "pictures", output, task="embed", format=chosen, pooling=pooling, batch_size=6)
    assert (report.answered, report.failed) == (NUM, 1)
    found = read_vectors(output, chosen)
    names = [f"{i:02}.png" for i in range(NUM)]
    assert list(found) == names
    expected = pipe.embed_images([folder / "pictures" / name for name in names])  # [I, Q, E]
    if pooling == "mean":
        sums = expected.astype(np.float64).sum(axis=1)
        expected = sums / np.sqrt((sums**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.stack(list(found.values())), expected, atol=1e-6 if pooling == "mean" else 0)


@pytest.mark.parametrize("chosen", ["csv", "jsonl", "parquet"])
def test_matches(chosen: str, folder: Path, pipe: Pipeline, bulk: Bulk, tmp_path: Path) -> None:
    """A text for each picture, of a column, and one for all; a text that is empty fails alone."""
    output = tmp_path / f"out.{chosen}"
    report = bulk(folder / "table.jsonl", output, task="match", format=chosen, batch_size=6)
    assert (report.answered, report.failed) == (NUM - 1, 1)
    if chosen == "csv":
        with open(output, newline="") as file:
            rows: list[Any] = list(csv.DictReader(file))
    elif chosen == "parquet":
        rows = parquet.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert list(rows[0]) == ["id", "text", "score", "itc", "itm", "itm_probability"]
    assert f"pictures/{NUM - 2:02}.png" not in {row["id"] for row in rows}
    for row in rows[::5]:
        scores = pipe.match(folder / row["id"], [row["text"]])
        for name in ("itc", "itm", "itm_probability"):
            assert float(row[name]) == float(getattr(scores, name)[0, 0])
        assert float(row["score"]) == float(row["itc"]) + float(row["itm"])
    one = tmp_path / "one.jsonl"
    bulk(folder / "pictures", one, task="match", text="w1 w2")
    row = json.loads(one.read_text().splitlines()[3])
    assert list(row) == ["id", "score", "itc", "itm", "itm_probability"]
    assert row["itm"] == float(pipe.match(folder / "pictures" / row["id"], "w1 w2").itm[0, 0])


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("chosen", ["npy", "parquet"])
def test_killed_anywhere_in_its_writes(
    chosen: str, folder: Path, bulk: Bulk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run after run is cut off inside a write, a sync or a commit: the bytes are those of the straight run."""
    monkeypatch.setattr(sinks, "ROWS_PER_FILE", 7)
    monkeypatch.setattr(bulk_run, "COMMIT_SECONDS", 0.0)
    job: dict[str, Any] = {"task": "embed", "format": chosen, "batch_size": 2}
    bulk(folder / "pictures", tmp_path / "straight", **job)
    draw, left, kills = random.Random(chosen), [0], 0

    def fragile(call: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if half:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                raise Killed
            return call(*arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fragile(os.pwrite, half=True))
        for name in ("fsync", "replace", "ftruncate"):
            patch.setattr(os, name, fragile(getattr(os, name)))
        patch.setattr(Journal, "commit", fragile(Journal.commit))
        while True:
            left[0] = draw.randint(1, 30)
            try:
                bulk(folder / "pictures", tmp_path / "killed", **job)
                break
            except Killed:
                kills += 1
                assert kills < 200
    assert kills > 2

    def content(output: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in output.iterdir() if p.is_file() and not p.name.startswith(".")}

    assert content(tmp_path / "killed") == content(tmp_path / "straight")


@pytest.mark.parametrize("least", [0.0, 0.2, 0.8])
def test_captions_that_itm_likes(
    least: float, tiny_engine: Path, tiny_retrieval_engine: Path, folder: Path, tmp_path: Path
) -> None:
    """Sequences below the minimum are dropped, pictures that have none left are listed; the engines see other sizes."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "writes").symlink_to(tiny_engine)
    (tmp_path / "engines" / "judges").symlink_to(tiny_retrieval_engine)
    options = GenerationOptions(num_beams=3, num_return_sequences=3, max_new_tokens=3)
    output = tmp_path / "out.jsonl"
    job: dict[str, Any] = {"text": "w1", "options": options, "workers": 0, "source": str(folder / "pictures")}
    report = run_bulk(BulkJob(output=output, min_itm=least, **job), tmp_path / "engines")
    found = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    errors = [json.loads(line) for line in Path(f"{output}.errors.jsonl").read_text().splitlines()]
    listed = {row["id"]: row["error"] for row in errors}
    writer, judge = Pipeline(tiny_engine), Pipeline(tiny_retrieval_engine)
    for path in sorted((folder / "pictures").glob("[0-9]*.png")):
        caption = writer.caption(path, "w1", options=options)
        texts = [row.text for row in (caption, *caption.alternatives)]
        likely = [judge.match(path, text).itm_probability[0, 0] if text else -1.0 for text in texts]
        kept = [(text, float(p)) for text, p in zip(texts, likely, strict=True) if p >= least]
        row = found.get(path.name)
        rows = [] if row is None else [row, *row["alternatives"]]
        assert [(row["text"], row["itm_probability"]) for row in rows] == kept
        assert bool(kept) or f"below min_itm={least}" in listed[path.name]
    assert (report.answered, report.failed) == (len(found), len(listed))
    assert len(found) + len(listed) == NUM + 1
    with pytest.raises(InputError, match="min_itm was"):
        run_bulk(BulkJob(output=output, min_itm=0.5, **job), tmp_path / "engines")
    again = run_bulk(BulkJob(output=output, min_itm=least, **job), tmp_path / "engines")
    assert (again.answered, again.failed, again.skipped) == (0, 0, NUM + 1)


def test_wrong_calls(folder: Path, tiny_engine: Path, tiny_retrieval_engine: Path, tmp_path: Path) -> None:
    """Refused before a picture is looked at, and nothing is left behind."""
    pictures, options = str(folder / "pictures"), GenerationOptions(num_beams=2)
    wrong: list[tuple[Path, dict[str, Any], str]] = [
        (tiny_retrieval_engine, {"task": "embed", "options": options}, "num_beams has no effect"),
        (tiny_retrieval_engine, {"task": "embed", "text": "w1"}, "text has no effect"),
        (tiny_retrieval_engine, {"task": "embed", "pooling": "max"}, "pooling 'max' is none of mean, none"),
        (tiny_retrieval_engine, {"task": "embed", "format": "csv"}, "pass --format jsonl, parquet, npy"),
        (tiny_retrieval_engine, {"task": "match", "text": "w1", "min_itm": 0.1}, "min_itm has no effect"),
        (tiny_retrieval_engine, {"task": "match", "text": "w1", "format": "sidecar"}, "jsonl, csv, parquet"),
        (tiny_retrieval_engine, {"task": "match"}, "holds no 'text'"),
        (tiny_retrieval_engine, {"task": "rank"}, "caption, answer, generate, embed, match"),
        (tiny_engine, {"format": "npy"}, "no place for what the task 'caption' gives"),
        (tiny_engine, {"task": "answer", "text": "w1", "min_itm": 0.5}, "min_itm is for captions"),
        (tiny_engine, {"min_itm": 1.5}, "a probability"),
    ]
    for engine, job, expected in wrong:
        with pytest.raises(InputError, match=expected):
            run_bulk(BulkJob(source=pictures, output=tmp_path / "out", **({"format": "jsonl"} | job)), engine)
    for engine, task in ((tiny_engine, "embed"), (tiny_retrieval_engine, "caption")):
        with pytest.raises(EngineError, match="build a"):
            run_bulk(BulkJob(source=pictures, output=tmp_path / "out", format="jsonl", task=task), engine)
    with pytest.raises(EngineError, match="build a"):
        run_bulk(BulkJob(source=pictures, output=tmp_path / "out", format="jsonl", min_itm=0.5), tiny_engine)
    with pytest.raises(InputError, match="empty"):
        run_bulk(
            BulkJob(source=pictures, output=tmp_path / "out", format="jsonl", task="match", text=""),
            tiny_retrieval_engine,
        )
    assert not (tmp_path / "out").exists()


def test_command(folder: Path, tiny_retrieval_engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors"
    arguments = ["bulk", str(folder / "pictures"), "--output", str(output), "--engine", str(tiny_retrieval_engine)]
    assert main([*arguments, "--task", "embed", "--format", "npy", "--pooling", "none", "--workers", "0"]) == 0
    assert np.load(output / "embeddings.npy").ndim == 3
    matches = tmp_path / "matches.csv"
    arguments[3] = str(matches)
    assert main([*arguments, "--task", "match", "--text", "w1 w2", "--workers", "0"]) == 0
    assert len(matches.read_text().splitlines()) == NUM + 1

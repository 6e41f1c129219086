"""Bulk runs: every source, every format, and the same bytes however often a run is killed."""

import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2rt import Blip2rtError, GenerationOptions, InputError, OutputError, Pipeline
from blip2rt.bulk import run as bulk_run
from blip2rt.bulk import sinks
from blip2rt.bulk.decoding import Decoders
from blip2rt.bulk.job import BulkJob, BulkReport
from blip2rt.bulk.journal import Journal
from blip2rt.bulk.run import run_bulk
from blip2rt.bulk.sources import Columns, Source
from blip2rt.bulk.webdataset import expand_shards, tar_member
from blip2rt.cli import main

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'blip2rt[parquet]'")

OPTIONS = GenerationOptions(num_beams=2, max_new_tokens=4, num_return_sequences=2)
FORMATS = {"jsonl": "out.jsonl", "csv": "out.csv", "parquet": "out.parquet", "webdataset": "shards", "sidecar": "texts"}


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures in three folders, and some that are none."""
    folder = tmp_path_factory.mktemp("source") / "pictures"
    for i in range(30):
        write_picture(folder / ("", "a", "b/c.d")[i % 3] / f"p.{i:02}.png", i)
    (folder / "a" / "text.jpg").write_text("no picture")
    (folder / "a" / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "p.00.png").read_bytes()[:60])
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("not a picture's name")
    write_picture(folder / ".hidden" / "h.png", 99)
    return folder


BROKEN = {"a/text.jpg", "a/empty.png", "cut.png", "gone.png", "pipe.png"}


@pytest.fixture(scope="module")
def captions(folder: Path, tiny_pipeline: Pipeline) -> dict[str, Any]:
    """What the pipeline says of every picture, by its id."""
    paths = sorted(folder.rglob("p.*.png"))
    results = tiny_pipeline.caption(paths, "w1 w2", options=OPTIONS)
    return {path.relative_to(folder).as_posix(): result for path, result in zip(paths, results, strict=True)}


@pytest.fixture
def bulk(tiny_engine: Path, tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BulkReport]:
    """A run in this process, with the engine that is open already."""
    monkeypatch.setattr(bulk_run, "Pipeline", lambda *_, **__: tiny_pipeline)

    def run(source: Any, output: Path, **job: Any) -> BulkReport:
        fields: dict[str, Any] = {"text": "w1 w2", "options": OPTIONS, "workers": 0} | job
        return run_bulk(BulkJob(str(source), output, **fields), tiny_engine)

    return run


def read_texts(output: Path, chosen: str) -> dict[str, list[str]]:
    """Id -> texts, of any format."""
    if chosen == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return {row["id"]: [row["text"], *(other["text"] for other in row["alternatives"])] for row in rows}
    if chosen == "csv":
        with open(output, newline="") as file:
            return {row["id"]: [row["text"], row["text_2"]] for row in csv.DictReader(file)}
    if chosen == "parquet":
        from pyarrow import parquet

        rows = parquet.read_table(output).to_pylist()
        return {row["id"]: [row["text"], *(other["text"] for other in row["alternatives"])] for row in rows}
    if chosen == "webdataset":
        found = {}
        for shard in sorted(output.glob("*.tar")):
            with tarfile.open(shard) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
            for name in members:
                if name.endswith(".caption.json"):
                    row = json.loads(members[name])
                    texts = members[name.removesuffix("json") + "txt"].decode().splitlines()
                    assert texts == [row["text"], *(other["text"] for other in row["alternatives"])]
                    found[row["id"]] = texts
        return found
    return {
        path.relative_to(output).as_posix().removesuffix(".txt") + ".png": path.read_text().splitlines()
        for path in output.rglob("*.txt")
    }


def read_errors(output: Path) -> dict[str, str]:
    path = output / "_errors.jsonl" if output.is_dir() else Path(f"{output}.errors.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    errors = {row["id"]: row["error"] for row in rows}
    assert len(errors) == len(rows)
    return errors


def snapshot(output: Path) -> dict[str, bytes]:
    """Everything of an output but its journal."""
    paths = [path for path in output.parent.rglob("*") if path.is_file() and ".blip2rt" not in str(path)]
    return {path.relative_to(output.parent).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("chosen", FORMATS)
def test_every_format_says_what_the_pipeline_says(
    chosen: str, folder: Path, captions: dict[str, Any], bulk: Callable[..., BulkReport], tmp_path: Path
) -> None:
    output = tmp_path / FORMATS[chosen]
    report = bulk(folder, output, format=chosen)
    assert (report.answered, report.failed, report.skipped) == (30, len(BROKEN), 0)
    expected = {name: [c.text, *(a.text for a in c.alternatives)] for name, c in captions.items()}
    assert read_texts(output, chosen) == expected
    errors = read_errors(output)
    assert errors.keys() == BROKEN
    assert "is empty" in errors["a/empty.png"] or chosen == "webdataset"
    if chosen == "jsonl":
        row = json.loads(output.read_text().splitlines()[0])
        assert list(row) == ["id", "text", "score", "finish_reason", "token_ids", "token_logprobs", "alternatives"]
        for line in output.read_text().splitlines():
            row = json.loads(line)
            expected_row = captions[row["id"]]
            assert all(row[name] == getattr(expected_row, name) for name in list(row)[1:-1])
    # again: nothing to do, and nothing changes
    before = snapshot(output)
    report = bulk(folder, output, format=chosen)
    assert (report.answered, report.failed, report.skipped) == (0, 0, 35)
    assert snapshot(output) == before


@pytest.fixture(scope="module")
def sources(folder: Path, captions: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same pictures in every kind of source; in shards and by bytes, the ids end as the paths do."""
    from pyarrow import parquet

    home = tmp_path_factory.mktemp("sources")
    names = sorted(captions)
    relative = [os.path.relpath(folder / name, home) for name in names]
    (home / "list.txt").write_text("\n".join(relative) + "\n\n")
    (home / "a.jsonl").write_text("".join(json.dumps({"file_name": n}) + "\n" for n in relative))
    (home / "a.csv").write_text("id,image\n" + "".join(f"{i},{n}\n" for i, n in zip(names, relative, strict=True)))
    (home / "a.tsv").write_text("﻿image\tx\n" + "".join(f"{n}\t1\n" for n in relative))
    data = [(folder / name).read_bytes() for name in names]
    for name, column in {
        "path": relative, "bytes": data, "struct": [{"bytes": d, "path": None} for d in data],
    }.items():  # fmt: skip
        parquet.write_table(pyarrow.table({"image": column, "id": names}), home / f"{name}.parquet", row_group_size=7)
    for shard in range(3):
        with open(home / f"s-{shard:03}.tar", "wb") as file:
            for name, content in list(zip(names, data, strict=True))[shard::3]:
                key = name.replace(".", "_")
                file.write(tar_member(f"{key}.json", b'{"question": "w3"}') + tar_member(f"{key}.png", content))
            file.write(b"\0" * 1024)
    with tarfile.open(home / "z.tar.gz", "w:gz") as archive:
        for name, content in zip(names, data, strict=True):
            info = tarfile.TarInfo(f"{name.replace('.', '_')}.image.PNG")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return {
        **{name: str(home / name) for name in ("list.txt", "a.jsonl", "a.csv", "a.tsv", "z.tar.gz")},
        **{name: str(home / f"{name}.parquet") for name in ("path", "bytes", "struct")},
        "glob": str(home / "s-*.tar"),
        "braces": str(home / "s-{000..002}.tar"),
        "pipe": f"pipe:cat {home / 'z.tar.gz'}",
    }


KINDS = ("list.txt", "a.jsonl", "a.csv", "a.tsv", "z.tar.gz", "path", "bytes", "struct", "glob", "braces", "pipe")


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_pictures(
    kind: str, sources: dict[str, str], captions: dict[str, Any], bulk: Callable[..., BulkReport], tmp_path: Path
) -> None:
    source = Source(sources[kind], Columns())
    assert source.count() in (30, None)
    bulk(sources[kind], tmp_path / "out.jsonl")
    found = read_texts(tmp_path / "out.jsonl", "jsonl")
    assert len(found) == 30
    expected = {re.sub(r"[._]", "_", name): caption.text for name, caption in captions.items()}
    for item_id, (text, _) in found.items():
        name = re.sub(r"[._]", "_", item_id)
        name = re.sub(r".*?pictures/|^(s-\d+|z|pipe)/", "", name)
        assert expected[name if name in expected else f"{name}_png"] == text
    assert read_errors(tmp_path / "out.jsonl") == {}


def test_shards_keep_what_came_with_a_sample(
    sources: dict[str, str], bulk: Callable[..., BulkReport], tmp_path: Path, tiny_pipeline: Pipeline
) -> None:
    """Questions from the .json of a sample; its members come out again beside the answer; shards in, shards out."""
    options = GenerationOptions(max_new_tokens=4)
    bulk(sources["glob"], tmp_path / "out", format="webdataset", task="answer", text=None, options=options)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        names = archive.getnames()
        row = json.load(archive.extractfile("s-000/a/p_01_png.answer.json"))  # type: ignore[arg-type]
        picture = archive.extractfile("s-000/a/p_01_png.png").read()  # type: ignore[union-attr]
    assert len(names) == 4 * 30
    assert names[:4] == [f"s-000/a/p_01_png.{e}" for e in ("png", "json", "answer.txt", "answer.json")]
    assert row["question"] == "w3"
    assert row["text"] == tiny_pipeline.answer(picture, "w3", options=options).text


# --- killed ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for SIGKILL: nothing between the call and the end of the run handles it."""


@pytest.mark.parametrize("chosen", FORMATS)
def test_killed_anywhere_in_its_writes(
    chosen: str, folder: Path, bulk: Callable[..., BulkReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off inside any write, sync, rename or commit, run after run: the bytes are those of the straight run."""
    monkeypatch.setattr(sinks, "ROWS_PER_FILE", 7)
    monkeypatch.setattr(sinks, "SAMPLES_PER_SHARD", 7)
    monkeypatch.setattr(bulk_run, "COMMIT_SECONDS", 0.0)
    job: dict[str, Any] = {"format": chosen, "batch_size": 3, "options": GenerationOptions(max_new_tokens=2)}
    straight = tmp_path / "straight" / "out"
    straight.parent.mkdir()
    bulk(folder, straight, **job)
    killed = tmp_path / "killed" / "out"
    killed.parent.mkdir()
    draw = random.Random(chosen)
    left = [0]

    def fragile(call: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if half:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                elif draw.random() < 0.5:
                    call(*arguments, **keywords)
                raise Killed
            return call(*arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fragile(os.pwrite, half=True))
        for name in ("fsync", "replace", "ftruncate"):
            patch.setattr(os, name, fragile(getattr(os, name)))
        patch.setattr(Journal, "commit", fragile(Journal.commit))
        kills = 0
        while True:
            left[0] = draw.randint(1, 25)
            try:
                bulk(folder, killed, **job)
                break
            except Killed:
                kills += 1
                assert kills < 200
    assert kills > 3
    private = {name for name in snapshot(killed) if name.endswith(".writing")}
    assert {name: data for name, data in snapshot(killed).items() if name not in private} == snapshot(straight)


@pytest.mark.slow
def test_kill_nine(tiny_engine: Path, tmp_path: Path) -> None:
    """Real processes and a real SIGKILL, at random moments; the workers go with their parent."""
    for i in range(100):
        write_picture(tmp_path / "pictures" / f"{i:03}.png", i)
    arguments = ["pictures", "--engine", tiny_engine, "--prompt", "w1", "--num-beams", "5", "--max-new-tokens", "30"]
    command = [sys.executable, "-m", "blip2rt", "bulk", *map(str, arguments), "--workers", "1"]
    subprocess.run([*command, "--output", "straight.jsonl"], cwd=tmp_path, check=True, stderr=subprocess.PIPE)
    draw, kills, sizes = random.Random(5), 0, set()
    output = tmp_path / "killed.jsonl"
    for _ in range(60):
        with subprocess.Popen(
            [*command, "--output", output], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            size = output.stat().st_size if output.exists() else 0
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if output.exists() and output.stat().st_size > size:  # it works: now it may be killed
                    time.sleep(draw.uniform(0, 0.5))
                    if kills < 3:
                        process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.01)
            code = process.wait(60)
            assert process.stderr is not None
            message = process.stderr.read()  # which ends when the last worker has closed it
        if code == 0:
            break
        assert code == -signal.SIGKILL, message
        kills += 1
        sizes.add(output.stat().st_size)
    assert code == 0
    assert kills >= 1
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_a_run_that_grows(folder: Path, bulk: Callable[..., BulkReport], tmp_path: Path) -> None:
    """New pictures are answered, old ones are not answered again; in every format that appends."""
    for i in range(5):
        write_picture(tmp_path / "pictures" / f"{i}.png", i)
    for chosen in FORMATS:
        assert bulk(tmp_path / "pictures", tmp_path / FORMATS[chosen], format=chosen).answered == 5
    write_picture(tmp_path / "pictures" / "00.png", 7)
    for chosen in FORMATS:
        report = bulk(tmp_path / "pictures", tmp_path / FORMATS[chosen], format=chosen)
        assert (report.answered, report.skipped) == (1, 5)
        assert len(read_texts(tmp_path / FORMATS[chosen], chosen)) == 6


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_picture_that_kills_its_worker(tiny_pipeline: Pipeline, folder: Path) -> None:
    """The others of its chunk, and those after it, are decoded all the same."""

    class Killer:
        def __reduce__(self) -> Any:
            return os._exit, (3,)

    entries: list[tuple[int, Any]] = [(i, Path(folder, "p.00.png")) for i in range(20)]
    entries[5] = (5, Killer())
    entries[9] = (9, None)
    decoders = Decoders([tiny_pipeline.manifest.image], 1)
    try:
        found = dict(decoders.run(entries))
    finally:
        decoders.close()
    assert list(found) == list(range(20))
    assert "killed the process" in str(found.pop(5))
    assert found.pop(9) is None
    expected = tiny_pipeline.preprocess(folder / "p.00.png")
    assert all(isinstance(p, tuple) and np.array_equal(p[0], expected) for p in found.values())


def test_wrong_rows_are_listed(folder: Path, bulk: Callable[..., BulkReport], tmp_path: Path) -> None:
    """A line that is no JSON, ids that come again, prompts that do not fit: each with its reason, once."""
    picture = str(folder / "p.00.png")
    rows: list[Any] = [
        {"id": "a", "image": picture, "prompt": "w1"},
        {"id": "long", "image": picture, "prompt": "w1 " * 300},
        {"id": "a", "image": picture, "prompt": "w2"},
        {"id": "none", "image": picture},
        {"id": "b", "prompt": "w1"},
        {"id": [1], "image": picture, "prompt": "w1"},
        [1],
        {"id": 7, "image": picture, "prompt": "w2"},
        {"id": "\udce9", "image": picture, "prompt": "w2"},
        {"id": "nul", "image": "a\0b", "prompt": "w2"},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n\xff\n")
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        bulk(source, output, task="generate", text=None, options=GenerationOptions())
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(row["id"], row["prompt"]) for row in found] == [("a", "w1"), ("7", "w2"), ("\udce9", "w2")]
        errors = read_errors(output)
        expected = {
            "long": "positions", "a": "came before", "none": "should be text", "b": "no picture",
            "a.jsonl:6": "the id should be", "a.jsonl:7": "should be an object", "a.jsonl:11": "not JSON",
            "nul": "cannot be opened", "a.jsonl:12": "not JSON",
        }  # fmt: skip
        assert errors.keys() == expected.keys()
        assert all(expected[name] in errors[name] for name in errors)


def test_outputs_that_would_be_shared(folder: Path, bulk: Callable[..., BulkReport], tmp_path: Path) -> None:
    """a.png and a.jpg have one sidecar; a text file that a person wrote stays."""
    for name in ("a.png", "a.jpg", "b.png"):
        write_picture(tmp_path / "pictures" / name, 1)
    (tmp_path / "pictures" / "b.caption").write_text("mine")
    report = bulk(tmp_path / "pictures", tmp_path / "pictures", format="sidecar", extension="caption")
    assert (report.answered, report.failed, report.kept) == (1, 1, 1)
    assert "another input's" in read_errors(tmp_path / "pictures")["a.png"]
    assert (tmp_path / "pictures" / "b.caption").read_text() == "mine"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("../pictures/a.png\n")
    report = bulk(tmp_path / "lists" / "list.txt", tmp_path / "texts", format="sidecar")
    assert (report.answered, report.failed) == (0, 1)
    bulk(tmp_path / "lists" / "list.txt", tmp_path / "shards", format="webdataset")
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as archive:
        assert archive.getnames()[0] == "pictures/a.png"  # no way out of the folder


def test_refusals(folder: Path, bulk: Callable[..., BulkReport], tmp_path: Path, tiny_pipeline: Pipeline) -> None:
    output = tmp_path / "out.jsonl"
    bulk(folder, output)
    before = snapshot(output)
    other = GenerationOptions(num_beams=3, max_new_tokens=4, num_return_sequences=2)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"options": other}, r"num_beams was 2 and is 3.*--force"),
        ({"text": "w3"}, r"text was 'w1 w2' and is 'w3'"),
        ({"task": "answer"}, r"task was"),
        ({"strip_prefixes": ["a"]}, r"strip_prefixes was"),
    )
    for job, expected in changes:
        with pytest.raises(InputError, match=expected):
            bulk(folder, output, **job)
    with pytest.raises(InputError, match="source was"):
        bulk(folder / "a", output)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "some.tar").write_bytes(b"")
    wrong: tuple[tuple[Path, str, dict[str, Any], str], ...] = (
        (tmp_path / "empty", "e.jsonl", {}, "no pictures"),
        (tmp_path / "empty.csv", "e.csv", {}, "no column 'image'"),
        (tmp_path / "nothing", "n.jsonl", {}, "there is no"),
        (folder / "notes.txt", "n", {}, "which format"),
        (folder, "n.jsonl", {"format": "xml"}, "'xml'"),
        (folder / "p.00.png", "n.jsonl", {}, "no collection"),
        (folder, "mine.jsonl", {}, "not written by"),
        (folder, "empty", {"format": "csv"}, "not a folder|a folder, which"),
        (folder, "mine.jsonl", {"format": "parquet"}, "not a folder"),
        (folder, "n.jsonl", {"task": "answer", "text": None}, "--question"),
        (folder, "n.jsonl", {"text": "w1", "columns": Columns(text="prompt")}, "one of the two"),
        (folder, "n", {"format": "sidecar", "extension": ".png"}, "extension"),
        (folder, "n.jsonl", {"workers": -1}, "workers"),
        (folder, "n.jsonl", {"task": "paint"}, "'paint'"),
        (folder, "n.jsonl", {"text": "w1 " * 300}, "positions"),
    )
    for source, name, job, expected in wrong:
        with pytest.raises(InputError, match=expected):
            bulk(source, tmp_path / name, **job)
    with pytest.raises(OutputError, match="cannot be written"):
        bulk(folder, tmp_path / "mine.jsonl" / "out.jsonl")
    held = Journal(tmp_path / "out.jsonl.blip2rt", json.loads(_settings(tmp_path / "out.jsonl.blip2rt")))
    for force in (False, True):
        with pytest.raises(InputError, match="another run"):
            bulk(folder, output, force=force)
    held.close()
    assert {name: data for name, data in snapshot(output).items() if name in before} == before
    bulk(folder, output, options=other, force=True)
    assert len(read_texts(output, "jsonl")) == 30
    output.write_bytes(b"")
    with pytest.raises(OutputError, match="changed or cut short"):
        bulk(folder, output, options=other)


def _settings(journal: Path) -> str:
    import sqlite3

    with sqlite3.connect(journal / "journal.sqlite") as database:
        found: str = database.execute("SELECT value FROM meta WHERE name = 'settings'").fetchone()[0]
    database.close()
    return found


def test_a_full_disk_loses_nothing(
    folder: Path, bulk: Callable[..., BulkReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(bulk_run, "COMMIT_SECONDS", 0.0)

        def full(descriptor: int, data: Any, offset: int) -> int:
            if offset > 2000:
                raise OSError(28, "No space left on device")
            return pwrite(descriptor, data, offset)

        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=r"No space left on device.*what is done stays done"):
            bulk(folder, output, batch_size=2)
    report = bulk(folder, output, batch_size=2)
    assert report.skipped > 0
    bulk(folder, tmp_path / "straight.jsonl")
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_a_damaged_shard(sources: dict[str, str], bulk: Callable[..., BulkReport], tmp_path: Path) -> None:
    """What can be read is answered, the command says what could not, and goes on when it is mended."""
    shards = [Path(path).read_bytes() for path in expand_shards(sources["glob"])]
    for number, data in enumerate(shards):
        (tmp_path / f"{number}.tar").write_bytes(data if number != 1 else data[: len(data) // 2 + 100])
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        with pytest.raises(Blip2rtError, match=r"1 of 3 shards .*1\.tar"):
            bulk(tmp_path / "*.tar", output)
    assert 20 < len(read_texts(output, "jsonl")) < 30
    (tmp_path / "1.tar").write_bytes(shards[1])
    bulk(tmp_path / "*.tar", output)
    assert len(read_texts(output, "jsonl")) == 30
    with pytest.raises(Blip2rtError, match="status 3"):
        bulk(f"pipe:cat {tmp_path / '0.tar'}; exit 3", tmp_path / "pipe.jsonl")
    assert len(read_texts(tmp_path / "pipe.jsonl", "jsonl")) == 9  # the last sample may not have been whole


def test_command(
    tiny_engine: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], captions: dict[str, Any]
) -> None:
    """With workers, as a person calls it: status 0 although some inputs failed, for they are listed."""
    arguments = ["--engine", str(tiny_engine), "--num-beams", "2", "--max-new-tokens", "4"]
    output = tmp_path / "out.jsonl"
    call = ["bulk", str(folder), "--output", str(output), "--prompt", "w1 w2", "--num-return-sequences", "2"]
    assert main([*call, *arguments, "--strip-prefix", "zzz"]) == 0
    assert "30 answered, 5 failed" in capsys.readouterr().err
    assert read_texts(output, "jsonl").keys() == captions.keys()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").touch()
    assert main(["bulk", str(tmp_path / "bad"), "--output", str(tmp_path / "b.csv"), *arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == 1

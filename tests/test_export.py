"""Checkpoint -> engine directory: proven, the same bytes every time, and never half of one."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import blip2rt.export
from blip2rt import EngineError, Pipeline, engine_directory
from blip2rt.cli import main
from blip2rt.engine_directory import check_files, describe_files, find_engine
from blip2rt.export import export_engine, graphs
from blip2rt.manifest import FORMAT_REVISION, MANIFEST_NAME, Manifest
from blip2rt.model import load_blip2

LAST_STEPS = 16  # of an export on the disk: manifest, syncs, exchange, removal of the old engine
ONE_LAYER = 7  # a seed of the smallest checkpoint: one layer everywhere


def describe(engine: Path) -> str:
    """A caption with its numbers: what an engine that works says."""
    pipe = Pipeline(engine, threads=1)
    size = pipe.manifest.image.size
    picture = np.random.default_rng(0).standard_normal((3, size, size), dtype=np.float32)
    return repr(pipe.caption(picture, "w1 w2", max_new_tokens=8))


def sign(engine: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make the manifest fit the files that lie there, after changing it."""
    manifest = json.loads((engine / MANIFEST_NAME).read_text())
    manifest["files"] = {name: vars(entry) for name, entry in describe_files(engine).items()}
    change(manifest)
    (engine / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, checkpoint_maker: Callable[..., Path]) -> tuple[Path, Path]:
    """The smallest checkpoint and its engine. Do not write into them."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint = checkpoint_maker(folder / "checkpoint", seed=ONE_LAYER, num_hidden_layers=1)
    return checkpoint, export_engine(checkpoint, folder / "engine")


@pytest.fixture
def engine(small: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of its engine, to be spoilt."""
    return Path(shutil.copytree(small[1], tmp_path / "engine"))


# --- what is built ---------------------------------------------------------------------------------------------------


def test_manifest_tells_what_was_built(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    manifest = Manifest.read(tiny_engine)
    check_files(manifest, tiny_engine, full=True)
    assert sorted([*manifest.files, MANIFEST_NAME]) == sorted(file.name for file in tiny_engine.iterdir())
    assert manifest.source_id == str(tiny_checkpoint)
    assert manifest.parity.keys() == manifest.stages.keys() == {"vision", "qformer", "decoder"}
    for parity in manifest.parity.values():
        assert parity.max_rel < 1e-5
        assert parity.cosine > 1 - 1e-9
        assert parity.sizes["B"] != graphs.TRACE_SIZES["B"]
    for stage in manifest.stages.values():
        graph = onnx.load(tiny_engine / stage.file, load_external_data=False)
        onnx.checker.check_model(tiny_engine / stage.file)
        assert [graph.opset_import[0].version, len(graph.opset_import)] == [24, 1]
        assert [value.name for value in graph.graph.input] == [t.name for t in stage.signature.inputs]
        assert [value.name for value in graph.graph.output] == [t.name for t in stage.signature.outputs]


def test_pipeline_computes_what_the_reference_does(
    tiny_pipeline: Pipeline, tiny_checkpoint: Path, tiny_images: list[np.ndarray[Any, Any]]
) -> None:
    """The stages as a whole, not block by block as `verify` sees them."""
    with torch.no_grad():
        expected = load_blip2(tiny_checkpoint).encode_image(torch.from_numpy(np.stack(tiny_images)))
    for i, features in enumerate(tiny_pipeline.encode(tiny_images)):
        found = features.image_embeds, features.query_embeds, features.prefix
        for ours, reference in zip(found, expected, strict=True):
            assert ours is not None
            np.testing.assert_allclose(ours, reference[i].numpy(), rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_same_bytes_in_another_process(small: tuple[Path, Path], tmp_path: Path) -> None:
    """The first export traced in this process, this one in its own, with other hashes and another place."""
    checkpoint, first = small
    command = [sys.executable, "-m", "blip2rt", "export"]
    command += ["--model", str(checkpoint), "--output", str(tmp_path / first.name)]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for file in first.iterdir():
        assert file.read_bytes() == (tmp_path / first.name / file.name).read_bytes(), file.name


# --- verify ----------------------------------------------------------------------------------------------------------


def change_weight(engine: Path, stage: str, weight: str, value: float) -> None:
    """One number of a tensor, in a file whose hash is right again."""
    initializers = onnx.load(engine / f"{stage}.onnx", load_external_data=False).graph.initializer
    place = next({e.key: e.value for e in t.external_data} for t in initializers if t.name == weight)
    index = 3 * Manifest.read(engine).model["text"]["hidden_size"] if weight.endswith("position.weight") else 0
    data = np.memmap(engine / f"{stage}.data", np.float32, "r+")
    data[int(place["offset"]) // 4 + index] += value
    data.flush()
    sign(engine)


def verify(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit status and lines of stdout."""
    status = main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, captured.out.splitlines()


CHANGES = [
    ("vision", "embedding.position", "embedding"),
    ("vision", "blocks.0.fc2.weight", "blocks.0"),
    ("qformer", "embedding.query_tokens", "embedding"),
    ("qformer", "projection.weight", "projection"),
    ("decoder", "embedding.position.weight", "embedding"),
    ("decoder", "blocks.0.qkv.bias", "blocks.0"),
    ("decoder", "head.norm.weight", "head"),
]


@pytest.mark.parametrize(("stage", "weight", "piece"), CHANGES)
def test_verify_finds_one_changed_number(
    stage: str, weight: str, piece: str, small: tuple[Path, Path], engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weight(engine, stage, weight, 1.5)
    status, told = verify([engine, "--model", small[0]], capsys)
    assert status == 1
    assert [line.partition(":")[0] for line in told] == ["vision", "qformer", "decoder"]
    assert [line for line in told if "diverges" in line] == [line for line in told if line.startswith(stage)]
    assert f"diverges first in {piece} (limit" in "".join(told)


def test_verify_tells_scripts(small: tuple[Path, Path], engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strict JSON, even of NaN."""
    for value, expected in ((0.0, None), (float("nan"), "blocks.0")):
        change_weight(engine, "qformer", "blocks.0.query_ffn.fc1.bias", value)
        status, told = verify([engine, "--model", small[0], "--json"], capsys)
        rows = [json.loads(line, parse_constant=pytest.fail) for line in told]
        assert status == bool(expected)
        assert [row["stage"] for row in rows] == ["vision", "qformer", "decoder"]
        assert [row["first_divergence"] for row in rows] == [None, expected, None]
        assert (rows[1]["max_abs"] is None) == bool(expected)
        assert rows[0]["cosine"] > 1 - 1e-9


def test_verify_hashes_large_files(
    small: tuple[Path, Path], engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening an engine does not."""
    monkeypatch.setattr(engine_directory, "HASHED_ON_OPENING", 0)
    data = np.memmap(engine / "decoder.data", np.uint8, "r+")
    data[-1] ^= 1
    data.flush()
    Pipeline(engine, threads=1)
    assert main(["verify", str(engine), "--model", str(small[0])]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "decoder.data was altered" in captured.err


def test_verify_refuses_what_it_cannot_compare(
    small: tuple[Path, Path], engine: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(engine), "--model", str(tiny_checkpoint)]) == 1
    assert "a model of other sizes" in capsys.readouterr().err
    (engine / "qformer.onnx").write_bytes(b"no graph")
    sign(engine)
    assert main(["verify", str(engine), "--model", str(small[0])]) == 1
    assert "qformer.onnx cannot be run" in capsys.readouterr().err


@pytest.mark.parametrize("existing", [False, True])
def test_failed_comparison_leaves_no_engine(
    existing: bool,
    small: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exporter that writes one tensor wrong."""
    output = tmp_path / "engines" / "engine"
    if existing:
        shutil.copytree(small[1], output)
    read = blip2rt.export._read
    wrong = "blocks.0.fc1.weight"

    def read_wrongly(checkpoint: Any, stage: str, name: str) -> torch.Tensor:
        return read(checkpoint, stage, name) * (-1 if (stage, name) == ("decoder", wrong) else 1)

    monkeypatch.setattr(blip2rt.export, "_read", read_wrongly)
    assert main(["export", "--model", str(small[0]), "--output", str(output), "--force"]) == 1
    message = capsys.readouterr().err
    assert "the engines disagree with the reference" in message
    assert "decoder: " in message
    assert "diverges first in blocks.0" in message
    assert [path.name for path in output.parent.iterdir()] == (["engine"] if existing else [])
    if existing:
        assert describe(output) == describe(small[1])


# --- engine directories that are damaged -----------------------------------------------------------------------------


def spoil_graph(engine: Path) -> None:
    (engine / "vision.onnx").write_bytes(b"no graph")
    sign(engine)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing graph": (lambda e: (e / "decoder.onnx").unlink(), "decoder.onnx is missing"),
    "missing weights": (lambda e: (e / "decoder.data").unlink(), "decoder.data is missing"),
    "missing tokenizer": (lambda e: (e / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "missing manifest": (lambda e: (e / MANIFEST_NAME).unlink(), "there is no engine in"),
    "altered weights": (lambda e: alter(e / "vision.data"), "vision.data was altered"),
    "altered graph": (lambda e: alter(e / "qformer.onnx"), "qformer.onnx was altered"),
    "truncated weights": (lambda e: shorten(e / "decoder.data"), "decoder.data has"),
    "truncated manifest": (lambda e: shorten(e / MANIFEST_NAME), "is not JSON"),
    "newer": (
        lambda e: sign(e, lambda m: m.update(format_revision=FORMAT_REVISION + 1)),
        f"format revision {FORMAT_REVISION + 1}",
    ),
    "another device": (lambda e: sign(e, lambda m: m.update(device="metal")), "was built for 'metal'"),
    "no graph": (spoil_graph, "vision.onnx cannot be opened"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_engine_is_refused(name: str, engine: Path) -> None:
    spoil, expected = DAMAGE[name]
    spoil(engine)
    with pytest.raises(EngineError) as error:
        Pipeline(engine)
    assert expected in str(error.value)
    assert "`blip2rt export" in str(error.value)
    assert "\n" not in str(error.value)


# --- exports that do not come to their end ---------------------------------------------------------------------------


class Child:
    """A command in a forked process: torch and the graphs are there already, one thread is enough."""

    def __init__(self, run: Callable[[], int], messages: Path):
        self.run, self.messages = run, messages
        self.process = multiprocessing.get_context("fork").Process(target=self._main)
        self.process.start()

    def _main(self) -> None:
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
        torch.set_num_threads(1)
        with self.messages.open("w") as stream:
            sys.stderr = stream
            status = self.run()
            stream.flush()
            os._exit(status)

    def wait(self) -> int:
        self.process.join(60)
        assert self.process.exitcode is not None, "the child hangs"
        return self.process.exitcode

    def kill(self, moment: float) -> None:
        time.sleep(moment)
        self.process.kill()
        self.wait()


def export_of(checkpoint: Path, output: Path) -> Callable[[], int]:
    """What replaces the engine at `output`; its exit status."""
    return lambda: main(["export", "--model", str(checkpoint), "--output", str(output), "--force"])


@pytest.fixture
def twins(small: tuple[Path, Path], tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Two checkpoints of the same sizes: sha256 -> path and what its engine says."""
    found = {}
    for i, checkpoint in enumerate((small[0], Path(shutil.copytree(small[0], tmp_path / "twin")))):
        state = load_file(checkpoint / "model.safetensors")
        state["query_tokens"] = state["query_tokens"] * (1 - 2 * i)
        if i:
            save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
        engine = export_engine(checkpoint, tmp_path / f"known-{i}")
        found[Manifest.read(engine).source_sha256] = checkpoint, describe(engine)
    assert len({text for _, text in found.values()}) == 2
    return found


def assert_whole(folder: Path, twins: dict[str, tuple[Path, str]]) -> str:
    """The one engine in `folder` is the engine of one of the twins; its sha256."""
    engine = find_engine(folder)
    manifest = Manifest.read(engine)
    check_files(manifest, engine, full=True)
    assert describe(engine) == twins[manifest.source_sha256][1]
    return manifest.source_sha256


def watch_steps(folder: Path, act: Callable[[], object], export: Callable[[], int]) -> int:
    """Export, and `act` before anything in `folder` is opened, made, renamed or removed, and before the exchange."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        on_disk = event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(folder) in str(arguments)
        if on_disk or (event == "ctypes.dlsym" and "renameat2" in arguments):
            act()

    sys.addaudithook(hook)
    return export()


def count_steps(folder: Path, counter: Path, export: Callable[[], int]) -> int:
    with counter.open("w") as stream:
        return watch_steps(folder, lambda: stream.write("."), export)


def die_before(step: int, folder: Path, export: Callable[[], int]) -> int:
    left = iter(range(step))
    return watch_steps(
        folder, lambda: os.kill(os.getpid(), signal.SIGKILL) if next(left, None) is None else None, export
    )


def test_killed_at_any_moment(twins: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    """kill -9 at 20 drawn moments of replacing one engine by the other, and before each of its last steps on disk."""
    folder, messages, draw = tmp_path / "engines", tmp_path / "messages", random.Random(0)
    checkpoints = [checkpoint for checkpoint, _ in twins.values()]
    output = export_engine(checkpoints[0], folder / "engine")

    def export(turn: int) -> Callable[[], int]:
        return export_of(checkpoints[turn % 2], output)

    start = time.monotonic()
    assert Child(export(1), messages).wait() == 0, messages.read_text()
    duration = time.monotonic() - start
    left_behind = 0
    for turn in range(20):
        Child(export(turn), messages).kill(draw.uniform(0, duration))
        left_behind += len(list(folder.iterdir())) - 1
        assert_whole(folder, twins)

    counter = tmp_path / "steps"
    assert Child(lambda: count_steps(folder, counter, export(1)), messages).wait() == 0
    num_steps, installed = len(counter.read_text()), []
    for step in range(num_steps - LAST_STEPS, num_steps):
        turn = num_steps - step
        assert Child(partial(die_before, step, folder, export(turn)), messages).wait() == -signal.SIGKILL
        left_behind += len(list(folder.iterdir())) - 1
        installed.append(assert_whole(folder, twins) == list(twins)[turn % 2])
    assert left_behind > 5
    assert set(installed) == {False, True}

    assert Child(export(0), messages).wait() == 0
    assert [path.name for path in folder.iterdir()] == ["engine"]
    assert_whole(folder, twins)


def test_killed_first_export_leaves_no_half_engine(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Where there was none before, there is none or a whole one."""
    folder = tmp_path / "engines"
    for moment in (0.02, 0.05, 0.1, 0.2):
        Child(export_of(small[0], folder / "engine"), tmp_path / "messages").kill(moment)
        if (folder / "engine").exists():
            check_files(Manifest.read(folder / "engine"), folder / "engine", full=True)
            shutil.rmtree(folder / "engine")
        else:
            with pytest.raises(EngineError, match="`blip2rt export`"):
                Pipeline(folder)
    export_engine(small[0], folder / "engine")
    assert [path.name for path in folder.iterdir()] == ["engine"]


def assert_no_room(checkpoint: Path, output: Path, messages: Path, limit: int | None = None) -> None:
    """Replacing the engine at `output` fails with one sentence, and the engine is as before."""
    before = describe(output)

    def export() -> int:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return export_of(checkpoint, output)()

    assert Child(export, messages).wait() == 1
    message = messages.read_text()
    assert message.count("\n") == 1
    assert message.startswith("blip2rt: there is no room to build")
    assert "nothing was changed" in message
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    check_files(Manifest.read(output), output, full=True)
    assert describe(output) == before


@pytest.mark.parametrize("limit", [0, 3_000, 50_000])
def test_no_space_for_a_file(limit: int, small: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "engines" / "engine"
    shutil.copytree(small[1], output)
    if limit == 0:
        limit = max(entry.size for entry in Manifest.read(output).files.values()) - 1
    assert_no_room(small[0], output, tmp_path / "messages", limit)


def test_no_space_on_the_disk(small: tuple[Path, Path], tmp_path: Path) -> None:
    """A file system with room for one engine and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size // 4096 + 1 for file in small[1].iterdir()) * 4096
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only the system's administrator may mount a file system")
    try:
        output = Path(shutil.copytree(small[1], disk / "engine"))
        assert_no_room(small[0], output, tmp_path / "messages")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_outputs_that_cannot_be(
    small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before any work is done; nothing of the user's is ever replaced, --force or not."""
    monkeypatch.setattr(blip2rt.export, "trace_stage", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "manifest.json").write_text('{"manifest_version": 3}')
    shutil.copytree(small[1], tmp_path / "engine")
    cases = [
        ("engine", [], 2, "add --force"),
        ("file", ["--force"], 2, "not a folder"),
        ("folder", ["--force"], 2, "blip2rt did not write"),
        (".", ["--force"], 2, "blip2rt did not write"),
        (os.fsdecode(b"caf\xe9"), [], 2, "is not UTF-8"),
        ("file/engine", [], 1, "nothing was changed"),
        ("/proc/blip2rt", [], 1, "nothing was changed"),
    ]
    for output, options, status, expected in cases:
        arguments = ["export", "--model", str(small[0]), "--output", str(tmp_path / output), *options]
        assert main(arguments) == status
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert expected in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list((tmp_path / "folder").iterdir())) == 1

"""The engine directory: what a manifest may hold, which damage is seen, and that no kill leaves half an engine."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2rt import engine_directory
from blip2rt.engine_directory import (
    HASHED_ON_OPENING,
    building,
    check_files,
    describe_files,
    find_engine,
    hash_file,
)
from blip2rt.errors import EngineError, ExportError, InputError
from blip2rt.manifest import FORMAT_REVISION, PLAIN_NAME, FileEntry, ImageSpec, Manifest, Parity, Stage, TokenSpec
from blip2rt.stages import GENERATIVE_STAGES, StageSpec, TensorSpec, decoder_spec, qformer_spec, vision_spec

SPECS = (vision_spec(28, 5, 6), qformer_spec(5, 6, 3, 8, 10), decoder_spec(2, 2, 5, 10, 50))


def a_manifest(**changes: Any) -> Manifest:
    """A manifest of three graphs that are not there."""
    stages = {name: Stage(f"{name}.onnx", spec) for name, spec in zip(GENERATIVE_STAGES, SPECS, strict=True)}
    manifest = Manifest(
        name="tiny",
        source_id="some/tiny model",
        source_sha256="00" * 32,
        precision="fp32",
        kernels="stock",
        device="cpu",
        image=ImageSpec(28, (0.48145466, 0.4578275, 0.40821073), (0.25, 0.5, 1.0)),
        tokens=TokenSpec(bos=2, pad=None, stop=(50118,), image=50265),
        question_tokens=TokenSpec(bos=101, pad=0, stop=(102,), image=None),
        parameters={"vision": 3},
        left_out=("blocks.3.norm1.weight",),
        toolchain={"blip2rt": "0.1.0"},
        parity={"vision": Parity(1e-6, 0.1 + 0.2, 1.0, {"B": 3})},
        model={"text": {"vocab_size": 50, "layer_norm_eps": 1e-12}, "names": ["ä", None, True]},
        stages=stages,
        files={stage.file: FileEntry(7, "0f" * 32) for stage in stages.values()},
    )
    return replace(manifest, **changes)


def fill(directory: Path, name: str) -> None:
    """Write a whole engine of random files into a directory."""
    for stage in GENERATIVE_STAGES:
        (directory / f"{stage}.onnx").write_bytes(random.randbytes(random.randrange(50_000)))
    a_manifest(name=name, files=describe_files(directory)).write(directory)


def build(output: Path, name: str = "tiny", then: Callable[[Path], object] = lambda directory: None) -> Path:
    """An engine at `output`, in place of what was there; `then` is done to it before it is installed."""
    with building(output, force=True) as directory:
        fill(directory, name)
        then(directory)
    return output


def opened(directory: Path) -> str:
    """The name of an engine, after a look at every byte of it."""
    manifest = Manifest.read(directory)
    check_files(manifest, directory, full=True)
    return manifest.name


def hidden(folder: Path) -> list[str]:
    """What builds left behind."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# The manifest

TEXT, SIZE = st.text(max_size=8), st.integers(0, 2**70)
REAL = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | REAL | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FILE_NAMES = st.from_regex(PLAIN_NAME, fullmatch=True).filter(lambda name: name != "manifest.json")
ENTRIES = st.builds(FileEntry, SIZE, st.text("0123456789abcdef", min_size=64, max_size=64))
TENSORS = st.builds(TensorSpec, TEXT, TEXT, st.lists(st.integers() | TEXT, max_size=4).map(tuple))
SIGNATURES = st.builds(StageSpec, *[st.lists(TENSORS, max_size=3).map(tuple)] * 2)
THREE = st.tuples(REAL, REAL, REAL)
TOKENS = st.builds(TokenSpec, SIZE, st.none() | SIZE, st.lists(SIZE, max_size=3).map(tuple), st.none() | SIZE)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that can be written."""
    files = draw(st.dictionaries(FILE_NAMES, ENTRIES, min_size=1, max_size=4))
    stages = st.builds(Stage, st.sampled_from(sorted(files)), SIGNATURES)
    more = draw(st.dictionaries(TEXT, stages, max_size=1))
    return Manifest(
        name=draw(TEXT),
        source_id=draw(TEXT),
        source_sha256=draw(TEXT),
        precision=draw(TEXT),
        kernels=draw(st.sampled_from(["stock", "native"])),
        device=draw(TEXT),
        image=draw(st.builds(ImageSpec, st.integers(1), THREE, THREE)),
        tokens=draw(TOKENS),
        question_tokens=draw(st.none() | TOKENS),
        left_out=draw(st.lists(TEXT, max_size=2).map(tuple)),
        parameters=draw(st.dictionaries(TEXT, SIZE, max_size=3)),
        toolchain=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        parity=draw(
            st.dictionaries(
                TEXT, st.builds(Parity, REAL, REAL, REAL, st.dictionaries(TEXT, JSON, max_size=2)), max_size=2
            )
        ),
        model=draw(st.dictionaries(TEXT, JSON, max_size=4)),
        stages={name: draw(stages) for name in GENERATIVE_STAGES} | more,
        files=files,
    )


@settings(max_examples=40, deadline=None)
@given(manifests())
def test_what_is_written_is_read_again(manifest: Manifest) -> None:
    with tempfile.TemporaryDirectory() as directory:
        manifest.write(directory)
        again = Manifest.read(directory)
    assert again == manifest
    assert repr(again) == repr(manifest)  # 1 == 1.0 and 0.0 == -0.0, but they are not written the same


def test_the_file_is_made_to_be_read(tmp_path: Path) -> None:
    a_manifest().write(tmp_path)
    text = (tmp_path / "manifest.json").read_text("utf-8")
    assert text.startswith('{\n  "format_revision": 1,\n  "kind": "generative",\n')
    assert '"mean": [0.48145466, 0.4578275, 0.40821073]' in text
    assert '{"name": "past_key_0", "dtype": "float32", "shape": ["B", 2, "C", 5]},\n' in text
    assert "ä" in text


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda m: m.pop("precision"), "precision is missing"),
    "missing, deep": (lambda m: m["stages"]["vision"]["inputs"][0].pop("dtype"), "stages.vision.inputs[0].dtype is"),
    "unknown": (lambda m: m.update(colour=1), "colour is not a field"),
    "unknown, deep": (lambda m: m["tokens"].update(eos=1), "tokens.eos is not a field"),
    "text for number": (lambda m: m["image"].update(size="28"), "image.size should be an integer, not '28'"),
    "truth for number": (lambda m: m["tokens"].update(bos=True), "tokens.bos should be an integer, not True"),
    "fraction for number": (lambda m: m["tokens"].update(bos=2.0), "tokens.bos should be an integer, not 2.0"),
    "null": (lambda m: m.update(name=None), "name should be a string, not None"),
    "not null": (lambda m: m["tokens"].update(pad="x"), "tokens.pad should be an integer or null, not 'x'"),
    "list for object": (lambda m: m.update(stages=[]), "stages should be an object"),
    "object for list": (lambda m: m["tokens"].update(stop={}), "tokens.stop should be a list"),
    "infinity": (lambda m: m["parity"]["vision"].update(cosine=1e308 * 10), "Infinity is not a JSON number"),
    "shape": (lambda m: m["stages"]["vision"]["inputs"][0]["shape"].append(1.5), "inputs[0].shape[4] should be"),
    "stage": (lambda m: m["stages"].pop("qformer"), "stages.qformer is missing"),
    "kind": (lambda m: m.update(kind="musical"), "kind 'musical' is none of generative, retrieval: upgrade blip2rt"),
    "kernels": (lambda m: m.update(kernels="avx2"), "kernels 'avx2' is none of stock, native: build the engine again"),
    "parent": (lambda m: m["files"].update({"../x": m["files"]["vision.onnx"]}), "'../x' is not the plain name"),
    "absolute": (lambda m: m["files"].update({"/etc/x": m["files"]["vision.onnx"]}), "'/etc/x' is not the plain"),
    "itself": (lambda m: m["files"].update({"manifest.json": m["files"]["vision.onnx"]}), "is not the plain name"),
    "NUL": (lambda m: m["files"].update({"a\0": m["files"]["vision.onnx"]}), "is not the plain name"),
    "stage's file": (lambda m: m["stages"]["vision"].update(file="../v"), "stages.vision.file: '../v' is not among"),
    "negative size": (lambda m: m["files"]["vision.onnx"].update(size=-1), "files.vision.onnx has no possible size"),
    "hash": (lambda m: m["files"]["vision.onnx"].update(sha256="00"), "files.vision.onnx has no possible size"),
    "two means": (lambda m: m["image"]["mean"].pop(), "image should have"),
    "older": (lambda m: m.update(format_revision=0), "format revision 0, and this blip2rt reads 1: build the"),
    "newer": (lambda m: m.update(format_revision=2, new={}), "format revision 2, and this blip2rt reads 1: upgrade"),
    "no revision": (lambda m: m.pop("format_revision"), "no engine of blip2rt's, build one with `blip2rt export`"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_with_its_mend(tmp_path: Path, damage: str) -> None:
    a_manifest().write(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text("utf-8"))
    change, message = DAMAGES[damage]
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(EngineError) as caught:
        Manifest.read(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "`blip2rt export" in str(caught.value)
    if damage not in ("infinity", "no revision"):
        assert f"`blip2rt export --model 'some/tiny model' --output {tmp_path} --force`" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[" * 100_000, b"[]", b"3", b"null", b'{"a": NaN}'])
def test_what_is_no_manifest_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"build .*`blip2rt export`"):
        Manifest.read(tmp_path)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    for directory in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(EngineError, match=str(directory)):
            Manifest.read(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parity": {"vision": Parity(0, 0, float("nan"), {})}}, "parity.vision.cosine should be a finite number"),
        ({"model": {"eps": float("inf")}}, "not JSON compliant"),
        ({"model": {"eps": object()}}, "not JSON serializable"),
        ({"files": {}}, "is not among the files"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        a_manifest(**changes).write(tmp_path)
    assert not list(tmp_path.iterdir())


# The files


def test_each_altered_file_is_seen(tmp_path: Path) -> None:
    manifest = Manifest.read(build(tmp_path / "engine"))
    path = tmp_path / "engine" / "decoder.onnx"
    content = path.read_bytes() or b"x"

    def refused(message: str, full: bool = False) -> str:
        with pytest.raises(EngineError, match=message) as caught:
            check_files(manifest, tmp_path / "engine", full=full)
        assert str(path) in str(caught.value)
        assert f"--output {tmp_path}/engine --force --precision fp32 --device cpu`" in str(caught.value)
        return str(caught.value)

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "`blip2rt verify" in refused("altered" if manifest.files[path.name].size else "has 1 bytes")
    path.write_bytes(content + b"more")
    refused("bytes where the manifest says")
    path.unlink()
    refused("is missing")
    path.mkdir()
    assert "verify" not in refused("is not a file", full=True)
    path.rmdir()
    os.mkfifo(path)  # a read of it would never end
    refused("is not a file")


def test_large_files_are_hashed_in_full_checks_only(tmp_path: Path) -> None:
    for size, name in ((HASHED_ON_OPENING - 1, "small"), (HASHED_ON_OPENING, "large")):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    files = describe_files(tmp_path)
    assert list(files) == ["large", "small"]
    for name in files:
        manifest = a_manifest(files={name: replace(files[name], sha256="ab" * 32)})
        with pytest.raises(EngineError, match="altered"):
            check_files(manifest, tmp_path, full=True)
        if name == "small":
            with pytest.raises(EngineError, match="altered"):
                check_files(manifest, tmp_path)
        else:
            check_files(manifest, tmp_path)


def test_files_are_described_without_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "manifest.json").touch()
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert describe_files(tmp_path) == {"a": FileEntry(3, sha256)}
    assert hash_file(tmp_path / "a") == sha256
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ExportError, match="link"):
        describe_files(tmp_path)


# Finding an engine


def test_find_engine(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "there is no"), (tmp_path, "there is no engine in")):
        with pytest.raises(EngineError, match=f"{message}.*`blip2rt export`.*engines/<model>-<precision>-<device>"):
            find_engine(path)
    first = build(tmp_path / "first")
    build(tmp_path / ".hidden")
    (tmp_path / "notes").mkdir()
    assert find_engine(tmp_path) == find_engine(first) == find_engine(first, "first") == first
    second = build(tmp_path / "second")
    with pytest.raises(EngineError, match="2 generative engines, first, second: pick one with name="):
        find_engine(tmp_path)
    assert find_engine(tmp_path, "second") == second
    for name in ("third", ".hidden", "notes", ".."):
        with pytest.raises(EngineError, match="only first, second"):
            find_engine(tmp_path, name)
    with pytest.raises(EngineError, match="leave out the name"):
        find_engine(first, "second")
    with pytest.raises(EngineError, match="is a file"):
        find_engine(first / "manifest.json")


# Building


def test_a_build_appears_at_its_end(tmp_path: Path) -> None:
    output = tmp_path / "new" / "parents" / "engine"
    with building(output) as directory:
        assert directory.parent == output.parent
        assert directory.name.startswith(".engine.")
        assert str(os.getpid()) in directory.name
        fill(directory, "one")
        assert not output.exists()
    assert opened(output) == "one"
    assert output.stat().st_mode == output.parent.stat().st_mode  # as mkdir makes it, not private
    with building(output, force=True) as directory:
        fill(directory, "two")
        assert opened(output) == "one"
    assert opened(output) == "two"
    assert not hidden(output.parent)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    with building(tmp_path / "engine") as directory:
        fill(directory, "tiny")
    assert opened(tmp_path / "engine") == "tiny"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(_: Path) -> None:
        raise error

    output = build(tmp_path / "engine", "old")
    with pytest.raises(error):
        build(output, "new", fail)
    assert opened(output) == "old"
    assert not hidden(tmp_path)


def test_an_engine_that_would_not_open_is_not_installed(tmp_path: Path) -> None:
    output = build(tmp_path / "engine", "old")
    with pytest.raises(ExportError, match=f"{output} was not touched.*is missing"):
        build(output, "new", lambda directory: (directory / "decoder.onnx").unlink())
    with pytest.raises(ExportError, match="no manifest"), building(output, force=True):
        pass
    assert opened(output) == "old"
    assert not hidden(tmp_path)


def test_what_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "a web page"}')
    around = build(tmp_path / "around")
    (around / "photos").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "file", foreign, around, tmp_path, tmp_path / "loop", Path("/"), Path("/proc")):
        before = sorted(path.iterdir()) if path.is_dir() and path != Path("/proc") else None
        with pytest.raises(InputError, match="choose"), building(path, force=True):
            pytest.fail("the refusal comes before the work")
        assert before is None or sorted(path.iterdir()) == before
    output = build(tmp_path / "engine")
    with pytest.raises(InputError, match="--force"), building(output):
        pytest.fail("the refusal comes before the work")


def test_a_damaged_engine_can_be_replaced(tmp_path: Path) -> None:
    output = build(tmp_path / "engine")
    manifest = output / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:500])
    (output / "decoder.onnx").unlink()
    assert opened(build(output, "new")) == "new"


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "engine"

    def write_thesis(_: Path) -> None:
        output.mkdir()
        (output / "thesis.txt").touch()

    with pytest.raises(InputError, match="did not write"):
        build(output, "new", write_thesis)
    assert (output / "thesis.txt").exists()


def test_the_engine_behind_a_link_is_replaced(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "engine"
    link = tmp_path / "engine"
    link.symlink_to(real)
    assert opened(build(link, "one")) == "one"
    assert opened(build(link, "two")) == "two"
    assert link.is_symlink()
    assert opened(real) == "two"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (Path("/proc/engine"), tmp_path / "file" / "engine", tmp_path / ("long" * 70)):
        with pytest.raises(ExportError, match=f"to build {path} .* bytes free.*choose another --output"):  # noqa: SIM117
            with building(path):
                pytest.fail("the refusal comes before the work")


@pytest.mark.parametrize("read_only", [".", "engine"])
def test_a_folder_of_somebody_else(read_only: str) -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path: nobody but its owner may look into that one
    output = build(folder / "engine", "old")
    folder.chmod(0o777)
    (folder / read_only).chmod(0o555)

    def refused() -> None:
        if os.getuid() == 0:
            os.setuid(65534)  # root may write everywhere
        with pytest.raises(ExportError, match=r"Permission denied|cannot be removed"), building(output, force=True):
            pytest.fail("the refusal comes before the work")

    assert exit_status(child(refused)) == 0
    assert opened(output) == "old"
    (folder / read_only).chmod(0o777)
    assert not hidden(folder)
    shutil.rmtree(folder)


# Disks that are full


def test_too_little_room_is_known_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"needs {2**60} bytes and {tmp_path} has [0-9]+ free"):  # noqa: SIM117
        with building(tmp_path / "engine", needed=2**60):
            pytest.fail("the refusal comes before the work")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("moment", ["writing", "syncing"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, moment: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    output = build(tmp_path / "engine", "old")
    moments = {"writing": fail, "syncing": lambda _: monkeypatch.setattr(os, "fsync", fail)}
    with pytest.raises(ExportError, match=f"no room to build {output} .* bytes free"):
        build(output, "new", moments[moment])
    assert opened(output) == "old"
    assert not hidden(tmp_path)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A real refusal of the kernel's, in the middle of a file: RLIMIT_FSIZE gives EFBIG."""
    output = build(tmp_path / "engine", "old")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (55_000, 55_000))
        with pytest.raises(ExportError, match="no room"):
            build(output, "new", lambda directory: (directory / "vision.data").write_bytes(bytes(60_000)))
        assert not hidden(tmp_path)

    assert exit_status(child(limited)) == 0
    assert opened(output) == "old"


# Kills

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # torch has threads; children do not


def child(work: Callable[[], None]) -> int:
    """Run `work` in a copy of this process; its id. A new interpreter would take longer than the builds."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    return pid


def exit_status(pid: int) -> int:
    """Wait for a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    output = build(tmp_path / "engine", "0")
    seen = 0
    for _ in range(20):
        reader, writer = os.pipe()

        def loop(first: int = seen + 1, done: int = writer) -> None:
            for generation in range(first, 10**9):
                build(output, str(generation))
                os.write(done, f"{generation}\n".encode())

        pid = child(loop)
        os.close(writer)
        reports = os.read(reader, 100)  # so that it has begun
        time.sleep(random.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)
        assert exit_status(pid) == -signal.SIGKILL
        while more := os.read(reader, 1000):
            reports += more
        os.close(reader)
        finished = int(reports.split()[-1])
        seen = int(opened(output))
        assert seen in (finished, finished + 1)
    assert opened(build(output, "last")) == "last"
    assert not hidden(tmp_path)


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process kill itself when it comes to its `step`-th call that touches the disk, before that call."""
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return count_and_call

    for module, names in ((os, ("mkdir", "rename", "fsync", "unlink", "rmdir")), (engine_directory, ("_exchange",))):
        for name in names:
            monkeypatch.setattr(module, name, counting(getattr(module, name)))


def no_exchange(*_: object) -> None:
    """A file system that cannot exchange."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(engine_directory, "_exchange", no_exchange)
    output, outcomes, left_behind, status, step = tmp_path / "engine", [], 0, -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        build(output, "old")
        assert not hidden(tmp_path)  # whatever the last kill left

        def killed(step: int = step) -> None:
            kill_at(step, monkeypatch)
            build(output, "new")

        status = exit_status(child(killed))
        left_behind += bool(hidden(tmp_path))
        outcomes.append(opened(output) if output.exists() else "aside")
        with pytest.raises(InputError, match="--force"), building(output):  # the next build first puts things in order
            pytest.fail("there is an engine, always")
        assert opened(output) == outcomes[-1].replace("aside", "old")
        assert not hidden(tmp_path)
        step += 1
    assert status == 0
    assert left_behind > 10
    changed = outcomes.index("new")
    assert outcomes == ["old"] * (changed - (not exchange)) + ["aside"] * (not exchange) + ["new"] * (step - changed)


def test_a_build_under_way_is_no_leftover(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    with building(output) as first:
        fill(first, "first")
        with building(output) as second:
            assert first.exists()
            fill(second, "second")
        assert opened(output) == "second"
    assert opened(output) == "first"  # the last to finish stays, also without force
    assert not hidden(tmp_path)


def test_leftovers_of_other_outputs_stay(tmp_path: Path) -> None:
    names = [f".engine{name}" for name in (".building-1-0123abcd", ".x.building-1-0123abcd", ".building-1-01", "")]
    for name in names:
        (tmp_path / name).mkdir()
    build(tmp_path / "engine")
    assert hidden(tmp_path) == sorted(names[1:])


def test_two_processes_build_at_the_same_time(tmp_path: Path) -> None:
    output = tmp_path / "engine"

    def repeat(name: str) -> None:
        for _ in range(15):
            build(output, name)

    pids = [child(lambda name=name: repeat(name)) for name in ("one", "two", "three")]  # type: ignore[misc]
    while not output.exists():
        time.sleep(0.001)
    for _ in range(300):  # once there, it is always there
        assert (output / "manifest.json").exists()
    assert [exit_status(pid) for pid in pids] == [0, 0, 0]
    assert opened(output) in ("one", "two", "three")
    assert not hidden(tmp_path)


def test_the_format_is_documented() -> None:
    readme = (Path(__file__).parents[1] / "engines" / "README.md").read_text("utf-8")
    assert f"Format revision: {FORMAT_REVISION}" in readme
    for part in (Manifest, ImageSpec, TokenSpec, Parity, FileEntry, StageSpec, TensorSpec):
        for field in fields(part):
            assert f"`{field.name}`" in readme, field.name

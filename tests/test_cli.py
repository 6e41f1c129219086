"""The command line: exit statuses, rows, and what goes to which stream."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Blip2ForConditionalGeneration

from blip2rt import Caption, Generation, GenerationOptions, InputError, Pipeline, __version__, bundled, cli
from blip2rt.cli import main

REPOSITORY = Path(__file__).parents[1]
KEYS = ["image", "text", "score", "token_ids", "token_logprobs", "finish_reason", "alternatives", "error"]
SHORT = ["--num-beams", "1", "--max-new-tokens", "3"]
IMAGES = [str(image) for image in bundled.IMAGES]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the program of export/ was called without arguments: it builds the bundled model."""
    folder = tmp_path_factory.mktemp("home")
    program = REPOSITORY / "export" / "build_engines.py"
    done = subprocess.run([sys.executable, program], cwd=folder, capture_output=True, text=True)
    engine = f"engines/{bundled.CHECKPOINT.name}-fp32-cpu"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"built {engine}\n")
    assert [path.name for path in (folder / "engines").iterdir()] == [Path(engine).name]
    return folder


@pytest.fixture(scope="module")
def pipe(home: Path) -> Pipeline:
    return Pipeline(home / "engines")


class Shell:
    """Commands in this process, in the folder that has `engines/`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *arguments: Any, status: int = 0) -> tuple[str, str]:
        """stdout and stderr of a command that must end with `status`."""
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's way to end
            found = int(error.code or 0)
        out, err = self.capsys.readouterr()
        assert found == status, err
        assert status or err == ""
        assert "Traceback" not in err
        return out, err

    def rows(self, *arguments: Any, status: int = 0) -> list[dict[str, Any]]:
        """The rows of a command with --json, which tells errors in them."""
        out, err = self(*arguments, "--json", status=status)
        assert err == ""
        return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(home)
    return Shell(capsys)


def assert_row(row: dict[str, Any], image: str, result: Generation) -> None:
    assert list(row) == KEYS
    assert row["image"] == image
    assert row["error"] is None
    others = row.pop("alternatives")
    assert len(others) == len(result.alternatives)
    for found, expected in ((row, result), *zip(others, result.alternatives, strict=True)):
        assert {key: found[key] for key in KEYS[1:6]} == {key: getattr(expected, key) for key in KEYS[1:6]}


def test_commands_are_the_pipeline(run: Shell, pipe: Pipeline) -> None:
    """Same numbers as from Python; one row a picture, in order; text without --json."""
    calls: list[tuple[Sequence[Any], list[Any]]] = [
        (["caption", *IMAGES], pipe.caption(IMAGES)),
        (["caption", *IMAGES, "--prompt", ""], pipe.caption(IMAGES, "")),
        (["answer", *IMAGES, "--question", "what is it?"], pipe.answer(IMAGES, "what is it?")),
        (["generate", *IMAGES, "--prompt", "a"], pipe.generate(IMAGES, "a")),
        (["caption", *IMAGES, "--num-return-sequences", "2"], pipe.caption(IMAGES, num_return_sequences=2)),
    ]
    for arguments, expected in calls:
        for row, image, result in zip(run.rows(*arguments), IMAGES, expected, strict=True):
            assert_row(row, image, result)
    lines = run(*calls[-1][0])[0].splitlines()
    assert lines == [f"{i}: {g}" for i, r in zip(IMAGES, calls[-1][1], strict=True) for g in (r, *r.alternatives)]


class Recorder:
    """Stands in for the pipeline and remembers the call."""

    calls: list[tuple[Any, ...]]
    generative_engine = SimpleNamespace(batch_size=8)

    def __init__(self, *arguments: Any, **keywords: Any):
        type(self).calls = [(arguments, keywords)]

    def preprocess(self, image: Any) -> Any:
        return image

    def caption(
        self, images: list[Any], prompt: str, options: GenerationOptions, strip_prefix: object
    ) -> list[Caption]:
        self.calls.append((images, prompt, options))
        return [Caption("text", [], [], "stop", 0.0) for _ in images]


def test_every_option_reaches_the_call(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "Pipeline", Recorder)
    common = {
        "max_new_tokens": 17, "min_new_tokens": 2, "length_penalty": -0.5, "early_stopping": "never",
        "repetition_penalty": 1.25, "no_repeat_ngram_size": 4, "num_return_sequences": 2, "rules": "transformers",
    }  # fmt: skip
    beams = {"num_beams": 3}
    sampling = {"do_sample": True, "num_beams": 1, "temperature": 0.75, "top_k": 11, "top_p": 0.5, "seed": 5}
    assert {*common, *beams, *sampling} == {field.name for field in fields(GenerationOptions)}
    for values in (common | beams, common | sampling):
        arguments = [
            part
            for name, value in values.items()
            for part in (["--" + name.replace("_", "-")] + ([] if value is True else [str(value)]))
        ]
        run("caption", "a.jpg", "--engine", "E", "--name", "N", "--threads", "2", "--prompt", "P", *arguments)
        opened, call = Recorder.calls
        assert opened == (("E",), {"name": "N", "threads": 2})
        assert call == (["a.jpg"], "P", GenerationOptions(**values))  # type: ignore[arg-type]
    run("caption", "a.jpg")
    assert Recorder.calls[1] == (["a.jpg"], "a photo of", GenerationOptions())
    for text, value in (("true", True), ("False", False)):
        run("caption", "a.jpg", "--early-stopping", text)
        assert Recorder.calls[1][2] == GenerationOptions(early_stopping=value)


WRONG_CALLS: dict[str, tuple[list[str], str]] = {
    "no command": ([], "required"),
    "unknown command": (["describe"], "describe"),
    "no picture": (["caption"], "IMAGE"),
    "no question": (["answer", IMAGES[0]], "--question"),
    "no prompt": (["generate", IMAGES[0]], "--prompt"),
    "unknown option": (["caption", IMAGES[0], "--beams", "3"], "--beams"),
    "shortened option": (["caption", IMAGES[0], "--num-b", "3"], "--num-b"),
    "not a number": (["caption", IMAGES[0], "--num-beams", "many"], "many"),
    "out of range": (["caption", IMAGES[0], "--num-beams", "0"], "num_beams"),
    "not finite": (["caption", IMAGES[0], "--length-penalty", "nan"], "length_penalty"),
    "no such choice": (["caption", IMAGES[0], "--early-stopping", "maybe"], "'maybe'"),
    "no such rules": (["caption", IMAGES[0], "--rules", "mine"], "'mine'"),
    "no threads": (["caption", IMAGES[0], "--threads", "0"], "threads"),
    "beams and sampling": (["caption", IMAGES[0], "--do-sample", "--num-beams", "3"], "num_beams=3"),
    "power beyond float32": (
        ["caption", IMAGES[0], "--length-penalty", "-1000"],
        "length_penalty must be a number above",
    ),
    "sampling option": (["caption", IMAGES[0], "--temperature", "2"], "temperature=2.0"),
    "more than beams": (["caption", IMAGES[0], "--num-return-sequences", "9"], "num_return_sequences=9"),
    "least above most": (["caption", IMAGES[0], "--min-new-tokens", "40"], "min_new_tokens=40"),
    "too long": (["caption", IMAGES[0], "--max-new-tokens", "100000"], "positions"),
    "precision": (["export", "--precision", "fp7"], "'fp7'"),
    "no kernels": (["export", "--precision", "fp16"], "int8 and int4"),
    "device": (["export", "--device", "abacus"], "'abacus'"),
    "verify without model": (["verify", "engines"], "--model"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(name: str, run: Shell) -> None:
    arguments, expected = WRONG_CALLS[name]
    out, err = run(*arguments, status=2)
    assert out == ""
    assert expected in err


def test_failed_work(run: Shell, tmp_path: Path) -> None:
    """One sentence that says what to do, on stderr."""
    shutil.copy(IMAGES[0], tmp_path)
    for arguments, expected in (
        (["caption", IMAGES[0], "--engine", tmp_path], "blip2rt export"),
        (["caption", IMAGES[0], "--engine", tmp_path / "nothing"], "blip2rt export"),
        (["caption", IMAGES[0], "--name", "nothing"], "no engine 'nothing'"),
        (["inspect", IMAGES[0]], "blip2rt export"),
        (["export", "--model", tmp_path], "holds no weights"),
        (["export", "--model", tmp_path / "nothing"], "no such directory"),
        (["verify", "engines", "--model", tmp_path], "holds no weights"),
    ):
        out, err = run(*arguments, status=1)
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("blip2rt: ")
        assert expected in err


def test_bad_pictures_do_not_stop_the_others(run: Shell, pipe: Pipeline, tmp_path: Path) -> None:
    """More than a batch of them, at both ends and in the middle."""
    text, empty, missing = tmp_path / "text.jpg", tmp_path / "empty.png", tmp_path / "missing.jpg"
    text.write_text("no picture")
    empty.touch()
    images = [str(text), *IMAGES, str(empty), str(tmp_path), *IMAGES, *IMAGES, str(missing)]
    bad = {str(path) for path in (text, empty, missing, tmp_path)}
    rows = run.rows("caption", *images, *SHORT, status=1)
    assert [row["image"] for row in rows] == images
    for row, image in zip(rows, images, strict=True):
        assert list(row) == KEYS
        if image in bad:
            assert row["error"]
            assert row["alternatives"] == []
            assert all(row[key] is None for key in KEYS[1:6])
        else:
            assert_row(row, image, pipe.caption(image, num_beams=1, max_new_tokens=3))
    out, err = run("caption", *images, *SHORT, status=1)
    assert [line.partition(": ")[0] for line in out.splitlines()] == [image for image in images if image not in bad]
    assert [line.split(": ")[1] for line in err.splitlines()] == [image for image in images if image in bad]


def test_inspect(run: Shell, home: Path) -> None:
    [engine] = (home / "engines").iterdir()
    [description] = run.rows("inspect", "engines")
    text = run("inspect", engine)[0]
    model = Blip2ForConditionalGeneration.from_pretrained(bundled.CHECKPOINT)
    parts = {
        "vision": [model.vision_model],
        "qformer": [model.qformer, model.language_projection],
        "decoder": [model.language_model],
    }
    counts = {part: sum(p.numel() for m in modules for p in m.parameters()) for part, modules in parts.items()}
    counts["qformer"] += model.query_tokens.numel()
    assert description["parameters"] == counts | {"total": sum(p.numel() for p in model.parameters())}
    assert description["bytes"].keys() == counts.keys()
    assert description["stages"]["vision"]["outputs"].keys() == {"image_embeds"}
    for count in counts.values():
        assert f"{count:,}" in text
    assert engine.name in text


def test_verify(run: Shell) -> None:
    rows = run.rows("verify", "engines", "--model", bundled.CHECKPOINT)
    assert [row["stage"] for row in rows] == ["vision", "qformer", "decoder"]
    assert all(row["first_divergence"] is None and row["max_rel"] < 1e-5 for row in rows)


# --- as a shell sees it ----------------------------------------------------------------------------------------------


def shell(home: Path, *command: Any, **keywords: Any) -> "subprocess.CompletedProcess[bytes]":
    """A process of its own, in the folder that has `engines/`."""
    return subprocess.run([sys.executable, "-m", "blip2rt", *command], cwd=home, capture_output=True, **keywords)


def test_module_and_script(home: Path) -> None:
    done = shell(home, "--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"blip2rt {__version__}\n")
    script = Path(sys.executable).with_name("blip2rt")
    if script.exists():  # absent where blip2rt runs from its sources
        assert subprocess.run([script, "--version"], capture_output=True).stdout == done.stdout


def test_names_that_are_no_utf8(home: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """The bytes of the name come back, from a text as they are, from JSON by `os.fsencode`."""
    good, bad = (os.path.join(os.fsencode(tmp_path), name) for name in (b"caf\xe9.png", b"\xff.png"))
    shutil.copy(IMAGES[0], os.fsdecode(good))
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = shell(home, "caption", good, bad, *SHORT, "--json", env=environment)
    rows = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]
    assert (done.returncode, done.stderr) == (1, b"")
    assert [os.fsencode(row["image"]) for row in rows] == [good, bad]
    assert_row(rows[0], os.fsdecode(good), pipe.caption(IMAGES[0], num_beams=1, max_new_tokens=3))
    done = shell(home, "caption", good, bad, *SHORT, env=environment)
    assert done.returncode == 1
    assert done.stdout.startswith(good + b": ")
    assert bad in done.stderr


def test_reader_that_leaves(home: Path) -> None:
    """`blip2rt caption ... | head -1`, a full disk, and no stdout at all."""
    command = [sys.executable, "-m", "blip2rt"]
    with subprocess.Popen(
        [*command, "caption", *IMAGES * 20, *SHORT], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().decode().startswith(IMAGES[0])
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*command, "inspect", "engines"], cwd=home, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        assert b"No space left on device" in done.stderr
    closed = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command, "inspect", "engines"], cwd=home, capture_output=True
    )
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_export_without_its_packages(home: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from blip2rt.cli import main; sys.exit(main(['export']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=home, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "blip2rt: this needs the package torch: pip install 'blip2rt[export]'\n"


def test_an_empty_name_is_no_default(run: Shell) -> None:
    """An unset variable of a shell: neither the bundled model nor the folder one is in."""
    assert "no directory or file is named, for --model" in run("export", "--model", "", status=1)[1]
    assert "an engine is the path of a folder, not ''" in run("caption", *IMAGES, "--engine", "", status=2)[1]
    with pytest.raises(InputError, match="not None"):
        Pipeline(None)  # type: ignore[arg-type]

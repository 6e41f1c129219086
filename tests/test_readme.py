"""The README tells the truth: its tree is the disk's, its code runs, its figures are those of benchmarks/results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from blip2rt.bundled import CHECKPOINT
from blip2rt.export import export_engine

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TREE = re.findall(r"```\n(.*?)```", README.partition("## The tree")[2], re.DOTALL)[0]


def listed_paths() -> set[Path]:
    """Paths that the tree names: two spaces of indent are one folder, commas separate files."""
    paths: set[Path] = set()
    folders: list[Path] = []
    for line in TREE.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        parent = folders[indent - 1] if indent else ROOT
        paths |= {parent / name for name in names}
        folders = [*folders[:indent], parent / names[0]]
    return paths


def test_tree_equals_disk() -> None:
    """A file that moved, or came, without the README."""
    listed = listed_paths()
    assert not [path for path in listed if not path.exists()]
    folders_of_listed_files = {path.parent for path in listed if path.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in tracked.split():
        path = ROOT / name
        covered = path in listed or (
            any(folder in path.parents for folder in listed if folder.is_dir())
            and (path.parent not in folders_of_listed_files or path.name == "__init__.py")
        )
        assert covered or path.name.startswith(".git"), f"{name} is not in the README's tree"


def test_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first thing a newcomer types."""
    export_engine(CHECKPOINT, tmp_path / "engines" / "captioner")
    (tmp_path / "blip2rt").symlink_to(ROOT / "blip2rt")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_figures_are_those_of_the_results() -> None:
    """A number that nobody measured."""
    table = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert f"<!-- figures -->\n{table}<!-- end of figures -->\n" in README


def test_errors_name_commands_that_exist() -> None:
    """`blip2rt COMMAND` in any message or document is a command of the program."""
    texts = [path.read_text() for path in ROOT.glob("blip2rt/**/*.py")] + [README]
    named = {match for text in texts for match in re.findall(r"`blip2rt ([a-z]+)\b", text)}
    help_text = subprocess.run(
        [sys.executable, "-m", "blip2rt", "--help"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert named
    assert all(re.search(rf"^\s+{name}\b", help_text, re.MULTILINE) for name in named), (named, help_text)

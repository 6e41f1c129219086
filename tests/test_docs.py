"""The documentation tells the truth: its examples run as they stand, page by page, and its site builds.

```bash and ```python blocks run in their order in a folder with `photos/`; ```sh blocks need a network or days of work.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from blip2rt import bundled

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUNNABLE = [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    if page.stem == "server":
        pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "blip2rt"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m blip2rt "$@"\n')
    program.chmod(0o755)
    (tmp_path / "photos").mkdir()
    for image in bundled.IMAGES:
        (tmp_path / "photos" / image.name).write_bytes(image.read_bytes())
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "BUNDLED": str(bundled.CHECKPOINT.parent),
    }
    python = ""  # a page is one session
    for kind, text in BLOCK.findall(page.read_text()):
        python += text if kind == "python" else ""
        command = [sys.executable, "-c", python] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_site_builds(tmp_path: Path) -> None:
    """Strictly: a page that the navigation lacks, or a link into nothing, is an error."""
    pytest.importorskip("material", reason="pip install 'blip2rt[docs]'")
    command: list[str | Path] = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        text = (tmp_path / "site" / name).read_text()
        assert "fonts.googleapis.com" not in text

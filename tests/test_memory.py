"""Too little memory is said before it is exhausted."""

import subprocess
import sys
from pathlib import Path

import pytest

from blip2rt import Pipeline, memory

LIMITED = """
import resource, sys
from blip2rt import EngineError, Pipeline
used = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), -1))
try:
    Pipeline(sys.argv[1])
except EngineError as error:
    print(error)
"""


def test_a_limit_on_addresses(tiny_engine: Path) -> None:
    size = sum(file.stat().st_size for file in tiny_engine.iterdir())

    def said(room: int) -> str:
        command = [sys.executable, "-c", LIMITED, str(tiny_engine), str(room)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    assert "raise `ulimit -v` by" in said(size // 2)
    assert said(2**31) == ""


def test_less_memory_than_the_files_take(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """The least of what is free and what the control group allows."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "ours").mkdir(parents=True)
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    assert memory.usable_memory() is None
    (proc / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    8 kB\n")
    assert memory.usable_memory() == 8192
    (proc / "self" / "cgroup").write_text("0::/ours\n")
    (groups / "ours" / "memory.max").write_text("max\n")
    assert memory.usable_memory() == 8192
    (groups / "ours" / "memory.max").write_text("4096\n")
    assert memory.usable_memory() == 4096
    with pytest.warns(UserWarning, match="every picture will wait for the disk") as told:
        Pipeline(tiny_engine)
    assert told[0].filename == __file__
    monkeypatch.undo()
    assert (memory.usable_memory() or 0) > 2**20
    Pipeline(tiny_engine)
    assert not recwarn.list

"""Bulk runs on a Ray cluster of three nodes: what one machine writes, whoever dies in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray", reason="pip install 'blip2rt[ray]'")
from pyarrow.dataset import dataset
from ray.cluster_utils import Cluster

OPTIONS = ["--prompt", "w1 w2", "--num-beams", "2", "--max-new-tokens", "4"]
PICTURES = 320


class Nodes:
    """A cluster of three nodes with a CPU each, and the command against it."""

    def __init__(self, engine: Path, home: Path):
        self._engine, self._home = engine, home
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.others = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def start(self, *arguments: str, on_ray: bool = True) -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            "-m",
            "blip2rt",
            "bulk",
            *arguments,
            "--engine",
            str(self._engine),
            "--json",
            *OPTIONS,
        ]
        return subprocess.Popen(
            command + ["--ray"] * on_ray,
            cwd=self._home,
            env=os.environ | {"RAY_ADDRESS": self.cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, on_ray: bool = True) -> dict[str, Any]:
        return finished(self.start(*arguments, on_ray=on_ray))

    def refused(self, *arguments: str) -> str:
        process = self.start(*arguments)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 2, said
        return said.strip().splitlines()[-1]


def finished(process: "subprocess.Popen[str]") -> dict[str, Any]:
    answer, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    report: dict[str, Any] = json.loads(answer)
    return report


def lines(folder: Path) -> list[bytes]:
    return sorted(line for part in folder.glob("part_*.jsonl") for line in part.read_bytes().splitlines())


def wait_for_parts(output: Path, number: int, process: "subprocess.Popen[str]") -> None:
    while len(list(output.glob("part_*"))) < number:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection with broken pictures, and one id twice in a list of some of them."""
    home = tmp_path_factory.mktemp("ray")
    (home / "pictures").mkdir()
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(home / "pictures" / f"{i:04}.png")
    for i in range(7, PICTURES, 97):
        (home / "pictures" / f"{i:04}.png").write_bytes(b"no picture")
    names = [f"pictures/{i:04}.png" for i in range(40)]
    (home / "list.txt").write_text("\n".join([*names, names[3]]) + "\n")
    return home


@pytest.fixture(scope="module")
def nodes(tiny_engine: Path, home: Path) -> Iterator[Nodes]:
    nodes = Nodes(tiny_engine, home)
    yield nodes
    nodes.cluster.shutdown()


def test_a_run_and_then_a_node_die(nodes: Nodes, home: Path) -> None:
    """The command is killed, and in the next one a machine: rows and errors are those of one machine, each id once."""
    broken = len(range(7, PICTURES, 97))
    nodes.run("pictures", "--output", "straight.jsonl", on_ray=False)
    first = nodes.start("pictures", "--output", "parts")
    wait_for_parts(home / "parts", 2, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = nodes.start("pictures", "--output", "parts")
    wait_for_parts(home / "parts", len(list((home / "parts").glob("part_*"))) + 1, second)
    nodes.cluster.remove_node(nodes.others.pop())
    report = finished(second)
    assert report["skipped"] > 0
    assert report["answered"] > 0
    assert report["answered"] + report["failed"] + report["skipped"] == PICTURES
    expected = sorted((home / "straight.jsonl").read_bytes().splitlines())
    assert len(expected) == PICTURES - broken
    assert lines(home / "parts") == expected
    errors = (home / "straight.jsonl.errors.jsonl").read_bytes().splitlines()
    assert lines(home / "parts" / "_errors") == sorted(
        line.replace(b"'pictures/", b"'" + bytes(home / "pictures/")) for line in errors
    )
    assert "other settings (source was" in nodes.refused("list.txt", "--output", "parts")


def test_a_list_into_parquet(nodes: Nodes, home: Path) -> None:
    """Columns are those of one machine's files; an id that comes twice is listed."""
    nodes.run("list.txt", "--output", "straight", "--format", "parquet", on_ray=False)
    command = ("list.txt", "--output", "table", "--format", "parquet")
    reports = [nodes.run(*command) for _ in range(2)]
    assert [(r["answered"], r["failed"], r["skipped"]) for r in reports] == [(39, 2, 0), (0, 0, 41)]
    tables = [
        dataset(home / folder, format="parquet", exclude_invalid_files=True).to_table().sort_by("id")
        for folder in ("straight", "table")
    ]
    assert tables[0].equals(tables[1])
    said = b"".join(path.read_bytes() for path in (home / "table" / "_errors").iterdir())
    assert b"its id came before in this source" in said
    assert "was not written by `blip2rt bulk --ray`" in nodes.refused("list.txt", "--output", "straight")
    assert "--ray writes --format jsonl or parquet, not 'csv'" in nodes.refused(
        "list.txt", "--output", "x", "--format", "csv"
    )

"""What can be said of the image without building it: its command is one of ours, its source is a whole package."""

import json
import re
import tomllib
from pathlib import Path

from blip2rt.cli import _parser, serve

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_command_serves_and_may_be_reached() -> None:
    entry, command = (json.loads(re.findall(rf"^{name} (.*)$", DOCKERFILE, re.M)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert entry[0] == "blip2rt"
    arguments = _parser().parse_args([*entry[1:], *command])
    assert arguments.run is serve
    assert (arguments.engine, arguments.host) == ("/engines", "0.0.0.0")
    ports = re.findall(r"^EXPOSE (\d+) (\d+)$", DOCKERFILE, re.M)
    assert ports == [(str(arguments.port), *re.findall(r"--grpc-port (\d+)", DOCKERFILE))]
    assert f"127.0.0.1:{arguments.port}/v2/health/ready" in DOCKERFILE


def test_the_source_is_whole() -> None:
    """All that the wheel is built from goes in, and the extra that is installed exists."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = project["tool"]["scikit-build"]
    assert {path.strip("/") for path in build["sdist"]["include"]} == kept
    assert set(build["wheel"]["packages"]) <= kept
    assert all((ROOT / name).exists() for name in kept)
    [extra] = re.findall(r"/source\[(\w+)\]", DOCKERFILE)
    assert extra in project["project"]["optional-dependencies"]

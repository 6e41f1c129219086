"""Servers for the tests: in this process, and as a process of their own. A plugin: conftest.py names it."""

import base64
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
import httpx
from starlette.testclient import TestClient

from blip2rt.server.app import create_app
from blip2rt.server.engines import Engines
from blip2rt.server.metrics import Metrics
from blip2rt.server.settings import ServerSettings

TINY: dict[str, Any] = {"max_new_tokens": 4}


def picture(seed: int, format_: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(file, format_)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Server:
    """A server in this process."""

    def __init__(self, engine: Path, **settings: Any):
        self.metrics = Metrics()
        self.settings = ServerSettings(**settings)
        self.engines = Engines(engine, None, None, self.settings, self.metrics)
        self.name = self.engines.current.name
        self.app = create_app(self.engines, self.settings, self.metrics, 2)

    def chat_body(self, data: bytes | str, text: str | None = "w1 w2", **more: Any) -> dict[str, Any]:
        url = data if isinstance(data, str) else data_url(data)
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
        content += [{"type": "text", "text": text}] if text is not None else []
        return {"model": self.name, "messages": [{"role": "user", "content": content}], **more}


@contextmanager
def running(engine: Path, **settings: Any) -> Iterator[tuple[Server, TestClient]]:
    server = Server(engine, **settings)
    with TestClient(server.app, raise_server_exceptions=False) as client:
        yield server, client


@pytest.fixture(scope="module")
def server_and_client(tiny_engine: Path) -> Iterator[tuple[Server, TestClient]]:
    with running(tiny_engine, max_new_tokens=50, max_pixels=100_000, max_body_mb=0.5, max_pictures=3) as both:
        yield both


@pytest.fixture
def server(server_and_client: tuple[Server, TestClient]) -> Server:
    return server_and_client[0]


@pytest.fixture
def client(server_and_client: tuple[Server, TestClient]) -> TestClient:
    return server_and_client[1]


class Process:
    """`blip2rt serve` on a free port of the loopback interface."""

    def __init__(self, engine: Path, *arguments: str):
        command = [sys.executable, "-m", "blip2rt", "serve", str(engine), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert "serving" in line, line + self.process.stderr.read()
        addresses = dict(word.split("://") for word in line.split() if "://" in word)
        self.url, self.grpc_address = f"http://{addresses['http']}", addresses.get("grpc", "")
        self.port = int(self.url.rpartition(":")[2])
        self.log: list[str] = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{self.url}/v2/health/ready", timeout=30)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@pytest.fixture(scope="module")
def process(tiny_engine: Path) -> Iterator[Process]:
    process = Process(tiny_engine, "--body-timeout", "1.5", "--max-batch", "2")
    yield process
    process.process.kill()
    process.process.wait()

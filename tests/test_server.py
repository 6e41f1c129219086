"""The server: everybody gets the Pipeline's answer, nobody gets more than his share, and no request hurts."""

import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
import httpx
from starlette.testclient import TestClient

from blip2rt import ImageError, InputError, Pipeline
from blip2rt.cli import main
from blip2rt.server import fetching
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


def test_chat_is_the_pipeline(server: Server, client: TestClient, tiny_pipeline: Pipeline) -> None:
    """A question, none, a conversation; OpenAI's options and ours; usage and log-probabilities."""
    image = picture(1)
    question = "Question: {} Answer:"

    def ask(text: str | None = "w1 w2", **more: Any) -> dict[str, Any]:
        response = client.post("/v1/chat/completions", json=server.chat_body(image, text, **more))
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    answer = ask(max_tokens=4, logprobs=True)
    expected = tiny_pipeline.generate(image, question.format("w1 w2"), **TINY)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert [row["logprob"] for row in choice["logprobs"]["content"]] == expected.token_logprobs
    queries = int(tiny_pipeline.manifest.stages["qformer"].signature.outputs[0].shape[1])
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["prompt_tokens"] == queries + 5  # BOS and four words
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert ask(None)["choices"][0]["message"]["content"] == tiny_pipeline.generate(image, "a photo of").text

    beams = ask(n=3, max_completion_tokens=4, num_beams=4, length_penalty=-1.0)
    result = tiny_pipeline.generate(
        image, question.format("w1 w2"), num_beams=4, num_return_sequences=3, length_penalty=-1.0, **TINY
    )
    texts = [choice["message"]["content"] for choice in beams["choices"]]
    assert texts == [result.text, *(other.text for other in result.alternatives)]
    sampled = ask(temperature=1.5, top_p=0.9, seed=3, max_tokens=6)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3, "max_new_tokens": 6}
    expected = tiny_pipeline.generate(image, question.format("w1 w2"), **options)
    assert sampled["choices"][0]["message"]["content"] == expected.text

    body = server.chat_body(image, "w1", max_tokens=4)
    body["messages"] = [
        {"role": "system", "content": "w9"},
        *body["messages"],
        {"role": "assistant", "content": "w2."},
        {"role": "user", "content": "w3"},
    ]
    found = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    prompt = "w9 Question: w1 Answer: w2. Question: w3 Answer:"
    assert found == tiny_pipeline.generate(image, prompt, **TINY).text
    assert client.get("/v1/models").json()["data"][0]["id"] == server.name
    assert client.get(f"/v1/models/{server.name}").json()["object"] == "model"


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_streams(server: Server, client: TestClient, tiny_pipeline: Pipeline) -> None:
    """The pieces joined are the text; the last event but one says why it ended, the last one what it cost."""
    for seed in range(3):
        more: dict[str, Any] = {"stream": True, "max_tokens": 12, "stream_options": {"include_usage": True}}
        response = client.post("/v1/chat/completions", json=server.chat_body(picture(seed), **more))
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response.text)
        expected = tiny_pipeline.generate(picture(seed), "Question: w1 w2 Answer:", max_new_tokens=12)
        pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
        assert "".join(pieces) == expected.text
        assert len(pieces) > 3 or len(expected.token_ids) < 3
        assert events[-2]["choices"][0]["finish_reason"] == expected.finish_reason
        assert events[-1]["usage"]["completion_tokens"] == len(expected.token_ids)


def test_uploads(client: TestClient, tiny_pipeline: Pipeline) -> None:
    """Names of files are given back and mean nothing; the content decides what a picture is."""
    names = ["../../etc/passwd", "x.txt", "a\\b\u202e.exe"]
    files = [("image", (name, picture(i, "JPEG"), "text/html")) for i, name in enumerate(names)]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    response = client.post("/caption", files=files, data={"prompt": "w1", "options": json.dumps(options)})
    expected = tiny_pipeline.caption([picture(i, "JPEG") for i in range(3)], "w1", **options)
    rows = response.json()["results"]
    assert [row["image"] for row in rows] == names
    assert [row["text"] for row in rows] == [result.text for result in expected]
    assert rows[0]["alternatives"][0]["score"] == expected[0].alternatives[0].score
    assert rows[0]["token_logprobs"] == expected[0].token_logprobs
    response = client.post("/answer", files=files[:1], data={"question": "w3"})
    assert response.json()["results"][0]["text"] == tiny_pipeline.answer(picture(0, "JPEG"), "w3").text


def test_open_inference_protocol(server: Server, client: TestClient, tiny_pipeline: Pipeline) -> None:
    """Metadata, JSON in and out, binary in and out."""
    url = f"/v2/models/{server.name}"
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert [t["name"] for t in client.get(url).json()["inputs"]] == ["image", "text"]
    assert client.get(f"{url}/versions/1/ready").json()["ready"] is True
    assert (client.get("/v2/health/live").status_code, client.get("/v2/health/ready").status_code) == (200, 200)
    images = [picture(i) for i in range(2)]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    expected = tiny_pipeline.answer(images, ["w1", "w2"], **options)
    texts = [row.text for result in expected for row in (result, *result.alternatives)]
    scores = [row.score for result in expected for row in (result, *result.alternatives)]
    body = {
        "id": "7",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [2, 1],
             "data": [[base64.b64encode(image).decode()] for image in images]},
            {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["w1", "w2"]},
        ],
        "parameters": {"task": "answer", **options},
    }  # fmt: skip
    answer = client.post(f"{url}/infer", json=body).json()
    assert (answer["id"], answer["model_name"]) == ("7", server.name)
    assert [(o["name"], o["shape"], o["data"]) for o in answer["outputs"]] == [
        ("text", [2, 2], texts), ("score", [2, 2], scores)
    ]  # fmt: skip
    binary = b"".join(struct.pack("<I", len(image)) + image for image in images)
    head = json.dumps(
        {
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(binary)}}
            ],
            "outputs": [{"name": "text", "parameters": {"binary_data": True}}],
            "parameters": TINY,
        }
    ).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    response = client.post(f"{url}/infer", content=head + binary, headers=length)
    end = int(response.headers["inference-header-content-length"])
    [output] = json.loads(response.content[:end])["outputs"]
    captions = [caption.text.encode() for caption in tiny_pipeline.caption(images, **TINY)]
    assert output["shape"] == [2, 1]
    assert response.content[end:] == b"".join(struct.pack("<I", len(text)) + text for text in captions)


# --- wrong requests and attacks --------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


BAD_PICTURES: dict[str, bytes] = {
    "decompression bomb": png_claiming(30_000, 30_000),
    "no pixels": png_claiming(0, 5),
    "header alone": png_claiming(5, 5),
    "empty": b"",
    "text": b"hello",
    "EPS, which is a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "PDF": b"%PDF-1.7\n",
    "HTML that says GIF": b"GIF89a<script>alert(1)</script>",
    "cut short": picture(0)[:50],
    "many ICO": b"\0\0\1\0\xff\xff" + b"\0" * 400,
    "PSD": b"8BPS\0\1" + b"\0" * 50,
    "format that is not for strangers": b"P6\n1 1\n255\n\0\0\0",
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(name: str, server: Server, client: TestClient) -> None:
    """By every way in: 400 and a sentence; the same request with a good picture goes through at once."""
    data = BAD_PICTURES[name]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(data).decode()]}
    for response in (
        client.post("/v1/chat/completions", json=server.chat_body(data)),
        client.post("/caption", files=[("image", ("a.png", data)), ("image", ("b.png", picture(1)))]),
        client.post(f"/v2/models/{server.name}/infer", json={"inputs": [tensor]}),
    ):
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert "picture" in str(error)
        assert "Traceback" not in response.text
    polyglot = picture(3) + b"\n<script>alert(1)</script>PK\x03\x04"  # a whole picture, and more behind it
    response = client.post("/v1/chat/completions", json=server.chat_body(polyglot, max_tokens=2))
    clean = client.post("/v1/chat/completions", json=server.chat_body(picture(3), max_tokens=2))
    assert response.json()["choices"] == clean.json()["choices"]


BAD_URLS = {
    "file": "file:///etc/passwd",
    "no scheme": "/etc/passwd",
    "loopback": "http://127.0.0.1/a.png",
    "metadata service": "http://169.254.169.254/latest",
    "not allowed": "https://example.org/a.png",
    "not base64": "data:image/png;base64,@@@@",
    "base64 with more behind": "data:image/png;base64,AAAA====AAAA",
    "no base64": "data:image/png,abc",
    "surrogate": "data:image/png;base64,\ud800",
    "empty": "",
}


@pytest.mark.parametrize("name", BAD_URLS)
def test_bad_urls(name: str, server: Server, client: TestClient) -> None:
    body = json.dumps(server.chat_body(BAD_URLS[name]))
    response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text


def test_wrong_requests(server: Server, client: TestClient) -> None:
    """4xx with a sentence in the protocol's own form; never 5xx."""
    good = server.chat_body(picture(0))
    message = good["messages"][0]
    infer = f"/v2/models/{server.name}/infer"
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(picture(0)).decode()]}
    text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1"]}
    chats: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "gpt"}, 404, "no model 'gpt'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, 400, "one picture"),
        ({"messages": [message, message]}, 400, "has 2"),
        ({"messages": [message, {"role": "assistant", "content": "x"}]}, 400, "the user's"),
        ({"messages": [{"role": "assistant", "content": "x"}, message]}, 400, "follows no question"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"num_beem": 3}, 400, "did you mean 'num_beams'"),
        ({"max_tokens": 51}, 400, "more than this server allows: 50"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 17}, 400, "allows: 16"),
        ({"num_beams": 2, "temperature": 1}, 400, "beams"),
        ({"stream": True, "num_beams": 2}, 400, "cannot be streamed"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"repetition_penalty": None}, 200, ""),
        ({"repetition_penalty": "x"}, 400, "repetition_penalty"),
        ({"tools": None, "frequency_penalty": 0, "metadata": {}, "user": "u"}, 200, ""),
    ]
    for change, status, expected in chats:
        response = client.post("/v1/chat/completions", json={**good, **change})
        assert (response.status_code, expected in response.text) == (status, True), response.text
        assert status == 200 or response.json()["error"]["type"] == "invalid_request_error"
    tensors: list[tuple[Any, str]] = [
        ([], "inputs must be a list"),
        ({}, "inputs must be a list"),
        ([text], "no input `image`"),
        ([image, image], "once each"),
        ([image, {**text, "shape": [2]}], "the shape [2]"),
        ([{**image, "datatype": "FP32"}], "BYTES"),
        ([{**image, "data": [1]}], "list of strings"),
        ([{**image, "data": ["@"]}], "not base64"),
        ([{**image, "parameters": {"binary_data_size": 9}}], "0 bytes are left"),
        ([{**image, "parameters": []}], "must be an object"),
        ([image, {**text, "data": ["\ud800"]}], "not valid text"),
        ([1], "must be an object"),
    ]
    for inputs, expected in tensors:
        response = client.post(infer, content=json.dumps({"inputs": inputs}))
        assert response.status_code == 400, response.text
        assert expected in response.json()["error"]
    raw: list[tuple[str, bytes, dict[str, str], int]] = [
        (infer, b"{", {}, 400),
        (infer, b"\xff\xfe", {}, 400),
        (infer, b"[" * 100_000, {}, 400),
        (infer, b"{}", {"Inference-Header-Content-Length": "9"}, 400),
        (infer, b"{}", {"Inference-Header-Content-Length": "-1"}, 400),
        (infer.replace(server.name, "x"), b"{}", {}, 404),
        ("/v1/chat/completions", b"{", {"content-type": "application/json"}, 400),
        ("/v1/chat/completions", b"\xff", {"content-type": "application/json"}, 400),
        ("/v1/chat/completions", b"[" * 100_000, {"content-type": "application/json"}, 400),
        ("/v1/chat/completions", json.dumps(good).encode(), {"content-type": "image/png"}, 400),
        ("/caption", b"--x\r\n", {"content-type": "multipart/form-data; boundary=x"}, 400),
        ("/caption", b"x", {"content-type": "multipart/form-data"}, 400),
        ("/caption", b"", {}, 400),
        ("/caption", b"x" * 600_000, {"content-type": "image/png"}, 413),
        ("/nothing", b"", {}, 404),
        ("/v1/models", b"", {}, 405),
    ]
    for path, content, headers, status in raw:
        response = client.post(path, content=content, headers=headers)
        assert response.status_code == status, (path, content[:20], response.text)
        assert response.json()["error"]
    files = [("image", ("a", picture(0)))] * 4
    assert "4 pictures" in client.post("/caption", files=files).text
    for options in ("[]", "{", '{"num_beams": 0}', '{"max_length": 3}', '{"prompt": 1}'):
        assert client.post("/caption", files=files[:1], data={"options": options}).status_code == 400
    long = client.post("/caption", files=files[:1], data={"prompt": "w1 " * 300})
    assert (long.status_code, "positions" in long.text) == (400, True)


def test_keys(tiny_engine: Path) -> None:
    """Nothing but health and the page without one."""
    with running(tiny_engine, api_keys=("first-key", "second-key")) as (_, client):
        for headers in (
            {}, {"authorization": "Bearer first-kez"}, {"authorization": "first-key"}, {"authorization": "Bearer "},
            {"authorization": "Bearer first-key first-key"}, {"authorization": "Basic Zmlyc3Qta2V5"},
        ):  # fmt: skip
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v2", "/nothing"):
                response = client.get(path, headers=headers)
                assert (response.status_code, response.json()["error"] != "") == (401, True)
            assert client.post("/v1/chat/completions", json={}, headers=headers).status_code == 401
        for key in ("first-key", "second-key"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/", "/page.js", "/page.css", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
    for wrong in (
        {"api_keys": ("short",)},
        {"allow_hosts": ("127.0.0.1",)},
        {"allow_hosts": ("http://a",)},
        {"max_queue": 0},
    ):
        with pytest.raises(InputError):
            ServerSettings(**wrong)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("192.168.1.1", False),
        ("172.16.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("::ffff:8.8.8.8", True),
        ("::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("nonsense", False), ("", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert fetching.is_public(address) is public


def test_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allowed hosts, public addresses, also behind a redirect; the address that was checked is the one used."""
    settings = ServerSettings(allow_hosts=("pictures.test", "inside.test"), max_body_mb=0.01, body_timeout=2)
    answers: dict[bytes, bytes] = {
        b"/ok": b"HTTP/1.0 200 OK\r\n\r\nPICTURE",
        b"/loop": b"HTTP/1.0 302 F\r\nLocation: /loop\r\n\r\n",
        b"/inside": b"HTTP/1.0 302 F\r\nLocation: http://inside.test/ok\r\n\r\n",
        b"/loopback": b"HTTP/1.0 302 F\r\nLocation: http://127.0.0.1/ok\r\n\r\n",
        b"/file": b"HTTP/1.0 302 F\r\nLocation: file:///etc/passwd\r\n\r\n",
        b"/again": b"HTTP/1.0 302 F\r\nLocation: /ok\r\n\r\n",
        b"/large": b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 20_000,
        b"/missing": b"HTTP/1.0 404 N\r\n\r\n",
        b"/garbage": b"\0\1\2\r\n\r\n",
    }
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        for _ in range(40):
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                head = connection.recv(4096)
                connection.sendall(answers.get(head.split()[1] if head else b"", b""))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    looked_up: list[str] = []

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        looked_up.append(host)
        address = {"pictures.test": "93.184.216.34", "inside.test": "10.0.0.7"}[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]

    connect = socket.create_connection

    def pinned(address: tuple[str, int], *more: Any) -> socket.socket:
        assert address == ("93.184.216.34", 80)  # never a name, never another address
        monkeypatch.undo()  # `connect` looks an address up as well
        connection = connect(listener.getsockname(), *more)
        patch()
        return connection

    def patch() -> None:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(socket, "create_connection", pinned)

    patch()
    assert fetching.fetch("http://pictures.test/ok", settings) == b"PICTURE"
    assert fetching.fetch("http://PICTURES.test/again", settings) == b"PICTURE"
    for url, expected in {
        "http://pictures.test/loop": "redirects more",
        "http://pictures.test/inside": "not public",
        "http://pictures.test/loopback": "not fetched from that host",
        "http://pictures.test/file": "data URL, or http",
        "http://pictures.test/large": "larger than",
        "http://pictures.test/missing": "status 404",
        "http://pictures.test/garbage": "cannot be read",
        "http://inside.test/ok": "not public",
        "http://other.test/ok": "not fetched from that host",
        "http://pictures.test:8080/ok": "port 80 only",
        "http://user@pictures.test/ok": "data URL, or http",
        "http://pictures.test@other.test/ok": "data URL, or http",
        "http://pictures.test/a b": "percent-encoded",
        "http://pictures.test/\r\nHost: x": "not known|percent-encoded|not fetched|cannot be read|status",
        "ftp://pictures.test/ok": "data URL, or http",
        "http://[::1/": "damaged",
    }.items():
        with pytest.raises(ImageError, match=expected):
            fetching.fetch(url, settings)
    listener.close()
    assert set(looked_up) == {"pictures.test", "inside.test"}


# --- many at once ----------------------------------------------------------------------------------------------------


def test_many_clients_get_their_own_answers(tiny_engine: Path, tiny_pipeline: Pipeline) -> None:
    """Sixty at once, with three kinds of options, batched as they come: each answer is the Pipeline's."""
    with running(tiny_engine, max_batch=5) as (server, client):
        kinds: list[dict[str, Any]] = [
            {"max_tokens": 5},
            {"max_tokens": 9, "num_beams": 3},
            {"max_tokens": 6, "temperature": 2.0, "seed": 1},
        ]
        ours: list[dict[str, Any]] = [
            {"max_new_tokens": 5},
            {"max_new_tokens": 9, "num_beams": 3},
            {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "seed": 1},
        ]

        def ask(i: int) -> str:
            body = server.chat_body(picture(i % 20), f"w{i % 7}", **kinds[i % 3])
            found: str = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            return found

        with ThreadPoolExecutor(30) as pool:
            found = list(pool.map(ask, range(60)))
        for i, text in enumerate(found):
            expected = tiny_pipeline.generate(picture(i % 20), f"Question: w{i % 7} Answer:", **ours[i % 3])
            assert text == expected.text
        metrics = client.get("/metrics").text
        assert "blip2rt_pictures_total 60.0" in metrics
        assert 'blip2rt_requests_total{route="/v1/chat/completions",status="200"} 60.0' in metrics
        batches = float(metrics.partition("blip2rt_batch_pictures_count ")[2].split()[0])
        assert batches < 60  # some of them did wait, and went together


class Blocked:
    """Holds the engines of a server until it is told to let go."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch):
        self.let_go, self.entered = threading.Event(), threading.Event()
        batcher = server.engines.current.batcher
        run = batcher._run

        def blocked(batch: Any) -> None:
            self.entered.set()
            assert self.let_go.wait(60)
            run(batch)

        monkeypatch.setattr(batcher, "_run", blocked)


def test_a_full_queue(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 and when to come again; what was accepted is answered; a time-out is said, not kept silent."""
    with running(tiny_engine, max_queue=2, max_batch=1, timeout=30.0) as (server, client):
        engine = Blocked(server, monkeypatch)
        body = server.chat_body(picture(0), max_tokens=2)
        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(client.post, "/v1/chat/completions", json=body)
            assert engine.entered.wait(30)
            accepted = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(2)]
            deadline = time.monotonic() + 30
            while len(server.engines.current.batcher._waiting) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            for more in ({}, {"stream": True}):
                refused = client.post("/v1/chat/completions", json=body | more)
                assert refused.status_code == 429
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert refused.json()["error"]["type"] == "rate_limit_error"
            engine.let_go.set()
            assert [done.result().status_code for done in (first, *accepted)] == [200] * 3
    with running(tiny_engine, max_batch=1, timeout=0.3) as (server, client):
        engine = Blocked(server, monkeypatch)
        response = client.post("/v1/chat/completions", json=server.chat_body(picture(0)))
        assert (response.status_code, "no answer within 0.3 s" in response.text) == (504, True)
        streamed = client.post("/v1/chat/completions", json=server.chat_body(picture(0), stream=True))
        assert "no answer within 0.3 s" in streamed.text
        engine.let_go.set()


def test_one_failure_is_one_failure(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Pipeline
) -> None:
    """A picture at which the engines fail does not take those beside it along."""
    with running(tiny_engine, max_batch=4) as (server, client):
        bad = server.engines.current.pipe.preprocess(picture(5))
        generative = server.engines.current.pipe.generative_engine
        encode = generative.encode

        def fragile(pixels: list[Any], first_index: None) -> Any:
            if any(np.array_equal(p, bad) for p in pixels):
                raise RuntimeError("no")
            return encode(pixels, first_index)

        monkeypatch.setattr(generative, "encode", fragile)
        engine = Blocked(server, monkeypatch)
        with ThreadPoolExecutor(8) as pool:
            bodies = [server.chat_body(picture(i), max_tokens=3) for i in range(8)]
            futures = [pool.submit(client.post, "/v1/chat/completions", json=body) for body in bodies]
            assert engine.entered.wait(30)
            engine.let_go.set()
            statuses = [future.result().status_code for future in futures]
        assert statuses == [500 if i == 5 else 200 for i in range(8)]


def test_reload_drops_nothing(tiny_engine: Path) -> None:
    """Requests go on while the engine is opened anew, again and again; a directory that is gone changes nothing."""
    import asyncio

    with running(tiny_engine) as (server, client):
        assert client.portal is not None
        body = server.chat_body(picture(0), max_tokens=4)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(30)]
            before = server.engines.current
            for _ in range(2):
                client.portal.call(server.engines.reload)
            assert server.engines.current is not before
            now = server.engines.current
            server.engines._path = tiny_engine.parent / "gone"
            client.portal.call(server.engines.reload)
            assert server.engines.current is now
            answers = {(f.result().status_code, f.result().json()["choices"][0]["message"]["content"]) for f in futures}
        assert len(answers) == 1
        deadline = time.monotonic() + 30
        while before.batcher._thread.is_alive() and time.monotonic() < deadline:
            client.portal.call(asyncio.sleep, 0.05)
        assert not before.batcher._thread.is_alive()  # the old engine was given back


def test_page(client: TestClient) -> None:
    """One page, no outside assets, and a policy that would not let any in."""
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", "/page.js", "/page.css"):
        text = client.get(path).text
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text  # a model's text is text


# --- a real process --------------------------------------------------------------------------------------------------


class Process:
    """`blip2rt serve` on a free port of the loopback interface."""

    def __init__(self, engine: Path, *arguments: str):
        command = [sys.executable, "-m", "blip2rt", "serve", str(engine), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert "serving" in line, line + self.process.stderr.read()
        self.url = line.split()[-1]
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


def test_openai_client(process: Process, tiny_pipeline: Pipeline) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    content: list[dict[str, Any]] = [
        {"type": "text", "text": "w1"},
        {"type": "image_url", "image_url": {"url": data_url(picture(2)), "detail": "low"}},
    ]
    messages = [{"role": "user", "content": content}]
    expected = tiny_pipeline.generate(picture(2), "Question: w1 Answer:", max_new_tokens=9)
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=9, logprobs=True)
    assert answer.choices[0].message.content == expected.text
    assert [row.logprob for row in answer.choices[0].logprobs.content] == expected.token_logprobs
    assert answer.usage.completion_tokens == len(expected.token_ids)
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text
    extra = client.chat.completions.create(
        model=model, messages=messages, max_tokens=9, n=2, extra_body={"num_beams": 3, "no_repeat_ngram_size": 2}
    )
    beams = tiny_pipeline.generate(
        picture(2),
        "Question: w1 Answer:",
        max_new_tokens=9,
        num_beams=3,
        num_return_sequences=2,
        no_repeat_ngram_size=2,
    )
    assert [c.message.content for c in extra.choices] == [beams.text, beams.alternatives[0].text]
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="gpt", messages=messages)
    content[1]["image_url"] = {"url": "data:image/png;base64,@"}
    with pytest.raises(openai.BadRequestError, match="not base64"):
        client.chat.completions.create(model=model, messages=messages)


def test_triton_client(process: Process, tiny_pipeline: Pipeline) -> None:
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(f"127.0.0.1:{process.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    name = httpx.get(f"{process.url}/v1/models").json()["data"][0]["id"]
    assert client.is_model_ready(name)
    assert client.get_model_metadata(name)["inputs"][0]["datatype"] == "BYTES"
    images = [picture(i) for i in range(2)]
    inputs = []
    for tensor, values in (("image", images), ("text", [b"w1", b"w2"])):
        inputs.append(http.InferInput(tensor, [2], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array(values, object))
    result = client.infer(name, inputs, parameters={"task": "answer", "max_new_tokens": 4})
    expected = tiny_pipeline.answer(images, ["w1", "w2"], max_new_tokens=4)
    assert [text.decode() for text in result.as_numpy("text")[:, 0]] == [row.text for row in expected]
    assert result.as_numpy("score")[:, 0].tolist() == [row.score for row in expected]


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return found


def test_slow_and_giant_requests(process: Process) -> None:
    """Slow heads and bodies are cut off, giant heads refused, liars refused; others are served meanwhile."""
    head = b"POST /caption HTTP/1.1\r\nHost: x\r\n"
    start = time.monotonic()
    with process.connect() as silent, process.connect() as slow_head, process.connect() as slow_body:
        slow_head.sendall(head + b"X-A: ")
        slow_body.sendall(head + b"Content-Length: 1000\r\n\r\nabc")
        assert httpx.get(f"{process.url}/v1/models", timeout=30).status_code == 200
        assert b"408" in read_all(slow_body).split(b"\r\n")[0]
        assert read_all(silent) == b""
        assert read_all(slow_head) == b""
    assert time.monotonic() - start < 30
    for request, status in (
        (head + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n", b"400"),
        (head + b"Content-Length: 99999999999\r\n\r\n", b"413"),
        (head + b"Content-Length: -5\r\n\r\n", b"400"),
        (head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"400"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /page%00.js HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
    ):
        with process.connect() as connection:
            connection.sendall(request)
            assert status in read_all(connection).split(b"\r\n")[0], request[:60]
    with process.connect() as chunked:
        chunked.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(400):
                chunked.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass  # it was cut off, as it should be
    assert httpx.get(f"{process.url}/v2/health/ready", timeout=30).status_code == 200


def metric(process: Process, name: str) -> float:
    text = httpx.get(f"{process.url}/metrics", timeout=30).text
    return float(text.partition(f"\n{name} ")[2].split()[0])


def test_clients_that_leave(process: Process) -> None:
    """Their rows end with them, streamed or not."""
    name = httpx.get(f"{process.url}/v1/models", timeout=30).json()["data"][0]["id"]
    content = [{"type": "image_url", "image_url": {"url": data_url(picture(1))}}]
    gone = metric(process, "blip2rt_cancelled_total")
    for stream in (False, True):
        options = {"max_tokens": 80, "min_new_tokens": 80, "num_beams": 1 if stream else 9, "stream": stream}
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": content}], **options}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connections = []
        for _ in range(8):
            connection = process.connect()
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            connections.append(connection)
        time.sleep(0.2)
        for connection in connections:
            connection.close()
    deadline = time.monotonic() + 50  # a request's own time is 60 s
    while metric(process, "blip2rt_queue_pictures") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert metric(process, "blip2rt_cancelled_total") > gone
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 2}).encode()
    assert httpx.post(
        f"{process.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}, timeout=50
    ).is_success


def test_sigterm_loses_nothing_and_sighup_reloads(tiny_engine: Path, tiny_pipeline: Pipeline) -> None:
    """Under load: what was accepted is answered, and the process ends with status 0; the port can be had again."""
    process = Process(tiny_engine, "--max-batch", "2")
    try:
        files = [("image", ("a.png", picture(1)))]
        expected = tiny_pipeline.caption(picture(1), "w1", max_new_tokens=20).text
        data = {"prompt": "w1", "options": '{"max_new_tokens": 20}'}

        def ask(_: int) -> str:
            try:
                response = httpx.post(f"{process.url}/caption", files=files, data=data, timeout=120)
            except httpx.ConnectError:
                return "refused"  # it came when the server had stopped listening
            assert response.status_code == 200, response.text
            found: str = response.json()["results"][0]["text"]
            return found

        with ThreadPoolExecutor(10) as pool:
            futures = [pool.submit(ask, i) for i in range(4)]
            process.process.send_signal(signal.SIGHUP)
            assert {future.result() for future in futures} == {expected}
            deadline = time.monotonic() + 60
            while metric(process, 'blip2rt_reloads_total{outcome="ok"}') < 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            futures = [pool.submit(ask, i) for i in range(10)]
            accepted = 0.0
            while accepted < 6 and not any(future.done() for future in futures):
                time.sleep(0.005)
                accepted = metric(process, "blip2rt_queue_pictures")
            process.process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in futures]
            assert set(answers) <= {expected, "refused"}
            assert answers.count(expected) >= max(1, accepted)
        assert process.process.wait(60) == 0, process.log
    finally:
        process.process.kill()
        process.process.wait()


def test_a_port_in_use(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tiny_engine), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err
    assert main(["serve", str(tiny_engine), "--port", "99999"]) == 2
    assert main(["serve", str(tiny_engine), "--max-queue", "0"]) == 2
    assert main(["serve", str(tiny_engine), "--api-keys", os.devnull, "--port", "-1"]) == 2

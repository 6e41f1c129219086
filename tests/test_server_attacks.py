"""Wrong requests and attacks: each is refused with a sentence, and none hurts."""

import base64
import json
import socket
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
from serving import Server, picture, running
from starlette.testclient import TestClient

from blip2rt import ImageError, InputError
from blip2rt.server import fetching
from blip2rt.server.settings import ServerSettings


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

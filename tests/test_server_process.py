"""`blip2rt serve` as a process: real clients, slow senders, signals."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
import httpx
from serving import Process, data_url, picture

from blip2rt import Pipeline
from blip2rt.cli import main


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


def test_answers_leave_at_once(process: Process) -> None:
    """Nagle's algorithm would hold the body of every answer back for 40 ms, until the head is acknowledged."""
    with httpx.Client(base_url=process.url) as client:
        seconds = [client.get("/v2/health/live").elapsed.total_seconds() for _ in range(20)]
    assert min(seconds[1:]) < 0.02


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

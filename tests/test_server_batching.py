"""Many requests at once: nobody gets another's answer, nor more than his share."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")

from serving import Server, picture, running

from blip2rt import Pipeline


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

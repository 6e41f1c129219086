"""The server as a Ray Serve application: two replicas on a cluster of two machines answer as the Pipeline does."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blip2rt import EngineError, InputError, Pipeline

pytest.importorskip("ray.serve", reason="pip install 'blip2rt[ray,serve]'")
import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster
from serving import data_url, picture

from blip2rt.server.on_ray import application

KEY = "a-key-of-ours"


@pytest.fixture(scope="module")
def url(tiny_engine: Path) -> Iterator[str]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application({"engine": str(tiny_engine), "replicas": "2", "api_keys": KEY}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def test_replicas_answer_as_the_pipeline(url: str, tiny_engine: Path) -> None:
    pipe = Pipeline(tiny_engine)
    pictures = [picture(seed) for seed in range(24)]
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:

        def ask(data: bytes) -> str:
            answer = client.post("/caption", files={"image": data})
            assert answer.status_code == 200, answer.text
            return str(answer.json()["results"][0]["text"])

        with ThreadPoolExecutor(8) as pool:
            said = list(pool.map(ask, pictures))
        assert said == [pipe.caption(data).text for data in pictures]
        replicas = serve.status().applications["default"].deployments["blip2rt"].replica_states
        assert list(replicas.values()) == [2], replicas
        refused = client.post("/caption", files={"image": b"no picture"})
        assert (refused.status_code, next(iter(refused.json()["error"]))) == (400, "message"), refused.text
        model = client.get("/v1/models").json()["data"][0]["id"]
        content = [{"type": "image_url", "image_url": {"url": data_url(pictures[0])}}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 5}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) > 2
    assert httpx.post(f"{url}/caption", files={"image": pictures[0]}).status_code == 401


def test_arguments(tiny_engine: Path, tmp_path: Path) -> None:
    for given, message in (
        ({}, "engine=DIR is missing"),
        ({"engine": str(tiny_engine), "max_batches": "3"}, "max_batches: there is no such argument, but engine"),
        ({"engine": str(tiny_engine), "max_batch": "many"}, "max_batch='many' is no whole number"),
        ({"engine": str(tiny_engine), "max_batch": "0"}, "max_batch must be above 0"),
        ({"engine": str(tiny_engine), "replicas": "0"}, "replicas=0 must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            application(given)
    with pytest.raises(EngineError):
        application({"engine": str(tmp_path / "nothing")})

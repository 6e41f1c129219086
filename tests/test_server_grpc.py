"""The Open Inference Protocol over gRPC, by tritonclient's client: answers, errors, keys, limits, leaving, stopping."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="pip install 'blip2rt[grpc]'")
pytest.importorskip("grpc", reason="pip install 'blip2rt[grpc]'")
import grpc
import httpx
from serving import Process, picture
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from blip2rt import Pipeline
from blip2rt.cli import main

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def grpc_process(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n")
    limits = ("--max-body-mb", "0.5", "--max-pictures", "3", "--max-batch", "2", "--max-queue", "8")
    process = Process(tiny_engine, "--grpc-port", "0", "--api-keys", str(keys), *limits)
    yield process
    process.process.kill()
    process.process.wait()


@pytest.fixture
def client(grpc_process: Process) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(grpc_process.grpc_address) as client:
        yield client


@pytest.fixture
def headers() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def name(grpc_process: Process) -> str:
    found = httpx.get(f"{grpc_process.url}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    return str(found.json()["data"][0]["id"])


def inputs(**values: list[bytes]) -> list[InferInput]:
    found = []
    for tensor, rows in values.items():
        found.append(InferInput(tensor, [len(rows)], "BYTES"))
        found[-1].set_data_from_numpy(np.array(rows, object))
    return found


def test_the_client_gets_what_the_pipeline_gives(
    client: InferenceServerClient, headers: dict[str, str], name: str, tiny_pipeline: Pipeline
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name, headers=headers)
    assert client.get_server_metadata(headers=headers).name == "blip2rt"
    metadata = client.get_model_metadata(name, headers=headers)
    assert [(row.name, row.datatype, list(row.shape)) for row in metadata.inputs] == [
        ("image", "BYTES", [-1]),
        ("text", "BYTES", [-1]),
    ]
    images = [picture(i) for i in range(2)]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "length_penalty": -0.5}
    expected = tiny_pipeline.answer(images, ["w1", "w2"], **options)
    result = client.infer(
        name,
        inputs(image=images, text=[b"w1", b"w2"]),
        parameters={"task": "answer", **options},
        headers=headers,
        request_id="7",
    )
    rows = [[row, *row.alternatives] for row in expected]
    assert result.as_numpy("text").tolist() == [[other.text.encode() for other in row] for row in rows]
    assert result.as_numpy("score").tolist() == [[other.score for other in row] for row in rows]
    assert result.get_response().id == "7"
    captions = client.infer(
        name,
        inputs(image=images),
        outputs=[InferRequestedOutput("text")],
        parameters={"max_new_tokens": 4},
        headers=headers,
    )
    expected = tiny_pipeline.caption(images, max_new_tokens=4)
    assert captions.as_numpy("text")[:, 0].tolist() == [row.text.encode() for row in expected]
    assert captions.as_numpy("score") is None


def test_typed_contents(grpc_process: Process, headers: dict[str, str], name: str, tiny_pipeline: Pipeline) -> None:
    """Values that stand in their tensor instead of behind all of them; the answer has the same form."""
    request = service_pb2.ModelInferRequest(model_name=name)
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(picture(3))
    request.parameters["max_new_tokens"].int64_param = 4
    with grpc.insecure_channel(grpc_process.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request, metadata=tuple(headers.items()))
        [expected] = tiny_pipeline.caption([picture(3)], max_new_tokens=4)
        assert answer.outputs[0].contents.bytes_contents == [expected.text.encode()]
        assert answer.outputs[1].contents.fp64_contents == [expected.score]
        request.raw_input_contents.append(b"")
        with pytest.raises(grpc.RpcError, match="both contents and raw_input_contents"):
            stub.ModelInfer(request, metadata=tuple(headers.items()))
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), metadata=tuple(headers.items()))


def test_wrong_requests(client: InferenceServerClient, headers: dict[str, str], name: str) -> None:
    def refused(status: str, message: str, *given: InferInput, model: str = name, **parameters: Any) -> None:
        with pytest.raises(InferenceServerException, match=message) as error:
            client.infer(model, list(given), parameters=parameters or None, headers=headers)
        assert error.value.status() == f"StatusCode.{status}"

    image, text = inputs(image=[picture(0)], text=[b"w1"])
    refused("NOT_FOUND", "there is no model 'gpt'", image, model="gpt")
    refused("INVALID_ARGUMENT", "no input `image`", text)
    refused("INVALID_ARGUMENT", "once each", image, image)
    refused("INVALID_ARGUMENT", "needs an input `text`", image, task="answer")
    refused("INVALID_ARGUMENT", "task 'sing' is none of", image, task="sing")
    refused("INVALID_ARGUMENT", "num_beams", image, num_beams=-1)
    refused("INVALID_ARGUMENT", "more than a request may have: 3", *inputs(image=[picture(i) for i in range(4)]))
    refused("INVALID_ARGUMENT", "not UTF-8", image, *inputs(text=[b"\xff"]), task="answer")
    refused("INVALID_ARGUMENT", "picture|image", *inputs(image=[b"nothing that is one"]))
    refused("RESOURCE_EXHAUSTED", "larger than max", *inputs(image=[b"x" * 600_000]))
    short = InferInput("image", [1], "BYTES")
    short._raw_content = b"\x09\x00\x00\x00abc"
    refused("INVALID_ARGUMENT", "cut short", short)


def test_keys(client: InferenceServerClient, name: str, grpc_process: Process, headers: dict[str, str]) -> None:
    """Health is open to all, as over HTTP."""
    assert client.is_server_live()
    for wrong in ({}, {"authorization": KEY}, {"authorization": "Bearer another-key"}):
        with pytest.raises(InferenceServerException, match="valid API key"):
            client.infer(name, inputs(image=[picture(0)]), headers=wrong)
        with pytest.raises(InferenceServerException, match="valid API key"):
            client.get_server_metadata(headers=wrong)
    metrics = httpx.get(f"{grpc_process.url}/metrics", headers=headers).text
    assert 'route="/inference.GRPCInferenceService/ModelInfer",status="UNAUTHENTICATED"' in metrics


def test_a_client_that_leaves_frees_its_place(
    client: InferenceServerClient, headers: dict[str, str], name: str, grpc_process: Process
) -> None:
    def cancelled() -> float:
        lines = httpx.get(f"{grpc_process.url}/metrics", headers=headers).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("blip2rt_cancelled_total"))

    before = cancelled()
    with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
        client.infer(
            name,
            inputs(image=[picture(i) for i in range(3)]),
            parameters={"max_new_tokens": 50, "min_new_tokens": 50, "num_beams": 16},
            headers=headers,
            client_timeout=0.02,
        )
    deadline = time.monotonic() + 30
    while cancelled() == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_answers_what_was_accepted(tiny_engine: Path, tiny_pipeline: Pipeline) -> None:
    process = Process(tiny_engine, "--grpc-port", "0", "--max-batch", "1")
    name = httpx.get(f"{process.url}/v1/models").json()["data"][0]["id"]
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "num_beams": 8}
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        with InferenceServerClient(process.grpc_address) as client:
            found[i] = client.infer(name, inputs(image=[picture(i)]), parameters=options).as_numpy("text")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while "blip2rt_queue_pictures 0.0" in httpx.get(f"{process.url}/metrics").text:  # until they wait
        assert time.monotonic() < deadline
    time.sleep(0.3)
    process.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert process.process.wait(60) == 0
    expected = tiny_pipeline.caption([picture(i) for i in range(6)], **options)
    assert [found[i][0, 0].decode() for i in range(6)] == [row.text for row in expected]


def test_a_port_in_use(tiny_engine: Path, grpc_process: Process, capsys: pytest.CaptureFixture[str]) -> None:
    port = grpc_process.grpc_address.rpartition(":")[2]
    assert main(["serve", str(tiny_engine), "--port", "0", "--grpc-port", port]) == 2
    assert f"127.0.0.1:{port} cannot be had for gRPC: choose another --grpc-port" in capsys.readouterr().err

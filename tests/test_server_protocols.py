"""The server's protocols: everybody gets the Pipeline's answer."""

import base64
import json
import struct
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
from serving import TINY, Server, picture
from starlette.testclient import TestClient

from blip2rt import Pipeline


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

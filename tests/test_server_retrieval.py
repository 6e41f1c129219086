"""What the server's retrieval engine and gallery answer is what the Pipeline and the Gallery answer."""

import base64
import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
from starlette.testclient import TestClient

from blip2rt import EngineError, Gallery, InputError, Pipeline
from blip2rt.cli import main
from blip2rt.server.app import create_app
from blip2rt.server.engines import Engines
from blip2rt.server.metrics import Metrics
from blip2rt.server.settings import ServerSettings

TEXTS = ["w1 w2", "w3", "w4 w5 w1"]


def picture(seed: int, side: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@contextmanager
def running(engine: Path, **settings: Any) -> Iterator[TestClient]:
    checked, metrics = ServerSettings(**settings), Metrics()
    app = create_app(Engines(engine, None, None, checked, metrics), checked, metrics, 2)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def both(tiny_engine: Path, tiny_retrieval_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generative and a retrieval engine."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "writes").symlink_to(tiny_engine)
    (folder / "compares").symlink_to(tiny_retrieval_engine)
    return folder


@pytest.fixture(scope="module")
def pipe(both: Path) -> Pipeline:
    return Pipeline(both)


@pytest.fixture(scope="module")
def gallery(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of seven pictures under `photos`, of one that lies outside, and of one that is called by a number."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "photos" / "more").mkdir(parents=True)
    names = [*(f"{i}.png" for i in range(6)), "more/6.png"]
    for i, name in enumerate(names):
        (folder / "photos" / name).write_bytes(picture(i, 600 if i == 0 else 30))
    (folder / "secret.png").write_bytes(picture(90))
    (folder / "photos" / "link.png").symlink_to(folder / "secret.png")
    (folder / "photos" / "text.png").write_text("no picture")
    ids: list[Any] = [*names, "../secret.png", "link.png", "text.png", "gone.png", 11]
    with Gallery(folder / "gallery", pipe) as made:
        made.add([picture(i, 600 if i == 0 else 30) for i in range(len(ids))], ids)
    return folder


@pytest.fixture(scope="module")
def client(both: Path, gallery: Path) -> Iterator[TestClient]:
    folders = {"gallery": gallery / "gallery", "pictures": gallery / "photos"}
    with running(both, **folders, max_pictures=3, max_texts=4, max_pairs=6) as client:
        yield client


def test_match_is_the_pipelines(client: TestClient, pipe: Pipeline) -> None:
    files = [("image", (f"{i}.png", picture(i))) for i in range(2)]
    response = client.post("/match", files=files, data={"text": TEXTS})
    expected = pipe.match([picture(i) for i in range(2)], TEXTS)
    rows = response.json()["results"]
    assert [(row["image"], row["text"]) for row in rows] == [(f"{i}.png", text) for i in range(2) for text in TEXTS]
    for key in ("itc", "itm", "itm_probability"):
        assert [row[key] for row in rows] == getattr(expected, key).ravel().tolist()
    assert [row["score"] for row in rows] == [row["itm"] + row["itc"] for row in rows]


def embeddings(client: TestClient, given: Any, **more: Any) -> Any:
    model = client.get("/v1/models").json()["data"][1]["id"]
    return client.post("/v1/embeddings", json={"model": model, "input": given, **more})


def test_embeddings_are_the_pipelines(client: TestClient, pipe: Pipeline) -> None:
    """Texts and pictures mixed, in their order; a picture's vectors pooled, or one behind the other."""
    given = [TEXTS[0], data_url(picture(3)), TEXTS[1], data_url(picture(4))]
    texts, images = pipe.embed_texts(TEXTS[:2]), pipe.embed_images([picture(3), picture(4)])
    answer = embeddings(client, given, pooling="none").json()
    found = [np.array(row["embedding"], np.float32) for row in answer["data"]]
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]
    for place, expected in zip(range(4), (texts[0], images[0].ravel(), texts[1], images[1].ravel()), strict=True):
        np.testing.assert_array_equal(found[place], expected)
    itc = pipe.match([picture(3)], TEXTS[:1]).itc[0, 0]
    np.testing.assert_allclose((found[1].reshape(images[0].shape) @ found[0]).max(), itc, rtol=1e-5)
    ids = pipe.retrieval_engine.token_ids(TEXTS[:2])
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids)) + 2 * images.shape[1]

    pooled = [np.array(row["embedding"]) for row in embeddings(client, given).json()["data"]]
    assert {vector.shape for vector in pooled} == {texts[0].shape}
    sums = images[0].astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(pooled[1], sums / np.sqrt((sums**2).sum()), atol=1e-6)
    alone = embeddings(client, TEXTS[0]).json()["data"]
    assert [row["embedding"] for row in alone] == [texts[0].tolist()]  # as beside others


def test_search_is_the_gallerys(client: TestClient, pipe: Pipeline, gallery: Path) -> None:
    """The ranking, and pictures: small copies of what lies under the operator's folder, and of nothing else."""
    opened = Gallery(gallery / "gallery", pipe)
    assert client.get("/gallery").json() == {"pictures": 12, "shown": True}
    for text in TEXTS:
        for rerank in (None, 0, 4):
            query: dict[str, Any] = {"text": text, "k": 12} | ({} if rerank is None else {"rerank": rerank})
            rows = client.get("/search", params=query).json()["results"]
            expected = opened.search(text, 12, rerank=6 if rerank is None else rerank)
            assert [row["id"] for row in rows] == list(expected.ids)
            assert [row["score"] for row in rows] == [float(score) for score in expected.scores]
    shown = {row["id"]: client.get(row["picture"]) for row in rows}
    good = {name for name, response in shown.items() if response.status_code == 200}
    assert good == {*(f"{i}.png" for i in range(6)), "more/6.png"}
    assert {response.status_code for response in shown.values()} == {200, 404}
    with Image.open(io.BytesIO(shown["0.png"].content)) as copy:
        assert (copy.format, max(copy.size)) == ("JPEG", 512)
    with Image.open(io.BytesIO(shown["1.png"].content)) as copy:
        assert copy.size == (37, 30)
    for path in ("/gallery/99", "/gallery/-1", "/gallery/../secret.png", "/gallery/%2e%2e%2fsecret.png", "/gallery/x"):
        assert client.get(path).status_code in (400, 404)
    assert "secret" not in client.get("/gallery/7").text


def test_a_replaced_picture_has_another_row(both: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """Another process writes to the gallery while it is served."""
    (tmp_path / "a.png").write_bytes(picture(1))
    writer = Gallery(tmp_path / "gallery", pipe, features=False)
    writer.add([picture(1)], ["a.png"])
    with running(both, gallery=tmp_path / "gallery", pictures=tmp_path) as client:
        first = client.get("/search", params={"text": "w1"}).json()["results"]
        assert [row["picture"] for row in first] == ["/gallery/0"]
        assert client.get("/search", params={"text": "w1", "rerank": 2}).status_code == 400  # keeps no features
        writer.add([picture(2), picture(3)], ["a.png", "b.png"])
        second = client.get("/search", params={"text": "w1"}).json()["results"]
        assert {row["picture"] for row in second} == {"/gallery/1", "/gallery/2"}
        assert client.get("/gallery/0").status_code == 404
    with running(both, gallery=tmp_path / "gallery") as client:
        assert client.get("/search", params={"text": "w1"}).json()["results"][0]["picture"] is None
        assert client.get("/gallery/1").status_code == 404


def test_wrong_requests(client: TestClient) -> None:
    image = ("image", ("a.png", picture(0)))
    matches: list[tuple[list[Any], dict[str, Any], str]] = [
        ([image], {}, "text"),
        ([], {"text": "w1"}, "image"),
        ([image], {"text": ["w1", ""]}, "empty"),
        ([image], {"text": "w1 " * 600}, "positions"),
        ([image], {"text": "w" * 20_000}, "longer than this server reads"),
        ([image], {"text": ["w1"] * 5}, "5 texts are more"),
        ([image] * 2, {"text": ["w1"] * 4}, "8 pairs, more than a request may have: 6"),
        ([image] * 4, {"text": ["w1"]}, "4 pictures are more"),
        ([image, ("image", ("b.png", b"no"))], {"text": "w1"}, "the picture is none of"),
    ]
    for files, data, expected in matches:
        response = client.post("/match", files=files, data=data)
        assert (response.status_code, expected in response.text) == (400, True), response.text
    inputs: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "input is empty"),
        ("", {}, "empty"),
        ([1, 2], {}, "token ids"),
        ([[1], [2]], {}, "token ids"),
        ({"text": "w1"}, {}, "input"),
        ("w1", {"dimensions": 2}, "dimensions=2"),
        ("w1", {"encoding_format": "int8"}, "encoding_format"),
        ("w1", {"pooling": "max"}, "pooling"),
        ("w1", {"truncate": True}, "truncate"),
        ("data:image/png;base64,@", {}, "not base64"),
        ([data_url(b"x")], {}, "the picture is none of"),
        ([data_url(picture(0))] * 4, {}, "4 pictures are more"),
        (["w1"] * 5, {}, "5 texts are more"),
    ]
    for given, more, expected in inputs:
        response = embeddings(client, given, **more)
        assert (response.status_code, expected in response.text) == (400, True), response.text
    surrogate = json.dumps({"model": client.get("/v1/models").json()["data"][1]["id"], "input": "\ud800"})
    response = client.post("/v1/embeddings", content=surrogate, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert client.post("/v1/embeddings", json={"model": "ada", "input": "w1"}).status_code == 404
    queries: list[tuple[dict[str, Any], str]] = [
        ({}, "text"), ({"text": ""}, "text"), ({"text": "  "}, "empty"), ({"text": "w1 " * 600}, "positions"),
        ({"text": "w1", "k": 0}, "k"), ({"text": "w1", "k": 101}, "k"), ({"text": "w1", "rerank": -1}, "rerank"),
        ({"text": "w1", "rerank": 7}, "more than this server allows: 6"),
    ]  # fmt: skip
    for query, expected in queries:
        response = client.get("/search", params=query)
        assert (response.status_code, expected in response.text) == (400, True), response.text


def test_engines_that_lack_a_head(tiny_engine: Path, tiny_retrieval_engine: Path, tmp_path: Path) -> None:
    """A server of one kind of engine says what it cannot do, and does the rest; a wrong gallery is refused at once."""
    with running(tiny_retrieval_engine) as client:
        [model] = client.get("/v1/models").json()["data"]
        assert model["kind"] == "retrieval"
        assert client.get(f"/v1/models/{model['id']}").json() == model
        found = client.post("/v1/embeddings", json={"model": model["id"], "input": "w1"})
        assert len(found.json()["data"]) == 1
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture(0))}}]}
        chat = client.post("/v1/chat/completions", json={"model": model["id"], "messages": [message]})
        caption = client.post("/caption", files=[("image", picture(0))])
        infer = client.post(f"/v2/models/{model['id']}/infer", json={})
        assert [r.status_code for r in (chat, caption, infer)] == [400] * 3
        assert all("writes none" in r.text for r in (chat, caption, infer))
        assert client.get("/search", params={"text": "w1"}).status_code == 404
        assert "--gallery DIR" in client.get("/gallery").json()["error"]["message"]
    with running(tiny_engine) as client:
        match = client.post("/match", files=[("image", picture(0))], data={"text": "w1"})
        assert (match.status_code, "ITC and ITM" in match.text) == (400, True)
        assert client.post("/v1/embeddings", json={"model": "x", "input": "w1"}).status_code == 400
    with pytest.raises(EngineError, match="is empty"), running(tiny_retrieval_engine, gallery=tmp_path / "none"):
        pass
    with pytest.raises(EngineError), running(tiny_engine, gallery=tmp_path / "none"):
        pass
    with pytest.raises(InputError, match="must be the folder of the pictures"):
        ServerSettings(pictures=tmp_path)
    assert main(["serve", str(tiny_retrieval_engine), "--port", "0", "--pictures", str(tmp_path)]) == 2


def test_openai_client(both: Path, pipe: Pipeline, gallery: Path) -> None:
    """The real client, which asks for base64, against a real process."""
    openai = pytest.importorskip("openai")
    command = [sys.executable, "-m", "blip2rt", "serve", str(both), "--port", "0"]
    command += ["--gallery", str(gallery / "gallery"), "--pictures", str(gallery / "photos")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "serving" in line, line + process.stderr.read()
            url = line.split()[-1]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
            model = next(row.id for row in client.models.list().data if row.kind == "retrieval")
            given = [TEXTS[2], data_url(picture(5))]
            texts, images = pipe.embed_texts(TEXTS[2]), pipe.embed_images(picture(5))
            for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
                answer = client.embeddings.create(model=model, input=given, extra_body={"pooling": "none"}, **encoding)
                vectors = [row.embedding for row in answer.data]
                if encoding.get("encoding_format") == "base64":  # asked for by name, it is handed on as it comes
                    vectors = [np.frombuffer(base64.b64decode(vector), np.float32) for vector in vectors]
                np.testing.assert_array_equal(np.array(vectors[0], np.float32), texts[0])
                np.testing.assert_array_equal(np.array(vectors[1], np.float32), images.ravel())
            with pytest.raises(openai.NotFoundError, match="there is no model"):
                client.embeddings.create(model="text-embedding-3-small", input="w1")
            with urllib.request.urlopen(f"{url}/search?text=w1&k=2", timeout=60) as response:
                rows = json.load(response)["results"]
            assert [row["id"] for row in rows] == list(Gallery(gallery / "gallery", pipe).search("w1", 2).ids)
        finally:
            process.kill()

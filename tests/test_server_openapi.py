"""Requests drawn from the server's own OpenAPI document, right ones and wrong ones: none makes it fail."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image

pytest.importorskip("schemathesis")
pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
import schemathesis
from schemathesis.generation import GenerationMode

from blip2rt import Gallery
from blip2rt.server.app import create_app
from blip2rt.server.engines import Engines
from blip2rt.server.metrics import Metrics
from blip2rt.server.settings import ServerSettings

EXAMPLES = int(os.environ.get("BLIP2RT_FUZZ", "6"))  # for each operation, of right and of wrong requests


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def engines(tiny_engine: Path, tiny_retrieval_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Both kinds of engine, and a gallery whose pictures are shown."""
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "writes").symlink_to(tiny_engine)
    (folder / "compares").symlink_to(tiny_retrieval_engine)
    (folder / "photos").mkdir()
    for i in range(3):
        (folder / "photos" / f"{i}.png").write_bytes(picture(i))
    with Gallery(folder / "gallery", tiny_retrieval_engine) as gallery:
        gallery.add([picture(i) for i in range(3)], [f"{i}.png" for i in range(3)])
    limits = ServerSettings(
        max_new_tokens=4, max_beams=2, max_texts=4, gallery=folder / "gallery", pictures=folder / "photos"
    )
    return Engines(folder, None, None, limits, Metrics())


@pytest.mark.slow
def test_no_request_makes_the_server_fail(engines: Engines) -> None:
    """An error of ours would come as 5xx or as an exception; 503 and 504 are said on purpose and do not occur here."""
    limits = engines._settings
    app = create_app(engines, limits, engines._metrics, 2)
    schemathesis.openapi.format("binary", st.sampled_from([picture(0), picture(1), b"", b"no picture"]))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    model = engines.current.name
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # Err: an operation that the document gets wrong
        for mode in GenerationMode:

            @settings(
                max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = model
                if "model" in (case.path_parameters or {}):
                    case.path_parameters["model"] = model
                response = case.call()
                statuses.setdefault(case.operation.label, set()).add(response.status_code)
                assert response.status_code < 500, (case.operation.label, response.text)

            try:
                check()
            except (schemathesis.errors.SerializationNotPossible, Unsatisfiable):
                assert mode is GenerationMode.NEGATIVE  # nothing can be wrong with a request that has no parts
    assert len(statuses) >= 15
    assert {200} < set().union(*statuses.values())
    assert {400} < set().union(*statuses.values())

"""The Open Inference Protocol 2 over HTTP (github.com/kserve/open-inference-protocol), with Triton's binary data.

Inputs: `image`, BYTES [B] or [B, 1], encoded pictures (base64 where they stand in JSON); `text`, BYTES of the same
shape, the prompt or question; it may be left out for captions. Outputs: `text` BYTES [B, n], `score` FP64 [B, n].
Parameters: `task` (caption, answer, generate) and the generation options.
"""

import json
import struct
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .. import __version__
from ..errors import InputError
from ..tokenizer import CAPTION_PROMPT
from .answering import DEFAULTS, Answering, read_prompt
from .engines import Engine, Engines
from .errors import HttpError
from .pictures import decode_base64

HEADER_LENGTH = "inference-header-content-length"
INPUTS = ({"name": "image", "datatype": "BYTES", "shape": [-1]}, {"name": "text", "datatype": "BYTES", "shape": [-1]})
OUTPUTS = (
    {"name": "text", "datatype": "BYTES", "shape": [-1, -1]},
    {"name": "score", "datatype": "FP64", "shape": [-1, -1]},
)
OWN_PARAMETERS = ("task", "binary_data_output", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout")


def router(engines: Engines, answering: Answering) -> APIRouter:
    """The routes under /v2."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @routes.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "blip2rt", "version": __version__, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @routes.get("/health/ready", responses={503: {"description": "not ready"}})
    async def ready() -> Response:
        """Requests are taken."""
        return JSONResponse({"ready": engines.is_ready}, 200 if engines.is_ready else 503)

    @routes.get("/models/{model}")
    @routes.get("/models/{model}/versions/{version}")
    async def metadata(model: str, version: str = "1") -> dict[str, Any]:
        """Inputs and outputs."""
        engine = _named(engines.current, model, version)
        tensors = {"inputs": list(INPUTS), "outputs": list(OUTPUTS)}
        return {"name": engine.name, "versions": ["1"], "platform": "blip2rt_onnx", **tensors}

    @routes.get("/models/{model}/ready")
    @routes.get("/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str = "1") -> dict[str, Any]:
        """The model answers."""
        return {"name": _named(engines.current, model, version).name, "ready": True}

    @routes.post("/models/{model}/infer", openapi_extra=_BODY)
    @routes.post("/models/{model}/versions/{version}/infer", openapi_extra=_BODY)
    async def infer(request: Request, model: str, version: str = "1") -> Response:
        """Caption, answer or follow instructions."""
        with engines.use() as engine:
            _named(engine, model, version)
            _ = engine.generative  # an error where there is none
            content, tail = _split(await request.body(), request.headers.get(HEADER_LENGTH))
            inputs = _inputs(content, tail)
            parameters = _object(content.get("parameters", {}), "parameters")
            task = parameters.get("task", "caption")
            if task not in DEFAULTS:
                raise InputError(f"task {task!r:.60} is none of {', '.join(DEFAULTS)}")
            given = {name: value for name, value in parameters.items() if name not in OWN_PARAMETERS}
            options = answering.options(str(task), given)
            texts = _texts(str(task), inputs.get("text"), len(inputs["image"]))
            prompts = [read_prompt(engine, str(task), text, options) for text in texts]
            jobs = await answering.jobs(engine, inputs["image"], prompts, options)
            results = await answering.results(request, engine, jobs)
        rows = [[result, *result.alternatives] for result in results]
        width = min(len(row) for row in rows)
        found_texts = [row.text for found in rows for row in found[:width]]
        scores = [row.score for found in rows for row in found[:width]]
        values: dict[str, tuple[str, list[Any]]] = {"text": ("BYTES", found_texts), "score": ("FP64", scores)}
        return _response(engine, content, values, [len(rows), width], bool(parameters.get("binary_data_output")))

    return routes


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object", "required": ["inputs"]}}},
    }
}


def _named(engine: Engine, name: str, version: str) -> Engine:
    if name != engine.name or version != "1":
        raise HttpError(404, f"there is no model {name[:100]!r}, version {version[:20]!r}, only {engine.name!r}, '1'")
    return engine


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} must be an object, not {type(value).__name__}")
    return value


def _split(body: bytes, length: str | None) -> tuple[dict[str, Any], bytes]:
    """The JSON part of a body, and the binary data behind it."""
    end = len(body)
    if length is not None:
        if not (length.isascii() and length.isdigit() and int(length) <= len(body)):
            raise InputError(
                f"Inference-Header-Content-Length {length[:20]!r} does not fit a body of {len(body)} bytes"
            )
        end = int(length)
    try:
        return _object(json.loads(body[:end]), "the request"), body[end:]
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the request is not JSON ({type(error).__name__})") from None


def _inputs(content: dict[str, Any], tail: bytes) -> dict[str, list[bytes]]:
    """Values of the inputs by name, `image` among them."""
    given = content.get("inputs")
    if not isinstance(given, list) or not 1 <= len(given) <= len(INPUTS):
        raise InputError("inputs must be a list with `image` and perhaps `text`")
    found: dict[str, list[bytes]] = {}
    for tensor in given:
        tensor = _object(tensor, "an input")
        name, shape = tensor.get("name"), tensor.get("shape")
        if name not in ("image", "text") or name in found or tensor.get("datatype") != "BYTES":
            raise InputError(f"inputs are `image` and `text`, once each, of datatype BYTES, not {name!r:.60}")
        size = _object(tensor.get("parameters", {}), "parameters").get("binary_data_size")
        if size is None:
            values = _json_values(tensor.get("data"), str(name))
        else:
            if type(size) is not int or not 0 <= size <= len(tail):
                raise InputError(f"binary_data_size of `{name}` is {size!r:.30}, and {len(tail)} bytes are left")
            values, tail = _binary_values(tail[:size], str(name)), tail[size:]
        if shape not in ([len(values)], [len(values), 1]):
            raise InputError(f"`{name}` has {len(values)} values and the shape {shape!r:.60}: one value a picture")
        found[str(name)] = values
    if tail:
        raise InputError(f"{len(tail)} bytes of binary data belong to no input")
    if not found.get("image"):
        raise InputError("there is no input `image`, or it is empty")
    return found


def _json_values(data: Any, name: str) -> list[bytes]:
    if not isinstance(data, list):
        raise InputError(f"data of `{name}` must be a list of strings")
    values = [inner for value in data for inner in (value if isinstance(value, list) else [value])]
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"data of `{name}` must be a list of strings")
    try:
        return [decode_base64(value) if name == "image" else value.encode() for value in values]
    except UnicodeEncodeError:
        raise InputError(f"data of `{name}` is not valid text") from None


def _binary_values(data: bytes, name: str) -> list[bytes]:
    """Each value behind its length, 4 bytes, little-endian."""
    values, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise InputError(f"the binary data of `{name}` is cut short")
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            raise InputError(f"the binary data of `{name}` is cut short")
        values.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return values


def _texts(task: str, texts: list[bytes] | None, count: int) -> list[str]:
    if texts is None:
        if task != "caption":
            raise InputError(f"the task {task} needs an input `text`")
        return [CAPTION_PROMPT] * count
    if len(texts) != count:
        raise InputError(f"{len(texts)} texts for {count} pictures: give one for every picture")
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError:
        raise InputError("`text` is not UTF-8") from None


def _response(
    engine: Engine, content: dict[str, Any], values: dict[str, tuple[str, list[Any]]], shape: list[int], binary: bool
) -> Response:
    """Outputs as they were asked for: which, and in which form."""
    wanted = content.get("outputs") or [{"name": name} for name in values]
    if not isinstance(wanted, list):
        raise InputError("outputs must be a list")
    outputs, tail = [], b""
    for output in wanted:
        name = _object(output, "an output").get("name")
        if name not in values:
            raise InputError(f"outputs are {', '.join(values)}, not {name!r:.60}")
        datatype, data = values[str(name)]
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if _object(output.get("parameters", {}), "parameters").get("binary_data", binary):
            part = b"".join(_binary(value) for value in data)
            tensor["parameters"] = {"binary_data_size": len(part)}
            tail += part
        else:
            tensor["data"] = data
        outputs.append(tensor)
    answer = {"model_name": engine.name, "model_version": "1", "outputs": outputs}
    if isinstance(content.get("id"), str):
        answer["id"] = content["id"]
    if not tail:
        return JSONResponse(answer)
    head = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(head + tail, media_type="application/octet-stream", headers=headers)


def _binary(value: Any) -> bytes:
    if isinstance(value, float):
        return struct.pack("<d", value)
    data = str(value).encode("utf-8", "replace")
    return struct.pack("<I", len(data)) + data

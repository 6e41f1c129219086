"""The Open Inference Protocol 2 over HTTP, with Triton's binary data. Pictures that stand in JSON are base64."""

import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .. import __version__
from ..errors import InputError
from .answering import Answering
from .engines import Engine, Engines
from .inference import (
    DATATYPES,
    INPUTS,
    OUTPUTS,
    PLATFORM,
    VERSION,
    Inputs,
    Outputs,
    infer,
    named,
    pack,
    unpack,
    wanted,
)
from .pictures import decode_base64

HEADER_LENGTH = "inference-header-content-length"


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
    async def metadata(model: str, version: str = VERSION) -> dict[str, Any]:
        """Inputs and outputs."""
        engine = named(engines.current, model, version)
        tensors = {"inputs": list(INPUTS), "outputs": list(OUTPUTS)}
        return {"name": engine.name, "versions": [VERSION], "platform": PLATFORM, **tensors}

    @routes.get("/models/{model}/ready")
    @routes.get("/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str = VERSION) -> dict[str, Any]:
        """The model answers."""
        return {"name": named(engines.current, model, version).name, "ready": True}

    @routes.post("/models/{model}/infer", openapi_extra=_BODY)
    @routes.post("/models/{model}/versions/{version}/infer", openapi_extra=_BODY)
    async def answer(request: Request, model: str, version: str = VERSION) -> Response:
        """Caption, answer or follow instructions."""
        engine = named(engines.current, model, version)
        _ = engine.generative  # before anything is read
        content, tail = _split(await request.body(), request.headers.get(HEADER_LENGTH))
        inputs = _inputs(content, tail)
        parameters = _object(content.get("parameters", {}), "parameters")
        values, shape = await infer(engines, answering, request, model, inputs, parameters)
        return _response(engine, content, values, shape, bool(parameters.get("binary_data_output")))

    return routes


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object", "required": ["inputs"]}}},
    }
}


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


def _inputs(content: dict[str, Any], tail: bytes) -> Inputs:
    """The inputs of a request, `image` among them."""
    given = content.get("inputs")
    if not isinstance(given, list) or not 1 <= len(given) <= len(INPUTS):
        raise InputError("inputs must be a list with `image` and perhaps `text`")
    found = Inputs()
    for tensor in given:
        tensor = _object(tensor, "an input")
        name = found.claim(tensor.get("name"), tensor.get("datatype"))
        size = _object(tensor.get("parameters", {}), "parameters").get("binary_data_size")
        if size is None:
            values = _json_values(tensor.get("data"), name)
        else:
            if type(size) is not int or not 0 <= size <= len(tail):
                raise InputError(f"binary_data_size of `{name}` is {size!r:.30}, and {len(tail)} bytes are left")
            values, tail = unpack(tail[:size], name), tail[size:]
        found.add(name, tensor.get("shape"), values)
    if tail:
        raise InputError(f"{len(tail)} bytes of binary data belong to no input")
    found.images()  # an error where there are none
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


def _response(engine: Engine, content: dict[str, Any], values: Outputs, shape: list[int], binary: bool) -> Response:
    """Outputs as they were asked for: which, and in which form."""
    asked = content.get("outputs") or [{"name": str(output["name"])} for output in OUTPUTS]
    if not isinstance(asked, list):
        raise InputError("outputs must be a list")
    forms = [_object(output, "an output") for output in asked]
    outputs, tail = [], b""
    for name, form in zip(wanted([form.get("name") for form in forms]), forms, strict=True):
        tensor: dict[str, Any] = {"name": name, "datatype": DATATYPES[name], "shape": shape}
        if _object(form.get("parameters", {}), "parameters").get("binary_data", binary):
            part = pack(values[name])
            tensor["parameters"] = {"binary_data_size": len(part)}
            tail += part
        else:
            tensor["data"] = values[name]
        outputs.append(tensor)
    answer = {"model_name": engine.name, "model_version": VERSION, "outputs": outputs}
    if isinstance(content.get("id"), str):
        answer["id"] = content["id"]
    if not tail:
        return JSONResponse(answer)
    head = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(head + tail, media_type="application/octet-stream", headers=headers)

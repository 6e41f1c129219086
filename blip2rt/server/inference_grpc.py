"""The Open Inference Protocol 2 over gRPC, beside HTTP in the same process; its stubs are those of tritonclient.

Pictures and texts stand in `raw_input_contents` or in `contents.bytes_contents`; the answer has the form of the
question. A key, where the server wants one, is the metadata `authorization: Bearer KEY`.
"""

import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from .. import __version__
from ..errors import InputError
from .answering import Answering
from .engines import Engines
from .errors import HttpError
from .inference import (
    DATATYPES,
    INPUTS,
    OUTPUTS,
    PLATFORM,
    VERSION,
    Inputs,
    encoded,
    infer,
    named,
    pack,
    unpack,
    wanted,
)
from .metrics import Metrics
from .middleware import Keys
from .settings import ServerSettings

LOG = logging.getLogger("blip2rt.server")
SERVICE = "/inference.GRPCInferenceService/"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Caller:
    """A client whose call gRPC itself cancels when it leaves."""

    async def is_disconnected(self) -> bool:
        return False


class Service(GRPCInferenceServiceServicer):  # type: ignore[misc]  # tritonclient has no types
    """The calls of the protocol; Triton's own answer UNIMPLEMENTED."""

    def __init__(self, engines: Engines, answering: Answering, settings: ServerSettings, metrics: Metrics):
        self._engines, self._answering, self._metrics = engines, answering, metrics
        self._keys = Keys(settings.api_keys)

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The process answers."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Requests are taken."""
        return messages.ServerReadyResponse(ready=self._engines.is_ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What this server is."""

        async def answer() -> Any:
            return messages.ServerMetadataResponse(name="blip2rt", version=__version__)

        return await self._answer(context, "ServerMetadata", answer)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The model answers."""

        async def answer() -> Any:
            named(self._engines.current, request.name, request.version or VERSION)
            return messages.ModelReadyResponse(ready=True)

        return await self._answer(context, "ModelReady", answer)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Inputs and outputs."""

        async def answer() -> Any:
            engine = named(self._engines.current, request.name, request.version or VERSION)
            return messages.ModelMetadataResponse(
                name=engine.name, versions=[VERSION], platform=PLATFORM, inputs=INPUTS, outputs=OUTPUTS
            )

        return await self._answer(context, "ModelMetadata", answer)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Caption, answer or follow instructions."""

        async def answer() -> Any:
            engine = named(self._engines.current, request.model_name, request.model_version or VERSION)
            _ = engine.generative  # before anything is read
            parameters = {
                name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
                for name, value in request.parameters.items()
            }
            inputs = _inputs(request)
            names = wanted([output.name for output in request.outputs])
            values, shape = await infer(
                self._engines, self._answering, _Caller(), request.model_name, inputs, parameters
            )
            response = messages.ModelInferResponse(model_name=engine.name, model_version=VERSION, id=request.id)
            for name in names:
                tensor = response.outputs.add(name=name, datatype=DATATYPES[name], shape=shape)
                if request.raw_input_contents:
                    response.raw_output_contents.append(pack(values[name]))
                elif name == "text":
                    tensor.contents.bytes_contents.extend(map(encoded, values[name]))
                else:
                    tensor.contents.fp64_contents.extend(values[name])
            return response

        return await self._answer(context, "ModelInfer", answer)

    async def _answer(self, context: Any, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` gives, or its error as a status and a sentence; counted like a request over HTTP."""
        start, code, message = monotonic(), grpc.StatusCode.CANCELLED, ""
        try:
            self._keys.check(dict(context.invocation_metadata() or ()).get("authorization", ""))
            response = await work()
            code = grpc.StatusCode.OK
            return response
        except HttpError as error:
            code, message = CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message
        except InputError as error:
            code, message = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except Exception:
            LOG.exception("%s failed", name)
            code, message = grpc.StatusCode.INTERNAL, "this is an error of the server, see its log"
        finally:
            self._metrics.requests.labels(SERVICE + name, code.name).inc()
            self._metrics.seconds.labels(SERVICE + name).observe(monotonic() - start)
        await context.abort(code, message.encode("utf-8", "replace").decode())


def _inputs(request: Any) -> Inputs:
    """The inputs of a request."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs: give one for each, or none")
    found = Inputs()
    for i, tensor in enumerate(request.inputs):
        name = found.claim(tensor.name, tensor.datatype)
        if raw and tensor.HasField("contents"):
            raise InputError(f"`{name}` has both contents and raw_input_contents: give one of them")
        found.add(name, list(tensor.shape), unpack(raw[i], name) if raw else list(tensor.contents.bytes_contents))
    return found


async def listen(service: Service, address: str, settings: ServerSettings) -> tuple[grpc.aio.Server, int]:
    """A started gRPC server, and its port.

    Args:
        service: what answers.
        address: "host:port".
        settings: limits; as many calls as may upload, wait and be answered are taken at once, more are told to wait.

    Raises:
        InputError: the address cannot be had.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", int(settings.max_body_mb * 1e6)),
            ("grpc.so_reuseport", 0),  # else two servers would share a port in silence
        ],
        maximum_concurrent_rpcs=settings.max_uploads + settings.max_queue + settings.max_batch,
    )
    add_GRPCInferenceServiceServicer_to_server(service, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise InputError(f"{address} cannot be had for gRPC: choose another --grpc-port") from None
    await server.start()
    return server, port

"""The application: routes behind the gate, errors as sentences."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import InputError
from . import embeddings, inference_http, openai, plain, retrieval
from .answering import Answering
from .engines import Engines
from .errors import HttpError, error_body
from .metrics import Metrics
from .middleware import Gate
from .settings import ServerSettings

PAGE = Path(__file__).parent / "page"
SECURITY = {  # for the page, which needs nothing from outside
    "content-security-policy": "default-src 'self'; img-src blob: data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def create_app(engines: Engines, settings: ServerSettings, metrics: Metrics, num_threads: int) -> FastAPI:
    """The ASGI application of a server.

    Args:
        engines: the open engine.
        settings: limits and permissions.
        metrics: what `engines` counts in.
        num_threads: pictures that are decoded at the same time.
    """
    answering = Answering(settings, num_threads)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engines.close()
        answering.close()

    app = FastAPI(title="blip2rt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.answering = answering
    app.include_router(openai.router(engines, answering))
    app.include_router(embeddings.router(engines, answering))
    app.include_router(inference_http.router(engines, answering))
    app.include_router(plain.router(engines, answering))
    app.include_router(retrieval.router(engines, answering))
    app.add_middleware(Gate, settings=settings, metrics=metrics)

    @app.get("/metrics", tags=["Operation"])
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(prometheus_client.generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    for path, name in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(name), include_in_schema=False)

    @app.exception_handler(HttpError)
    async def told(request: Request, error: HttpError) -> Response:
        return JSONResponse(error_body(request.url.path, error.status, error.message), error.status, error.headers)

    @app.exception_handler(InputError)
    async def wrong(request: Request, error: InputError) -> Response:
        message = str(error).encode("utf-8", "replace").decode()
        return JSONResponse(error_body(request.url.path, 400, message), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = f"{place}: {first['msg']}".encode("utf-8", "replace").decode()
        return JSONResponse(error_body(request.url.path, 400, message), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        content = error_body(request.url.path, error.status_code, str(error.detail))
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(request.url.path, 500, "this is an error of the server, see its log"), 500)

    return app


def _file(name: str):  # type: ignore[no-untyped-def]
    async def page() -> FileResponse:
        return FileResponse(PAGE / name, headers=SECURITY)

    return page

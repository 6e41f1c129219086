"""What stands before every route: keys, sizes, slow senders, and the count of those who may send at once."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from time import monotonic
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .errors import HttpError, error_body
from .metrics import Metrics
from .settings import ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/page.js", "/page.css", "/v2/health/live", "/v2/health/ready")  # without a key


class Keys:
    """Those who may ask; without a key, everybody."""

    def __init__(self, keys: Sequence[str]):
        self._keys = [key.encode() for key in keys]

    def check(self, authorization: str) -> None:
        """Compare with all keys; it takes as long for each, whatever they have in common.

        Raises:
            HttpError: 401, it is none of them.
        """
        given = authorization.removeprefix("Bearer ").encode("utf-8", "replace")
        found = [hmac.compare_digest(given, key) for key in self._keys]
        if self._keys and not (any(found) and authorization.startswith("Bearer ")):
            raise HttpError(401, "a valid API key is needed: Authorization: Bearer KEY", {"www-authenticate": "Bearer"})


class Gate:
    """Lets through only whole requests of those who may ask. Their bodies are in memory by then."""

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = Keys(settings.api_keys)
        self._num_uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        except HttpError as error:
            body = error_body(scope["path"], error.status, error.message)
            headers = {"connection": "close", **error.headers}  # the rest of a body may still be on its way
            await JSONResponse(body, error.status, headers)(scope, receive, counted)
        finally:
            # only paths that exist: a label for every path that a stranger asks for would fill the memory
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS:
            self._keys.check(headers.get("authorization", ""))
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if self._num_uploads >= self._settings.max_uploads:
            raise HttpError(429, "too many uploads at the same time: try again", {"retry-after": "1"})
        self._num_uploads += 1
        try:
            body = await self._body(headers, receive)
        finally:
            self._num_uploads -= 1
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()  # that the client has left
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = int(self._settings.max_body_mb * 1e6)
        too_large = HttpError(413, f"the body is larger than {self._settings.max_body_mb:g} MB: send a smaller picture")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HttpError(400, "the client left before its request was whole")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            seconds = f"{self._settings.body_timeout:g} s"
            raise HttpError(408, f"the body did not arrive within {seconds}: send it faster, or less") from None

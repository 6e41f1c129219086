"""START HERE: `blip2rt serve`, the process around the application."""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InputError
from .app import create_app
from .engines import Engines
from .metrics import Metrics
from .settings import ServerSettings

HEADER_BYTES = 32_768  # of a request, without its body


def serve(
    engine: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    name: str | None = None,
    threads: int | None = None,
    settings: ServerSettings | None = None,
) -> None:
    """Serve an engine until SIGTERM or SIGINT; what was accepted is answered first. SIGHUP opens the engine anew.

    Args:
        engine: its directory, or a folder of several.
        host: address to listen on.
        port: of HTTP; 0: any that is free.
        grpc_port: of gRPC; None: there is none.
        name: which engine of a folder.
        threads: cores to use; None: all.
        settings: limits and permissions.

    Raises:
        InputError: a port cannot be had.
        EngineError: as `Pipeline`.
    """
    settings = settings or ServerSettings()
    listener = _listen(host, port)
    with listener:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
        metrics = Metrics()
        engines = Engines(engine, name, threads, settings, metrics)
        app = create_app(engines, settings, metrics, len(os.sched_getaffinity(0)))
        config = uvicorn.Config(
            app,
            http=_protocol(settings.body_timeout),
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=10,
        )

        async def run() -> None:
            server = _Server(config, engines, settings.timeout)
            address = f"http://{host}:{listener.getsockname()[1]}"
            if grpc_port is not None:
                from .inference_grpc import Service, listen  # its packages are an extra

                service = Service(engines, app.state.answering, settings, metrics)
                server.rpc, at = await listen(service, f"{host}:{grpc_port}", settings)
                address += f" and grpc://{host}:{at}"
            print(f"blip2rt: serving {engines.current.name} on {address}", file=sys.stderr)
            await server.serve(sockets=[listener])

        # uvicorn stops gracefully and then raises the signal once more: by then it has done its work
        signal.signal(signal.SIGTERM, lambda *_: None)
        asyncio.run(run())


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"port must be 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns Nagle's algorithm off for sockets that say they are TCP, and with it 40 ms of every answer
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port} is no address to listen on ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be had ({reason}): choose another --port") from None
    return listener


class _Server(uvicorn.Server):
    """Tells the world that it stops before it stops, and listens to SIGHUP."""

    def __init__(self, config: uvicorn.Config, engines: Engines, timeout: float):
        super().__init__(config)
        self._engines, self._timeout = engines, timeout
        self.rpc: Any = None  # the gRPC server beside this one
        self._reloads: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._engines.reload())
        self._reloads.add(task)  # the loop itself does not keep it alive
        task.add_done_callback(self._reloads.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engines.is_ready = False
        await asyncio.gather(self._stop_rpc(), super().shutdown(sockets))

    async def _stop_rpc(self) -> None:
        """Take no more calls, and keep the engine until those that were taken are answered."""
        if self.rpc is not None:
            with self._engines.use():
                await self.rpc.stop(self._timeout)


def _protocol(header_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which waits for ever for the end of a request's head; this one does not."""

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head_timer:
                self._head_timer.cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """The clock runs from the end of one request to the end of the next one's head."""
            is_busy = self.cycle is not None and not self.cycle.response_complete
            if is_busy and self._head_timer:
                self._head_timer.cancel()
                self._head_timer = None
            elif not is_busy and self._head_timer is None:
                self._head_timer = self.loop.call_later(header_seconds, self._too_slow)

        def _too_slow(self) -> None:
            self._head_timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return Protocol

"""The same application on a Ray cluster: `serve run blip2rt.server.on_ray:application engine=/shared/engines`.

Ray Serve's proxies stand where `run.py` has uvicorn, and hand each request to one of the replicas, each with an engine.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import ray
from fastapi import FastAPI
from ray import serve

from ..engine_directory import checked_manifest, find_engines
from ..errors import InputError
from ..inspection import gpus_needed
from .app import create_app
from .engines import Engines
from .metrics import Metrics
from .settings import ServerSettings


def application(arguments: Mapping[str, object]) -> serve.Application:
    """What `serve run`, `serve deploy` and `serve.run` take.

    Args:
        arguments: `engine`, a directory under the same path on every machine; if need be `name`; `threads`, CPUs of a
            replica (default 1); `replicas`, a number or "auto" (default 1); and every field of `ServerSettings`, with
            commas between several `api_keys` or `allow_hosts`.

    Raises:
        InputError: an unknown argument, or a value that makes no sense.
        EngineError: there is no engine.
    """
    given = {key: str(value) for key, value in arguments.items()}  # a file of Serve may hold numbers
    if "engine" not in given:
        raise InputError("engine=DIR is missing: an engine directory under the same path on every machine")
    engine, name = Path(given.pop("engine")).absolute(), given.pop("name", None)
    threads = _read("threads", int, given.pop("threads", "1"))
    replicas: Any = given.pop("replicas", "1")
    replicas = replicas if replicas == "auto" else _read("replicas", int, replicas)
    if threads < 1 or (replicas != "auto" and replicas < 1):
        raise InputError(f"threads={threads} and replicas={replicas} must be at least 1")
    settings = _settings(given)
    for directory in find_engines(engine, name).values():  # what is wrong is said here, and not on every machine
        checked_manifest(directory, None)

    def build() -> FastAPI:
        metrics = Metrics()
        return create_app(Engines(engine, name, threads, settings, metrics), settings, metrics, threads)

    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    replica = serve.deployment(
        name="blip2rt",
        num_replicas=replicas,
        # the application's own limits answer before Ray's queue grows
        max_ongoing_requests=2 * (settings.max_queue + settings.max_batch + settings.max_uploads),
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus_needed(engine, name, gpus)},
    )
    bound: serve.Application = replica(serve.ingress(build)()).bind()
    return bound


def _settings(given: Mapping[str, str]) -> ServerSettings:
    """Fields of `ServerSettings` from words."""
    known = {f.name for f in fields(ServerSettings)}
    if unknown := sorted(given.keys() - known):
        names = ", ".join(["engine", "name", "threads", "replicas", *sorted(known)])
        raise InputError(f"{', '.join(unknown)}: there is no such argument, but {names}")
    kinds = get_type_hints(ServerSettings)
    values: dict[str, Any] = {}
    for key, word in given.items():
        if kinds[key] in (int, float):
            values[key] = _read(key, kinds[key], word)
        else:
            values[key] = tuple(word.split(",")) if kinds[key] == tuple[str, ...] else Path(word).absolute()
    return ServerSettings(**values)


def _read(key: str, kind: type[int] | type[float], word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise InputError(f"{key}={word!r} is no {'whole number' if kind is int else 'number'}") from None

"""What an operator can set. Needs none of the server's packages: the command line shows it without them."""

import ipaddress
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InputError


def _limit(default: float, what: str) -> Any:
    return field(default=default, metadata={"what": what})


@dataclass(frozen=True)
class ServerSettings:
    """Limits and permissions of a server. Every one of them is there for an attack or an accident.

    Raises:
        InputError: a value that makes no sense.
    """

    max_batch: int = _limit(8, "pictures that go through the engines together")
    max_queue: int = _limit(64, "pictures that wait; who comes next is told to come again")
    max_uploads: int = _limit(32, "requests whose bodies are received at the same time")
    max_body_mb: float = _limit(20.0, "size of a request")
    max_pixels: int = _limit(40_000_000, "pixels of a picture")
    max_pictures: int = _limit(16, "pictures in one request")
    max_texts: int = _limit(256, "texts in one request that embeds or matches them")
    max_pairs: int = _limit(256, "pairs of picture and text that ITM looks at for one request")
    max_new_tokens: int = _limit(256, "longest text")
    max_beams: int = _limit(16, "most beams, and most sequences")
    timeout: float = _limit(60.0, "seconds from a request to its answer")
    body_timeout: float = _limit(20.0, "seconds for the head of a request, and again for its body")
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    allow_hosts: tuple[str, ...] = ()  # hosts whose pictures are fetched; none: nothing is ever fetched
    gallery: Path | None = None  # that can be searched
    pictures: Path | None = None  # folder under which the gallery's ids are paths of pictures; None: none are shown

    def __post_init__(self) -> None:
        for name, _, _ in self.limits():
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)!r}")
        if any(len(key) < 8 or not key.isascii() for key in self.api_keys):
            raise InputError("an API key must have at least 8 characters, all of them ASCII")
        if self.pictures is not None and (self.gallery is None or not self.pictures.is_dir()):
            raise InputError(f"--pictures {self.pictures} must be the folder of the pictures of a --gallery")
        for host in self.allow_hosts:
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host) or _is_address(host):
                raise InputError(f"--allow-host takes the name of a host, such as images.example.org, not {host!r}")

    @classmethod
    def limits(cls) -> list[tuple[str, Any, str]]:
        """Name, default and meaning of every number."""
        return [(f.name, f.default, f.metadata["what"]) for f in fields(cls) if "what" in f.metadata]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

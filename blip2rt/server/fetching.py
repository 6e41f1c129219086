"""Pictures by URL, from hosts that the operator allows, and from nowhere else.

A host's name says nothing about where it leads: it is looked up once, every address must be public, and the connection
goes to just that address. A redirect is a new URL with all of this to pass again.
"""

import http.client
import ipaddress
import socket
import ssl
from time import monotonic
from urllib.parse import urljoin, urlsplit

from ..errors import ImageError
from .settings import ServerSettings

MAX_REDIRECTS = 3
CHUNK = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)


def fetch(url: str, settings: ServerSettings) -> bytes:
    """The body of a URL. Blocks; for a thread.

    Raises:
        ImageError: the URL is not allowed, leads to a place that is not public, or gives no body that fits.
    """
    deadline = monotonic() + settings.body_timeout
    for _ in range(MAX_REDIRECTS + 1):
        connection, path = _connection(url, settings)
        try:
            connection.request("GET", path, headers={"user-agent": "blip2rt", "accept": "image/*"})
            response = connection.getresponse()
            if response.status in REDIRECTS:
                url = urljoin(url, response.headers.get("location", ""))
                continue
            if response.status != 200:
                raise ImageError(f"the picture's URL answers with status {response.status}")
            return _read(response, settings, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"the picture's URL cannot be read ({type(error).__name__})") from None
        finally:
            connection.close()
    raise ImageError(f"the picture's URL redirects more than {MAX_REDIRECTS} times")


def _connection(url: str, settings: ServerSettings) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the URL's host, not open yet, and the path to ask for."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ImageError("the picture's URL is damaged") from None
    if parts.scheme not in ("http", "https") or host is None or parts.username is not None:
        raise ImageError("a picture's URL is a data URL, or http(s)://HOST/PATH")
    if host.rstrip(".").lower() not in {allowed.lower() for allowed in settings.allow_hosts}:
        raise ImageError("pictures are not fetched from that host: send the picture itself, as a data URL")
    usual = 443 if parts.scheme == "https" else 80
    if port not in (None, usual):
        raise ImageError(f"pictures are fetched from port {usual} only")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii() or any(c <= " " for c in path):
        raise ImageError("the picture's URL has characters that must be percent-encoded")
    address = _public_address(host, usual)
    kind = _PinnedHttps if parts.scheme == "https" else _PinnedHttp
    return kind(host, usual, address, settings.body_timeout), path


def _public_address(host: str, port: int) -> str:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise ImageError("the picture's host is not known") from None
    if not found or not all(is_public(address) for address in found):
        raise ImageError("the picture's host leads to an address that is not public")
    return sorted(found)[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, also where it is written within another."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _PinnedHttp(http.client.HTTPConnection):
    """Connects to an address that was looked at, not to what the name means by then."""

    def __init__(self, host: str, port: int, address: str, timeout: float):
        super().__init__(host, port, timeout=timeout)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)


class _PinnedHttps(_PinnedHttp):
    default_port = 443

    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def _read(response: http.client.HTTPResponse, settings: ServerSettings, deadline: float) -> bytes:
    limit = int(settings.max_body_mb * 1e6)
    body = bytearray()
    while chunk := response.read1(CHUNK):
        body += chunk
        if len(body) > limit:
            raise ImageError(f"the picture is larger than {settings.max_body_mb:g} MB")
        if monotonic() > deadline:
            raise ImageError("the picture's host is too slow")
    return bytes(body)

"""Images that records name by URL, where ``allow_image_urls`` is set: one GET, bounded in size and time.

Records often come from other people, so no URL may reach what only this machine can: the address
that is connected to is the one that was looked at, in every redirect. Proxies of the environment are not
used, because what stands behind one cannot be looked at.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import socket
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from vembed_ds.errors import DataError

MAX_BYTES = 64 * 2**20
BLOCK_BYTES = 2**16
MAX_REDIRECTS = 5
WAIT_SECONDS, TOTAL_SECONDS = 10.0, 60.0

_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 behind a translator, in the last 32 bits


class ImageUrl(str):
    """The URL of an image that may be fetched; a plain text is always the name of a file."""

    __slots__ = ()


class _RefusedError(Exception):
    """Why a URL is not read."""


class _Https(HTTPConnection):
    default_port = 443  # is no part of the Host header


def is_http_url(text: str) -> bool:
    """Whether a text is a URL of the only two schemes that are ever fetched."""
    return text[:8].lower().startswith(("http://", "https://"))


def fetch_image(
    url: str, *, place: str, allow_private: bool = False, total_seconds: float = TOTAL_SECONDS
) -> bytes:
    """Read what a URL gives, following redirects.

    Args:
        url: http or https.
        place: The record and what is fetched, for messages.
        allow_private: Also connect to this machine and private networks (tests do).
        total_seconds: For everything but looking up names and connecting.

    Returns:
        The encoded image, not looked at.

    Raises:
        DataError: Naming record and URL: another scheme, a private address, no answer in time, an
            answer other than 200, more than ``MAX_BYTES``, or less than was announced.
    """
    deadline = time.monotonic() + total_seconds
    problem = ""
    try:
        content = _followed(url, allow_private=allow_private, deadline=deadline)
    except _RefusedError as error:
        problem = str(error)
    except (OSError, HTTPException, ValueError) as error:
        problem = f"cannot be fetched ({type(error).__name__}: {error})"
    if time.monotonic() >= deadline:  # the connection was cut: whatever came of it is not whole
        problem = f"is not there after {total_seconds:g} s"
    if problem:
        raise DataError(
            f"{place} {url[:200]} {problem}; correct the URL, download the image or remove the record"
        )
    return content


def _followed(url: str, *, allow_private: bool, deadline: float) -> bytes:
    for _ in range(1 + MAX_REDIRECTS):
        found = _get(url, allow_private=allow_private, deadline=deadline)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise _RefusedError(f"redirects more than {MAX_REDIRECTS} times")


def _get(url: str, *, allow_private: bool, deadline: float) -> bytes | str:
    """The content, or where it is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _RefusedError(f"leads to {url[:200]!r}, and only http and https are fetched")
    kind = _Https if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname, _port(parts))
    connection.sock = link = _connected(parts, allow_private=allow_private)
    # A server that gives a byte now and then never runs into the socket's own limit.
    watch = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [link])
    watch.start()
    try:
        if isinstance(link, ssl.SSLSocket):
            link.do_handshake()
        path = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
        target = quote(path, safe="%/:?=&+,;@~!$'()*")
        connection.request("GET", target, headers={"User-Agent": "vembed_ds"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in _REDIRECTS and location:
            return location
        if response.status != 200:
            raise _RefusedError(f"is answered by {response.status} {response.reason}")
        return _content(response)
    finally:
        watch.cancel()
        connection.close()


def _content(response: HTTPResponse) -> bytes:
    content = bytearray()
    while block := response.read(BLOCK_BYTES):
        content += block
        if len(content) > MAX_BYTES:
            raise _RefusedError(f"is larger than {MAX_BYTES >> 20} MiB")
    if response.length:
        raise _RefusedError(f"ends {response.length} bytes early")
    return bytes(content)


def _connected(parts: SplitResult, *, allow_private: bool) -> socket.socket:
    """A connection to an address that was looked at: a second look-up could give another one."""
    assert parts.hostname is not None
    found = socket.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if refused := [a for a in addresses if not (allow_private or _is_public(a))]:
        raise _RefusedError(
            f"leads to {refused[0]}, an address of this machine or of a private network"
        )
    plain = _first_connection(addresses, _port(parts))
    if parts.scheme == "http":
        return plain
    return _tls().wrap_socket(plain, server_hostname=parts.hostname, do_handshake_on_connect=False)


def _first_connection(addresses: list[str], port: int) -> socket.socket:
    for address in addresses[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=WAIT_SECONDS)
    return socket.create_connection((addresses[-1], port), timeout=WAIT_SECONDS)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    return address.is_global and not address.is_multicast


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        socket.socket.shutdown(connection, socket.SHUT_RDWR)

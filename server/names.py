"""Names of servers: hosts as requests tell them, and origins as browsers do."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_][a-z0-9_.-]*))(?::[0-9]*)?", re.IGNORECASE)
_ORIGIN = re.compile(
    r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_-]|\.(?=[a-z0-9_]))*)(?::[0-9]{1,5})?", re.IGNORECASE
)
_PORTS = {"http": 80, "https": 443}
# Names of this machine, the last two as containers on it know it; nobody can make them point elsewhere on the internet.
OWN_NAMES = frozenset({"localhost", "host.docker.internal", "host.containers.internal"})


def host_in(authority: str) -> str:
    """The host of ``authority`` (``host`` or ``host:port``) in small letters; empty where it is none."""
    found = _HOST.fullmatch(authority)
    return (found["address"] or found["name"] or "").lower().removesuffix(".") if found else ""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens on ``host``."""
    if not is_address(host):
        return host.lower() == "localhost"
    address = ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def origin_of(text: str) -> str:
    """``text`` as browsers write it in ``Origin``: in small letters, without the port that its scheme has by itself.

    Raises:
        ValueError: it is no origin of a page on the web.
    """
    wrong = ValueError(f"{text!r} is no origin: write scheme, host and port alone, or *")
    if not _ORIGIN.fullmatch(text):
        raise wrong
    try:
        parts = urlsplit(text.lower())
        port, host = parts.port, parts.hostname or ""
        if parts.netloc.startswith("["):
            host = f"[{ip_address(host)}]"
    except ValueError:
        raise wrong from None
    return f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")

"""Which names a server on loopback answers to.

A web page can point a name of its own at 127.0.0.1 and then read what a server there says (DNS rebinding);
the `Host` header gives it away.
"""

from __future__ import annotations

import ipaddress


def is_loopback(name: str) -> bool:
    """True for `localhost`, names below it, and addresses of the own machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(header: bytes) -> str:
    """The name in a `Host` header, without port, brackets and final dot."""
    text = header.decode("latin-1").strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.rstrip(".")

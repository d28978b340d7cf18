"""Check that a request comes from a program on this machine, not from a web page.

Any page in your browser can send requests to loopback, either directly or through its
own host name if that resolves to 127.0.0.1 (DNS rebinding). The browser adds headers
that reveal where such a request comes from.

Source: the Fetch Standard, section *Origin header*; Fetch Metadata Request Headers.
"""

import ipaddress
import re
from functools import lru_cache

from multidict import CIMultiDictProxy

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:/@\s]+))(?::\d+)?")


def why_untrusted(headers: CIMultiDictProxy[str]) -> str | None:
    """Why a request with these headers is refused; None if it isn't."""
    host = headers.get("host", "")
    if not is_local(host):
        return (
            f"The stub answers only programs on this machine, but the request's Host "
            f"is {host!r}. Use the address http://127.0.0.1 or http://localhost."
        )
    origin = headers.get("origin")
    if origin is not None:
        scheme, _, host = origin.partition("://")
        if scheme not in ("http", "https") or not is_local(host):
            return (
                f"The stub doesn't answer web pages, and this request comes from one "
                f"with the Origin {origin!r}."
            )
    elif headers.get("sec-fetch-site") == "cross-site":
        return (
            "The stub doesn't answer requests from another site's page. To open this "
            "address in a browser, type it into the address bar."
        )
    return None


@lru_cache(maxsize=256)
def is_local(host: str) -> bool:
    """Whether a host, with or without a port, is a name or address of loopback."""
    found = _HOST.fullmatch(host)
    if not found:
        return False
    name = found[1] or found[2]
    if name.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

"""How a fault leaves the provider: the bytes, or the lack of them."""

import asyncio
import json
import socket
import struct
import sys
from typing import NoReturn

from aiohttp import web

from .wire import Json

EARLY = frozenset({"error_500", "error_503", "reset", "hang"})
MIDWAY = frozenset({"reset_midway", "truncated", "malformed"})
"""Before the first byte; in the middle of a stream."""

PAGE = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


class BrokenOffError(ConnectionResetError):
    """This side ended the connection."""


async def hang() -> None:
    """Never return; the client's end cancels it."""
    await asyncio.Event().wait()


def reset(request: web.Request) -> None:
    """Reset the connection: what was not sent is lost."""
    transport = request.transport
    if transport is None:
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:  # close with a RST instead of a FIN
        pair = "hh" if sys.platform == "win32" else "ii"
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(pair, 1, 0))
    transport.abort()


async def broken_off(
    request: web.Request, headers: dict[str, str], body: Json, *, abruptly: bool
) -> NoReturn:
    """Announce a whole body, send half of it, and close or reset."""
    raw = json.dumps(body).encode()
    response = web.StreamResponse(headers=headers)
    response.content_type, response.content_length = "application/json", len(raw)
    await response.prepare(request)
    await response.write(raw[: len(raw) // 2])
    _break_off(request, abruptly)


async def broken_stream(
    request: web.Request, response: web.StreamResponse, fault: str, event: bytes
) -> None:
    """End a stream too early, or with half an event."""
    if fault == "malformed":
        await response.write(event[: len(event) // 2] + b"\n\n")
        return
    _break_off(request, fault == "reset_midway")


def _break_off(request: web.Request, abruptly: bool) -> NoReturn:
    if abruptly:
        reset(request)
    elif request.transport:
        request.transport.close()
    raise BrokenOffError("as the fault wants it")


def malformed(body: Json) -> web.Response:
    """A whole response whose JSON breaks off."""
    text = json.dumps(body)
    return web.Response(text=text[: len(text) // 2], content_type="application/json")


def wrong_type() -> web.Response:
    """What a proxy sends in the place of an answer."""
    return web.Response(body=PAGE, content_type="text/html")

"""The faults: what goes wrong with a call, and the bytes that the client sees.

| fault          | what the client sees                                        |
|----------------|-------------------------------------------------------------|
| `slow`         | the first byte arrives `slow` seconds late                  |
| `error_500`    | the API's error object, when the first token would be due   |
| `error_503`    | the same with status 503                                    |
| `reset`        | a connection reset instead of the first byte                |
| `hang`         | nothing, ever                                               |
| `reset_midway` | a connection reset in the middle of the body                |
| `truncated`    | the connection closes in the middle of the body             |
| `malformed`    | a complete response with truncated JSON                     |
| `wrong_type`   | an HTML page with status 200, like a proxy's error page     |

In a stream, `reset_midway`, `truncated` and `malformed` happen after half of the
tokens. `wrong_type` replaces the stream.
"""

import asyncio
import json
import socket
import struct
import sys
from typing import NoReturn

from aiohttp import web

from .api.errors import Json, server_error
from .settings import Fault, Settings

BEFORE_FIRST_BYTE: frozenset[Fault] = frozenset(
    {"error_500", "error_503", "reset", "hang"}
)
IN_STREAM: frozenset[Fault] = frozenset({"reset_midway", "truncated", "malformed"})
IN_ANSWER: frozenset[Fault] = IN_STREAM | {"wrong_type"}

PAGE = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


class ConnectionBrokenError(ConnectionResetError):
    """The stub itself broke the connection, for example to cause a fault."""


def extra_wait(fault: Fault | None, settings: Settings) -> float:
    """Seconds that a fault adds before the first token."""
    return settings.slow if fault == "slow" else 0


async def instead_of_answer(request: web.Request, fault: Fault) -> NoReturn:
    """Cause a fault of BEFORE_FIRST_BYTE.

    Raises ApiError or ConnectionBrokenError; a hang ends when it is cancelled.
    """
    if fault == "hang":
        await asyncio.Event().wait()
    if fault == "reset":
        reset(request)
        raise ConnectionBrokenError(fault)
    raise server_error(503 if fault == "error_503" else 500)


async def spoiled_answer(
    request: web.Request, body: Json, fault: Fault
) -> web.StreamResponse:
    """An answer without streaming, spoiled by a fault of IN_ANSWER.

    Raises ConnectionBrokenError if the fault breaks the connection.
    """
    if fault == "wrong_type":
        return web.Response(body=PAGE, content_type="text/html")
    raw = json.dumps(body).encode()
    half = raw[: len(raw) // 2]
    if fault == "malformed":
        return web.Response(body=half, content_type="application/json")
    response = web.StreamResponse()
    response.content_type, response.content_length = "application/json", len(raw)
    await response.prepare(request)
    await response.write(half)
    _break_connection(request, fault)


async def spoiled_stream(
    request: web.Request, response: web.StreamResponse, fault: Fault, event: bytes
) -> None:
    """End a stream with a fault of IN_STREAM; `event` would be the next one.

    Raises ConnectionBrokenError if the fault breaks the connection.
    """
    if fault == "malformed":
        await response.write(event[: len(event) // 2] + b"\n\n")
        return
    _break_connection(request, fault)


def reset(request: web.Request) -> None:
    """Reset the connection; unsent bytes are lost."""
    transport = request.transport
    if transport is None:
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:  # close with a RST instead of a FIN
        pair = "hh" if sys.platform == "win32" else "ii"
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(pair, 1, 0))
    transport.abort()


def _break_connection(request: web.Request, fault: Fault) -> NoReturn:
    if fault == "reset_midway":
        reset(request)
    elif request.transport:
        request.transport.close()
    raise ConnectionBrokenError(fault)

"""The faults: what goes wrong with a call, and the bytes that the client sees.

| fault                | what the client sees                                          |
|----------------------|---------------------------------------------------------------|
| `slow`               | the first byte arrives `slow` seconds late                    |
| `error_500`          | the API's error object, when the first token would be due     |
| `error_503`          | the same with status 503                                      |
| `insufficient_quota` | 429 at once: the account is out of credit; retries don't help |
| `reset`              | a connection reset instead of the first byte                  |
| `hang`               | nothing, ever                                                 |
| `reset_midway`       | a connection reset in the middle of the body                  |
| `truncated`          | the connection closes in the middle of the body               |
| `malformed`          | a complete response with truncated JSON                       |
| `wrong_type`         | an HTML page with status 200, like a proxy's error page       |
| `error_in_stream`    | a stream with status 200 that ends with an error event        |
| `null_choices`       | a complete response with `choices: null`, as some gateways    |
|                      | send it (`output` in a response, `data` in embeddings)        |
| `content_filter`     | an empty text with finish_reason `content_filter`             |

In a stream, `reset_midway`, `truncated`, `malformed`, `error_in_stream` and
`null_choices` happen after half of the tokens, and the stream ends. `wrong_type`
replaces the stream. Without a stream, `error_in_stream` is `error_500`.
`content_filter` doesn't affect embeddings.
"""

import asyncio
import json
import socket
import struct
import sys
from typing import NoReturn

from aiohttp import web

from .api.errors import Json, insufficient_quota, server_error
from .settings import Fault, Settings

BEFORE_FIRST_BYTE: frozenset[Fault] = frozenset(
    {"error_500", "error_503", "insufficient_quota", "reset", "hang"}
)
IN_STREAM: frozenset[Fault] = frozenset(
    {"reset_midway", "truncated", "malformed", "error_in_stream", "null_choices"}
)
IN_ANSWER: frozenset[Fault] = frozenset(
    {"reset_midway", "truncated", "malformed", "null_choices", "wrong_type"}
)

# The field of a body or event that holds the answer: the first of these that exists.
NULLED = "choices output data delta text arguments part item response".split()
PAGE = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


class ConnectionBrokenError(ConnectionResetError):
    """The stub itself broke the connection, for example to cause a fault."""


def applied(fault: Fault | None, *, stream: bool) -> Fault | None:
    """The fault as it applies to a call with or without a stream."""
    return "error_500" if fault == "error_in_stream" and not stream else fault


def wait_before(fault: Fault | None, first_token: float, settings: Settings) -> float:
    """Seconds until the first byte; without the fault, they would be `first_token`."""
    if fault == "insufficient_quota":
        return 0
    return first_token + (settings.slow if fault == "slow" else 0)


async def instead_of_answer(request: web.Request, fault: Fault) -> NoReturn:
    """Cause a fault of BEFORE_FIRST_BYTE.

    Raises ApiError or ConnectionBrokenError; a hang ends when it is cancelled.
    """
    if fault == "hang":
        await asyncio.Event().wait()
    if fault == "reset":
        reset(request)
        raise ConnectionBrokenError(fault)
    if fault == "insufficient_quota":
        raise insufficient_quota()
    raise server_error(503 if fault == "error_503" else 500)


async def spoiled_answer(
    request: web.Request, body: Json, fault: Fault
) -> web.StreamResponse:
    """An answer without streaming, spoiled by a fault of IN_ANSWER.

    Raises ConnectionBrokenError if the fault breaks the connection.
    """
    if fault == "wrong_type":
        return web.Response(body=PAGE, content_type="text/html")
    if fault == "null_choices":
        return web.json_response(_nulled(body))
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
    if fault in ("reset_midway", "truncated"):
        _break_connection(request, fault)
    head, _, data = event.partition(b"data: ")
    if fault == "malformed":
        await response.write(event[: len(event) // 2] + b"\n\n")
    elif fault == "null_choices":
        nulled = json.dumps(_nulled(json.loads(data))).encode()
        await response.write(b"%bdata: %b\n\n" % (head, nulled))
    else:
        await response.write(_error_event(json.loads(data)))


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


def _nulled(body: Json) -> Json:
    """The body with null instead of its answer."""
    name = next(name for name in NULLED if name in body)
    return {**body, name: None}


def _error_event(event: Json) -> bytes:
    """The error event that replaces this one."""
    error = server_error(500).body["error"]
    if "sequence_number" not in event:
        return b"data: %b\n\n" % json.dumps({"error": error}).encode()
    body = {
        "type": "error",
        "sequence_number": event["sequence_number"],
        "code": error["type"],
        "message": error["message"],
        "param": None,
    }
    return b"event: error\ndata: %b\n\n" % json.dumps(body).encode()

"""The limit on open files, which also limits how many connections the stub can hold.

On macOS, the default is 256. A server that has reached its limit can't even accept a
connection in order to refuse it, so the stub keeps a few files free.
"""

import asyncio
import json
import socket
import sys
from collections.abc import Callable

from .api.errors import ApiError

WANTED = 8192  # open files
REFUSED_AFTER = 1.0  # seconds that we wait for a refused client's request
RETRY_AFTER = 0.1  # seconds until the next attempt to accept a connection


def raise_limit() -> int:
    """Raise the soft limit to WANTED, if the hard limit allows it; return the limit."""
    if sys.platform == "win32":
        return WANTED  # sockets don't count as open files there
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return WANTED
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


class Connections:
    """Accepts connections up to a limit, and refuses the rest.

    `make` creates the protocol of a connection, and `count` returns how many
    connections are open. Some files are kept free for the process itself, and for
    connections that are being refused.
    """

    def __init__(
        self, make: Callable[[], asyncio.Protocol], count: Callable[[], int], limit: int
    ) -> None:
        self._make, self._count = make, count
        kept_free = min(64, limit // 4)
        self._most = limit - kept_free
        self._refusing = asyncio.Semaphore(kept_free // 2)
        self._opening: set[asyncio.Task[None]] = set()
        error = ApiError(
            503,
            f"The stub can hold only {self._most} connections at once, because its "
            f"process may open only {limit} files. Keep fewer calls in flight, or "
            f"raise the limit before you start the stub: ulimit -n {WANTED}",
            code="too_many_connections",
            kind="server_error",
        )
        body = json.dumps(error.body).encode()
        self._refusal = (
            b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        ) % (len(body), body)

    async def accept(self, listening: socket.socket) -> None:
        """Accept connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError:  # no file is left, or the client has disconnected
                await asyncio.sleep(RETRY_AFTER)
                continue
            make = self._make
            if self._count() + len(self._opening) >= self._most:
                await self._refusing.acquire()  # meanwhile, other connections wait
                make = self._refuse
            opening = loop.create_task(_open(make, connection))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    def _refuse(self) -> asyncio.Protocol:
        return Refused(self._refusal, self._refusing.release)


async def _open(
    make: Callable[[], asyncio.Protocol], connection: socket.socket
) -> None:
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(make, connection)


class Refused(asyncio.Protocol):
    """Sends the refusal as soon as anything arrives, and closes the connection.

    Most clients read a response only after they have sent their request. So it waits
    for the request, but only for REFUSED_AFTER.
    """

    def __init__(self, refusal: bytes, closed: Callable[[], None]) -> None:
        self._refusal, self._closed = refusal, closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        asyncio.get_running_loop().call_later(REFUSED_AFTER, self._answer)

    def data_received(self, data: bytes) -> None:
        self._answer()

    def connection_lost(self, error: Exception | None) -> None:
        self._closed()

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._refusal)
            self._transport.close()

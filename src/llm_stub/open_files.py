"""The limit on open files, which also limits how many connections the stub can hold.

macOS starts programs with a limit of 256. A server that reaches it can't even accept
a connection to refuse it, so the stub stops a little earlier.
"""

import asyncio
import json
import socket
import sys
from collections.abc import Callable

from .api.errors import ApiError

WANTED = 8192  # open files
REFUSED_AFTER = 1.0  # seconds that a refused client has to send its request
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
    """Accepts connections, and refuses those that are too many.

    `make` makes the protocol of a connection, and `count` returns how many of them are
    open. Some files are kept free: for those that the process itself opens, and for
    the connections that are being refused.
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
            except OSError:  # there is no file left, or the client has hung up
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
    """Answers whatever arrives with the refusal, and closes the connection.

    Most clients read it only after they have sent their request, so it waits for that
    request, but not for long.
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

"""Run the stub: python -m llm_stub --port 8000"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import socket
import sys
import threading

from aiohttp import web

from .live import OPENAI
from .open_files import Connections, raise_limit
from .server import Connection, Server

HOST = "127.0.0.1"  # loopback only, never 0.0.0.0
MAX_WAITING = 4096  # connections waiting to be accepted
PARENT_POLL = 0.5  # seconds between checks of the parent


async def serve(port: int, parent: int | None, upstream: str | None, count: str) -> int:
    """Serve until stopped or, if a parent is given, until the parent exits."""
    runner = web.AppRunner(
        Server(upstream, os.environ.get("LLM_MODEL"), count).app(),
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    loop, manager = asyncio.get_running_loop(), runner.server
    assert manager is not None
    connections = Connections(
        make=lambda: Connection(manager, loop=loop),
        count=lambda: len(manager.connections),
        limit=raise_limit(),
    )
    try:
        listening = socket.create_server((HOST, port), backlog=MAX_WAITING)
    except OSError as error:
        print(
            f"The stub can't listen on port {port}: {error.strerror}. "
            "Choose another --port, or --port 0 for any free one.",
            file=sys.stderr,
        )
        return 2
    listening.setblocking(False)
    port = listening.getsockname()[1]
    ready = {"url": f"http://{HOST}:{port}", "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    accepting = asyncio.create_task(connections.accept(listening))
    if parent is None:
        await accepting
    else:
        await _wait_for_parent_exit(parent)
    accepting.cancel()
    listening.close()
    await runner.cleanup()
    return 0


async def _wait_for_parent_exit(parent: int) -> None:
    """Return when standard input ends or the parent process changes.

    Neither is enough alone: a process forked from the parent can keep the pipe open
    after the parent has exited, and on Windows the parent id never changes.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def watch_input() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch_input, daemon=True).start()
    while not ended.is_set() and (os.name == "nt" or os.getppid() == parent):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), PARENT_POLL)


def main() -> int:
    """Read the command line and serve."""
    # Each call creates many small objects. Garbage collection after every 700 of
    # them took a quarter of the CPU time.
    gc.set_threshold(50_000, 20, 50)
    parser = argparse.ArgumentParser(
        prog="python -m llm_stub",
        description="A local server that imitates OpenAI's API. Set OPENAI_BASE_URL to "
        "its address followed by /v1, or LLM_PROVIDER_URL to its address.",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0 for any free port (default: 8000)"
    )
    parser.add_argument(
        "--parent", type=int, help="stop when the process with this id exits"
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="forward calls to OPENAI_API_BASE, OPENAI_BASE_URL or OpenAI, up to a cap",
    )
    parser.add_argument(
        "--count",
        default=":memory:",
        metavar="FILE",
        help="where live mode keeps its count and its caps, to share them with other "
        "stubs (default: nowhere)",
    )
    options = parser.parse_args()
    if not 0 <= options.port <= 65_535:
        parser.error(f"--port must be from 0 to 65535, not {options.port}")
    environ = os.environ
    names = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
    bases = {environ[name].rstrip("/") for name in names if environ.get(name)}
    if options.live and len(bases) > 1:
        parser.error(f"{' and '.join(names)} name different servers; unset one of them")
    upstream = min(bases, default=OPENAI) if options.live else None
    try:
        return asyncio.run(serve(options.port, options.parent, upstream, options.count))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

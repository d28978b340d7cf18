"""Run the provider: python -m llm_stub --port 8000"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import sys
import threading

from aiohttp import web

from .app import Provider
from .live import OPENAI
from .protocol import Connection

HOST = "127.0.0.1"  # loopback only, never 0.0.0.0
POLL = 0.5  # seconds between two looks at who the parent is


async def serve(port: int, parent: int | None, upstream: str | None) -> int:
    """Serve until stopped; where a parent is given, until it is gone."""
    runner = web.AppRunner(
        Provider(upstream, os.environ.get("LLM_MODEL")).app(),
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    loop, manager = asyncio.get_running_loop(), runner.server
    assert manager is not None
    try:
        server = await loop.create_server(
            lambda: Connection(manager, loop=loop), HOST, port, backlog=4096
        )
    except OSError as error:
        print(
            f"The provider cannot listen on port {port}: {error.strerror}. "
            "Choose another --port, or 0 for a free one.",
            file=sys.stderr,
        )
        return 2
    port = server.sockets[0].getsockname()[1]
    ready = {"url": f"http://{HOST}:{port}", "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    if parent is None:
        await asyncio.Event().wait()
    else:
        await _parent_gone(parent)
    server.close()
    await runner.cleanup()
    return 0


async def _parent_gone(parent: int) -> None:
    """Return when standard input ends or the parent process changes.

    Either alone can fail: a process forked from the parent may hold the pipe
    open after its death, and Windows never changes a parent.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def watch_input() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch_input, daemon=True).start()
    while not ended.is_set() and (os.name == "nt" or os.getppid() == parent):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), POLL)


def main() -> int:
    """Read the command line and serve."""
    # Each call makes many small objects; looking through them for cycles after
    # every 700 took a quarter of the CPU.
    gc.set_threshold(50_000, 20, 50)
    parser = argparse.ArgumentParser(
        prog="python -m llm_stub",
        description="A local server that plays OpenAI; point OPENAI_BASE_URL at "
        "its address followed by /v1, or LLM_PROVIDER_URL at its address.",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--parent", type=int, help="end when this process has ended")
    parser.add_argument(
        "--live",
        action="store_true",
        help="forward to OPENAI_API_BASE, OPENAI_BASE_URL or OpenAI, with a cap",
    )
    options = parser.parse_args()
    environ = os.environ
    base = environ.get("OPENAI_API_BASE") or environ.get("OPENAI_BASE_URL") or OPENAI
    upstream = base if options.live else None
    try:
        return asyncio.run(serve(options.port, options.parent, upstream))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

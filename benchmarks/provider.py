"""How much load the provider bears: python run.py bench provider

A load generator keeps so many connections busy with chat calls of 0.2 s each,
so the ideal is connections / 0.2 s calls a second. The generator is wrk where
it is installed (Debian: apt-get install wrk), else a bare aiohttp client,
which takes more CPU from the provider on a small machine. A bare aiohttp
handler that only sleeps and answers is measured beside it: the floor.

Every load begins with all calls at once, which a process can only answer one
after another. 40 seconds make that less than one call in a hundred.
"""

import argparse
import asyncio
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import quantiles
from typing import Any, NamedTuple

import psutil
from aiohttp import ClientSession, TCPConnector, web

LATENCY = 0.2  # seconds a call
BODY = {"model": "m", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
ROUTE = "/v1/chat/completions"
OPEN_FILES = 20_000


class Load(NamedTuple):
    """What a load generator has seen; latencies in seconds."""

    calls: int
    seconds: float
    p50: float
    p99: float
    errors: int


Generator = Callable[[str, int, float], Load]


HEAD = """\
| server | connections | calls/s | ideal | added p50, ms | added p99, ms \
| CPU a call, ms | memory, MB | errors |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python run.py bench provider")
    parser.add_argument("--seconds", type=float, default=40, help="of each load")
    parser.add_argument("--connections", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--calls", type=int, default=200_000, help="for the memory")
    parser.add_argument(
        "--generator",
        choices=["wrk", "aiohttp"],
        default="wrk" if shutil.which("wrk") else "aiohttp",
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds in all")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.connections, options.calls = 2, [100], 2_000
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))
    generate = GENERATORS[options.generator]
    print(f"load generator: {options.generator}; {psutil.cpu_count()} CPUs\n\n{HEAD}")
    for name, command in SERVERS.items():
        for connections in options.connections:
            with serving(command) as (url, process):
                spent = cpu_time(process)
                measured = generate(url, connections, options.seconds)
                spent, memory = cpu_time(process) - spent, process.memory_info().rss
                print(row(name, connections, measured, spent, memory), flush=True)
    memory_over(options.calls, generate)
    return 0


def row(name: str, connections: int, load: Load, cpu: float, memory: int) -> str:
    """One row of the table; CPU in seconds and memory in bytes, of the server."""
    cells = (
        name,
        f"{connections:,}",
        f"{load.calls / load.seconds:,.0f}",
        f"{connections / LATENCY:,.0f}",
        f"{1000 * (load.p50 - LATENCY):.0f}",
        f"{1000 * (load.p99 - LATENCY):.0f}",
        f"{1000 * cpu / load.calls:.2f}",
        f"{memory / 1e6:.0f}",
        f"{load.errors}",
    )
    return f"| {' | '.join(cells)} |"


def memory_over(calls: int, generate: Generator) -> None:
    """Show how memory grows over so many calls, in five steps."""
    print(f"\nMemory of the provider over {calls:,} calls without latency:")
    with serving(SERVERS["provider"]) as (url, process):
        configure(url, first_token=0)
        done, shown = 0, 0
        while True:
            if done >= shown:
                print(f"{done:9,} calls: {process.memory_info().rss / 1e6:.0f} MB")
                shown += calls // 5
            if done >= calls:
                break
            done += generate(url, 64, 1).calls


def cpu_time(process: psutil.Process) -> float:
    """Seconds of CPU that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def serving(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server process that prints its URL; end it."""
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        configure(url, first_token=LATENCY, per_token=0, jitter=0)
        yield url, psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


def configure(url: str, **settings: Any) -> None:
    """Set how the provider behaves; the floor has no such route, and no need."""
    data = json.dumps(settings).encode()
    request = urllib.request.Request(f"{url}/_provider/config", data, method="PATCH")
    urllib.request.urlopen(request).close()


def wrk(url: str, connections: int, seconds: float) -> Load:
    """Keep the connections busy for so long, by wrk."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA.replace("BODY", json.dumps(BODY)))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        command += ["--timeout", "30s", "-s", script.name, url + ROUTE]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    p50, p99 = found["p50"] / 1e6, found["p99"] / 1e6
    return Load(found["calls"], found["us"] / 1e6, p50, p99, found["errors"])


LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [[BODY]]
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '{"calls": %d, "us": %d, "p50": %d, "p99": %d, "errors": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def bare_client(url: str, connections: int, seconds: float) -> Load:
    """The same by a bare aiohttp client in this process."""
    return asyncio.run(_bare_client(url + ROUTE, connections, seconds))


async def _bare_client(url: str, connections: int, seconds: float) -> Load:
    latencies: list[float] = []
    errors, begun = 0, time.perf_counter()

    async def keep_busy(session: ClientSession) -> None:
        nonlocal errors
        while (sent := time.perf_counter()) < begun + seconds:
            async with session.post(url, json=BODY) as answer:
                await answer.read()
                errors += answer.status != 200
            latencies.append(time.perf_counter() - sent)

    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        await asyncio.gather(*[keep_busy(session) for _ in range(connections)])
    took = time.perf_counter() - begun
    shares = quantiles(latencies, n=100)
    return Load(len(latencies), took, shares[49], shares[98], errors)


GENERATORS: dict[str, Generator] = {"wrk": wrk, "aiohttp": bare_client}


def serve_floor() -> None:
    """Run the floor: a bare aiohttp handler."""

    async def handler(request: web.Request) -> web.Response:
        if request.method == "POST":
            await request.read()
            await asyncio.sleep(LATENCY)
        return web.json_response(BODY)

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        host, port = runner.addresses[0]
        print(json.dumps({"url": f"http://{host}:{port}"}), flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


SERVERS = {
    "bare aiohttp": [sys.executable, __file__, "--serve-floor"],
    "provider": [sys.executable, "-m", "llm_stub", "--port", "0"],
}


if __name__ == "__main__":
    if "--serve-floor" in sys.argv:
        serve_floor()
    else:
        sys.exit(main())

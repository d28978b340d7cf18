"""How much load the stub can handle: python run.py bench stub

A load generator keeps a number of connections busy with chat requests of 0.2 s
each, so the ideal throughput is connections / 0.2 s. The generator is wrk if it
is installed (Debian: apt-get install wrk), otherwise a bare aiohttp client,
which takes more CPU away from the stub on a small machine. The baseline is a
bare aiohttp handler that only sleeps and responds.

Each run starts with a burst of requests on all connections, which a single
process can only handle one by one. In a run of 40 seconds, this burst is less
than one percent of all requests.
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

LATENCY = 0.2  # seconds per request
BODY = {"model": "m", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
PATH = "/v1/chat/completions"
MAX_OPEN_FILES = 20_000


class Load(NamedTuple):
    """The result of one load run; times and latencies in seconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    errors: int


Generator = Callable[[str, int, float], Load]  # URL, connections, seconds

HEADER = """\
| server | connections | requests/s | ideal | added p50, ms | added p99, ms \
| CPU/request, ms | memory, MB | errors |
|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(prog="python run.py bench stub")
    parser.add_argument("--seconds", type=float, default=40, help="per run (40)")
    parser.add_argument("--connections", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument(
        "--requests", type=int, default=200_000, help="for the memory test (200000)"
    )
    parser.add_argument(
        "--generator",
        choices=["wrk", "aiohttp"],
        default="wrk" if shutil.which("wrk") else "aiohttp",
    )
    parser.add_argument("--quick", action="store_true", help="finish in a few seconds")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.connections, options.requests = 2, [100], 2_000
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_OPEN_FILES), hard))
    generate = GENERATORS[options.generator]
    print(f"load generator: {options.generator}; {psutil.cpu_count()} CPUs\n\n{HEADER}")
    for name, command in SERVERS.items():
        for connections in options.connections:
            with serving(command) as (url, process):
                cpu_before = cpu_time(process)
                load = generate(url, connections, options.seconds)
                cpu, memory = cpu_time(process) - cpu_before, process.memory_info().rss
                print(row(name, connections, load, cpu, memory), flush=True)
    print_memory_growth(options.requests, generate)
    return 0


def row(name: str, connections: int, load: Load, cpu: float, memory: int) -> str:
    """Format a table row. `cpu` (seconds) and `memory` (bytes) are the server's."""
    cells = (
        name,
        f"{connections:,}",
        f"{load.requests / load.seconds:,.0f}",
        f"{connections / LATENCY:,.0f}",
        f"{1000 * (load.p50 - LATENCY):.0f}",
        f"{1000 * (load.p99 - LATENCY):.0f}",
        f"{1000 * cpu / load.requests:.2f}",
        f"{memory / 1e6:.0f}",
        f"{load.errors}",
    )
    return f"| {' | '.join(cells)} |"


def print_memory_growth(requests: int, generate: Generator) -> None:
    """Print the stub's memory in five steps up to this number of requests."""
    print(f"\nMemory of the stub over {requests:,} requests without latency:")
    with serving(SERVERS["stub"]) as (url, process):
        configure(url, first_token=0)
        done, next_print = 0, 0
        while True:
            if done >= next_print:
                print(f"{done:9,} requests: {process.memory_info().rss / 1e6:.0f} MB")
                next_print += requests // 5
            if done >= requests:
                break
            done += generate(url, 64, 1).requests


def cpu_time(process: psutil.Process) -> float:
    """CPU time that a process has used, in seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def serving(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server that prints its URL as JSON; kill it after the block."""
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
    """Change the stub's settings. The baseline server ignores this request."""
    data = json.dumps(settings).encode()
    request = urllib.request.Request(f"{url}/_provider/config", data, method="PATCH")
    urllib.request.urlopen(request).close()


def wrk(url: str, connections: int, seconds: float) -> Load:
    """Generate load with wrk."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA.replace("BODY", json.dumps(BODY)))
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        command += ["--timeout", "30s", "-s", script.name, url + PATH]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(process.stdout.splitlines()[-1])
    p50, p99 = result["p50"] / 1e6, result["p99"] / 1e6
    return Load(result["requests"], result["us"] / 1e6, p50, p99, result["errors"])


LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [[BODY]]
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "us": %d, "p50": %d, "p99": %d, "errors": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def bare_client(url: str, connections: int, seconds: float) -> Load:
    """Generate the same load with a bare aiohttp client in this process."""
    return asyncio.run(keep_busy(url + PATH, connections, seconds))


async def keep_busy(url: str, connections: int, seconds: float) -> Load:
    """Send one request after another on each connection."""
    latencies: list[float] = []
    errors, start = 0, time.perf_counter()

    async def send_requests(session: ClientSession) -> None:
        nonlocal errors
        while (sent := time.perf_counter()) < start + seconds:
            async with session.post(url, json=BODY) as response:
                await response.read()
                errors += response.status != 200
            latencies.append(time.perf_counter() - sent)

    async with ClientSession(connector=TCPConnector(limit=0)) as session:
        await asyncio.gather(*[send_requests(session) for _ in range(connections)])
    elapsed = time.perf_counter() - start
    percentiles = quantiles(latencies, n=100)
    return Load(len(latencies), elapsed, percentiles[49], percentiles[98], errors)


GENERATORS: dict[str, Generator] = {"wrk": wrk, "aiohttp": bare_client}


def serve_baseline() -> None:
    """Run the baseline server: a bare aiohttp handler."""

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
    "bare aiohttp": [sys.executable, __file__, "--serve-baseline"],
    "stub": [sys.executable, "-m", "llm_stub", "--port", "0"],
}


if __name__ == "__main__":
    if "--serve-baseline" in sys.argv:
        serve_baseline()
    else:
        sys.exit(main())

"""For scoreboard.py: run one way in a fresh process and measure it from outside.

The ways are the cells of lesson 15 with the tag `bench`. The baselines send the
same requests through fewer layers.
"""

import argparse
import asyncio
import inspect
import json
import linecache
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import cache
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil

from helpers.connection import Provider

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LESSON = NOTEBOOKS / "15_choose.ipynb"
PROMPTS = (NOTEBOOKS / "prompts.txt").read_text("utf-8").splitlines()
SPAWN = multiprocessing.get_context("spawn")

WAYS = ["loop", "pool", "gather", "semaphore", "workers", "batch", "abatch"]
WAYS += ["aiohttp", "Dask", "Batch API"]  # in the lesson's order

Names = dict[str, Any]  # "way" maps (prompts, at_once) to answers or a coroutine
Row = dict[str, Any]


# The baselines. Each builds a client. A "transport" is closed after the run.


def bare_sdk() -> Names:
    """The openai package without LangChain."""
    return way_with(openai.AsyncOpenAI())


def bare_sdk_on_aiohttp() -> Names:
    """The openai package on its aiohttp transport, without LangChain."""
    transport = openai.DefaultAioHttpClient()
    client = openai.AsyncOpenAI(http_client=transport)
    return way_with(client) | {"transport": transport}


def way_with(client: openai.AsyncOpenAI) -> Names:
    """The way that sends its requests with this client."""

    async def ask(prompt: str) -> str:
        reply = await client.chat.completions.create(**body(prompt))
        return str(reply.choices[0].message.content)

    return {"way": lambda prompts, at_once: run_workers(ask, prompts, at_once)}


def bare_aiohttp() -> Names:
    """Only HTTP and JSON, on aiohttp."""
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"

    async def way(prompts: list[str], at_once: int) -> list[str]:
        connector = aiohttp.TCPConnector(limit=at_once)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(prompt: str) -> str:
                async with session.post(url, json=body(prompt)) as response:
                    reply = await response.json()
                return str(reply["choices"][0]["message"]["content"])

            return await run_workers(ask, prompts, at_once)

    return {"way": way}


def body(prompt: str) -> dict[str, Any]:
    """The request body that LangChain sends for a prompt."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": "gpt-3.5-turbo", "messages": messages}


async def run_workers(
    ask: Callable[[str], Any], prompts: list[str], at_once: int
) -> list[str]:
    """Return the answers, from workers that take their prompts from one iterator."""
    answers, waiting = [""] * len(prompts), iter(enumerate(prompts))

    async def worker() -> None:
        for number, prompt in waiting:
            answers[number] = await ask(prompt)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())
            await asyncio.sleep(0)  # let it start first, as in the lesson
    return answers


BASELINES = {
    "bare SDK": bare_sdk,
    "bare SDK, aiohttp": bare_sdk_on_aiohttp,
    "bare aiohttp": bare_aiohttp,
}


# One run: the process that is measured, and the one that measures it


def load_lesson(name: str) -> Names:
    """The names that the lesson's cells with the tag `bench` define.

    They belong to `__main__`, as in a notebook, so Dask pickles them by value.
    Dask is imported only for the way that uses it.
    """
    names: Names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(LESSON.read_text("utf-8"))["cells"]):
        tags = cell["metadata"].get("tags", [])
        if "bench" in tags and ("dask" not in tags or name == "Dask"):
            source, file = "".join(cell["source"]), f"<cell {number}>"
            lines = source.splitlines(keepends=True)
            linecache.cache[file] = (len(source), None, lines, file)  # for inspect
            exec(compile(source, file, "exec"), names)
    return names | {"way": names["ways"][name][0], "lines": names["lines_of"](name)}


def run_in_child(
    pipe: Connection, name: str, prompts: list[str], options: argparse.Namespace
) -> None:
    """In a fresh process: prepare, wait for "go", run, and wait to be measured."""
    names = BASELINES[name]() if name in BASELINES else load_lesson(name)
    start, cluster = time.perf_counter(), None
    if name == "Dask":
        cluster = names["start_dask"](options.at_once, options.workers)
    cluster_seconds = time.perf_counter() - start
    with asyncio.Runner() as loop:

        def call(prompts: list[str]) -> tuple[float, float, list[str]]:
            start, cpu = time.perf_counter(), time.process_time()
            answers = names["way"](prompts, options.at_once)
            if inspect.iscoroutine(answers):
                answers = loop.run(answers)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            return seconds, cpu, [*map(str, answers)]

        if options.warm:
            call(prompts[:1])
        pipe.send((cluster_seconds, names.get("lines")))
        pipe.recv()
        pipe.send(call(prompts))
        pipe.recv()
        if "transport" in names:
            loop.run(names["transport"].aclose())
    if cluster:
        cluster.close()
        cluster.cluster.close()


def measure(
    name: str, count: int, provider: Provider, options: argparse.Namespace
) -> Row:
    """Run a way in a fresh process and measure that process from outside.

    Raises EOFError if the process dies before it returns its answers.
    """
    prompts = list(islice(cycle(PROMPTS), count))
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=run_in_child, args=(theirs, name, prompts, options))
    process.start()
    theirs.close()  # so that recv() fails when the process dies
    cluster_seconds, lines = ours.recv()
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    tree = [parent, *children]
    provider.ask("/_provider/reset", "POST")
    provider.configure(requests_per_minute=None)
    provider.configure(requests_per_minute=options.limit)  # refills the bucket
    before, memory = cpu_seconds(children), 0.0
    ours.send("go")
    while not ours.poll(0.05):
        memory = max(memory, megabytes(tree))
    seconds, cpu, answers = ours.recv()
    # The operating system may count in steps of 10 ms, so the process reports its own.
    cpu += cpu_seconds(children) - before
    memory = max(memory, megabytes(tree))
    ours.send("end")
    process.join()
    while (stats := provider.ask("/_provider/stats"))["in_flight"]:
        time.sleep(0.01)  # the stub notices the end of a call a moment later
    at_once = {"loop": 1, "gather": count}.get(name, options.at_once)
    efficiency = options.latency * math.ceil(count / at_once) / seconds
    return {
        "way": name,
        "prompts": count,
        "answered": sum(map(str.__eq__, answers, cycle(expected()))),
        "seconds": seconds,
        "ms_per_call": 1000 * seconds / count,
        # The provider decides how long a batch takes.
        "efficiency": None if name == "Batch API" else efficiency,
        "in_flight": stats["peak_in_flight"],
        "attempts": stats["requests"],
        "rejected": stats["statuses"].get("429", 0),
        "cpu_ms": 1000 * cpu / count,
        "memory_mb": memory,
        "lines": lines,
        "cluster_s": cluster_seconds,  # not part of "seconds"
    }


@cache
def expected() -> list[str]:
    """The answer to each prompt, from sequential calls."""
    client = openai.OpenAI()
    replies = [client.chat.completions.create(**body(prompt)) for prompt in PROMPTS]
    return [str(reply.choices[0].message.content) for reply in replies]


def cpu_seconds(tree: list[psutil.Process]) -> float:
    """CPU time that these processes have used so far, in seconds."""
    return float(sum(sum(process.cpu_times()[:2]) for process in tree))


def megabytes(tree: list[psutil.Process]) -> float:
    """Resident memory of these processes, in MB."""
    return float(sum(process.memory_info().rss for process in tree) / 1e6)

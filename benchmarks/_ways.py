"""One run of one way, for scoreboard.py: in a fresh process, seen from outside.

The ways are the cells of lesson 15 with the tag `bench`; the floors send the
same through fewer layers.
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
WAYS += ["aiohttp", "Dask", "Batch API"]  # the lesson's, in its order

Names = dict[str, Any]  # "way": prompts, at once -> answers, or a coroutine
Row = dict[str, Any]


# The floors. Each builds its client; what is to be closed is its "transport".


def bare_sdk() -> Names:
    """The openai package without LangChain."""
    return on_sdk(openai.AsyncOpenAI())


def bare_sdk_on_aiohttp() -> Names:
    """The same on its aiohttp transport."""
    transport = openai.DefaultAioHttpClient()
    client = openai.AsyncOpenAI(http_client=transport)
    return on_sdk(client) | {"transport": transport}


def on_sdk(client: openai.AsyncOpenAI) -> Names:
    """The way that asks this client."""

    async def ask(prompt: str) -> str:
        reply = await client.chat.completions.create(**body(prompt))
        return str(reply.choices[0].message.content)

    return {"way": lambda prompts, at_once: shared(ask, prompts, at_once)}


def bare_aiohttp() -> Names:
    """HTTP and JSON, and nothing else."""
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"

    async def way(prompts: list[str], at_once: int) -> list[str]:
        connector = aiohttp.TCPConnector(limit=at_once)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask(prompt: str) -> str:
                async with session.post(url, json=body(prompt)) as response:
                    reply = await response.json()
                return str(reply["choices"][0]["message"]["content"])

            return await shared(ask, prompts, at_once)

    return {"way": way}


def body(prompt: str) -> dict[str, Any]:
    """What LangChain sends for a prompt."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": "gpt-3.5-turbo", "messages": messages}


async def shared(
    ask: Callable[[str], Any], prompts: list[str], at_once: int
) -> list[str]:
    """The answers, by workers that take their prompts from one iterator."""
    answers, waiting = [""] * len(prompts), iter(enumerate(prompts))

    async def worker() -> None:
        for number, prompt in waiting:
            answers[number] = await ask(prompt)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())
            await asyncio.sleep(0)  # let it begin, as the lesson's do
    return answers


FLOORS = {
    "bare SDK": bare_sdk,
    "bare SDK, aiohttp": bare_sdk_on_aiohttp,
    "bare aiohttp": bare_aiohttp,
}


# One run: in the process that is measured, and in the one that looks at it


def lesson(name: str) -> Names:
    """The names that the lesson's cells with the tag `bench` define.

    They belong to `__main__`, as in a notebook, so Dask sends them by value.
    Only the way that needs Dask imports it.
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


def measured(
    pipe: Connection, name: str, prompts: list[str], options: argparse.Namespace
) -> None:
    """In a fresh process: get ready, wait for the word, run, wait to be looked at."""
    names = FLOORS[name]() if name in FLOORS else lesson(name)
    begun, cluster = time.perf_counter(), None
    if name == "Dask":
        cluster = names["start_dask"](options.at_once, options.workers)
    started = time.perf_counter() - begun
    with asyncio.Runner() as loop:

        def call(prompts: list[str]) -> tuple[float, float, list[str]]:
            begun, cpu = time.perf_counter(), time.process_time()
            answers = names["way"](prompts, options.at_once)
            if inspect.iscoroutine(answers):
                answers = loop.run(answers)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
            return seconds, cpu, [*map(str, answers)]

        if options.warm:
            call(prompts[:1])
        pipe.send((started, names.get("lines")))
        pipe.recv()
        pipe.send(call(prompts))
        pipe.recv()
        if "transport" in names:
            loop.run(names["transport"].aclose())
    if cluster:
        cluster.close()
        cluster.cluster.close()


def measure(
    name: str, number: int, provider: Provider, options: argparse.Namespace
) -> Row:
    """Run a way in a fresh process, and look at that process from here.

    Raises EOFError where it ends before it has answered.
    """
    prompts = list(islice(cycle(PROMPTS), number))
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=measured, args=(theirs, name, prompts, options))
    process.start()
    theirs.close()  # so that we hear of it when the process ends
    started, lines = ours.recv()
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    tree = [parent, *children]
    provider.ask("/_provider/reset", "POST")
    provider.configure(requests_per_minute=None)
    provider.configure(requests_per_minute=options.limit)  # with a full bucket
    before, memory = cpu_seconds(children), 0.0
    ours.send("go")
    while not ours.poll(0.05):
        memory = max(memory, megabytes(tree))
    seconds, cpu, answers = ours.recv()
    # The system may count in steps of 10 ms; the process itself knows it better.
    cpu += cpu_seconds(children) - before
    memory = max(memory, megabytes(tree))
    ours.send("end")
    process.join()
    while (stats := provider.ask("/_provider/stats"))["in_flight"]:
        time.sleep(0.01)  # the provider sees the end of a call a moment later
    at_once = {"loop": 1, "gather": number}.get(name, options.at_once)
    efficiency = options.latency * math.ceil(number / at_once) / seconds
    return {
        "way": name,
        "prompts": number,
        "answered": sum(map(str.__eq__, answers, cycle(expected()))),
        "seconds": seconds,
        "each_ms": 1000 * seconds / number,
        # A batch takes as long as the provider pleases.
        "efficiency": None if name == "Batch API" else efficiency,
        "in_flight": stats["peak_in_flight"],
        "attempts": stats["requests"],
        "refused": stats["statuses"].get("429", 0),
        "cpu_ms": 1000 * cpu / number,
        "memory_mb": memory,
        "lines": lines,
        "cluster_s": started,  # not in the seconds
    }


@cache
def expected() -> list[str]:
    """The answer to each of the prompts, asked one by one."""
    client = openai.OpenAI()
    replies = [client.chat.completions.create(**body(prompt)) for prompt in PROMPTS]
    return [str(reply.choices[0].message.content) for reply in replies]


def cpu_seconds(tree: list[psutil.Process]) -> float:
    """What these processes have computed so far."""
    return float(sum(sum(process.cpu_times()[:2]) for process in tree))


def megabytes(tree: list[psutil.Process]) -> float:
    """What these processes hold now."""
    return float(sum(process.memory_info().rss for process in tree) / 1e6)

"""Memory and tasks of a long job: python run.py bench bounds

Runs the three ways of lesson 05 (workers on a queue, a semaphore, no limit) with
more prompts than the lesson has time for. The code comes from the notebook's
cells. Each run has a separate process and a separate stub.
"""

import argparse
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from langchain_openai import ChatOpenAI

from helpers import connect

LESSON = Path(__file__).parents[1] / "notebooks" / "05_bound_what_is_in_flight.ipynb"
WAYS = ["workers", "with_semaphore", "unbounded"]


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python run.py bench bounds")
    parser.add_argument("prompts", type=int, nargs="*", default=[100, 1000, 10_000])
    numbers = parser.parse_args().prompts
    print("| way | prompts | answers | peak tasks | peak blocks, 1000s | seconds |")
    print("|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for way in WAYS:
            for number in numbers:
                future = processes.submit(measure, way, number)
                seconds, tasks, blocks, answers = future.result()
                print(
                    f"| {way} | {number:,} | {answers:,} | {tasks:,} "
                    f"| {blocks:.1f} | {seconds:.1f} |",
                    flush=True,
                )
    return 0


Result = tuple[float, int, float, int]


def measure(way: str, number: int) -> Result:
    """Return seconds, peak tasks, peak memory blocks in thousands, and answers."""
    connect(first_token=0.05, per_token=0, jitter=0)
    lesson = load_lesson()

    async def warm_up_and_run() -> Result:
        await lesson["run"](lesson["workers"], 100)  # to do lazy imports first
        result: Result = await lesson["run"](lesson[way], number)
        return result

    return asyncio.run(warm_up_and_run())


def load_lesson() -> dict[str, Any]:
    """The names that the lesson's cells with the tag `bounds` define."""
    names: dict[str, Any] = {"asyncio": asyncio, "ChatOpenAI": ChatOpenAI}
    for cell in nbformat.read(LESSON, as_version=4).cells:
        if "bounds" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


if __name__ == "__main__":
    raise SystemExit(main())

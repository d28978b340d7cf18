"""What a long job holds at a time: python run.py bench bounds

The three ways of lesson 05 (workers on a queue, a semaphore, no bound), taken
from the notebook's own cells and run with more prompts than a lesson has time
for. Each run has a process and a provider of its own.
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
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python run.py bench bounds")
    parser.add_argument("prompts", type=int, nargs="*", default=[100, 1000, 10_000])
    numbers = parser.parse_args().prompts
    print("| way | prompts | answers | tasks | thousand blocks | seconds |")
    print("|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for way in WAYS:
            for number in numbers:
                done = processes.submit(measured, way, number)
                seconds, tasks, blocks, answers = done.result()
                print(
                    f"| {way} | {number:,} | {answers:,} | {tasks:,} "
                    f"| {blocks:.1f} | {seconds:.1f} |",
                    flush=True,
                )
    return 0


def measured(way: str, number: int) -> tuple[float, int, float, int]:
    """Seconds, most tasks alive, most blocks in thousands, and answers."""
    connect(first_token=0.05, per_token=0, jitter=0)
    lesson = lessons_cells()

    async def both() -> tuple[float, int, float, int]:
        await lesson["run"](lesson["workers"], 100)  # loads what is loaded once
        found: tuple[float, int, float, int] = await lesson["run"](lesson[way], number)
        return found

    return asyncio.run(both())


def lessons_cells() -> dict[str, Any]:
    """The names that the lesson's cells with the tag `bounds` define."""
    names: dict[str, Any] = {"asyncio": asyncio, "ChatOpenAI": ChatOpenAI}
    for cell in nbformat.read(LESSON, as_version=4).cells:
        if "bounds" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


if __name__ == "__main__":
    raise SystemExit(main())

"""Lesson 11's code on a cluster whose processes were started separately."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import nbformat
import pytest
from distributed import Client

from helpers import Timeline, connect
from helpers.connection import Provider

LESSON = Path(__file__).parents[2] / "notebooks" / "11_use_more_than_one_process.ipynb"
DASK = [sys.executable, "-m", "dask"]
PROMPTS = [f"Question {number}" for number in range(48)]

Run = Callable[[list[str], int], list[Any]]  # prompts, chunk size -> results


@pytest.fixture(scope="module")
def lesson() -> dict[str, Any]:
    """The names that the lesson's cells with the tag `cluster` define.

    They belong to `__main__`, as in a notebook, so Dask pickles them by value.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(LESSON, as_version=4).cells:
        if "cluster" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


@pytest.fixture(scope="module")
def cluster(
    stop_stub_at_exit: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A client of a scheduler and two workers, started with the lesson's commands."""
    folder = tmp_path_factory.mktemp("cluster")
    quiet = {"DASK_LOGGING__DISTRIBUTED": "error"}
    with ExitStack() as stack, mock.patch.dict(os.environ):
        connect()  # sets the variables that point the workers at the stub

        def start(*words: str, name: str) -> None:
            with (folder / f"{name}.txt").open("wb") as log:
                process = subprocess.Popen(
                    [*DASK, *words, "--dashboard-address", ":0"],
                    cwd=folder,
                    env=os.environ | quiet,
                    stdout=log,
                    stderr=log,
                )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        file = str(folder / "scheduler.json")
        here = ("--host", "127.0.0.1")
        start("scheduler", *here, "--port=0", "--scheduler-file", file, name="s")
        with Client(scheduler_file=file, timeout=60) as first_client:
            address = first_client.scheduler.address
        for name in ("a", "b"):
            start("worker", address, *here, "--nthreads=2", name=name)
        assert address.startswith("tcp://")
        client = stack.enter_context(Client(address, timeout=60))
        client.wait_for_workers(2, timeout=60)
        yield client


@pytest.fixture
def client(cluster: Client, lesson: dict[str, Any]) -> Client:
    """A client with two workers, each with the lesson's plugin and eight slots."""
    cluster.wait_for_workers(2, timeout=60)
    cluster.register_plugin(lesson["Calls"](max_concurrency=8))
    return cluster


@pytest.fixture
def run(client: Client, lesson: dict[str, Any]) -> Run:
    """Run the prompts; return all results in prompt order."""

    def run(prompts: list[str], size: int) -> list[Any]:
        chunks = dict(lesson["done_chunks"](client, prompts, size))
        return [text for number in sorted(chunks) for text in chunks[number]]

    return run


def test_answers_from_both_workers_are_in_prompt_order(
    provider: Provider, client: Client, run: Run
) -> None:
    provider.configure(first_token=0.5)

    with Timeline("cluster") as seen:
        answers = run(PROMPTS, 8)
    again = run(PROMPTS, 5)  # for any chunk size

    assert answers == again
    assert len(set(answers)) == len(PROMPTS)
    assert seen.attempts == len(PROMPTS)
    assert seen.peak_in_flight == 16  # eight per worker


def test_killing_a_worker_repeats_calls_but_loses_no_answers(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    provider.configure(first_token=0.5)
    before = run(PROMPTS, 8)
    chunks: dict[int, list[str]] = {}

    with Timeline("killed") as seen:
        for number, answers in lesson["done_chunks"](client, PROMPTS, 8):
            assert number not in chunks
            chunks[number] = answers
            if len(chunks) == 3:
                processing = client.processing()
                busiest = max(processing, key=lambda worker: len(processing[worker]))
                process_id = client.run(os.getpid, workers=[busiest])[busiest]
                os.kill(process_id, signal.SIGKILL)

    assert [text for number in sorted(chunks) for text in chunks[number]] == before
    assert seen.attempts > len(PROMPTS)
    assert seen.attempts <= len(PROMPTS) + 32  # running, or done but not yet fetched


def test_dead_worker_is_replaced_by_one_with_the_same_plugin(
    provider: Provider, client: Client, run: Run
) -> None:
    before = set(client.nthreads())
    process_ids = client.run(os.getpid)

    os.kill(next(iter(process_ids.values())), signal.SIGKILL)
    answers = run(PROMPTS, 4)
    client.wait_for_workers(2, timeout=60)

    assert all(isinstance(answer, str) for answer in answers)
    assert len(set(client.nthreads()) - before) == 1


def test_failed_prompt_has_its_error_in_its_place_and_the_others_are_answered(
    provider: Provider, run: Run
) -> None:
    # The SDK's own errors can't be unpickled. Returned unchanged, one would keep its
    # whole chunk from arriving.
    provider.configure(faults_by_prompt={"Question 5": ["error_500"] * 9})

    answers: list[Any] = []
    thread = Thread(target=lambda: answers.extend(run(PROMPTS[:16], 8)), daemon=True)
    thread.start()
    thread.join(60)

    assert not thread.is_alive()
    assert isinstance(answers[5], RuntimeError)
    assert "500" in str(answers[5])
    assert all(isinstance(text, str) for text in answers[:5] + answers[6:])


def test_repeated_prompt_is_sent_once_per_repetition(
    provider: Provider, run: Run
) -> None:
    with Timeline("repeated prompt") as seen:
        run(["Who wrote Hamlet?"] * 5, 1)

    assert seen.attempts == 5


def test_leaving_the_loop_early_cancels_the_chunks_that_have_not_started(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    provider.configure(first_token=0.5)
    with Timeline("left early") as seen:
        for _ in lesson["done_chunks"](client, PROMPTS * 3, 4):
            break
        run(PROMPTS[:8], 8)  # queued behind everything still to be done

    assert seen.attempts < 2 * len(PROMPTS)


def test_each_worker_keeps_one_llm_client(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    def llm_id(dask_worker: Any) -> int:
        return id(dask_worker.plugins["calls"].llm)

    before = client.run(llm_id)
    run(PROMPTS, 8)

    assert client.run(llm_id) == before
    assert len(before) == 2


def test_shared_rate_limit_applies_across_all_workers(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    provider.configure(requests_per_minute=1200, burst=1)
    client.register_plugin(lesson["SharedLimit"](per_second=18))
    client.register_plugin(lesson["Together"](max_concurrency=32))

    with Timeline("limited") as seen:
        answers = run(PROMPTS + PROMPTS, 8)

    assert all(isinstance(answer, str) for answer in answers)
    assert seen.failed <= 0.02 * seen.attempts
    assert seen.wall > 4.5  # 96 calls at 18 per second

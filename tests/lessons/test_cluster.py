"""Lesson 11's cells on a cluster whose processes were started by hand."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import nbformat
import pytest
from distributed import Client

from helpers import Timeline, connect
from helpers.connection import Provider

LESSON = Path(__file__).parents[2] / "notebooks" / "11_use_more_than_one_process.ipynb"
DASK = [sys.executable, "-m", "dask"]
PROMPTS = [f"Question {number}" for number in range(48)]

Run = Callable[[list[str], int], list[Any]]  # prompts, size of a chunk -> results


@pytest.fixture(scope="module")
def lesson() -> dict[str, Any]:
    """The names that the lesson's cells with the tag `cluster` define.

    They belong to `__main__`, as in a notebook: so they travel by value.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in nbformat.read(LESSON, as_version=4).cells:
        if "cluster" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


@pytest.fixture(scope="module")
def cluster(
    stopped_at_the_end: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A client by address; scheduler and two workers by the commands of the lesson."""
    connect()  # the workers find the provider in their environment
    folder = tmp_path_factory.mktemp("cluster")
    quiet = {"DASK_LOGGING__DISTRIBUTED": "error"}
    with ExitStack() as stack:

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
        with Client(scheduler_file=file, timeout=60) as found:
            address = found.scheduler.address
        for name in ("a", "b"):
            start("worker", address, *here, "--nthreads=2", name=name)
        assert address.startswith("tcp://")
        client = stack.enter_context(Client(address, timeout=60))
        client.wait_for_workers(2, timeout=60)
        yield client


@pytest.fixture
def client(cluster: Client, lesson: dict[str, Any]) -> Client:
    """Both workers are there and have the lesson's plugin, eight calls each."""
    cluster.wait_for_workers(2, timeout=60)
    cluster.register_plugin(lesson["Calls"](max_concurrency=8))
    return cluster


@pytest.fixture
def run(client: Client, lesson: dict[str, Any]) -> Run:
    """All results, in the order of the prompts."""

    def run(prompts: list[str], size: int) -> list[Any]:
        found = dict(lesson["done_chunks"](client, prompts, size))
        return [text for number in sorted(found) for text in found[number]]

    return run


def test_the_answers_come_in_the_order_of_the_prompts_from_both_workers(
    provider: Provider, client: Client, run: Run
) -> None:
    provider.configure(first_token=0.5)

    with Timeline("cluster") as seen:
        answers = run(PROMPTS, 8)
    again = run(PROMPTS, 5)  # whatever the size of a chunk

    assert answers == again
    assert len(set(answers)) == len(PROMPTS)
    assert seen.attempts == len(PROMPTS)
    assert seen.peak_in_flight == 16  # eight in each


def test_a_worker_that_is_killed_costs_calls_and_no_answers(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    provider.configure(first_token=0.5)
    before = run(PROMPTS, 8)
    found: dict[int, list[str]] = {}

    with Timeline("killed") as seen:
        for number, answers in lesson["done_chunks"](client, PROMPTS, 8):
            assert number not in found
            found[number] = answers
            if len(found) == 3:
                in_work = client.processing()
                busy = max(in_work, key=lambda worker: len(in_work[worker]))
                process_id = client.run(os.getpid, workers=[busy])[busy]
                os.kill(process_id, signal.SIGKILL)

    assert [text for number in sorted(found) for text in found[number]] == before
    assert seen.attempts > len(PROMPTS)
    assert seen.attempts <= len(PROMPTS) + 32  # in work, or done and not yet fetched


def test_a_worker_that_has_died_is_replaced_by_one_that_is_set_up_alike(
    provider: Provider, client: Client, run: Run
) -> None:
    before = set(client.nthreads())
    process_ids = client.run(os.getpid)

    os.kill(next(iter(process_ids.values())), signal.SIGKILL)
    answers = run(PROMPTS, 4)
    client.wait_for_workers(2, timeout=60)

    assert all(isinstance(answer, str) for answer in answers)
    assert len(set(client.nthreads()) - before) == 1


def test_an_error_stands_in_its_place_and_the_others_are_answered(
    provider: Provider, run: Run
) -> None:
    # The SDK's own error cannot be unpickled: sent as it is, its chunk never came.
    provider.configure(faults_by_prompt={"Question 5": ["error_500"] * 9})

    answers: list[Any] = []
    asking = Thread(target=lambda: answers.extend(run(PROMPTS[:16], 8)), daemon=True)
    asking.start()
    asking.join(60)

    assert not asking.is_alive()
    assert isinstance(answers[5], RuntimeError)
    assert "500" in str(answers[5])
    assert all(isinstance(text, str) for text in answers[:5] + answers[6:])


def test_the_same_prompt_is_asked_as_often_as_it_is_given(
    provider: Provider, run: Run
) -> None:
    with Timeline("the same") as seen:
        run(["Who wrote Hamlet?"] * 5, 1)

    assert seen.attempts == 5


def test_a_loop_that_is_left_early_asks_no_more_than_has_been_begun(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    provider.configure(first_token=0.5)
    with Timeline("left early") as seen:
        for _ in lesson["done_chunks"](client, PROMPTS * 3, 4):
            break
        run(PROMPTS[:8], 8)  # comes after all that is still to be done

    assert seen.attempts < 2 * len(PROMPTS)


def test_each_worker_has_one_client_for_its_whole_life(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    def connected(dask_worker: Any) -> int:
        return id(dask_worker.plugins["calls"].llm)

    before = client.run(connected)
    run(PROMPTS, 8)

    assert client.run(connected) == before
    assert len(before) == 2


def test_one_limit_holds_for_all_workers_together(
    provider: Provider, client: Client, lesson: dict[str, Any], run: Run
) -> None:
    provider.configure(requests_per_minute=1200, burst=1)
    client.register_plugin(lesson["SharedLimit"](per_second=18))
    client.register_plugin(lesson["Together"](max_concurrency=32))

    with Timeline("limited") as seen:
        answers = run(PROMPTS + PROMPTS, 8)

    assert all(isinstance(answer, str) for answer in answers)
    assert seen.failed <= 0.02 * seen.attempts
    assert seen.wall > 4.5  # 96 at 18 a second

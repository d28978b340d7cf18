"""The functions to copy from lesson 07, and what its prose says about the client."""

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import openai
import pytest
from langchain_openai import ChatOpenAI

from helpers import Timeline
from helpers.connection import Provider

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_survive_failures.ipynb"
TIMEOUT = 10.0  # seconds for any one step, even on a busy machine


@pytest.fixture
def lesson() -> dict[str, Any]:
    """The names that the cells with the tag `survive` define."""
    names: dict[str, Any] = {"asyncio": asyncio, "suppress": suppress}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "survive" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


@pytest.fixture
def run_all(lesson: dict[str, Any]) -> Callable[..., Any]:
    function: Callable[..., Any] = lesson["run_all"]
    return function


class FakeAsk:
    """An `ask` whose calls wait until the test sets their answers."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.answers: dict[str, asyncio.Future[str]] = {}
        self._new_call = asyncio.Event()

    async def __call__(self, prompt: str) -> str:
        self.started.append(prompt)
        self._new_call.set()
        try:
            return await self.answers.setdefault(prompt, asyncio.Future())
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise

    async def wait_until_started(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while len(self.started) < count:
                self._new_call.clear()
                await self._new_call.wait()


Hedge = tuple[Callable[[str], Any], FakeAsk]


async def test_results_are_in_prompt_order(
    run_all: Callable[..., Any],
) -> None:
    ask = FakeAsk()
    running = asyncio.create_task(run_all(ask, ["a", "b", "c"]))
    await ask.wait_until_started(3)

    for prompt in ("c", "a", "b"):
        ask.answers[prompt].set_result(prompt.upper())

    assert await running == ["A", "B", "C"]


async def test_repeated_prompt_has_one_result_per_repetition(
    run_all: Callable[..., Any],
) -> None:
    numbers = itertools.count()

    async def ask(prompt: str) -> str:
        return f"{prompt} {next(numbers)}"

    assert await run_all(ask, ["a", "a"]) == ["a 0", "a 1"]


async def test_no_prompts_give_no_results(run_all: Callable[..., Any]) -> None:
    assert await run_all(FakeAsk(), []) == []


async def test_failed_prompt_has_its_error_in_its_place_and_the_others_are_answered(
    run_all: Callable[..., Any],
) -> None:
    ask, error = FakeAsk(), ValueError("broken")
    running = asyncio.create_task(run_all(ask, ["a", "b"]))
    await ask.wait_until_started(2)

    ask.answers["a"].set_exception(error)
    ask.answers["b"].set_result("B")

    assert await running == [error, "B"]


async def test_no_more_calls_start_than_the_concurrency_limit_allows(
    run_all: Callable[..., Any],
) -> None:
    ask = FakeAsk()
    running = asyncio.create_task(run_all(ask, ["a", "b", "c"], 2))
    await ask.wait_until_started(2)
    for _ in range(10):  # a third call would start now
        await asyncio.sleep(0)
    assert ask.started == ["a", "b"]

    ask.answers["a"].set_result("A")
    await ask.wait_until_started(3)
    ask.answers["b"].set_result("B")
    ask.answers["c"].set_result("C")

    assert await running == ["A", "B", "C"]


async def test_call_timeout_is_an_error_of_that_prompt_only(
    run_all: Callable[..., Any],
) -> None:
    ask = FakeAsk()
    ask.answers["b"] = asyncio.Future()
    ask.answers["b"].set_result("B")

    first, second = await run_all(ask, ["a", "b"], limit=0.05)

    assert (type(first), second) == (TimeoutError, "B")
    assert ask.cancelled == ["a"]


async def test_deadline_keeps_finished_answers_and_marks_the_rest_as_not_done(
    run_all: Callable[..., Any], lesson: dict[str, Any]
) -> None:
    ask = FakeAsk()
    ask.answers["a"] = asyncio.Future()
    ask.answers["a"].set_result("A")

    finished, in_flight, queued = await run_all(ask, ["a", "b", "c"], 1, deadline=0.05)

    assert finished == "A"
    assert type(in_flight) is type(queued) is lesson["NotDoneError"]
    assert ask.started == ["a", "b"]
    assert ask.cancelled == ["b"]


async def test_cancelling_run_all_cancels_every_call(
    run_all: Callable[..., Any],
) -> None:
    ask = FakeAsk()
    running = asyncio.create_task(run_all(ask, ["a", "b", "c"], 2))
    await ask.wait_until_started(2)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert sorted(ask.cancelled) == ask.started == ["a", "b"]


@pytest.fixture
def hedge(lesson: dict[str, Any]) -> Hedge:
    """`hedged` with a short delay, and the fake that gets "call 1" and "call 2"."""
    ask, numbers = FakeAsk(), itertools.count(1)

    class FakeClient:
        async def ainvoke(self, prompt: str) -> str:
            return await ask(f"call {next(numbers)}")

    lesson["patient"], lesson["delay"] = FakeClient(), 0.05
    return lesson["hedged"], ask


async def test_answer_within_the_delay_needs_no_second_call(hedge: Hedge) -> None:
    hedged, ask = hedge
    ask.answers["call 1"] = asyncio.Future()
    ask.answers["call 1"].set_result("first")

    assert await hedged("a") == "first"
    assert ask.started == ["call 1"]


@pytest.mark.parametrize(("winner", "loser"), [(1, 2), (2, 1)])
async def test_first_answer_wins_and_the_other_call_is_cancelled(
    hedge: Hedge, winner: int, loser: int
) -> None:
    hedged, ask = hedge
    running = asyncio.create_task(hedged("a"))
    await ask.wait_until_started(2)

    ask.answers[f"call {winner}"].set_result("answer")

    assert await running == "answer"
    assert ask.cancelled == [f"call {loser}"]


async def test_cancelling_a_hedged_call_cancels_both_calls(hedge: Hedge) -> None:
    hedged, ask = hedge
    running = asyncio.create_task(hedged("a"))
    await ask.wait_until_started(2)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert ask.cancelled == ["call 1", "call 2"]


# What the lesson says about the real client. These tests use synchronous calls: the
# async client would keep its connections, but each async test has a new event loop.


@pytest.mark.parametrize("fault", ["truncated", "reset_midway"])
def test_stream_that_breaks_midway_is_not_retried(
    provider: Provider, fault: str
) -> None:
    provider.configure(first_token=0, faults={fault: 1})
    stream = ChatOpenAI().stream("Who?")

    with Timeline(fault) as run, pytest.raises(openai.APIConnectionError):
        list(stream)

    assert run.attempts == 1


def test_langchains_with_retry_multiplies_the_sdks_retries(provider: Provider) -> None:
    provider.configure(first_token=0, faults={"error_500": 1})
    llm = ChatOpenAI(max_retries=1)
    retrying = llm.with_retry(wait_exponential_jitter=False, stop_after_attempt=3)

    with Timeline("multiplied") as run, pytest.raises(openai.InternalServerError):
        retrying.invoke("Who?")

    assert run.attempts == 6


def test_status_error_has_the_request_id(provider: Provider) -> None:
    provider.configure(first_token=0, faults={"error_500": 1})
    llm = ChatOpenAI(max_retries=0)

    with pytest.raises(openai.APIStatusError) as caught:
        llm.invoke("Who?")

    assert caught.value.request_id

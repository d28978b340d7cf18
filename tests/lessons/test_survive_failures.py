"""The functions that readers copy from lesson 07, and what it says in prose."""

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


@pytest.fixture
def lesson() -> dict[str, Any]:
    """What the cells tagged `survive` define."""
    names: dict[str, Any] = {"asyncio": asyncio, "suppress": suppress}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "survive" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


@pytest.fixture
def run_all(lesson: dict[str, Any]) -> Callable[..., Any]:
    return lesson["run_all"]


class Asked:
    """An `ask` whose prompts are answered when the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.answers: dict[str, asyncio.Future[str]] = {}

    async def __call__(self, prompt: str) -> str:
        self.begun.append(prompt)
        try:
            return await self.answers.setdefault(prompt, asyncio.Future())
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise

    async def until_begun(self, number: int) -> None:
        while len(self.begun) < number:
            await asyncio.sleep(0)


async def test_results_stand_in_the_order_of_the_prompts(
    run_all: Callable[..., Any],
) -> None:
    ask = Asked()
    running = asyncio.create_task(run_all(ask, ["a", "b", "c"]))
    await ask.until_begun(3)

    for prompt in ("c", "a", "b"):
        ask.answers[prompt].set_result(prompt.upper())

    assert await running == ["A", "B", "C"]


async def test_a_prompt_that_stands_twice_has_two_results(
    run_all: Callable[..., Any],
) -> None:
    numbers = itertools.count()

    async def ask(prompt: str) -> str:
        return f"{prompt} {next(numbers)}"

    assert await run_all(ask, ["a", "a"]) == ["a 0", "a 1"]


async def test_no_prompts_no_results(run_all: Callable[..., Any]) -> None:
    assert await run_all(Asked(), []) == []


async def test_an_error_stands_in_its_place_and_the_others_go_on(
    run_all: Callable[..., Any],
) -> None:
    ask, error = Asked(), ValueError("broken")
    running = asyncio.create_task(run_all(ask, ["a", "b"]))
    await ask.until_begun(2)

    ask.answers["a"].set_exception(error)
    ask.answers["b"].set_result("B")

    assert await running == [error, "B"]


async def test_never_more_are_begun_than_the_bound_allows(
    run_all: Callable[..., Any],
) -> None:
    ask = Asked()
    running = asyncio.create_task(run_all(ask, ["a", "b", "c"], 2))
    await ask.until_begun(2)
    for _ in range(10):
        await asyncio.sleep(0)
    assert ask.begun == ["a", "b"]

    ask.answers["a"].set_result("A")
    await ask.until_begun(3)
    ask.answers["b"].set_result("B")
    ask.answers["c"].set_result("C")

    assert await running == ["A", "B", "C"]


async def test_one_prompts_limit_is_a_named_error_and_stops_that_one_only(
    run_all: Callable[..., Any],
) -> None:
    ask = Asked()
    ask.answers["b"] = asyncio.Future()
    ask.answers["b"].set_result("B")

    first, second = await run_all(ask, ["a", "b"], limit=0.05)

    assert (type(first), second) == (TimeoutError, "B")
    assert ask.cancelled == ["a"]


async def test_at_the_deadline_what_is_there_is_kept_and_the_rest_is_named(
    run_all: Callable[..., Any], lesson: dict[str, Any]
) -> None:
    ask = Asked()
    ask.answers["a"] = asyncio.Future()
    ask.answers["a"].set_result("A")

    done, under_way, never = await run_all(ask, ["a", "b", "c"], 1, deadline=0.05)

    assert done == "A"
    assert type(under_way) is type(never) is lesson["NotDoneError"]
    assert ask.begun == ["a", "b"]
    assert ask.cancelled == ["b"]


async def test_who_cancels_it_cancels_all_its_calls(
    run_all: Callable[..., Any],
) -> None:
    ask = Asked()
    running = asyncio.create_task(run_all(ask, ["a", "b", "c"], 2))
    await ask.until_begun(2)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert sorted(ask.cancelled) == ask.begun == ["a", "b"]


@pytest.fixture
def hedge(lesson: dict[str, Any]) -> tuple[Callable[[str], Any], Asked]:
    """`hedged` after a short delay, and what it asked: call 1, call 2."""
    asked, numbers = Asked(), itertools.count(1)

    class Patient:
        async def ainvoke(self, prompt: str) -> str:
            return await asked(f"call {next(numbers)}")

    lesson["patient"], lesson["delay"] = Patient(), 0.05
    return lesson["hedged"], asked


async def test_an_answer_before_the_delay_needs_no_second_call(
    hedge: tuple[Callable[[str], Any], Asked],
) -> None:
    hedged, asked = hedge
    asked.answers["call 1"] = asyncio.Future()
    asked.answers["call 1"].set_result("first")

    assert await hedged("a") == "first"
    assert asked.begun == ["call 1"]


@pytest.mark.parametrize(("winner", "loser"), [(1, 2), (2, 1)])
async def test_whichever_answer_comes_first_wins_and_the_other_is_cancelled(
    hedge: tuple[Callable[[str], Any], Asked], winner: int, loser: int
) -> None:
    hedged, asked = hedge
    running = asyncio.create_task(hedged("a"))
    await asked.until_begun(2)

    asked.answers[f"call {winner}"].set_result("won")

    assert await running == "won"
    await asyncio.sleep(0)
    assert asked.cancelled == [f"call {loser}"]


async def test_who_cancels_a_hedged_call_cancels_both(
    hedge: tuple[Callable[[str], Any], Asked],
) -> None:
    hedged, asked = hedge
    running = asyncio.create_task(hedged("a"))
    await asked.until_begun(2)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    await asyncio.sleep(0)
    assert asked.cancelled == ["call 1", "call 2"]


# What the lesson says of the real client. Its synchronous half: the other keeps
# its connections from loop to loop, and here each test has a loop of its own.


@pytest.mark.parametrize("fault", ["truncated", "reset_midway"])
def test_a_stream_that_has_begun_is_not_tried_again(
    provider: Provider, fault: str
) -> None:
    provider.configure(first_token=0, faults={fault: 1})
    stream = ChatOpenAI().stream("Who?")

    with Timeline(fault) as run, pytest.raises(openai.APIConnectionError):
        list(stream)

    assert run.attempts == 1


def test_langchains_with_retry_multiplies_the_sdks_own(provider: Provider) -> None:
    provider.configure(first_token=0, faults={"error_500": 1})
    llm = ChatOpenAI(max_retries=1)
    again = llm.with_retry(wait_exponential_jitter=False, stop_after_attempt=3)

    with Timeline("multiplied") as run, pytest.raises(openai.InternalServerError):
        again.invoke("Who?")

    assert run.attempts == 6


def test_a_status_error_names_its_request(provider: Provider) -> None:
    provider.configure(first_token=0, faults={"error_500": 1})
    llm = ChatOpenAI(max_retries=0)

    with pytest.raises(openai.APIStatusError) as caught:
        llm.invoke("Who?")

    assert caught.value.request_id

import asyncio
import contextlib
import http.client
import itertools
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from helpers.connection import Provider
from llm_stub.capacity import Capacity
from tests.llm_stub.conftest import Json, finished_attempts

Connection = http.client.HTTPConnection

SKY = "Why is the sky blue?"
LATENCY = 0.4
TOLERANCE = 0.02  # seconds by which the next call may start early or late

# The queue


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


async def run_other_tasks(rounds: int = 5) -> None:
    for _ in range(rounds):
        await asyncio.sleep(0)


def capacity_of(limit: int | None) -> Capacity:
    capacity = Capacity()
    capacity.change(limit)
    return capacity


async def assert_free_slots(capacity: Capacity, slots: int) -> None:
    """Exactly this many slots are free."""
    for _ in range(slots):
        assert await asyncio.wait_for(capacity.enter(), 1) is False
    one_more = asyncio.create_task(capacity.enter())
    await run_other_tasks()
    assert not one_more.done()
    one_more.cancel()
    for _ in range(slots):
        capacity.leave()


def test_enter_returns_whether_it_had_to_wait() -> None:
    async def main() -> None:
        capacity = capacity_of(1)
        assert await capacity.enter() is False
        queued = asyncio.create_task(capacity.enter())
        await run_other_tasks()
        assert not queued.done()
        capacity.leave()
        assert await queued is True

    run(main())


def test_without_a_limit_calls_are_counted_but_never_queue() -> None:
    async def main() -> None:
        capacity = capacity_of(None)
        for _ in range(100):
            assert await capacity.enter() is False
        capacity.change(101)
        await assert_free_slots(capacity, 1)
        for _ in range(100):
            capacity.leave()
        await assert_free_slots(capacity, 101)

    run(main())


def test_lowered_limit_admits_no_call_until_enough_have_finished() -> None:
    async def main() -> None:
        capacity = capacity_of(3)
        for _ in range(3):
            await capacity.enter()
        capacity.change(1)
        queued = asyncio.create_task(capacity.enter())
        for _ in range(2):
            capacity.leave()
            await run_other_tasks()
            assert not queued.done()
        capacity.leave()
        assert await queued is True

    run(main())


@pytest.mark.parametrize("limit", [3, None])
def test_raised_limit_admits_queued_calls_immediately(limit: int | None) -> None:
    async def main() -> None:
        capacity = capacity_of(1)
        await capacity.enter()
        queued = [asyncio.create_task(capacity.enter()) for _ in range(2)]
        await run_other_tasks()
        capacity.change(limit)
        assert await asyncio.gather(*queued) == [True, True]

    run(main())


@pytest.mark.parametrize("cancelled_first", [False, True])
@pytest.mark.parametrize("by_change", [False, True])
def test_slot_of_a_call_that_is_being_cancelled_goes_to_the_next(
    cancelled_first: bool, by_change: bool
) -> None:
    async def main() -> None:
        capacity = capacity_of(1)
        await capacity.enter()
        cancelled, waiting = (asyncio.create_task(capacity.enter()) for _ in range(2))
        await run_other_tasks()
        if cancelled_first:
            cancelled.cancel()
        if by_change:
            capacity.change(2)
        else:
            capacity.leave()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await waiting is True
        if by_change:
            capacity.leave()
        capacity.leave()
        await assert_free_slots(capacity, 2 if by_change else 1)

    run(main())


def test_cancelled_queued_calls_take_no_slots() -> None:
    async def main() -> None:
        capacity = capacity_of(1)
        await capacity.enter()
        queued = [asyncio.create_task(capacity.enter()) for _ in range(10)]
        await run_other_tasks()
        for task in queued:
            task.cancel()
        capacity.leave()
        await asyncio.wait(queued)
        await assert_free_slots(capacity, 1)

    run(main())


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["arrive", "arrive", "finish", "cancel", "limit"]),
            st.integers(0, 9),
            st.integers(0, 2),
        ),
        max_size=40,
    )
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_slots_are_never_lost_or_shared_and_the_queue_is_first_in_first_out(
    steps: list[tuple[str, int, int]],
) -> None:
    async def main() -> None:
        capacity, highest_limit = capacity_of(2), 2
        finished: list[asyncio.Event] = []
        queued: list[int] = []
        entered: list[int] = []
        inside: set[int] = set()

        async def call(number: int) -> None:
            if await capacity.enter():
                queued.append(number)
            try:
                entered.append(number)
                inside.add(number)
                await finished[number].wait()
            finally:
                inside.discard(number)
                capacity.leave()

        calls: list[asyncio.Task[None]] = []
        for verb, which, pause in steps:
            if verb == "arrive":
                finished.append(asyncio.Event())
                calls.append(asyncio.create_task(call(len(calls))))
                await run_other_tasks(1)  # a call arrives when its task starts
            elif verb == "limit":
                capacity.change(which % 3 + 1)
                highest_limit = max(highest_limit, which % 3 + 1)
            elif calls and verb == "cancel":
                calls[-1 - which % len(calls)].cancel()
            elif inside:
                finished[sorted(inside)[which % len(inside)]].set()
            await run_other_tasks(pause)
            assert len(inside) <= highest_limit
            if pause == 2:
                await run_other_tasks()  # every admitted call has started
                waiting = {n for n, task in enumerate(calls) if not task.done()}
                assert min(waiting - inside, default=40) > max(entered, default=-1)
        for event in finished:
            event.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert queued == sorted(queued)
        assert {n for n, result in enumerate(results) if result is None} <= {*entered}
        assert all(isinstance(r, asyncio.CancelledError | None) for r in results)
        capacity.change(2)
        await assert_free_slots(capacity, 2)

    run(main())


# The stub

StartCall = Callable[..., Connection]


@pytest.fixture
def start_call(provider: Provider) -> Iterator[StartCall]:
    """Send a request and wait until it has arrived, but not for the response."""
    provider.configure(first_token=LATENCY, per_token=0, jitter=0)
    with contextlib.ExitStack() as stack:

        def start_call(path: str = "completions", **body: Any) -> Connection:
            before = provider.ask("/_provider/stats")["requests"]
            connection = Connection(provider.url.removeprefix("http://"), timeout=30)
            stack.callback(connection.close)
            body = {"model": "m", **(body or {"prompt": SKY})}
            connection.request("POST", f"/v1/{path}", json.dumps(body))
            while provider.ask("/_provider/stats")["requests"] == before:
                pass
            return connection

        yield start_call


def read_responses(*connections: Connection) -> None:
    for connection in connections:
        response = connection.getresponse()
        response.read()
        assert response.status == 200


def duration(entry: Json) -> float:
    return float(entry["end"] - entry["arrival"])


@pytest.mark.parametrize("capacity", [1, 2])
def test_capacity_limits_concurrency_and_calls_are_served_in_order_of_arrival(
    provider: Provider, start_call: StartCall, capacity: int
) -> None:
    provider.configure(capacity=capacity)
    read_responses(*(start_call() for _ in range(6)))
    attempts = finished_attempts(provider)
    ends = [entry["end"] for entry in attempts]
    assert ends == sorted(ends)
    for earlier, later in zip(ends, ends[capacity:], strict=False):
        assert later - earlier >= LATENCY - TOLERANCE
    waves = 6 / capacity
    assert ends[-1] - attempts[0]["arrival"] < (waves + 1) * LATENCY


def test_without_a_capacity_no_call_waits(
    provider: Provider, start_call: StartCall
) -> None:
    read_responses(*(start_call() for _ in range(10)))
    assert max(map(duration, finished_attempts(provider))) < 2 * LATENCY


def test_all_routes_share_one_capacity(
    provider: Provider, start_call: StartCall
) -> None:
    provider.configure(capacity=1)
    read_responses(
        start_call("completions", prompt=SKY),
        start_call("chat/completions", messages=[{"role": "user", "content": SKY}]),
        start_call("responses", input=SKY),
        start_call("embeddings", input=SKY),
    )
    ends = [entry["end"] for entry in finished_attempts(provider)]
    for earlier, later in itertools.pairwise(ends):
        assert later - earlier >= LATENCY - TOLERANCE


def test_rejected_call_does_not_queue(
    provider: Provider, start_call: StartCall
) -> None:
    provider.configure(capacity=1, models=["m"], first_token=60)
    start_call()
    assert start_call(model="other", prompt=SKY).getresponse().status == 404
    assert start_call(prompt=SKY, n=0).getresponse().status == 400


@pytest.mark.parametrize("raised", [3, None])
def test_raised_capacity_admits_queued_calls(
    provider: Provider, start_call: StartCall, raised: int | None
) -> None:
    provider.configure(capacity=1)
    calls = [start_call() for _ in range(3)]
    provider.configure(capacity=raised)
    read_responses(*calls)
    first, *queued = finished_attempts(provider)
    assert max(entry["end"] for entry in queued) < first["end"] + LATENCY


def test_lowered_capacity_does_not_affect_calls_in_flight(
    provider: Provider, start_call: StartCall
) -> None:
    provider.configure(capacity=3)
    calls = [start_call() for _ in range(3)]
    provider.configure(capacity=1)
    read_responses(*calls, start_call(), start_call())
    *earlier, last_earlier, first, second = finished_attempts(provider)
    assert max(map(duration, [*earlier, last_earlier])) < 2 * LATENCY
    assert first["end"] >= last_earlier["end"] + LATENCY - TOLERANCE
    assert second["end"] >= first["end"] + LATENCY - TOLERANCE


def test_client_that_disconnects_in_the_queue_loses_its_place(
    provider: Provider, start_call: StartCall, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(capacity=1)
    first, second, last = start_call(), start_call(), start_call()
    second.close()
    read_responses(first, last)
    answered, cancelled, next_answered = finished_attempts(provider)
    assert (cancelled["state"], cancelled["first_byte"]) == ("cancelled", None)
    assert cancelled["end"] < answered["end"]
    assert next_answered["end"] < answered["end"] + 2 * LATENCY


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_disconnects_frees_its_slot(
    provider: Provider, start_call: StartCall, stream: bool
) -> None:
    provider.configure(capacity=1, per_token=60)
    first = start_call(prompt=SKY, stream=stream)
    provider.configure(per_token=0)
    second = start_call()
    if stream:
        first.getresponse().close()
    first.close()
    read_responses(second)
    cancelled, answered = finished_attempts(provider)
    assert (cancelled["state"], answered["state"]) == ("cancelled", "answered")
    assert answered["end"] >= cancelled["end"] + LATENCY - TOLERANCE


def test_hanging_call_keeps_its_slot_until_the_client_disconnects(
    provider: Provider, start_call: StartCall
) -> None:
    provider.configure(first_token=0, capacity=1, faults_by_prompt={SKY: ["hang"]})
    hanging = start_call()
    provider.configure(first_token=LATENCY, faults_by_prompt={})
    queued = start_call(), start_call()
    hanging.close()
    read_responses(*queued)
    ends = [entry["end"] for entry in finished_attempts(provider)]
    for earlier, later in itertools.pairwise(ends):
        assert later - earlier >= LATENCY - TOLERANCE


def test_stream_keeps_its_slot_until_it_ends(
    provider: Provider, client: OpenAI, start_call: StartCall
) -> None:
    provider.configure(capacity=1, per_token=0.1)
    stream = client.completions.create(model="m", prompt=SKY, max_tokens=6, stream=True)
    next(iter(stream))
    provider.configure(per_token=0)
    queued = start_call()
    list(stream)
    read_responses(queued)
    streamed, waited = finished_attempts(provider)
    assert streamed["end"] >= streamed["first_byte"] + 0.4
    assert waited["first_byte"] >= streamed["end"] + LATENCY - TOLERANCE


def test_latency_of_a_queued_call_starts_when_it_gets_a_slot(
    provider: Provider, start_call: StartCall
) -> None:
    provider.configure(capacity=1, first_token=0.3)
    first, second = start_call(), start_call()
    provider.configure(first_token=0)
    third = start_call()
    read_responses(first, second, third)
    ends = [entry["end"] for entry in finished_attempts(provider)]
    assert ends[1] >= ends[0] + 0.3 - TOLERANCE
    assert ends[1] <= ends[2] < ends[1] + 0.3

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

Json = dict[str, Any]
Connection = http.client.HTTPConnection

SKY = "Why is the sky blue?"
LATENCY = 0.4
CLOSE = 0.02  # seconds between a turn's end and the next one's begin, at most


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


async def ticks(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def with_limit(limit: int | None) -> Capacity:
    capacity = Capacity()
    capacity.change(limit)
    return capacity


async def is_free(capacity: Capacity, turns: int) -> None:
    """So many turns are free, and no more."""
    for _ in range(turns):
        assert await asyncio.wait_for(capacity.enter(), 1) is False
    more = asyncio.create_task(capacity.enter())
    await ticks()
    assert not more.done()
    more.cancel()
    for _ in range(turns):
        capacity.leave()


def test_entering_tells_whether_there_was_a_queue() -> None:
    async def main() -> None:
        capacity = with_limit(1)
        assert await capacity.enter() is False
        queued = asyncio.create_task(capacity.enter())
        await ticks()
        assert not queued.done()
        capacity.leave()
        assert await queued is True

    run(main())


def test_without_a_limit_nobody_queues_and_all_are_counted() -> None:
    async def main() -> None:
        capacity = with_limit(None)
        for _ in range(100):
            assert await capacity.enter() is False
        capacity.change(101)
        await is_free(capacity, 1)
        for _ in range(100):
            capacity.leave()
        await is_free(capacity, 101)

    run(main())


def test_a_lowered_limit_lets_nobody_in_until_enough_have_left() -> None:
    async def main() -> None:
        capacity = with_limit(3)
        for _ in range(3):
            await capacity.enter()
        capacity.change(1)
        queued = asyncio.create_task(capacity.enter())
        for _ in range(2):
            capacity.leave()
            await ticks()
            assert not queued.done()
        capacity.leave()
        assert await queued is True

    run(main())


@pytest.mark.parametrize("limit", [3, None])
def test_a_raised_limit_lets_the_queue_in_at_once(limit: int | None) -> None:
    async def main() -> None:
        capacity = with_limit(1)
        await capacity.enter()
        queued = [asyncio.create_task(capacity.enter()) for _ in range(2)]
        await ticks()
        capacity.change(limit)
        assert await asyncio.gather(*queued) == [True, True]

    run(main())


@pytest.mark.parametrize("cancelled_first", [False, True])
@pytest.mark.parametrize("by_change", [False, True])
def test_a_turn_that_comes_as_its_call_is_cancelled_goes_to_the_next(
    cancelled_first: bool, by_change: bool
) -> None:
    async def main() -> None:
        capacity = with_limit(1)
        await capacity.enter()
        gone, waiting = (asyncio.create_task(capacity.enter()) for _ in range(2))
        await ticks()
        if cancelled_first:
            gone.cancel()
        if by_change:
            capacity.change(2)
        else:
            capacity.leave()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await waiting is True
        if by_change:
            capacity.leave()
        capacity.leave()
        await is_free(capacity, 2 if by_change else 1)

    run(main())


def test_a_whole_queue_that_is_cancelled_leaves_no_trace() -> None:
    async def main() -> None:
        capacity = with_limit(1)
        await capacity.enter()
        queued = [asyncio.create_task(capacity.enter()) for _ in range(10)]
        await ticks()
        for task in queued:
            task.cancel()
        capacity.leave()
        await asyncio.wait(queued)
        await is_free(capacity, 1)

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
def test_whatever_happens_no_turn_is_lost_or_given_twice_and_the_order_is_kept(
    steps: list[tuple[str, int, int]],
) -> None:
    async def main() -> None:
        capacity, most = with_limit(2), 2
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
                await ticks(1)  # a call arrives when its task begins
            elif verb == "limit":
                capacity.change(which % 3 + 1)
                most = max(most, which % 3 + 1)
            elif calls and verb == "cancel":
                calls[-1 - which % len(calls)].cancel()
            elif inside:
                finished[sorted(inside)[which % len(inside)]].set()
            await ticks(pause)
            assert len(inside) <= most
            if pause == 2:
                await ticks()  # all whose turn has come have begun
                waiting = {n for n, task in enumerate(calls) if not task.done()}
                assert min(waiting - inside, default=40) > max(entered, default=-1)
        for event in finished:
            event.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert queued == sorted(queued)
        assert {number for number, end in enumerate(ends) if end is None} <= {*entered}
        assert all(isinstance(end, asyncio.CancelledError | None) for end in ends)
        capacity.change(2)
        await is_free(capacity, 2)

    run(main())


Begin = Callable[..., Connection]


@pytest.fixture
def begin(provider: Provider) -> Iterator[Begin]:
    """Send a call, and wait until it has arrived."""
    provider.configure(first_token=LATENCY, per_token=0, jitter=0)
    with contextlib.ExitStack() as opened:

        def begin(path: str = "completions", **body: Any) -> Connection:
            before = provider.ask("/_provider/stats")["requests"]
            connection = Connection(provider.url.removeprefix("http://"), timeout=30)
            opened.callback(connection.close)
            asked = {"model": "m", **(body or {"prompt": SKY})}
            connection.request("POST", f"/v1/{path}", json.dumps(asked))
            while provider.ask("/_provider/stats")["requests"] == before:
                pass
            return connection

        yield begin


def answered(*connections: Connection) -> None:
    for connection in connections:
        response = connection.getresponse()
        response.read()
        assert response.status == 200


def attempts(provider: Provider) -> list[Json]:
    """The calls in the order of their arrival, once all have ended."""
    found: list[Json] = provider.ask("/_provider/journal?settle=10")["attempts"]
    assert all(entry["end"] is not None for entry in found)
    return found


def took(entry: Json) -> float:
    return float(entry["end"] - entry["arrival"])


@pytest.mark.parametrize("capacity", [1, 2])
def test_so_many_calls_at_once_are_answered_in_the_order_of_their_arrival(
    provider: Provider, begin: Begin, capacity: int
) -> None:
    provider.configure(capacity=capacity)
    answered(*(begin() for _ in range(6)))
    found = attempts(provider)
    ends = [entry["end"] for entry in found]
    assert ends == sorted(ends)
    for earlier, later in zip(ends, ends[capacity:], strict=False):
        assert later - earlier >= LATENCY - CLOSE
    waves = 6 / capacity
    assert ends[-1] - found[0]["arrival"] < (waves + 1) * LATENCY


def test_without_a_capacity_no_call_waits_for_another(
    provider: Provider, begin: Begin
) -> None:
    answered(*(begin() for _ in range(10)))
    assert max(map(took, attempts(provider))) < 2 * LATENCY


def test_all_routes_share_one_capacity(provider: Provider, begin: Begin) -> None:
    provider.configure(capacity=1)
    answered(
        begin("completions", prompt=SKY),
        begin("chat/completions", messages=[{"role": "user", "content": SKY}]),
        begin("responses", input=SKY),
        begin("embeddings", input=SKY),
    )
    ends = [entry["end"] for entry in attempts(provider)]
    for earlier, later in itertools.pairwise(ends):
        assert later - earlier >= LATENCY - CLOSE


def test_a_refused_call_does_not_queue(provider: Provider, begin: Begin) -> None:
    provider.configure(capacity=1, models=["m"], first_token=60)
    begin()
    assert begin(model="other", prompt=SKY).getresponse().status == 404
    assert begin(prompt=SKY, n=0).getresponse().status == 400


@pytest.mark.parametrize("raised", [3, None])
def test_a_raised_capacity_lets_queued_calls_in(
    provider: Provider, begin: Begin, raised: int | None
) -> None:
    provider.configure(capacity=1)
    calls = [begin() for _ in range(3)]
    provider.configure(capacity=raised)
    answered(*calls)
    first, *queued = attempts(provider)
    assert max(entry["end"] for entry in queued) < first["end"] + LATENCY


def test_a_lowered_capacity_leaves_calls_in_flight_alone(
    provider: Provider, begin: Begin
) -> None:
    provider.configure(capacity=3)
    calls = [begin() for _ in range(3)]
    provider.configure(capacity=1)
    answered(*calls, begin(), begin())
    *before, last_before, one, other = attempts(provider)
    assert max(map(took, [*before, last_before])) < 2 * LATENCY
    assert one["end"] >= last_before["end"] + LATENCY - CLOSE
    assert other["end"] >= one["end"] + LATENCY - CLOSE


def test_a_client_that_hangs_up_in_the_queue_leaves_its_place_to_the_next(
    provider: Provider, begin: Begin, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(capacity=1)
    first, gone, last = begin(), begin(), begin()
    gone.close()
    answered(first, last)
    one, cancelled, other = attempts(provider)
    assert (cancelled["state"], cancelled["first_byte"]) == ("cancelled", None)
    assert cancelled["end"] < one["end"]
    assert other["end"] < one["end"] + 2 * LATENCY


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_in_its_turn_gives_it_to_the_next(
    provider: Provider, begin: Begin, stream: bool
) -> None:
    provider.configure(capacity=1, per_token=60)
    first = begin(prompt=SKY, stream=stream)
    provider.configure(per_token=0)
    second = begin()
    if stream:
        first.getresponse().close()
    first.close()
    answered(second)
    gone, answer = attempts(provider)
    assert (gone["state"], answer["state"]) == ("cancelled", "answered")
    assert answer["end"] >= gone["end"] + LATENCY - CLOSE


def test_a_call_that_hangs_holds_its_turn_until_its_client_hangs_up(
    provider: Provider, begin: Begin
) -> None:
    provider.configure(first_token=0, capacity=1, faults_by_prompt={SKY: ["hang"]})
    hanging = begin()
    provider.configure(first_token=LATENCY, faults_by_prompt={})
    queued = begin(), begin()
    hanging.close()
    answered(*queued)
    ends = [entry["end"] for entry in attempts(provider)]
    for earlier, later in itertools.pairwise(ends):
        assert later - earlier >= LATENCY - CLOSE


def test_a_stream_holds_its_turn_until_its_end(
    provider: Provider, client: OpenAI, begin: Begin
) -> None:
    provider.configure(capacity=1, per_token=0.1)
    stream = client.completions.create(model="m", prompt=SKY, max_tokens=6, stream=True)
    next(iter(stream))
    provider.configure(per_token=0)
    queued = begin()
    list(stream)
    answered(queued)
    streamed, waited = attempts(provider)
    assert streamed["end"] >= streamed["first_byte"] + 0.4
    assert waited["first_byte"] >= streamed["end"] + LATENCY - CLOSE


def test_a_queued_calls_latency_begins_with_its_turn(
    provider: Provider, begin: Begin
) -> None:
    provider.configure(capacity=1, first_token=0.3)
    first, second = begin(), begin()
    provider.configure(first_token=0)
    third = begin()
    answered(first, second, third)
    one, other, last = attempts(provider)
    assert other["end"] >= one["end"] + 0.3 - CLOSE
    assert other["end"] <= last["end"] < other["end"] + 0.3

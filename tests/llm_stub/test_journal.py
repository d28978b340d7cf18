import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from helpers.connection import Provider
from llm_stub.journal import Journal

Json = dict[str, Any]


def attempts(provider: Provider) -> list[Json]:
    """The journal, once every call in it has ended."""
    found: list[Json] = provider.ask("/_provider/journal?settle=5")["attempts"]
    assert all(entry["end"] is not None for entry in found)
    return found


def stats(provider: Provider) -> Json:
    found: Json = provider.ask("/_provider/stats")
    return found


Complete = Callable[..., None]


@pytest.fixture
def complete(client: OpenAI) -> Complete:
    """Make a call and wait for its answer."""

    def complete(prompt: str = "Why?", **options: Any) -> None:
        client.completions.create(model="m", prompt=prompt, **options)

    return complete


Begin = Callable[..., http.client.HTTPConnection]


@pytest.fixture
def begin(provider: Provider) -> Iterator[Begin]:
    """Send a call and do not wait for its answer."""
    with contextlib.ExitStack() as opened:

        def begin(**options: Any) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(
                provider.url.removeprefix("http://"), timeout=30
            )
            opened.callback(connection.close)
            body = {"model": "m", "prompt": "Why is the sky blue?"} | options
            connection.request("POST", "/v1/completions", json.dumps(body))
            return connection

        yield begin


@pytest.mark.parametrize("stream", [False, True])
def test_an_attempt_has_its_moments_in_order(
    provider: Provider, begin: Begin, stream: bool
) -> None:
    provider.configure(first_token=0.05, per_token=0.02, jitter=0)
    with begin(stream=stream).getresponse() as response:
        response.read()
    [entry] = attempts(provider)
    assert entry["arrival"] + 0.05 <= entry["first_byte"] <= entry["end"]
    receiving = entry["end"] - entry["first_byte"]
    waiting = entry["first_byte"] - entry["arrival"]
    assert receiving > waiting if stream else receiving < waiting


def test_an_attempt_tells_the_call(provider: Provider, complete: Complete) -> None:
    provider.configure(first_token=0, per_token=0)
    complete("Who wrote Hamlet?", max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        complete(n=0)
    good, bad = attempts(provider)
    assert good["route"] == bad["route"] == "POST /v1/completions"
    assert (good["state"], good["status"]) == ("answered", 200)
    assert (good["model"], good["prompt"]) == ("m", "Who wrote Hamlet?")
    assert (good["prompt_tokens"], good["completion_tokens"]) == (4, 3)
    assert (bad["state"], bad["status"]) == ("failed", 400)
    assert bad["number"] == good["number"] + 1


@pytest.mark.parametrize(
    ("header", "attempt"),
    [
        ({}, 1),
        ({"x-stainless-retry-count": "0"}, 1),
        ({"x-stainless-retry-count": "2"}, 3),
        ({"x-stainless-retry-count": "-1"}, 1),
        ({"x-stainless-retry-count": "many"}, 1),
        ({"x-stainless-retry-count": "9" * 5000}, 1),
    ],
    ids=["none", "first", "third", "negative", "a word", "huge"],
)
def test_the_attempts_number_comes_from_the_sdks_header(
    provider: Provider, header: dict[str, str], attempt: int
) -> None:
    connection = http.client.HTTPConnection(provider.url.removeprefix("http://"))
    connection.request("GET", "/v1/models", headers=header)
    assert connection.getresponse().status == 200
    connection.close()
    [entry] = attempts(provider)
    assert entry["attempt"] == attempt


def test_the_sdks_own_retries_are_counted(provider: Provider, client: OpenAI) -> None:
    provider.configure(first_token=30)
    impatient = client.with_options(max_retries=1, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="m", prompt="Why?")
    found = attempts(provider)
    assert [entry["attempt"] for entry in found] == [1, 2]
    assert {entry["state"] for entry in found} == {"cancelled"}


def overlap(entries: list[Json]) -> int:
    """The most entries that are open at one moment, by their own times."""
    changes = [(entry["arrival"], 1) for entry in entries]
    changes += [(entry["end"], -1) for entry in entries]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("calls", [2, 25])
def test_calls_released_together_are_in_flight_together(
    provider: Provider, calls: int
) -> None:
    provider.configure(first_token=0.6, per_token=0, jitter=0)

    async def release() -> None:
        url = f"{provider.url}/v1/completions"
        async with aiohttp.ClientSession() as session:
            bodies = [{"model": "m", "prompt": str(call)} for call in range(calls)]
            for answered in asyncio.as_completed(
                [session.post(url, json=body) for body in bodies]
            ):
                assert (await answered).status == 200

    asyncio.run(release())
    found = attempts(provider)
    assert len(found) == calls
    assert stats(provider)["peak_in_flight"] == overlap(found) == calls


def test_calls_one_after_another_are_never_in_flight_together(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(first_token=0, per_token=0)
    for _ in range(10):
        complete()
    assert stats(provider)["peak_in_flight"] == overlap(attempts(provider)) == 1
    assert stats(provider)["in_flight"] == 0


def test_hanging_up_before_the_first_byte_is_recorded(
    provider: Provider, begin: Begin, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=60)
    connection = begin()
    until_in_flight(1)
    connection.close()
    [entry] = attempts(provider)
    assert (entry["state"], entry["disconnected"]) == ("cancelled", True)
    assert (entry["first_byte"], entry["status"]) == (None, None)
    assert entry["completion_tokens"] == 0
    assert stats(provider)["statuses"] == {"disconnected": 1}
    assert stats(provider)["in_flight"] == 0


def test_hanging_up_in_mid_stream_is_recorded(provider: Provider, begin: Begin) -> None:
    provider.configure(first_token=0, per_token=2, jitter=0)
    connection = begin(stream=True)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    [entry] = attempts(provider)
    assert (entry["state"], entry["status"]) == ("cancelled", 200)
    assert entry["arrival"] <= entry["first_byte"] <= entry["end"]
    assert entry["completion_tokens"] == 1
    assert stats(provider)["statuses"] == {"disconnected": 1}


def test_hanging_up_in_mid_request_is_recorded(
    provider: Provider, until_in_flight: Callable[[int], None]
) -> None:
    host, port = provider.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
        )
        until_in_flight(1)
    [entry] = attempts(provider)
    assert (entry["state"], entry["first_byte"]) == ("cancelled", None)


def test_a_cancelled_task_is_recorded(
    provider: Provider, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=60)

    async def main() -> None:
        async with AsyncOpenAI(max_retries=0) as client:
            call = asyncio.create_task(
                client.completions.create(model="m", prompt="Why?")
            )
            await asyncio.to_thread(until_in_flight, 1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(main())
    assert [entry["state"] for entry in attempts(provider)] == ["cancelled"]


def test_a_call_in_flight_says_so(
    provider: Provider, begin: Begin, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=60)
    begin()
    until_in_flight(1)
    [entry] = provider.ask("/_provider/journal")["attempts"]
    assert entry["state"] == "in flight"
    assert (entry["first_byte"], entry["end"]) == (None, None)


def test_since_gives_what_came_after_a_mark(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(first_token=0, per_token=0)
    complete("before")
    mark = provider.ask(f"/_provider/journal?since={10**12}")
    assert (mark["attempts"], mark["dropped"]) == ([], 0)
    complete("after")
    page = provider.ask(f"/_provider/journal?since={mark['next']}")
    [entry] = page["attempts"]
    assert (entry["prompt"], entry["number"]) == ("after", mark["next"])
    assert (page["next"], page["dropped"]) == (mark["next"] + 1, 0)
    assert mark["now"] <= entry["arrival"] <= entry["end"] <= page["now"]


def test_settling_waits_for_calls_to_end_but_not_for_later_ones() -> None:
    async def main() -> None:
        journal = Journal()
        first = journal.arrive("GET /", 1)
        page = asyncio.create_task(journal.since(0, settle=10))
        await asyncio.sleep(0)
        journal.arrive("GET /", 1)
        journal.end(first)
        found = (await page)["attempts"]
        assert [entry["number"] for entry in found] == [0]
        assert found[0]["end"] is not None

    asyncio.run(main())


@pytest.mark.parametrize("query", ["since=first", "settle=long"])
def test_a_wrong_query_is_refused(provider: Provider, query: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        provider.ask(f"/_provider/journal?{query}")


def page(journal: Journal, since: int = 0) -> Json:
    return asyncio.run(journal.since(since))


def filled(kept: int, calls: int) -> Journal:
    journal = Journal(kept)
    for _ in range(calls):
        entry = journal.arrive("GET /", 1)
        journal.first_byte(entry, 200)
        journal.end(entry)
    return journal


def test_the_journal_is_bounded_and_says_what_it_dropped() -> None:
    journal = filled(kept=3, calls=5)
    found = page(journal)
    assert [entry["number"] for entry in found["attempts"]] == [2, 3, 4]
    assert (found["dropped"], found["next"]) == (2, 5)
    assert page(journal, since=2)["dropped"] == 0
    assert page(journal, since=5)["dropped"] == 0
    assert journal.stats()["requests"] == 5


def test_a_reset_empties_the_journal_and_goes_on_counting() -> None:
    journal = filled(kept=10, calls=5)
    journal.reset()
    assert journal.stats() == {
        "requests": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "in_flight": 0,
        "peak_in_flight": 0,
        "statuses": {},
    }
    assert page(journal)["attempts"] == []
    assert (page(journal)["dropped"], page(journal)["next"]) == (5, 5)
    assert journal.arrive("GET /", 1).number == 5


def test_a_reset_keeps_what_is_in_flight() -> None:
    journal = Journal()
    entry = journal.arrive("GET /", 1)
    journal.reset()
    assert journal.stats()["in_flight"] == journal.stats()["peak_in_flight"] == 1
    journal.end(entry)
    assert journal.stats()["in_flight"] == 0
    assert page(journal)["dropped"] == 0


def test_calls_in_flight_are_counted_even_where_their_entry_was_dropped() -> None:
    journal = Journal(kept=1)
    entries = [journal.arrive("GET /", 1) for _ in range(3)]
    journal.reset()
    assert journal.stats()["in_flight"] == 3
    for entry in entries:
        journal.end(entry)
    assert journal.stats()["in_flight"] == 0


def test_stats_add_up_what_the_attempts_say(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(first_token=0, per_token=0, models=["m"])
    complete("Who wrote Hamlet?", max_tokens=3)
    complete("Why is the sky blue?", stream=False)
    for path in ("/v1/models", "/v1/models/other", "/nowhere"):
        connection = http.client.HTTPConnection(provider.url.removeprefix("http://"))
        connection.request("GET", path)
        connection.getresponse().read()
        connection.close()
    found, sums = attempts(provider), stats(provider)
    assert sums["requests"] == len(found) == 5
    for name in ("prompt_tokens", "completion_tokens"):
        assert sums[name] == sum(entry[name] for entry in found) > 0
    assert sums["statuses"] == {"200": 3, "404": 2}


def test_control_requests_are_not_in_the_journal(provider: Provider) -> None:
    provider.configure()
    stats(provider)
    assert attempts(provider) == []

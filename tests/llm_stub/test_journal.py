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
from llm_stub.journal import Attempt, Journal
from tests.llm_stub.conftest import Json, finished_attempts


def get_stats(provider: Provider) -> Json:
    stats: Json = provider.ask("/_provider/stats")
    return stats


Complete = Callable[..., None]


@pytest.fixture
def complete(client: OpenAI) -> Complete:
    """Make a call and wait for the response."""

    def complete(prompt: str = "Why?", **options: Any) -> None:
        client.completions.create(model="m", prompt=prompt, **options)

    return complete


SendCall = Callable[..., http.client.HTTPConnection]


@pytest.fixture
def send_call(provider: Provider) -> Iterator[SendCall]:
    """Send a request without waiting for the response."""
    with contextlib.ExitStack() as stack:

        def send_call(**options: Any) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(
                provider.url.removeprefix("http://"), timeout=30
            )
            stack.callback(connection.close)
            body = {"model": "m", "prompt": "Why is the sky blue?"} | options
            connection.request("POST", "/v1/completions", json.dumps(body))
            return connection

        yield send_call


@pytest.mark.parametrize("stream", [False, True])
def test_attempt_has_arrival_first_byte_and_end_in_order(
    provider: Provider, send_call: SendCall, stream: bool
) -> None:
    provider.configure(first_token=0.05, per_token=0.02, jitter=0)
    with send_call(stream=stream).getresponse() as response:
        response.read()
    [entry] = finished_attempts(provider)
    assert entry["arrival"] + 0.05 <= entry["first_byte"] <= entry["end"]
    receiving = entry["end"] - entry["first_byte"]
    waiting = entry["first_byte"] - entry["arrival"]
    assert receiving > waiting if stream else receiving < waiting


def test_attempt_has_route_model_prompt_status_and_tokens(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(first_token=0, per_token=0)
    complete("Who wrote Hamlet?", max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        complete(n=0)
    good, bad = finished_attempts(provider)
    assert good["route"] == bad["route"] == "POST /v1/completions"
    assert (good["state"], good["status"]) == ("answered", 200)
    assert (good["model"], good["prompt"]) == ("m", "Who wrote Hamlet?")
    assert (good["prompt_tokens"], good["completion_tokens"]) == (4, 3)
    assert (bad["state"], bad["status"]) == ("failed", 400)
    assert bad["number"] == good["number"] + 1


def test_call_for_an_unknown_model_is_recorded_without_tokens(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(models=["another"])
    with pytest.raises(openai.NotFoundError):
        complete("Who wrote Hamlet?")
    [entry] = finished_attempts(provider)
    assert (entry["status"], entry["prompt"]) == (404, "Who wrote Hamlet?")
    assert entry["prompt_tokens"] == 0


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
    ids=["no header", "first", "third", "negative", "word", "huge"],
)
def test_attempt_number_comes_from_the_sdks_retry_header(
    provider: Provider, header: dict[str, str], attempt: int
) -> None:
    connection = http.client.HTTPConnection(provider.url.removeprefix("http://"))
    connection.request("GET", "/v1/models", headers=header)
    assert connection.getresponse().status == 200
    connection.close()
    [entry] = finished_attempts(provider)
    assert entry["attempt"] == attempt


def test_sdk_retries_are_counted(provider: Provider, client: OpenAI) -> None:
    provider.configure(first_token=30)
    impatient = client.with_options(max_retries=1, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model="m", prompt="Why?")
    attempts = finished_attempts(provider)
    assert [entry["attempt"] for entry in attempts] == [1, 2]
    assert {entry["state"] for entry in attempts} == {"timed out"}
    assert {entry["timeout"] for entry in attempts} == {0.3}


def max_overlap(entries: list[Json]) -> int:
    """The highest number of entries in flight at once, computed from their times."""
    changes = [(entry["arrival"], 1) for entry in entries]
    changes += [(entry["end"], -1) for entry in entries]
    now = highest = 0
    for _, change in sorted(changes):
        now += change
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("calls", [2, 25])
def test_concurrent_calls_are_in_flight_together(
    provider: Provider, calls: int
) -> None:
    provider.configure(first_token=0.6, per_token=0, jitter=0)

    async def send_concurrently() -> None:
        url = f"{provider.url}/v1/completions"
        async with aiohttp.ClientSession() as session:
            bodies = [{"model": "m", "prompt": str(call)} for call in range(calls)]
            for response in asyncio.as_completed(
                [session.post(url, json=body) for body in bodies]
            ):
                assert (await response).status == 200

    asyncio.run(send_concurrently())
    attempts = finished_attempts(provider)
    assert len(attempts) == calls
    assert get_stats(provider)["peak_in_flight"] == max_overlap(attempts) == calls


def test_sequential_calls_are_never_in_flight_together(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(first_token=0, per_token=0)
    for _ in range(10):
        complete()
    assert (
        get_stats(provider)["peak_in_flight"]
        == max_overlap(finished_attempts(provider))
        == 1
    )
    assert get_stats(provider)["in_flight"] == 0


def test_disconnect_before_the_first_byte_is_recorded(
    provider: Provider, send_call: SendCall, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=60)
    connection = send_call()
    until_in_flight(1)
    connection.close()
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["disconnected"]) == ("cancelled", True)
    assert (entry["first_byte"], entry["status"]) == (None, None)
    assert entry["completion_tokens"] == 0
    assert get_stats(provider)["statuses"] == {"disconnected": 1}
    assert get_stats(provider)["in_flight"] == 0


def test_disconnect_during_a_stream_is_recorded(
    provider: Provider, send_call: SendCall
) -> None:
    provider.configure(first_token=0, per_token=2, jitter=0)
    connection = send_call(stream=True)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["status"]) == ("cancelled", 200)
    assert entry["arrival"] <= entry["first_byte"] <= entry["end"]
    assert entry["completion_tokens"] == 1
    assert get_stats(provider)["statuses"] == {"disconnected": 1}


def test_disconnect_during_the_request_is_recorded(
    provider: Provider, until_in_flight: Callable[[int], None]
) -> None:
    host, port = provider.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        until_in_flight(1)
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["first_byte"]) == ("cancelled", None)


@pytest.mark.parametrize("text", ["soon", "-1", "1e9", "nan", "١", "9" * 40])
def test_odd_timeout_header_is_ignored(provider: Provider, text: str) -> None:
    connection = http.client.HTTPConnection(provider.url.removeprefix("http://"))
    headers = {"x-stainless-read-timeout": text.encode("utf-8")}
    connection.request("GET", "/v1/models", headers=headers)
    connection.getresponse().read()
    connection.close()
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["timeout"]) == ("answered", None)


def test_cancelled_task_is_recorded(
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
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["timeout"]) == ("cancelled", 600)  # the SDK's own


def test_call_in_flight_has_the_state_in_flight(
    provider: Provider, send_call: SendCall, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=60)
    send_call()
    until_in_flight(1)
    [entry] = provider.ask("/_provider/journal")["attempts"]
    assert entry["state"] == "in flight"
    assert (entry["first_byte"], entry["end"]) == (None, None)


def test_since_returns_the_attempts_after_a_mark(
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


def test_settle_waits_for_earlier_calls_but_not_for_later_ones() -> None:
    async def main() -> None:
        journal = Journal()
        first = journal.arrive("GET /", 1)
        page = asyncio.create_task(journal.since(0, settle=10))
        await asyncio.sleep(0)
        journal.arrive("GET /", 1)
        journal.end(first)
        _, attempts = await page
        assert attempts == [first]
        assert first.end is not None

    asyncio.run(main())


def test_changed_returns_only_the_attempts_that_changed_after_a_mark(
    provider: Provider, complete: Complete
) -> None:
    provider.configure(first_token=0, per_token=0)
    complete("before")
    mark = provider.ask("/_provider/journal?settle=10")
    assert [entry["changed"] for entry in mark["attempts"]] == [mark["changed"]]
    unchanged = provider.ask(f"/_provider/journal?changed={mark['changed']}")
    assert (unchanged["attempts"], unchanged["changed"]) == ([], mark["changed"])

    complete("after")
    page = provider.ask(f"/_provider/journal?changed={mark['changed']}&settle=10")
    [entry] = page["attempts"]
    assert (entry["prompt"], entry["state"]) == ("after", "answered")
    assert entry["changed"] == page["changed"] > mark["changed"]
    assert page["dropped"] == mark["dropped"]


@pytest.mark.parametrize("step", ["describe", "first_byte", "end"])
def test_every_step_of_an_attempt_is_a_change(step: str) -> None:
    journal = Journal()
    entry = journal.arrive("GET /", 1)
    journal.arrive("GET /", 1)
    mark, _ = read_journal(journal)
    options: dict[str, list[Any]] = {
        "describe": ["m", "Why?", False],
        "first_byte": [200],
        "end": [],
    }
    getattr(journal, step)(entry, *options[step])
    head, attempts = read_journal(journal, changed=mark["changed"])
    assert attempts == [entry]
    assert entry.changed == head["changed"] == mark["changed"] + 1


@pytest.mark.parametrize("query", ["since=first", "settle=long", "changed=all"])
def test_invalid_query_is_rejected(provider: Provider, query: str) -> None:
    with pytest.raises(ValueError, match="rejected the request"):
        provider.ask(f"/_provider/journal?{query}")


def journal_of(calls: int, max_attempts: int) -> Journal:
    journal = Journal(max_attempts)
    for _ in range(calls):
        entry = journal.arrive("GET /", 1)
        journal.first_byte(entry, 200)
        journal.end(entry)
    return journal


def read_journal(
    journal: Journal, since: int = 0, changed: int = 0
) -> tuple[Json, list[Attempt]]:
    return asyncio.run(journal.since(since, changed=changed))


def test_journal_is_bounded_and_counts_dropped_attempts() -> None:
    journal = journal_of(calls=5, max_attempts=3)
    head, attempts = read_journal(journal)
    assert [entry.number for entry in attempts] == [2, 3, 4]
    assert (head["dropped"], head["next"]) == (2, 5)
    for since in (2, 5):
        head, _ = read_journal(journal, since)
        assert head["dropped"] == 0
    assert journal.stats()["requests"] == 5


def test_reset_empties_the_journal_but_continues_the_numbering() -> None:
    journal = journal_of(calls=5, max_attempts=10)
    journal.reset()
    assert journal.stats() == {
        "requests": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "in_flight": 0,
        "peak_in_flight": 0,
        "statuses": {},
    }
    head, attempts = read_journal(journal)
    assert attempts == []
    assert (head["dropped"], head["next"]) == (5, 5)
    assert journal.arrive("GET /", 1).number == 5


def test_reset_keeps_calls_in_flight() -> None:
    journal = Journal()
    entry = journal.arrive("GET /", 1)
    journal.reset()
    assert journal.stats()["in_flight"] == journal.stats()["peak_in_flight"] == 1
    journal.end(entry)
    assert journal.stats()["in_flight"] == 0
    head, _ = read_journal(journal)
    assert head["dropped"] == 0


def test_calls_in_flight_are_counted_even_if_their_entry_was_dropped() -> None:
    journal = Journal(kept=1)
    entries = [journal.arrive("GET /", 1) for _ in range(3)]
    journal.reset()
    assert journal.stats()["in_flight"] == 3
    for entry in entries:
        journal.end(entry)
    assert journal.stats()["in_flight"] == 0


def test_stats_are_the_sums_of_the_attempts(
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
    attempts, stats = finished_attempts(provider), get_stats(provider)
    assert stats["requests"] == len(attempts) == 5
    for name in ("prompt_tokens", "completion_tokens"):
        assert stats[name] == sum(entry[name] for entry in attempts) > 0
    assert stats["statuses"] == {"200": 3, "404": 2}


def test_control_requests_are_not_in_the_journal(provider: Provider) -> None:
    provider.configure()
    get_stats(provider)
    assert finished_attempts(provider) == []


def test_attempt_that_arrives_while_a_page_settles_is_on_the_next_page() -> None:
    async def read_two_pages() -> list[int]:
        journal = Journal()
        first = journal.arrive("GET /", 1)
        settling = asyncio.create_task(journal.since(0, settle=10))
        await asyncio.sleep(0)  # it waits for the first attempt to end
        second = journal.arrive("GET /", 1)
        journal.end(first)
        head, attempts = await settling
        assert attempts == [first]
        _, attempts = await journal.since(0, changed=int(head["changed"]))
        assert second in attempts
        return [entry.number for entry in attempts]

    assert 1 in asyncio.run(read_two_pages())

import asyncio
import math
import re
import time
from typing import Any

import openai
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI

from helpers.connection import Provider
from llm_stub.api.errors import rate_limit_exceeded
from llm_stub.limits import Limits, format_duration
from llm_stub.settings import Settings

Json = dict[str, Any]

HEADERS = [
    f"x-ratelimit-{what}-{name}"
    for what in ("limit", "remaining", "reset")
    for name in ("requests", "tokens")
]
TIME = re.compile(r"\d{1,3}ms|(\d+h)?(\d{1,2}m)?\d{1,2}(\.\d{1,3})?s")
drawn = settings(deadline=None, max_examples=50, derandomize=True)


def limits(now: float = 0, **changes: Any) -> Limits:
    made = Limits()
    made.change(Settings(**changes), now)
    return made


def remaining(made: Limits, name: str = "requests") -> int:
    return int(made.headers()[f"x-ratelimit-remaining-{name}"])


def admitted_at_once(made: Limits, now: float = 0) -> int:
    """How many calls are let through until one is refused."""
    calls = 0
    while made.admit(0, now) is None:
        calls += 1
    return calls


@pytest.mark.parametrize(
    ("name", "per_minute", "most"), [("requests", 600, 1), ("tokens", 6000, 20)]
)
@given(data=st.data())
@drawn
def test_a_minute_under_pressure_lets_through_the_allowance_and_one_burst(
    name: str, per_minute: int, most: int, data: st.DataObject
) -> None:
    per_minute *= data.draw(st.integers(1, 10), "scale")
    burst = data.draw(st.floats(5, 15), "burst")
    tokens = data.draw(st.integers(1, most), "tokens")
    together = data.draw(st.integers(1, 30), "calls at once; 1: evenly")
    pressure = data.draw(st.floats(1.5, 3), "times the limit")
    made = limits(**{f"{name}_per_minute": per_minute, "burst": burst})
    gap = 60 * tokens * together / per_minute / pressure
    moments = [turn * gap for turn in range(math.floor(60 / gap) + 1)]
    used = sum(
        tokens
        for now in moments
        for _ in range(together)
        if made.admit(tokens, now) is None
    )
    allowance = per_minute / 60 * (burst + moments[-1])
    assert 0.99 * allowance <= used <= allowance + 1e-5


@given(
    per_minute=st.sampled_from([7, 60, 500, 6000, 60_000]),
    burst=st.integers(1, 60),
    now=st.integers(0, 10**8).map(lambda milliseconds: milliseconds / 1000),
    share=st.floats(0, 1),
)
@drawn
def test_a_call_is_let_through_when_its_retry_after_ms_has_passed_and_no_sooner(
    per_minute: int, burst: int, now: float, share: float
) -> None:
    made = limits(now, tokens_per_minute=per_minute, burst=burst)
    most = remaining(made, "tokens")
    assert made.admit(most, now) is None
    tokens = max(1, round(share * most))
    refusal = made.admit(tokens, now)
    assume(refusal is not None and refusal.retry_after > 0.01)
    assert refusal is not None
    told = rate_limit_exceeded(refusal).headers
    assert made.admit(tokens, now + 0.5 * refusal.retry_after) is not None
    assert made.admit(tokens, now + int(told["retry-after-ms"]) / 1000) is None
    assert 0 <= int(told["retry-after"]) * 1000 - int(told["retry-after-ms"]) < 1000


def test_a_refused_call_uses_nothing_up() -> None:
    made = limits(requests_per_minute=60, tokens_per_minute=600, burst=10)
    assert made.admit(60, 0) is None
    before = made.headers()
    for tokens in (41, 50, 100, 101):
        assert made.admit(tokens, 0) is not None
    assert made.headers() == before
    assert made.admit(40, 0) is None
    assert (remaining(made), remaining(made, "tokens")) == (8, 0)


def test_the_limit_that_lasts_longest_is_the_one_told() -> None:
    made = limits(requests_per_minute=60, tokens_per_minute=60, burst=2)
    assert made.admit(1, 0) is None
    assert made.admit(1, 0) is None
    for tokens, name in [(1, "requests"), (2, "tokens"), (3, "tokens")]:
        refusal = made.admit(tokens, 0.1)
        assert refusal is not None
        assert refusal.bucket.name == name


def test_what_is_not_used_adds_up_to_one_burst_and_no_more() -> None:
    made = limits(requests_per_minute=60, burst=5)
    assert admitted_at_once(made) == 5
    assert admitted_at_once(made, now=3) == 3
    assert admitted_at_once(made, now=1000) == 5


def test_one_request_passes_however_small_burst_and_limit_are() -> None:
    made = limits(requests_per_minute=0.5, burst=0.1)
    assert admitted_at_once(made) == 1
    assert admitted_at_once(made, now=119) == 0
    assert admitted_at_once(made, now=120) == 1


@given(st.lists(st.sampled_from([6, 30, 60, 600]), min_size=2, max_size=6))
@drawn
def test_changes_of_a_limit_never_give_a_new_burst(rates: list[int]) -> None:
    made, used = Limits(), 0
    for rate in rates:
        made.change(Settings(requests_per_minute=rate, burst=10), 0)
        used += admitted_at_once(made)
    assert used <= max(rates) / 60 * 10


def test_another_setting_leaves_what_was_used_used() -> None:
    made = limits(requests_per_minute=60, burst=10)
    for _ in range(4):
        assert made.admit(0, 0) is None
    made.change(Settings(requests_per_minute=60, burst=10, first_token=0), 1)
    assert admitted_at_once(made, now=1) == 7


def test_a_new_limit_holds_from_its_change_on() -> None:
    made = limits(requests_per_minute=60, burst=10)
    assert admitted_at_once(made) == 10
    made.change(Settings(requests_per_minute=600, burst=10), 0)
    admitted_at_once(made)
    assert admitted_at_once(made, now=1) == 10


def test_a_limit_that_is_taken_away_no_longer_holds() -> None:
    made = limits(requests_per_minute=60, tokens_per_minute=60)
    made.change(Settings(tokens_per_minute=600), 0)
    assert all(made.admit(0, 0) is None for _ in range(1000))
    made.change(Settings(), 0)
    assert all(made.admit(10**6, 0) is None for _ in range(1000))
    assert made.headers() == {}


@pytest.mark.parametrize(
    ("per_minute", "used", "remains", "reset"),
    [
        (500, 0, "30000", "0s"),
        (500, 1, "29999", "120ms"),
        (10_000 / 24 / 60, 1, "415", "8.64s"),
        (60, 360, "3240", "6m0s"),
        (1, 60, "0", "1h0m0s"),
    ],
)
def test_the_headers_tell_what_remains_and_when_all_of_it_is_back(
    per_minute: float, used: int, remains: str, reset: str
) -> None:
    made = limits(requests_per_minute=per_minute, burst=3600)
    assert all(made.admit(0, 0) is None for _ in range(used))
    assert made.headers() == {
        "x-ratelimit-limit-requests": f"{per_minute:.0f}",
        "x-ratelimit-remaining-requests": remains,
        "x-ratelimit-reset-requests": reset,
    }


@pytest.fixture
def client(provider: Provider, client: OpenAI) -> OpenAI:
    provider.configure(first_token=0, per_token=0)
    return client


CALLS: dict[str, Json] = {
    "completion": {"prompt": "Why?"},
    "completion stream": {"prompt": "Why?", "stream": True},
    "chat": {"messages": [{"role": "user", "content": "Why?"}]},
    "response": {"input": "Why?"},
    "response stream": {"input": "Why?", "stream": True},
    "embedding": {"input": "Why?"},
}


def headers(client: OpenAI, kind: str = "completion", **options: Any) -> Any:
    """Make a call and give the headers of its answer."""
    endpoint: Any = {
        "completion": client.completions,
        "chat": client.chat.completions,
        "response": client.responses,
        "embedding": client.embeddings,
    }[kind.split()[0]]
    raw = endpoint.with_raw_response.create(model="m", **CALLS[kind] | options)
    raw.http_response.read()
    return raw.headers


def attempts(provider: Provider) -> list[Json]:
    found: list[Json] = provider.ask("/_provider/journal?settle=5")["attempts"]
    assert all(entry["end"] is not None for entry in found)
    return found


@pytest.mark.parametrize("name", ["requests", "tokens"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_call_past_a_limit_is_refused_as_the_api_does(
    client: OpenAI, provider: Provider, kind: str, name: str
) -> None:
    with provider.behaving(**{f"{name}_per_minute": 1, "burst": 3600}):
        used = 60 - int(headers(client, kind)[f"x-ratelimit-remaining-{name}"])
    provider.ask("/_provider/reset", "POST")
    provider.configure(**{f"{name}_per_minute": 1, "burst": 60 * used + 1})
    headers(client, kind)
    with pytest.raises(openai.RateLimitError) as caught:
        headers(client, kind)

    error, told = caught.value, caught.value.response.headers
    assert (error.status_code, error.code, error.type, error.param) == (
        429,
        "rate_limit_exceeded",
        name,
        None,
    )
    assert f"Limit 1, Requested {used}. Please try again in" in error.message
    assert 0 < int(told["retry-after-ms"]) <= 60_000 * used
    assert int(told["retry-after"]) == math.ceil(int(told["retry-after-ms"]) / 1000)
    assert told[f"x-ratelimit-remaining-{name}"] == "0"
    assert told["x-request-id"].startswith("req_")
    assert [(entry["status"], entry["state"]) for entry in attempts(provider)] == [
        (200, "answered"),
        (429, "failed"),
    ]


@pytest.mark.parametrize("kind", CALLS)
def test_an_answer_has_the_headers_of_the_limits_that_are_set(
    client: OpenAI, provider: Provider, kind: str
) -> None:
    assert not [name for name in headers(client, kind) if "ratelimit" in name]
    with provider.behaving(requests_per_minute=6):
        found = headers(client, kind)
        assert {name for name in HEADERS if name in found} == set(HEADERS[::2])
    provider.configure(requests_per_minute=6, tokens_per_minute=6, burst=3600)
    found = headers(client, kind)
    for name in ("requests", "tokens"):
        assert found[f"x-ratelimit-limit-{name}"] == "6"
        remains = int(found[f"x-ratelimit-remaining-{name}"])
        assert 300 < remains < 360
        reset = found[f"x-ratelimit-reset-{name}"]
        assert TIME.fullmatch(reset)
        assert reset == format_duration((360 - remains) * 10)
    assert not [name for name in found if name.startswith("retry-after")]


def test_prompt_and_answer_count_against_the_tokens(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(tokens_per_minute=1, burst=3600)
    answer = client.completions.with_raw_response.create(model="m", prompt="Why?")
    usage = answer.parse().usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    remains = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert usage.total_tokens == 60 - remains


def test_a_call_larger_than_the_limit_is_told_so_and_not_when_to_retry(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(tokens_per_minute=600, burst=1)
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        headers(client, prompt="Why?" * 20, max_tokens=1)
    error = caught.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    assert "at most 10 at once, Requested 41" in error.message
    assert "retry-after" not in error.response.headers
    assert error.response.headers["x-ratelimit-remaining-tokens"] == "10"
    headers(client, max_tokens=1)


def test_the_sdks_own_retry_waits_as_long_as_it_is_told_and_gets_through(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(requests_per_minute=60, burst=0.1, first_token=0, per_token=0)
    headers(client)
    headers(client.with_options(max_retries=2))
    first, refused, retried = attempts(provider)
    assert [entry["status"] for entry in (first, refused, retried)] == [200, 429, 200]
    assert [entry["attempt"] for entry in (first, refused, retried)] == [1, 1, 2]
    # Its own back-off is half a second at most, and would be refused again.
    assert 1 <= retried["arrival"] - first["arrival"] < 3


def test_a_limit_may_hold_for_a_block_only(client: OpenAI, provider: Provider) -> None:
    with provider.behaving(requests_per_minute=6, burst=1):
        headers(client)
        with pytest.raises(openai.RateLimitError):
            headers(client)
    for _ in range(5):
        headers(client)
    assert provider.configure()["requests_per_minute"] is None


def test_a_limit_does_not_stop_a_call_in_flight(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(per_token=0.02)
    earlier = client.completions.create(model="m", prompt="Why?", stream=True)
    provider.configure(tokens_per_minute=1)
    with pytest.raises(openai.RateLimitError):
        headers(client)
    assert list(earlier)[-1].choices[0].finish_reason == "stop"
    states = [entry["state"] for entry in attempts(provider)]
    assert states == ["answered", "failed"]


def test_many_clients_together_get_what_the_limit_allows_and_no_more(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(requests_per_minute=1200, burst=1, first_token=0, per_token=0)
    until = time.monotonic() + 4

    async def press(client: AsyncOpenAI, prompt: str) -> None:
        while time.monotonic() < until:
            try:
                await client.completions.create(model="m", prompt=prompt, max_tokens=1)
            except openai.RateLimitError as error:
                wait = int(error.response.headers["retry-after-ms"])
                await asyncio.sleep(wait / 1000)

    async def all_together() -> None:
        async with AsyncOpenAI(max_retries=0) as client:
            await asyncio.gather(*(press(client, str(one)) for one in range(10)))

    asyncio.run(all_together())
    found = attempts(provider)
    assert {entry["status"] for entry in found} == {200, 429}
    admitted = [entry["arrival"] for entry in found if entry["status"] == 200]
    # The journal knows of each decision only that it came between the arrival
    # and the first byte. A refusal says that less than one request was left.
    refused = [entry for entry in found if entry["status"] == 429][-1]
    by_then = sum(arrival <= refused["first_byte"] for arrival in admitted)
    assert by_then > 20 + 20 * (refused["arrival"] - found[0]["first_byte"]) - 1
    end = max(entry["first_byte"] for entry in found if entry["status"] == 200)
    assert len(admitted) <= 20 + 20 * (end - found[0]["arrival"])

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
from tests.llm_stub.conftest import Json, finished_attempts

DURATION = re.compile(r"\d{1,3}ms|(\d+h)?(\d{1,2}m)?\d{1,2}(\.\d{1,3})?s")
property_test = settings(deadline=None, max_examples=50, derandomize=True)


UNLIMITED = {
    f"x-ratelimit-{field}-{name}": value
    for field, value in [
        ("limit", "1000000000"),
        ("remaining", "1000000000"),
        ("reset", "0s"),
    ]
    for name in ("requests", "tokens")
}


def make_limits(now: float = 0, **changes: Any) -> Limits:
    limits = Limits()
    limits.change(Settings(**changes), now)
    return limits


def remaining(limits: Limits, name: str = "requests") -> int:
    return int(limits.headers()[f"x-ratelimit-remaining-{name}"])


def admitted_at_once(limits: Limits, now: float = 0) -> int:
    """How many calls are admitted before one is rejected."""
    calls = 0
    while limits.admit(0, now) is None:
        calls += 1
    return calls


# The limits


@pytest.mark.parametrize(
    ("name", "per_minute", "max_tokens"), [("requests", 600, 1), ("tokens", 6000, 20)]
)
@given(data=st.data())
@property_test
def test_overloaded_limit_admits_its_rate_plus_one_burst(
    name: str, per_minute: int, max_tokens: int, data: st.DataObject
) -> None:
    per_minute *= data.draw(st.integers(1, 10), "scale")
    burst = data.draw(st.floats(5, 15), "burst")
    tokens = data.draw(st.integers(1, max_tokens), "tokens per call")
    group = data.draw(st.integers(1, 30), "calls that arrive together")
    load = data.draw(st.floats(1.5, 3), "load as a multiple of the limit")
    limits = make_limits(**{f"{name}_per_minute": per_minute, "burst": burst})
    gap = 60 * tokens * group / per_minute / load
    times = [turn * gap for turn in range(math.floor(60 / gap) + 1)]
    used = sum(
        tokens
        for now in times
        for _ in range(group)
        if limits.admit(tokens, now) is None
    )
    allowance = per_minute / 60 * (burst + times[-1])
    assert 0.99 * allowance <= used <= allowance + 1e-5


@given(
    per_minute=st.sampled_from([7, 60, 500, 6000, 60_000]),
    burst=st.integers(1, 60),
    now=st.integers(0, 10**8).map(lambda milliseconds: milliseconds / 1000),
    share=st.floats(0, 1),
)
@property_test
def test_call_is_admitted_after_retry_after_ms_and_not_sooner(
    per_minute: int, burst: int, now: float, share: float
) -> None:
    limits = make_limits(now, tokens_per_minute=per_minute, burst=burst)
    burst_tokens = remaining(limits, "tokens")
    assert limits.admit(burst_tokens, now) is None
    tokens = max(1, round(share * burst_tokens))
    rejection = limits.admit(tokens, now)
    assume(rejection is not None and rejection.retry_after > 0.01)
    assert rejection is not None
    headers = rate_limit_exceeded(rejection).headers
    milliseconds = int(headers["retry-after-ms"])
    assert limits.admit(tokens, now + 0.5 * rejection.retry_after) is not None
    assert limits.admit(tokens, now + milliseconds / 1000) is None
    assert 0 <= int(headers["retry-after"]) * 1000 - milliseconds < 1000


def test_rejected_call_uses_up_nothing() -> None:
    limits = make_limits(requests_per_minute=60, tokens_per_minute=600, burst=10)
    assert limits.admit(60, 0) is None
    before = limits.headers()
    for tokens in (41, 50, 100, 101):
        assert limits.admit(tokens, 0) is not None
    assert limits.headers() == before
    assert limits.admit(40, 0) is None
    assert (remaining(limits), remaining(limits, "tokens")) == (8, 0)


def test_rejection_is_for_the_limit_with_the_longest_wait() -> None:
    limits = make_limits(requests_per_minute=60, tokens_per_minute=60, burst=2)
    assert limits.admit(1, 0) is None
    assert limits.admit(1, 0) is None
    for tokens, name in [(1, "requests"), (2, "tokens"), (3, "tokens")]:
        rejection = limits.admit(tokens, 0.1)
        assert rejection is not None
        assert rejection.bucket.name == name


def test_unused_requests_accumulate_up_to_one_burst() -> None:
    limits = make_limits(requests_per_minute=60, burst=5)
    assert admitted_at_once(limits) == 5
    assert admitted_at_once(limits, now=3) == 3
    assert admitted_at_once(limits, now=1000) == 5


def test_one_request_is_admitted_even_with_a_tiny_burst() -> None:
    limits = make_limits(requests_per_minute=0.5, burst=0.1)
    assert admitted_at_once(limits) == 1
    assert admitted_at_once(limits, now=119) == 0
    assert admitted_at_once(limits, now=120) == 1


@given(st.lists(st.sampled_from([6, 30, 60, 600]), min_size=2, max_size=6))
@property_test
def test_changing_a_limit_never_grants_a_new_burst(rates: list[int]) -> None:
    limits, used = Limits(), 0
    for rate in rates:
        limits.change(Settings(requests_per_minute=rate, burst=10), 0)
        used += admitted_at_once(limits)
    assert used <= max(rates) / 60 * 10


def test_changing_another_setting_keeps_the_used_share() -> None:
    limits = make_limits(requests_per_minute=60, burst=10)
    for _ in range(4):
        assert limits.admit(0, 0) is None
    limits.change(Settings(requests_per_minute=60, burst=10, first_token=0), 1)
    assert admitted_at_once(limits, now=1) == 7


def test_new_limit_applies_from_the_change_on() -> None:
    limits = make_limits(requests_per_minute=60, burst=10)
    assert admitted_at_once(limits) == 10
    limits.change(Settings(requests_per_minute=600, burst=10), 0)
    admitted_at_once(limits)
    assert admitted_at_once(limits, now=1) == 10


def test_removed_limit_no_longer_applies() -> None:
    limits = make_limits(requests_per_minute=60, tokens_per_minute=60)
    limits.change(Settings(tokens_per_minute=600), 0)
    assert all(limits.admit(0, 0) is None for _ in range(1000))
    limits.change(Settings(), 0)
    assert all(limits.admit(10**6, 0) is None for _ in range(1000))
    assert limits.headers() == UNLIMITED


@pytest.mark.parametrize(
    ("per_minute", "used", "left", "reset"),
    [
        (500, 0, "30000", "0s"),
        (500, 1, "29999", "120ms"),
        (10_000 / 24 / 60, 1, "415", "8.64s"),
        (60, 360, "3240", "6m0s"),
        (1, 60, "0", "1h0m0s"),
    ],
)
def test_headers_have_the_remaining_requests_and_the_time_until_reset(
    per_minute: float, used: int, left: str, reset: str
) -> None:
    limits = make_limits(requests_per_minute=per_minute, burst=3600)
    assert all(limits.admit(0, 0) is None for _ in range(used))
    assert limits.headers() == UNLIMITED | {
        "x-ratelimit-limit-requests": f"{per_minute:.0f}",
        "x-ratelimit-remaining-requests": left,
        "x-ratelimit-reset-requests": reset,
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (2.007, "2.007s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (61.5, "1m1.5s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90_061.25, "25h1m1.25s"),
    ],
)
def test_duration_has_the_format_of_the_api_and_is_never_too_short(
    seconds: float, text: str
) -> None:
    assert format_duration(seconds) == text


# HTTP


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


def call(client: OpenAI, kind: str = "completion", **options: Any) -> Any:
    """Make a call; returns the response headers."""
    endpoint: Any = {
        "completion": client.completions,
        "chat": client.chat.completions,
        "response": client.responses,
        "embedding": client.embeddings,
    }[kind.split()[0]]
    raw = endpoint.with_raw_response.create(model="m", **CALLS[kind] | options)
    raw.http_response.read()
    return raw.headers


@pytest.mark.parametrize("name", ["requests", "tokens"])
@pytest.mark.parametrize("kind", CALLS)
def test_call_over_a_limit_gets_the_429_of_the_api(
    client: OpenAI, provider: Provider, kind: str, name: str
) -> None:
    with provider.behaving(**{f"{name}_per_minute": 1, "burst": 3600}):
        used = 60 - int(call(client, kind)[f"x-ratelimit-remaining-{name}"])
    provider.ask("/_provider/reset", "POST")
    provider.configure(**{f"{name}_per_minute": 1, "burst": 60 * used + 1})
    call(client, kind)
    with pytest.raises(openai.RateLimitError) as caught:
        call(client, kind)

    error, headers = caught.value, caught.value.response.headers
    assert (error.status_code, error.code, error.type, error.param) == (
        429,
        "rate_limit_exceeded",
        name,
        None,
    )
    assert f"Limit 1, Requested {used}. Please try again in" in error.message
    milliseconds = int(headers["retry-after-ms"])
    assert 0 < milliseconds <= 60_000 * used
    assert int(headers["retry-after"]) == math.ceil(milliseconds / 1000)
    assert headers[f"x-ratelimit-remaining-{name}"] == "0"
    assert headers["x-request-id"].startswith("req_")
    attempts = finished_attempts(provider)
    assert [(entry["status"], entry["state"]) for entry in attempts] == [
        (200, "answered"),
        (429, "failed"),
    ]


def limit_headers(headers: Any) -> dict[str, str]:
    return {name: text for name, text in headers.items() if "ratelimit" in name}


@pytest.mark.parametrize("kind", CALLS)
def test_response_has_headers_for_both_limits_even_if_they_are_not_set(
    client: OpenAI, provider: Provider, kind: str
) -> None:
    assert limit_headers(call(client, kind)) == UNLIMITED
    with provider.behaving(requests_per_minute=6):
        headers = limit_headers(call(client, kind))
        assert headers.keys() == UNLIMITED.keys()
        changed = {name for name in headers if headers[name] != UNLIMITED[name]}
        assert changed == {name for name in UNLIMITED if name.endswith("requests")}
    provider.configure(requests_per_minute=6, tokens_per_minute=6, burst=3600)
    headers = call(client, kind)
    for name in ("requests", "tokens"):
        assert headers[f"x-ratelimit-limit-{name}"] == "6"
        left = int(headers[f"x-ratelimit-remaining-{name}"])
        assert 300 < left < 360
        reset = headers[f"x-ratelimit-reset-{name}"]
        assert DURATION.fullmatch(reset)
        assert reset == format_duration((360 - left) * 10)
    assert not [name for name in headers if name.startswith("retry-after")]


def test_prompt_and_answer_both_count_towards_the_token_limit(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(tokens_per_minute=1, burst=3600)
    raw = client.completions.with_raw_response.create(model="m", prompt="Why?")
    usage = raw.parse().usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    left = int(raw.headers["x-ratelimit-remaining-tokens"])
    assert usage.total_tokens == 60 - left


@pytest.mark.parametrize("kind", CALLS)
def test_invalid_call_uses_up_one_request_but_no_tokens(
    client: OpenAI, provider: Provider, kind: str
) -> None:
    provider.configure(requests_per_minute=1, tokens_per_minute=1, burst=3600)
    for left in ("59", "58"):
        with pytest.raises(openai.BadRequestError) as error:
            call(client, kind, extra_body={"temprature": 0})
        headers = limit_headers(error.value.response.headers)
        assert headers.keys() == UNLIMITED.keys()
        assert headers["x-ratelimit-remaining-requests"] == left
        assert headers["x-ratelimit-remaining-tokens"] == "60"


def test_invalid_call_gets_its_400_even_if_no_request_is_left(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(requests_per_minute=1, burst=60)
    call(client)
    with pytest.raises(openai.BadRequestError) as error:
        call(client, n=0)
    assert error.value.response.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"keys": ["other"]}, openai.AuthenticationError),
        ({"models": ["other"]}, openai.NotFoundError),
    ],
    ids=["401", "404"],
)
def test_call_with_a_wrong_key_or_model_has_no_limit_headers_and_uses_up_nothing(
    client: OpenAI,
    provider: Provider,
    setting: Json,
    error: type[openai.APIStatusError],
) -> None:
    provider.configure(requests_per_minute=1, burst=3600)
    with provider.behaving(**setting), pytest.raises(error) as caught:
        call(client)
    assert limit_headers(caught.value.response.headers) == {}
    assert call(client)["x-ratelimit-remaining-requests"] == "59"


def test_call_larger_than_the_limit_gets_a_429_without_retry_after(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(tokens_per_minute=600, burst=1)
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        call(client, prompt="Why?" * 20, max_tokens=1)
    error = caught.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "tokens")
    assert "at most 10 at once, Requested 41" in error.message
    assert "retry-after" not in error.response.headers
    assert error.response.headers["x-ratelimit-remaining-tokens"] == "10"
    call(client, max_tokens=1)


def test_sdk_retry_waits_for_retry_after_and_is_admitted(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(requests_per_minute=60, burst=0.1, first_token=0, per_token=0)
    call(client)
    call(client.with_options(max_retries=2))
    first, rejected, retried = finished_attempts(provider)
    assert [entry["status"] for entry in (first, rejected, retried)] == [200, 429, 200]
    assert [entry["attempt"] for entry in (first, rejected, retried)] == [1, 1, 2]
    # The SDK's default backoff, at most half a second, would be rejected again.
    assert 1 <= retried["arrival"] - first["arrival"] < 3


def test_limit_can_apply_to_a_block_only(client: OpenAI, provider: Provider) -> None:
    with provider.behaving(requests_per_minute=6, burst=1):
        call(client)
        with pytest.raises(openai.RateLimitError):
            call(client)
    for _ in range(5):
        call(client)
    assert provider.configure()["requests_per_minute"] is None


def test_new_limit_does_not_stop_a_call_in_flight(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(per_token=0.02)
    earlier = client.completions.create(
        model="m", prompt="Why?", stream=True, max_tokens=99
    )
    provider.configure(tokens_per_minute=1)
    with pytest.raises(openai.RateLimitError):
        call(client)
    assert list(earlier)[-1].choices[0].finish_reason == "stop"
    states = [entry["state"] for entry in finished_attempts(provider)]
    assert states == ["answered", "failed"]


def test_concurrent_clients_together_get_exactly_the_limit(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(requests_per_minute=1200, burst=1, first_token=0, per_token=0)
    deadline = time.monotonic() + 4

    async def keep_calling(client: AsyncOpenAI, prompt: str) -> None:
        while time.monotonic() < deadline:
            try:
                await client.completions.create(model="m", prompt=prompt, max_tokens=1)
            except openai.RateLimitError as error:
                wait = int(error.response.headers["retry-after-ms"])
                await asyncio.sleep(wait / 1000)

    async def ten_clients() -> None:
        async with AsyncOpenAI(max_retries=0) as client:
            await asyncio.gather(*(keep_calling(client, str(n)) for n in range(10)))

    asyncio.run(ten_clients())
    attempts = finished_attempts(provider)
    assert {entry["status"] for entry in attempts} == {200, 429}
    admitted = [entry["arrival"] for entry in attempts if entry["status"] == 200]
    # The journal doesn't record when the limit decided, only that it was between
    # arrival and first byte. A rejection means that less than one request was left.
    rejected = [entry for entry in attempts if entry["status"] == 429][-1]
    by_then = sum(arrival <= rejected["first_byte"] for arrival in admitted)
    assert by_then > 20 + 20 * (rejected["arrival"] - attempts[0]["first_byte"]) - 1
    end = max(entry["first_byte"] for entry in attempts if entry["status"] == 200)
    assert len(admitted) <= 20 + 20 * (end - attempts[0]["arrival"])

import asyncio
import contextlib
import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import httpx2
import openai
import pytest
from openai import OpenAI

from helpers.connection import Provider

Json = dict[str, Any]

SKY = "Why is the sky blue?"
CALLS: dict[str, Json] = {
    "completion": {"prompt": SKY},
    "chat": {"messages": [{"role": "user", "content": SKY}]},
    "response": {"input": SKY},
    # Where the caller names no format, the SDK takes the vectors apart itself.
    "embedding": {"input": SKY, "encoding_format": "float"},
}
EACH_WAY = [(kind, False) for kind in CALLS] + [
    (kind, True) for kind in CALLS if kind != "embedding"
]
RAISED: dict[str, tuple[type[Exception], type[Exception] | None]] = {
    "error_500": (openai.InternalServerError, None),
    "error_503": (openai.InternalServerError, None),
    "reset": (openai.APIConnectionError, httpx2.ReadError),
    "reset_midway": (openai.APIConnectionError, httpx2.ReadError),
    "truncated": (openai.APIConnectionError, httpx2.RemoteProtocolError),
    "malformed": (json.JSONDecodeError, None),
    "hang": (openai.APITimeoutError, httpx2.ReadTimeout),
}
ENTERED = {
    "error_500": (500, "failed"),
    "error_503": (503, "failed"),
    "reset": (None, "failed"),
    "reset_midway": (200, "failed"),
    "truncated": (200, "failed"),
    "malformed": (200, "failed"),
    "wrong_type": (200, "failed"),
    "slow": (200, "answered"),
    "hang": (None, "cancelled"),
}
ways = pytest.mark.parametrize(("kind", "stream"), EACH_WAY)


def endpoint(client: Any, kind: str) -> Any:
    return {
        "completion": client.completions,
        "chat": client.chat.completions,
        "response": client.responses,
        "embedding": client.embeddings,
    }[kind]


def ask(
    client: OpenAI, kind: str = "completion", stream: bool = False, **options: Any
) -> Any:
    """Make a call and take its whole answer: of a stream, its events."""
    body = CALLS[kind] | options | ({"stream": True} if stream else {})
    answer = endpoint(client, kind).create(model="m", **body)
    return list(answer) if stream else answer


def attempts(provider: Provider) -> list[Json]:
    found: list[Json] = provider.ask("/_provider/journal?settle=5")["attempts"]
    assert all(entry["end"] is not None for entry in found)
    return found


def entered(provider: Provider) -> list[tuple[int | None, str, str]]:
    return [
        (entry["status"], entry["state"], entry["fault"])
        for entry in attempts(provider)
    ]


@pytest.fixture
def client(provider: Provider, client: OpenAI) -> OpenAI:
    """A client of a provider that answers at once, one call at a time."""
    provider.configure(first_token=0, per_token=0, capacity=1)
    return client


@ways
@pytest.mark.parametrize("fault", RAISED)
def test_a_fault_is_raised_and_the_next_call_of_the_same_client_is_answered(
    client: OpenAI, provider: Provider, fault: str, kind: str, stream: bool
) -> None:
    provider.configure(faults_by_prompt={SKY: [fault]})
    if fault == "hang":
        client = client.with_options(timeout=0.3)
    error, cause = RAISED[fault]
    with pytest.raises(error) as caught:
        ask(client, kind, stream)
    assert type(caught.value) is error
    assert type(caught.value.__cause__) is (cause or type(None))
    status, state = ENTERED[fault]
    if isinstance(caught.value, openai.InternalServerError):
        assert caught.value.status_code == status
        assert (caught.value.type, caught.value.code) == ("server_error", None)
    assert entered(provider) == [(status, state, fault)]

    patient = client.with_options(timeout=30)
    assert ask(patient, kind, stream)
    assert entered(provider)[1:] == [(200, "answered", "")]


@ways
def test_a_page_in_the_place_of_an_answer_is_a_text_or_an_empty_stream(
    client: OpenAI, provider: Provider, kind: str, stream: bool
) -> None:
    provider.configure(faults_by_prompt={SKY: ["wrong_type"]})
    page = ask(client, kind, stream)
    assert page == [] if stream else page.startswith("<html>")
    answer = ask(client, kind, stream)
    assert answer
    assert not isinstance(answer, str)
    first, second = entered(provider)
    assert first == (200, "failed", "wrong_type")
    assert second == (200, "answered", "")


@ways
def test_a_slow_answer_is_whole_and_late(
    client: OpenAI, provider: Provider, kind: str, stream: bool
) -> None:
    provider.configure(faults_by_prompt={SKY: ["slow"]}, slow=0.3)
    late, quick = ask(client, kind, stream), ask(client, kind, stream)
    assert late == quick
    assert entered(provider) == [(200, "answered", "slow"), (200, "answered", "")]
    waits = [one["first_byte"] - one["arrival"] for one in attempts(provider)]
    assert waits[0] >= 0.3 > waits[1]


def sent(client: OpenAI, kind: str) -> bytes:
    """The bytes of a stream, as far as they come."""
    raw = endpoint(client, kind).with_raw_response.create(
        model="m", stream=True, **CALLS[kind]
    )
    received = b""
    with contextlib.suppress(httpx2.HTTPError):
        for piece in raw.http_response.iter_bytes():
            received += piece
    return received


@pytest.mark.parametrize("kind", ["completion", "chat", "response"])
@pytest.mark.parametrize("fault", ["reset_midway", "truncated", "malformed"])
def test_a_broken_stream_is_the_beginning_of_the_whole_one(
    client: OpenAI, provider: Provider, fault: str, kind: str
) -> None:
    whole = sent(client, kind)
    provider.configure(faults={fault: 1})
    broken = sent(client, kind)
    *events, rest = broken.removesuffix(b"\n\n").split(b"\n\n")
    assert 5 < len(events) < whole.count(b"\n\n") - 5
    assert whole.startswith(broken.removesuffix(b"\n\n"))
    assert attempts(provider)[1]["completion_tokens"] < 20
    if fault == "malformed":
        _, _, half = rest.partition(b"data: ")
        assert half.startswith(b"{")
        with pytest.raises(json.JSONDecodeError):
            json.loads(half)


@pytest.mark.parametrize("fault", ["reset_midway", "truncated", "malformed"])
def test_a_stream_of_one_token_breaks_too(
    client: OpenAI, provider: Provider, fault: str
) -> None:
    provider.configure(faults={fault: 1})
    with pytest.raises(RAISED[fault][0]):
        ask(client, stream=True, max_tokens=1)
    assert [entry["state"] for entry in attempts(provider)] == ["failed"]


@pytest.mark.parametrize("fault", [*RAISED, "wrong_type", "slow"])
def test_a_client_that_hangs_up_before_the_fault_has_cancelled_its_call(
    client: OpenAI,
    provider: Provider,
    until_in_flight: Callable[[int], None],
    fault: str,
) -> None:
    provider.configure(first_token=60, faults_by_prompt={SKY: [fault]})
    connection = http.client.HTTPConnection(provider.url.removeprefix("http://"))
    body = json.dumps({"model": "m", "prompt": SKY})
    connection.request("POST", "/v1/completions", body)
    until_in_flight(1)
    connection.close()
    [entry] = attempts(provider)
    assert (entry["state"], entry["disconnected"]) == ("cancelled", True)
    assert entry["status"] is None


@pytest.mark.parametrize("fault", ["error_500", "error_503", "reset", "truncated"])
def test_the_sdks_own_retry_gets_past_a_fault(
    client: OpenAI, provider: Provider, fault: str
) -> None:
    provider.configure(faults_by_prompt={SKY: [fault, None]})
    assert ask(client.with_options(max_retries=1)).choices
    assert [(entry["attempt"], entry["fault"]) for entry in attempts(provider)] == [
        (1, fault),
        (2, ""),
    ]


def succeeds(client: OpenAI, prompt: str = SKY) -> bool:
    try:
        client.completions.create(model="m", prompt=prompt)
    except openai.InternalServerError:
        return False
    return True


def test_a_list_of_faults_says_what_becomes_of_each_try(
    client: OpenAI, provider: Provider
) -> None:
    faults = ["error_500", None, "error_503", None]
    provider.configure(faults_by_prompt={SKY: faults})
    tries = [succeeds(client) for _ in range(6)]
    assert tries == [False, True, False, True, True, True]


def test_tries_are_counted_anew_after_a_change_and_only_after_one(
    client: OpenAI, provider: Provider
) -> None:
    listed = {SKY: ["error_500"]}
    provider.configure(faults_by_prompt=listed)
    assert [succeeds(client), succeeds(client)] == [False, True]
    provider.configure(faults_by_prompt=listed)
    assert succeeds(client)
    provider.configure(seed=5)
    assert [succeeds(client), succeeds(client)] == [False, True]


def test_tries_of_different_prompts_are_counted_apart(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(faults_by_prompt={SKY: ["error_500"], "How?": ["error_503"]})
    assert [succeeds(client, prompt) for prompt in (SKY, "How?", "Who?")] == [
        False,
        False,
        True,
    ]
    assert succeeds(client)
    assert succeeds(client, "How?")


def test_white_space_and_case_of_a_prompt_do_not_matter(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(
        faults_by_prompt={" WHY is\nthe  sky blue?": ["error_500", "error_500"]}
    )
    assert not succeeds(client, "why is the sky blue?")
    assert not succeeds(client, "\tWhy Is The Sky Blue? ")
    assert succeeds(client, SKY)


def test_a_prompt_with_a_list_of_its_own_is_spared_the_rates(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(
        faults={"error_500": 1}, faults_by_prompt={SKY: ["error_503", None]}
    )
    assert [succeeds(client), succeeds(client), succeeds(client)] == [False, True, True]
    assert [succeeds(client, "How?"), succeeds(client, "How?")] == [False, False]
    statuses = [entry["status"] for entry in attempts(provider)]
    assert statuses == [503, 200, 200, 500, 500]


RATES = {
    "error_500": 0.1,
    "error_503": 0.05,
    "malformed": 0.2,
    "reset": 0.05,
    "truncated": 0.15,
    "wrong_type": 0.05,
}
PROMPTS = [f"What is {number} times {number}?" for number in range(400)]


def hit(provider: Provider, prompts: list[str], seed: int) -> dict[str, str]:
    """The fault that each prompt meets, '' for none."""
    provider.configure(faults=RATES, seed=seed, capacity=None)
    mark = provider.ask(f"/_provider/journal?since={10**12}")["next"]

    async def ask_all() -> None:
        url = f"{provider.url}/v1/completions"
        async with aiohttp.ClientSession() as session:

            async def ask_one(prompt: str) -> None:
                with contextlib.suppress(aiohttp.ClientError):
                    body = {"model": "m", "prompt": prompt, "max_tokens": 1}
                    async with session.post(url, json=body) as response:
                        await response.read()

            await asyncio.gather(*map(ask_one, prompts))

    asyncio.run(ask_all())
    found = provider.ask(f"/_provider/journal?since={mark}&settle=5")["attempts"]
    assert len(found) == len(prompts)
    return {entry["prompt"]: entry["fault"] for entry in found}


def test_each_fault_has_its_share_the_same_in_every_run_with_the_same_seed(
    client: OpenAI, provider: Provider
) -> None:
    first = hit(provider, PROMPTS, seed=1)
    counts = Counter(first.values())
    assert counts.keys() == RATES.keys() | {""}
    for fault, rate in RATES.items():
        assert counts[fault] / 400 == pytest.approx(rate, abs=0.05)

    other = hit(provider, PROMPTS, seed=2)
    assert Counter(other.values()) != counts
    assert sum(other[prompt] != first[prompt] for prompt in PROMPTS) > 100
    assert hit(provider, PROMPTS[::-1], seed=1) == first


@pytest.mark.parametrize(
    ("before", "later", "stream"),
    [("error_500", None, False), (None, "reset", False), (None, "reset_midway", True)],
)
def test_a_call_in_flight_ends_by_the_faults_it_began_with(
    client: OpenAI,
    provider: Provider,
    until_in_flight: Callable[[int], None],
    before: str | None,
    later: str | None,
    stream: bool,
) -> None:
    def rates(fault: str | None) -> dict[str, float]:
        return {fault: 1} if fault else {}

    def call() -> None:
        with contextlib.suppress(openai.APIError):
            ask(client, stream=stream)

    provider.configure(first_token=0.4, jitter=0, faults=rates(before))
    thread = threading.Thread(target=call)
    thread.start()
    until_in_flight(1)
    provider.configure(faults=rates(later))
    call()
    thread.join()
    assert [entry["fault"] for entry in attempts(provider)] == [
        before or "",
        later or "",
    ]


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"error_500": 0.6, "reset": 0.5}, "the rates add up to more than 1"),
        ({"boom": 0.5}, "'error_500', 'error_503', 'reset'"),
        ({"reset": 1.1}, "less than or equal to 1"),
        ({"reset": -0.1}, "greater than or equal to 0"),
    ],
    ids=["too many", "unknown", "over 1", "below 0"],
)
def test_wrong_faults_are_refused_with_a_reason(
    provider: Provider, faults: dict[str, float], reason: str
) -> None:
    before = provider.configure()
    with pytest.raises(ValueError, match="faults=") as error:
        provider.configure(faults=faults)
    assert str(faults) in str(error.value)
    assert reason in str(error.value)
    assert provider.configure() == before


def test_an_unknown_fault_of_a_prompt_is_refused_with_those_that_exist(
    provider: Provider,
) -> None:
    with pytest.raises(ValueError, match="'error_500', 'error_503', 'reset'"):
        provider.configure(faults_by_prompt={SKY: ["boom"]})

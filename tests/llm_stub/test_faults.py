import asyncio
import contextlib
import http.client
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import httpx2
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from langchain_openai import ChatOpenAI
from openai import OpenAI

from helpers.connection import Provider
from llm_stub.server import Server
from tests.llm_stub.conftest import Json, finished_attempts, without_ids
from tests.llm_stub.test_ids import FLAT_TOOLS, QUESTION, TOOLS

SKY = "Why is the sky blue?"
CALLS: dict[str, Json] = {
    "completion": {"prompt": SKY},
    "chat": {"messages": [{"role": "user", "content": SKY}]},
    "response": {"input": SKY},
    # Without a format, the SDK asks for base64 and decodes the vectors itself.
    "embedding": {"input": SKY, "encoding_format": "float"},
}
KINDS_AND_STREAM = [(kind, False) for kind in CALLS] + [
    (kind, True) for kind in CALLS if kind != "embedding"
]
EXPECTED_ERRORS: dict[str, tuple[type[Exception], type[Exception] | None]] = {
    "error_500": (openai.InternalServerError, None),
    "error_503": (openai.InternalServerError, None),
    "insufficient_quota": (openai.RateLimitError, None),
    "reset": (openai.APIConnectionError, httpx2.ReadError),
    "reset_midway": (openai.APIConnectionError, httpx2.ReadError),
    "truncated": (openai.APIConnectionError, httpx2.RemoteProtocolError),
    "malformed": (json.JSONDecodeError, None),
    "hang": (openai.APITimeoutError, httpx2.ReadTimeout),
}
EXPECTED_ENTRIES = {
    "error_500": (500, "failed"),
    "error_503": (503, "failed"),
    "insufficient_quota": (429, "failed"),
    "reset": (None, "failed"),
    "reset_midway": (200, "failed"),
    "truncated": (200, "failed"),
    "malformed": (200, "failed"),
    "wrong_type": (200, "failed"),
    "error_in_stream": (200, "failed"),
    "null_choices": (200, "failed"),
    "content_filter": (200, "answered"),
    "slow": (200, "answered"),
    "hang": (None, "timed out"),
}
TEXTS = ["completion", "chat", "response"]
every_kind = pytest.mark.parametrize(("kind", "stream"), KINDS_AND_STREAM)


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
    """Make a call; returns the answer, or the list of a stream's events."""
    body = CALLS[kind] | options | ({"stream": True} if stream else {})
    answer = endpoint(client, kind).create(model="m", **body)
    return list(answer) if stream else answer


def journal_entries(provider: Provider) -> list[tuple[int | None, str, str]]:
    return [
        (entry["status"], entry["state"], entry["fault"])
        for entry in finished_attempts(provider)
    ]


@pytest.fixture
def client(provider: Provider, client: OpenAI) -> OpenAI:
    """A client of a stub that answers immediately, one call at a time."""
    provider.configure(first_token=0, per_token=0, capacity=1)
    return client


@every_kind
@pytest.mark.parametrize("fault", EXPECTED_ERRORS)
def test_fault_raises_an_error_and_the_clients_next_call_succeeds(
    client: OpenAI, provider: Provider, fault: str, kind: str, stream: bool
) -> None:
    provider.configure(faults_by_prompt={SKY: [fault]})
    if fault == "hang":
        client = client.with_options(timeout=0.3)
    error, cause = EXPECTED_ERRORS[fault]
    with pytest.raises(error) as caught:
        ask(client, kind, stream)
    assert type(caught.value) is error
    assert type(caught.value.__cause__) is (cause or type(None))
    status, state = EXPECTED_ENTRIES[fault]
    if isinstance(caught.value, openai.InternalServerError):
        assert caught.value.status_code == status
        assert (caught.value.type, caught.value.code) == ("server_error", None)
    assert journal_entries(provider) == [(status, state, fault)]

    patient = client.with_options(timeout=30)
    assert ask(patient, kind, stream)
    assert journal_entries(provider)[1:] == [(200, "answered", "")]


@every_kind
def test_html_page_instead_of_json_becomes_a_str_or_an_empty_stream(
    client: OpenAI, provider: Provider, kind: str, stream: bool
) -> None:
    provider.configure(faults_by_prompt={SKY: ["wrong_type"]})
    page = ask(client, kind, stream)
    assert page == [] if stream else page.startswith("<html>")
    answer = ask(client, kind, stream)
    assert answer
    assert not isinstance(answer, str)
    first, second = journal_entries(provider)
    assert first == (200, "failed", "wrong_type")
    assert second == (200, "answered", "")


@every_kind
def test_slow_answer_is_complete_but_late(
    client: OpenAI, provider: Provider, kind: str, stream: bool
) -> None:
    provider.configure(faults_by_prompt={SKY: ["slow"]}, slow=0.3)
    late, quick = ask(client, kind, stream), ask(client, kind, stream)
    assert without_ids(late) == without_ids(quick)
    assert journal_entries(provider) == [
        (200, "answered", "slow"),
        (200, "answered", ""),
    ]
    attempts = finished_attempts(provider)
    waits = [entry["first_byte"] - entry["arrival"] for entry in attempts]
    assert waits[0] >= 0.3 > waits[1]


def received_bytes(client: OpenAI, kind: str, **options: Any) -> bytes:
    """The bytes of a stream up to its end or its interruption, without ids."""
    raw = endpoint(client, kind).with_raw_response.create(
        model="m", stream=True, **(CALLS[kind] | options)
    )
    received = b""
    with contextlib.suppress(httpx2.HTTPError):
        for chunk in raw.http_response.iter_bytes():
            received += chunk
    return re.sub(rb"[0-9a-f]{24,}", b"", received)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("fault", ["reset_midway", "truncated", "malformed"])
def test_broken_stream_is_a_prefix_of_the_complete_one(
    client: OpenAI, provider: Provider, fault: str, kind: str
) -> None:
    complete = received_bytes(client, kind)
    provider.configure(faults={fault: 1})
    broken = received_bytes(client, kind)
    *events, rest = broken.removesuffix(b"\n\n").split(b"\n\n")
    assert 5 < len(events) < complete.count(b"\n\n") - 5
    assert complete.startswith(broken.removesuffix(b"\n\n"))
    assert finished_attempts(provider)[1]["completion_tokens"] < 20
    if fault == "malformed":
        _, _, half = rest.partition(b"data: ")
        assert half.startswith(b"{")
        with pytest.raises(json.JSONDecodeError):
            json.loads(half)


@pytest.mark.parametrize("fault", ["reset_midway", "truncated", "malformed"])
def test_stream_of_one_token_breaks_after_that_token(
    client: OpenAI, provider: Provider, fault: str
) -> None:
    provider.configure(faults={fault: 1})
    with pytest.raises(EXPECTED_ERRORS[fault][0]):
        ask(client, stream=True, max_tokens=1)
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["completion_tokens"]) == ("failed", 1)


LATE_FAULTS = {*EXPECTED_ENTRIES} - {"insufficient_quota", "error_in_stream"}


@pytest.mark.parametrize("fault", sorted(LATE_FAULTS))
def test_client_that_disconnects_before_the_fault_cancels_its_call(
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
    [entry] = finished_attempts(provider)
    assert (entry["state"], entry["disconnected"]) == ("cancelled", True)
    assert entry["status"] is None


@pytest.mark.parametrize("fault", ["error_500", "error_503", "reset", "truncated"])
def test_sdk_retry_gets_past_a_fault(
    client: OpenAI, provider: Provider, fault: str
) -> None:
    provider.configure(faults_by_prompt={SKY: [fault, None]})
    assert ask(client.with_options(max_retries=1)).choices
    assert [
        (entry["attempt"], entry["fault"]) for entry in finished_attempts(provider)
    ] == [
        (1, fault),
        (2, ""),
    ]


def succeeds(client: OpenAI, prompt: str = SKY) -> bool:
    try:
        client.completions.create(model="m", prompt=prompt)
    except openai.InternalServerError:
        return False
    return True


def test_faults_by_prompt_apply_to_one_request_each_in_order(
    client: OpenAI, provider: Provider
) -> None:
    faults = ["error_500", None, "error_503", None]
    provider.configure(faults_by_prompt={SKY: faults})
    results = [succeeds(client) for _ in range(6)]
    assert results == [False, True, False, True, True, True]


@pytest.mark.parametrize(
    "change",
    [
        ("config", "PATCH", {"faults_by_prompt": {SKY: ["error_500"]}}),  # unchanged
        ("config", "PATCH", {"seed": 0}),  # unchanged
        ("config", "PATCH", {"seed": 5}),
        ("reset", "POST", None),
    ],
    ids=str,
)
def test_faults_by_prompt_start_over_after_settings_are_sent_and_after_a_reset(
    client: OpenAI, provider: Provider, change: tuple[str, str, Json | None]
) -> None:
    route, method, body = change
    provider.configure(faults_by_prompt={SKY: ["error_500"]})
    assert [succeeds(client), succeeds(client)] == [False, True]
    provider.configure()  # reads the settings and changes nothing
    assert succeeds(client)
    provider.ask(f"/_provider/{route}", method, body)
    assert [succeeds(client), succeeds(client)] == [False, True]


def test_faults_by_prompt_count_each_prompt_separately(
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


def test_faults_by_prompt_ignore_case_and_whitespace(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(
        faults_by_prompt={" WHY is\nthe  sky blue?": ["error_500", "error_500"]}
    )
    assert not succeeds(client, "why is the sky blue?")
    assert not succeeds(client, "\tWhy Is The Sky Blue? ")
    assert succeeds(client, SKY)


def test_faults_by_prompt_override_the_rates(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(
        faults={"error_500": 1}, faults_by_prompt={SKY: ["error_503", None]}
    )
    assert [succeeds(client), succeeds(client), succeeds(client)] == [False, True, True]
    assert [succeeds(client, "How?"), succeeds(client, "How?")] == [False, False]
    statuses = [entry["status"] for entry in finished_attempts(provider)]
    assert statuses == [503, 200, 200, 500, 500]


RATES = {
    "content_filter": 0.1,
    "error_500": 0.1,
    "error_503": 0.05,
    "insufficient_quota": 0.1,
    "malformed": 0.2,
    "null_choices": 0.1,
    "reset": 0.05,
    "truncated": 0.15,
    "wrong_type": 0.05,
}
PROMPTS = [f"What is {number} times {number}?" for number in range(400)]


def caused_faults(provider: Provider, prompts: list[str], seed: int) -> dict[str, str]:
    """The fault that each prompt gets, '' for none."""
    provider.configure(faults=RATES, seed=seed, capacity=None)
    mark = provider.ask(f"/_provider/journal?since={10**12}")["next"]

    async def send_all() -> None:
        url = f"{provider.url}/v1/completions"
        async with aiohttp.ClientSession() as session:

            async def send(prompt: str) -> None:
                with contextlib.suppress(aiohttp.ClientError):
                    body = {"model": "m", "prompt": prompt, "max_tokens": 1}
                    async with session.post(url, json=body) as response:
                        await response.read()

            await asyncio.gather(*map(send, prompts))

    asyncio.run(send_all())
    attempts = provider.ask(f"/_provider/journal?since={mark}&settle=5")["attempts"]
    assert len(attempts) == len(prompts)
    return {entry["prompt"]: entry["fault"] for entry in attempts}


def test_fault_rates_give_the_same_faults_in_every_run_with_the_same_seed(
    client: OpenAI, provider: Provider
) -> None:
    first = caused_faults(provider, PROMPTS, seed=1)
    counts = Counter(first.values())
    assert counts.keys() == RATES.keys() | {""}
    for fault, rate in RATES.items():
        assert counts[fault] / 400 == pytest.approx(rate, abs=0.05)

    other = caused_faults(provider, PROMPTS, seed=2)
    assert Counter(other.values()) != counts
    assert sum(other[prompt] != first[prompt] for prompt in PROMPTS) > 100
    assert caused_faults(provider, PROMPTS[::-1], seed=1) == first


@pytest.mark.parametrize(
    ("before", "later", "stream"),
    [("error_500", None, False), (None, "reset", False), (None, "reset_midway", True)],
)
def test_call_in_flight_keeps_the_faults_it_started_with(
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
    assert [entry["fault"] for entry in finished_attempts(provider)] == [
        before or "",
        later or "",
    ]


# Insufficient quota, errors in a stream, null choices, content filters


@pytest.fixture(params=["prompt", "rate"])
def turn_on(
    request: pytest.FixtureRequest, client: OpenAI, provider: Provider
) -> Callable[[str], None]:
    """Turn a fault on, for all prompts or for SKY only."""

    def turn_on(fault: str) -> None:
        if request.param == "rate":
            provider.configure(faults={fault: 1})
        else:
            provider.configure(faults_by_prompt={SKY: [fault] * 9})

    return turn_on


def llm_of(api: str, **options: Any) -> ChatOpenAI:
    responses = api == "response"
    return ChatOpenAI(model="m", timeout=30, use_responses_api=responses, **options)


@every_kind
def test_insufficient_quota_is_an_immediate_429_without_retry_after(
    client: OpenAI,
    provider: Provider,
    turn_on: Callable[[str], None],
    kind: str,
    stream: bool,
) -> None:
    turn_on("insufficient_quota")
    provider.configure(first_token=3600)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, kind, stream)
    error = caught.value
    assert (error.code, error.type) == ("insufficient_quota", "insufficient_quota")
    assert "check your plan and billing details" in error.message
    assert not {"retry-after", "retry-after-ms"} & error.response.headers.keys()
    assert journal_entries(provider) == [(429, "failed", "insufficient_quota")]


@pytest.mark.parametrize(
    "call",
    [lambda: ask(OpenAI()), lambda: llm_of("chat").invoke(SKY)],
    ids=["SDK", "LangChain"],
)
def test_clients_make_three_attempts_although_insufficient_quota_is_permanent(
    client: OpenAI, provider: Provider, call: Callable[[], Any]
) -> None:
    provider.configure(faults={"insufficient_quota": 1})
    with pytest.raises(openai.RateLimitError):
        call()
    assert [entry["attempt"] for entry in finished_attempts(provider)] == [1, 2, 3]
    assert provider.ask("/_provider/stats")["statuses"] == {"429": 3}


@pytest.mark.parametrize("kind", TEXTS)
def test_error_in_stream_arrives_as_an_event_after_half_of_the_tokens(
    client: OpenAI, provider: Provider, turn_on: Callable[[str], None], kind: str
) -> None:
    complete = received_bytes(client, kind)
    turn_on("error_in_stream")
    *events, error, end = received_bytes(client, kind).split(b"\n\n")
    assert end == b""
    assert complete.startswith(b"\n\n".join(events))
    assert 5 < len(events) < complete.count(b"\n\n") - 5
    assert b"The server had an error" in error

    received: list[Any] = []
    stream = endpoint(client, kind).create(model="m", stream=True, **CALLS[kind])
    if kind == "response":
        received.extend(stream)
        assert (received[-1].type, received[-1].code) == ("error", "server_error")
    else:
        with pytest.raises(openai.APIError, match="The server had an error") as caught:
            received.extend(stream)
        assert type(caught.value) is openai.APIError
        assert caught.value.type == "server_error"
    assert len(received) > 5
    failed = (200, "failed", "error_in_stream")
    assert journal_entries(provider)[1:] == [failed, failed]


@pytest.mark.parametrize("kind", CALLS)
def test_error_in_stream_without_a_stream_is_a_500(
    client: OpenAI, provider: Provider, turn_on: Callable[[str], None], kind: str
) -> None:
    turn_on("error_in_stream")
    with pytest.raises(openai.InternalServerError):
        ask(client, kind)
    assert journal_entries(provider) == [(500, "failed", "error_500")]


NULLED = {"response": "output", "embedding": "data"}


@every_kind
def test_null_choices_replace_the_answer(
    client: OpenAI,
    provider: Provider,
    turn_on: Callable[[str], None],
    kind: str,
    stream: bool,
) -> None:
    turn_on("null_choices")
    answer = ask(client, kind, stream)
    last = answer[-1] if stream else answer
    if stream and kind == "response":
        assert (last.type, last.delta) == ("response.output_text.delta", None)
    else:
        assert getattr(last, NULLED.get(kind, "choices")) is None
    assert journal_entries(provider) == [(200, "failed", "null_choices")]


@every_kind
def test_content_filter_answers_with_an_empty_text_and_its_reason(
    client: OpenAI,
    provider: Provider,
    turn_on: Callable[[str], None],
    kind: str,
    stream: bool,
) -> None:
    expected = without_ids(ask(client, kind, stream))
    turn_on("content_filter")
    answer = ask(client, kind, stream)
    entries = finished_attempts(provider)
    assert journal_entries(provider)[1:] == [(200, "answered", "content_filter")]
    assert entries[1]["completion_tokens"] == 0
    last = answer[-1] if stream else answer
    if kind == "embedding":
        assert without_ids(answer) == expected
    elif kind == "response":
        response = last.response if stream else last
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "content_filter"
        assert response.output_text == ""
        assert response.usage.output_tokens == 0
    else:
        assert last.choices[0].finish_reason == "content_filter"
        for part in answer if stream else [answer]:
            message = part.choices[0]
            if kind == "chat":
                message = message.delta if stream else message.message
            text = message.text if kind == "completion" else message.content
            assert not text


@pytest.mark.parametrize("api", ["chat", "response"])
def test_langchain_raises_an_error_for_each_of_these_faults_except_content_filter(
    client: OpenAI, provider: Provider, api: str
) -> None:
    llm = llm_of(api, max_retries=0)
    calls: list[tuple[str, Callable[[], Any], type[Exception]]] = [
        ("insufficient_quota", lambda: llm.invoke(SKY), openai.RateLimitError),
        ("error_in_stream", lambda: llm.invoke(SKY), openai.InternalServerError),
        (
            "error_in_stream",
            lambda: list(llm.stream(SKY)),
            ValueError if api == "response" else openai.APIError,
        ),
        ("null_choices", lambda: llm.invoke(SKY), TypeError),
    ]
    for fault, call, error in calls:
        provider.configure(faults={fault: 1})
        with pytest.raises(error):
            call()
    provider.configure(faults={"content_filter": 1})
    answer = llm.invoke(SKY)
    assert answer.text == ""
    details = answer.response_metadata
    if api == "chat":
        assert details["finish_reason"] == "content_filter"
    else:
        assert details["incomplete_details"] == {"reason": "content_filter"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("chat", {"messages": [{"role": "user", "content": QUESTION}], **TOOLS}),
        ("response", {"input": QUESTION, **FLAT_TOOLS}),
    ],
    ids=["chat", "response"],
)
@pytest.mark.parametrize("fault", ["error_in_stream", "null_choices", "malformed"])
def test_fault_between_two_function_calls_ends_the_stream_after_a_whole_event(
    client: OpenAI, provider: Provider, fault: str, kind: str, options: Json
) -> None:
    provider.configure(faults={fault: 1})
    # Both calls have the same number of tokens, so the first half is the first call.
    *events, end = received_bytes(client, kind, **options).split(b"\n\n")
    assert (len(events) > 3, end) == (True, b"")
    assert b"get_weather" in b"".join(events)
    assert journal_entries(provider) == [(200, "failed", fault)]


# A bug in the stub


async def test_internal_error_names_the_exception_and_its_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise LookupError("nothing here")

    app = Server().app()
    app.router.add_get("/v1/broken", fail)
    async with TestClient(TestServer(app)) as client:
        response = await client.get("/v1/broken")
        error = (await response.json())["error"]
    assert response.status == 500
    assert error["type"] == "server_error"
    line = fail.__code__.co_firstlineno + 1
    assert (
        f"LookupError: nothing here (test_faults.py, line {line})" in error["message"]
    )
    [record] = caplog.records
    assert (record.levelno, bool(record.exc_info)) == (logging.ERROR, True)

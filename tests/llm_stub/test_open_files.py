"""The stub keeps answering with a low limit on open files and with a long journal."""

import asyncio
import contextlib
import gc
import http.client
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from openai import OpenAI

from helpers.connection import Provider
from llm_stub.control import Control
from llm_stub.journal import MAX_ATTEMPTS
from llm_stub.open_files import raise_limit
from llm_stub.state import State
from tests.llm_stub.conftest import Json
from tests.llm_stub.test_abuse import wait_until
from tests.llm_stub.test_trusted_host import started_stub

limits_exist = pytest.mark.skipif(
    sys.platform == "win32", reason="on Windows, sockets don't count as open files"
)
MACOS_LIMIT = 256  # the default on macOS
CALLS = 400
TIMEOUT = aiohttp.ClientTimeout(total=10)  # of each call
BODY: Json = {"model": "m", "prompt": "a", "max_tokens": 1}

Outcome = tuple[int, Json] | aiohttp.ClientError


@contextlib.contextmanager
def limited_stub(folder: Path, *, soft: int, hard: int) -> Iterator[Provider]:
    """Start a stub in a shell with these limits; check that it logs nothing."""
    limits = f'ulimit -S -n {soft} && ulimit -H -n {hard} && exec "$@"'
    errors = folder / "stderr"
    with (
        errors.open("w") as file,
        started_stub(command=("sh", "-c", limits, "sh"), errors=file) as stub,
    ):
        stub.configure(first_token=0, per_token=0)
        yield stub
    assert errors.read_text() == ""


def call_at_once(stub: Provider, calls: int) -> list[Outcome]:
    """How each call ends. All connections stay open until the last call ends."""

    async def call(session: aiohttp.ClientSession) -> Outcome:
        url = f"{stub.url}/v1/completions"
        try:
            async with session.post(url, json=BODY) as response:
                return response.status, await response.json()
        except aiohttp.ClientError as error:
            return error

    async def main() -> list[Outcome]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT) as one:
            return await asyncio.gather(*(call(one) for _ in range(calls)))

    return asyncio.run(main())


def answered(outcomes: list[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if isinstance(one, tuple) and one[0] == 200]


def assert_refused_with_advice(outcomes: list[Outcome]) -> None:
    """Some calls were refused, and the error names the limit and what to do."""
    refused = [one for one in outcomes if isinstance(one, tuple) and one[0] != 200]
    assert refused
    for status, body in refused:
        error = body["error"]
        assert (status, error["code"]) == (503, "too_many_connections")
        assert f"may open only {MACOS_LIMIT} files" in error["message"]
        assert "Keep fewer calls in flight" in error["message"]
        assert "ulimit -n " in error["message"]


@limits_exist
def test_stub_raises_a_soft_limit_that_is_too_low(tmp_path: Path) -> None:
    raise_limit()  # of this process, which holds the client ends
    with limited_stub(tmp_path, soft=MACOS_LIMIT, hard=4096) as stub:
        assert len(answered(call_at_once(stub, CALLS))) == CALLS


@pytest.fixture
def full_stub(tmp_path: Path) -> Iterator[Provider]:
    """A stub that can't raise its limit, and can take only half of CALLS at once."""
    raise_limit()
    with limited_stub(tmp_path, soft=MACOS_LIMIT, hard=MACOS_LIMIT) as stub:
        yield stub
        wait_until(lambda: len(answered(call_at_once(stub, 50))) == 50)


@limits_exist
def test_every_call_ends_even_if_the_limit_cannot_be_raised(
    full_stub: Provider,
) -> None:
    for _ in range(3):
        outcomes = call_at_once(full_stub, CALLS)
        assert len(answered(outcomes)) >= 150
        assert_refused_with_advice(outcomes)


@limits_exist
def test_idle_connections_cannot_make_a_call_hang(full_stub: Provider) -> None:
    host, _, port = full_stub.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as idle:
        for _ in range(MACOS_LIMIT):
            connection = socket.create_connection((host, int(port)), timeout=10)
            idle.enter_context(connection)
        for _ in range(3):
            assert_refused_with_advice(call_at_once(full_stub, CALLS))


# A long journal


def finish_attempts(state: State, number: int) -> None:
    for _ in range(number):
        entry = state.journal.arrive("POST /v1/completions", attempt=1)
        state.journal.describe(entry, "m", "Why is the sky blue?", stream=False)
        state.journal.first_byte(entry, 200)
        state.journal.end(entry)


async def test_reading_a_long_journal_lets_other_requests_run_in_between() -> None:
    state = State()
    finish_attempts(state, MAX_ATTEMPTS)
    request = make_mocked_request("GET", "/_provider/journal")
    reading = asyncio.create_task(Control(state, None).get_journal(request))
    longest_gap = 0.0
    gc.freeze()  # a collection of all that the tests hold is no part of the stub's work
    while not reading.done():
        # CPU time, because another process may use the processor in between.
        before = time.thread_time()
        await asyncio.sleep(0)
        longest_gap = max(longest_gap, time.thread_time() - before)
    gc.unfreeze()
    response = reading.result()
    assert isinstance(response, web.Response)
    assert len(json.loads(response.text or "")["attempts"]) == MAX_ATTEMPTS
    assert longest_gap < 0.05


def test_journal_returns_only_what_changed(
    provider: Provider, client: OpenAI, until_in_flight: Callable[[int], None]
) -> None:
    def read(changed: int, settle: int = 5) -> tuple[int, list[tuple[int, str]]]:
        query = f"changed={changed}&settle={settle}"
        journal = provider.ask(f"/_provider/journal?{query}")
        attempts = journal["attempts"]
        return journal["changed"], [(one["number"], one["state"]) for one in attempts]

    provider.configure(first_token=0, per_token=0)
    client.completions.create(**BODY)
    mark, [(first, state)] = read(0)
    assert state == "answered"
    assert read(mark) == (mark, [])

    provider.configure(first_token=60)
    address = provider.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(BODY))
        until_in_flight(1)
        mark, attempts = read(mark, settle=0)
        assert attempts == [(first + 1, "in flight")]
    mark, attempts = read(mark)
    assert attempts == [(first + 1, "cancelled")]
    assert read(mark) == (mark, [])

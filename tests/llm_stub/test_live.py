import asyncio
import base64
import contextlib
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import langchain_openai
import openai
import psutil
import pytest
from aiohttp import ClientTimeout, web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI

from helpers import Timeline, connect, connection, environment
from helpers.connection import Provider, ProviderError
from llm_stub import server
from llm_stub.answers import answer
from llm_stub.settings import Settings

TIMEOUT = 30.0  # seconds, for a busy machine
UNREACHED_CAP = 10**9  # a cap that no test reaches
MODEL = "some-model"
SKY = "Why is the sky blue?"
DEAD_ADDRESS = "http://127.0.0.1:9/v1"
SECRET = "sk-secret-key"
BASE_URL_VARIABLES = "OPENAI_BASE_URL", "OPENAI_API_BASE"
TIME_HEADERS = {"date", "openai-processing-ms"}
# Headers of one connection, and the one that live mode changes to read the usage.
CHANGED_HEADERS = {"host", "connection", "accept-encoding"}

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# The client, live mode and the upstream


@contextlib.contextmanager
def never_connected() -> Iterator[None]:
    """Act as if connect() was never called; restore the environment afterwards."""
    with mock.patch.object(connection, "_current", None), mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith(("OPENAI_", "LLM_")) or name.lower().endswith("_proxy"):
                del os.environ[name]
        yield


@pytest.fixture(autouse=True)
def clean_connection_state() -> Iterator[None]:
    with never_connected():
        yield
        with contextlib.suppress(ProviderError):
            connection.current().stop()


@contextlib.contextmanager
def started_by_hand(*options: str, **environment: str) -> Iterator[Provider]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", "0", *options],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["url"]
        yield Provider(url, process, started_with={})
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def second_stub() -> Iterator[Provider]:
    with never_connected(), started_by_hand() as provider:
        yield provider


@pytest.fixture
def upstream(second_stub: Provider) -> Provider:
    """A second stub, without latency and with an empty journal."""
    settings = Settings(first_token=0, per_token=0).model_dump()
    second_stub.configure(**settings)
    settled_journal(second_stub)
    second_stub.ask("/_provider/reset", "POST")
    return second_stub


@pytest.fixture(scope="module")
def started_live(second_stub: Provider) -> Iterator[Provider]:
    with never_connected():
        os.environ["OPENAI_BASE_URL"] = f"{second_stub.url}/v1"
        provider = connect(live=True)
    yield provider
    provider.stop()


@pytest.fixture
def live(started_live: Provider, upstream: Provider) -> Iterator[Provider]:
    """Live mode, started by connect(), with caps that no test reaches."""
    with mock.patch.object(connection, "_current", started_live):
        os.environ["OPENAI_BASE_URL"] = f"{upstream.url}/v1"
        caps = {"max_calls": UNREACHED_CAP, "max_tokens": UNREACHED_CAP}
        provider = connect(live=True, max_answer_tokens=500, **caps)
        settled_journal(provider)
        provider.ask("/_provider/reset", "POST")
        yield provider


@pytest.fixture
def client(live: Provider, connections: DefaultHttpxClient) -> OpenAI:
    """The SDK's client, which connect() has pointed at live mode."""
    return OpenAI(max_retries=0, http_client=connections)


@pytest.fixture
def direct(upstream: Provider, connections: DefaultHttpxClient) -> OpenAI:
    """A client that calls the upstream directly."""
    return client_of(upstream.url, connections)


class FakeUpstream:
    """An upstream that records its requests and responds as a test wants it to."""

    def __init__(self) -> None:
        self.received: list[Json] = []
        self.respond: Handler = respond_with(chat_body(SKY))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): text for name, text in request.headers.items()}
        self.received.append(
            {
                "line": f"{request.method} {request.raw_path}",
                "headers": {
                    k: v for k, v in headers.items() if k not in CHANGED_HEADERS
                },
                "body": await request.read(),
            }
        )
        return await self.respond(request)


class ServerThread:
    """A thread with an event loop, for servers that don't need a process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT)

    @contextlib.contextmanager
    def serving(self, app: web.Application) -> Iterator[str]:
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

        async def start() -> str:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        try:
            yield self.run(start())
        finally:
            self.run(runner.cleanup())

    @contextlib.contextmanager
    def fake_upstream(self) -> Iterator[tuple[FakeUpstream, str]]:
        """A fake upstream and its URL."""
        upstream, app = FakeUpstream(), web.Application()
        app.router.add_route("*", "/{path:.*}", upstream.handle)
        with self.serving(app) as url:
            yield upstream, url

    @contextlib.contextmanager
    def forwarding(self, upstream: str, model: str | None = None) -> Iterator[Provider]:
        """Live mode in this process, forwarding to any address."""
        with self.serving(server.Server(upstream, model).app()) as url:
            yield Provider(url, live=True)


@pytest.fixture(scope="module")
def server_thread() -> Iterator[ServerThread]:
    thread = ServerThread()
    yield thread
    thread.loop.call_soon_threadsafe(thread.loop.stop)


@pytest.fixture
def fake_upstream(server_thread: ServerThread) -> Iterator[tuple[FakeUpstream, str]]:
    with server_thread.fake_upstream() as upstream_and_url:
        yield upstream_and_url


class Faked:
    """A fake upstream, live mode that forwards to it, and a client of each."""

    def __init__(
        self,
        thread: ServerThread,
        upstream: FakeUpstream,
        url: str,
        live: Provider,
        http: DefaultHttpxClient,
    ) -> None:
        self.thread, self.upstream, self.live = thread, upstream, live
        self.client, self.direct = client_of(live.url, http), client_of(url, http)


@pytest.fixture
def faked(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    connections: DefaultHttpxClient,
) -> Iterator[Faked]:
    with server_thread.forwarding(f"{fake_upstream[1]}/v1") as live:
        yield Faked(server_thread, *fake_upstream, live, connections)


def client_of(url: str, http: DefaultHttpxClient) -> OpenAI:
    return OpenAI(
        base_url=f"{url}/v1",
        api_key=SECRET,
        max_retries=0,
        timeout=TIMEOUT,
        http_client=http,
    )


def chat_body(text: str, **fields: Any) -> Json:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL}
    return {**head, "choices": [choice], **fields}


def respond_with(body: Json, **options: Any) -> Handler:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, **options)

    return respond


async def never_respond(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")


async def send_part(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json"})
    response.content_length = 1000
    await response.prepare(request)
    await response.write(b'{"id": "1",')
    return response


async def disconnect_midway(request: web.Request) -> web.StreamResponse:
    await send_part(request)
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def stall_midway(request: web.Request) -> web.StreamResponse:
    await send_part(request)
    return await never_respond(request)


# Calls

MESSAGES = [{"role": "user", "content": SKY}]
LIMIT = 300  # tokens, more than any answer of the stub has
LIMIT_NAMES = {
    "completion": "max_tokens",
    "chat": "max_tokens",
    "response": "max_output_tokens",
}
CALLS: dict[str, Callable[..., Any]] = {
    "completion": lambda client, **options: client.completions.create(
        **{"model": MODEL, "prompt": SKY, "max_tokens": LIMIT} | options
    ),
    "chat": lambda client, **options: client.chat.completions.create(
        **{"model": MODEL, "messages": MESSAGES, "max_tokens": LIMIT} | options
    ),
    "response": lambda client, **options: client.responses.create(
        **{"model": MODEL, "input": SKY, "max_output_tokens": LIMIT} | options
    ),
    "embedding": lambda client, **options: client.embeddings.create(
        **{"model": MODEL, "input": SKY} | options
    ),
    "models": lambda client: client.models.list(),
    "model": lambda client: client.models.retrieve(MODEL),
}
GENERATING = list(CALLS)[:3]
COUNTED = list(CALLS)[:4]
PATHS = {
    "completion": "/v1/completions",
    "chat": "/v1/chat/completions",
    "response": "/v1/responses",
    "embedding": "/v1/embeddings",
}
BODIES: dict[str, Json] = {
    "completion": {"model": MODEL, "prompt": SKY},
    "chat": {"model": MODEL, "messages": MESSAGES},
    "response": {"model": MODEL, "input": SKY},
    "embedding": {"model": MODEL, "input": SKY},
}


def token_limit(kind: str, limit: Any) -> Json:
    return {LIMIT_NAMES[kind]: limit}


def without_limit(kind: str) -> Json:
    return token_limit(kind, openai.omit)


def post(live: Provider, kind: str, body: Json | bytes) -> httpx.Response:
    """Send a body that the SDK might change or refuse."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return httpx.post(
        live.url + PATHS[kind],
        content=raw,
        headers=headers,
        timeout=TIMEOUT,
        trust_env=False,
    )


def settled_journal(provider: Provider) -> list[Json]:
    """The journal, once all calls in it have ended."""
    attempts: list[Json] = provider.ask("/_provider/journal?settle=10")["attempts"]
    return attempts


def request_count(provider: Provider) -> int:
    requests: int = provider.ask("/_provider/stats")["requests"]
    return requests


def usage_so_far(live: Provider) -> Json:
    settled_journal(live)
    counts: Json = live.ask("/_provider/stats")["live"]
    return counts


def leave_room(live: Provider, name: str, amount: int) -> int:
    """Set a cap so that only this amount is left; return the cap."""
    cap: int = usage_so_far(live)[name.removeprefix("max_")] + amount
    live.configure(**{name: cap})
    return cap


@contextlib.contextmanager
def measured_cost(live: Provider) -> Iterator[Json]:
    """Yield a dict; after the block it says how many calls and tokens were counted."""
    cost: Json = {}
    start = usage_so_far(live)
    yield cost
    cost.update(
        {name: count - start[name] for name, count in usage_so_far(live).items()}
    )


def run_async(call: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with AsyncOpenAI(max_retries=0) as client:
            return await call(client)

    return asyncio.run(main())


def as_received(raw: Any) -> tuple[int, str, list[tuple[str, str]]]:
    """Status, body and headers of a response, without the headers that change."""
    response = getattr(raw, "http_response", raw)
    headers = [
        pair for pair in response.headers.multi_items() if pair[0] not in TIME_HEADERS
    ]
    return response.status_code, response.text, sorted(headers)


def without_ids(value: Any) -> str:
    """What the stub sends, without the ids, which differ in every call."""
    ids = r"\b((?:chatcmpl|cmpl)-|(?:req|resp|msg|call|fc)_)[0-9a-f]+"
    return re.sub(ids, r"\1", repr(value))


def outcome(client: Any) -> tuple[Any, ...]:
    """The response to a chat, or the error that the client raised for it."""
    try:
        return as_received(CALLS["chat"](client))
    except openai.APIStatusError as error:
        return type(error), str(error), *as_received(error.response)
    except Exception as error:
        return type(error), str(error)


# Where calls are sent


def test_live_mode_calls_the_address_that_connect_replaced_until_it_is_switched_off(
    upstream: Provider,
) -> None:
    address = f"{upstream.url}/v1"
    os.environ["OPENAI_API_BASE"] = address

    stub = connect(first_token=0, per_token=0)
    assert [os.environ[name] for name in BASE_URL_VARIABLES] == [f"{stub.url}/v1"] * 2
    client = OpenAI(max_retries=0)

    def requests_upstream() -> int:
        earlier = request_count(upstream)
        assert CALLS["completion"](client).choices[0].text == answer(SKY)
        return request_count(upstream) - earlier

    assert requests_upstream() == 0

    first = connect(live=True)
    assert first.url == stub.url
    assert requests_upstream() == 1
    assert connect(live=True) is first

    os.environ["LLM_LIVE"] = "1"
    again = connect(live=False)
    assert (again.url, again.live) == (stub.url, False)
    assert requests_upstream() == 0


def test_address_can_be_set_and_corrected_between_calls_of_connect(
    upstream: Provider,
) -> None:
    stub = connect()
    client = OpenAI(max_retries=0)
    os.environ |= {"LLM_LIVE": "1", "OPENAI_BASE_URL": DEAD_ADDRESS}
    assert connect().live
    with pytest.raises(openai.InternalServerError, match="is OPENAI_BASE_URL right"):
        CALLS["completion"](client)
    os.environ["OPENAI_BASE_URL"] = f"{upstream.url}/v1"
    assert connect().url == stub.url
    assert CALLS["completion"](client).choices[0].text == answer(SKY)
    assert request_count(upstream) == 1


@pytest.mark.parametrize("off", [None, "", "0"])
def test_live_mode_is_off_without_llm_live(upstream: Provider, off: str | None) -> None:
    if off is not None:
        os.environ["LLM_LIVE"] = off
    with mock.patch.object(connection, "_current", upstream):
        assert connect() is upstream


def test_stub_started_by_hand_in_live_mode_uses_llm_model_except_for_embeddings(
    upstream: Provider,
) -> None:
    address = f"{upstream.url}/v1"
    variables = {"OPENAI_API_BASE": address, "LLM_MODEL": "custom-model"}
    with started_by_hand("--live", **variables) as live:
        os.environ["LLM_PROVIDER_URL"] = live.url
        provider = connect(max_calls=7, max_tokens=900)
        client = OpenAI(max_retries=0)
        answers = [CALLS[kind](client).model for kind in COUNTED]
    assert answers == ["custom-model"] * len(GENERATING) + [MODEL]
    assert [entry["model"] for entry in settled_journal(upstream)] == answers
    assert repr(provider) == "<Provider: LIVE, up to 7 calls and 900 tokens>"


@pytest.mark.parametrize("key", [None, "", "stub"])
def test_live_mode_with_openai_requires_a_key(
    upstream: Provider, key: str | None
) -> None:
    if key is not None:
        os.environ["OPENAI_API_KEY"] = key
    children = psutil.Process().children()
    with pytest.raises(ProviderError, match=r"OPENAI_API_KEY.*OPENAI_BASE_URL"):
        connect(live=True)
    assert psutil.Process().children() == children
    assert {os.environ[name] for name in BASE_URL_VARIABLES} == {DEAD_ADDRESS}

    with mock.patch.object(connection, "_current", upstream):
        connect()
        with pytest.raises(ProviderError, match="OPENAI_API_KEY"):
            connect(live=True)
    assert request_count(upstream) == 0  # the stub is still running


@pytest.mark.parametrize("how", ["live=True", "LLM_LIVE=1"])
def test_live_mode_with_llm_provider_url_is_an_error(
    upstream: Provider, how: str
) -> None:
    os.environ["LLM_PROVIDER_URL"] = upstream.url
    os.environ["OPENAI_BASE_URL"] = f"{upstream.url}/v1"
    if how == "LLM_LIVE=1":
        os.environ["LLM_LIVE"] = "1"
    children = psutil.Process().children()
    with pytest.raises(
        ProviderError, match=r"LLM_PROVIDER_URL is set to \S+\. Unset it"
    ):
        connect(live=True if how == "live=True" else None)
    assert psutil.Process().children() == children


def test_repr_shows_live_and_the_caps(live: Provider) -> None:
    live.configure(max_calls=7, max_tokens=900)
    assert repr(live) == "<Provider: LIVE, up to 7 calls and 900 tokens>"


# What live mode forwards


@pytest.mark.parametrize("kind", CALLS)
def test_response_and_headers_are_the_upstreams(
    client: OpenAI, direct: OpenAI, upstream: Provider, kind: str
) -> None:
    upstream.configure(requests_per_minute=10**6, burst=3600)
    direct_response = CALLS[kind](direct.with_raw_response)
    via_live = CALLS[kind](client.with_raw_response)
    ids = [entry["request_id"] for entry in settled_journal(upstream)]
    assert ids == [got.headers["x-request-id"] for got in (direct_response, via_live)]
    expected = without_ids(as_received(direct_response))
    assert without_ids(as_received(via_live)) == expected


@pytest.mark.parametrize("kind", CALLS)
def test_async_client_gets_the_upstreams_response(
    live: Provider, direct: OpenAI, upstream: Provider, kind: str
) -> None:
    expected = CALLS[kind](direct).model_dump()
    via_live = run_async(CALLS[kind])
    assert without_ids(via_live.model_dump()) == without_ids(expected)
    assert request_count(upstream) == 2


LANGCHAIN: dict[str, Callable[..., object]] = {
    "completion": lambda **options: langchain_openai.OpenAI(**options).invoke(SKY),
    "chat": lambda **options: (
        langchain_openai.ChatOpenAI(**options).invoke(SKY).content
    ),
    "chat stream": lambda **options: [
        chunk.content for chunk in langchain_openai.ChatOpenAI(**options).stream(SKY)
    ],
    "response": lambda **options: (
        langchain_openai.ChatOpenAI(use_responses_api=True, **options).invoke(SKY).text
    ),
    "embedding": lambda **options: langchain_openai.OpenAIEmbeddings(
        check_embedding_ctx_length=False, **options
    ).embed_query(SKY),
}


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("kind", LANGCHAIN)
def test_langchain_gets_the_upstreams_response(upstream: Provider, kind: str) -> None:
    via_live = LANGCHAIN[kind]()
    assert request_count(upstream) == 1
    assert via_live == LANGCHAIN[kind](base_url=f"{upstream.url}/v1")


@pytest.mark.parametrize("kind", GENERATING)
def test_stream_is_forwarded_byte_for_byte(
    client: OpenAI, direct: OpenAI, kind: str
) -> None:
    expected, via_live = (
        CALLS[kind](caller.with_raw_response, stream=True).http_response.read()
        for caller in (direct, client)
    )
    assert without_ids(via_live) == without_ids(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"models": ["another-model"]},
        {"keys": ["another-key"]},
        {"tokens_per_minute": 6},
        {"faults": {"error_500": 1.0}},
        {"faults": {"error_503": 1.0}},
        {"faults": {"malformed": 1.0}},
        {"faults": {"wrong_type": 1.0}},
    ],
    ids=str,
)
def test_upstream_errors_look_the_same_as_without_live_mode(
    client: OpenAI, direct: OpenAI, upstream: Provider, change: Json
) -> None:
    upstream.configure(**change)
    expected = outcome(direct)
    assert issubclass(expected[0], openai.APIError | ValueError | AttributeError)
    assert without_ids(outcome(client)) == without_ids(expected)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 409, 422, 429, 500, 503])
def test_status_headers_and_error_object_are_forwarded_unchanged(
    faked: Faked, status: int
) -> None:
    headers = [
        ("x-request-id", "req_1"),
        ("x-ratelimit-remaining-tokens", "17"),
        ("x-ratelimit-reset-tokens", "6m0s"),
        ("retry-after", "20"),
        ("retry-after-ms", "20000"),
        ("server", "upstream"),
    ]
    error = {"message": "No.", "type": "t", "param": "p", "code": "c"}
    faked.upstream.respond = respond_with(
        {"error": error}, status=status, reason="Custom Reason", headers=headers
    )
    expected, via_live = (
        outcome(client.with_raw_response) for client in (faked.direct, faked.client)
    )
    assert set(headers) <= set(expected[-1])
    assert via_live == expected


def test_headers_with_which_a_web_page_could_read_answers_are_not_passed_on(
    faked: Faked,
) -> None:
    for_browser = [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("access-control-expose-headers", "*"),
        ("access-control-allow-private-network", "true"),
        ("set-cookie", "a=1"),
        ("alt-svc", 'h3=":443"'),
        ("strict-transport-security", "max-age=1"),
    ]
    faked.upstream.respond = respond_with(chat_body("Hi."), headers=for_browser)
    from_browser = {"origin": "http://localhost:3000", "cookie": "login=secret"}
    from_browser |= {"referer": "http://localhost:3000/", "sec-fetch-mode": "cors"}

    answer = CALLS["chat"](
        faked.client.with_options(default_headers=from_browser).with_raw_response
    )

    assert answer.status_code == 200
    assert not {name for name, _ in for_browser} & {*answer.headers}
    [request] = faked.upstream.received
    assert not {*from_browser} & {*request["headers"]}


def test_compressed_request_is_forwarded_uncompressed(faked: Faked) -> None:
    body = BODIES["chat"] | token_limit("chat", LIMIT)
    response = httpx.post(
        f"{faked.live.url}/v1/chat/completions",
        content=gzip.compress(json.dumps(body).encode()),
        headers={"content-encoding": "gzip", "content-type": "application/json"},
        trust_env=False,
    )
    assert response.status_code == 200
    [request] = faked.upstream.received
    assert json.loads(request["body"]) == body
    assert "content-encoding" not in request["headers"]


def test_compressed_response_stays_readable(faked: Faked) -> None:
    async def compressed(request: web.Request) -> web.StreamResponse:
        body = gzip.compress(json.dumps(chat_body("Hi.")).encode())
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        return web.Response(body=body, headers=headers)

    faked.upstream.respond = compressed
    chat = CALLS["chat"](faked.client)
    assert chat.choices[0].message.content == "Hi."


@pytest.mark.parametrize("kind", CALLS)
def test_request_reaches_the_upstream_unchanged(faked: Faked, kind: str) -> None:
    for client in faked.direct, faked.client:
        customized = client.with_options(default_headers={"x-custom": "1"})
        CALLS[kind](customized.with_raw_response)
    expected, via_live = faked.upstream.received
    assert expected["headers"]["authorization"] == f"Bearer {SECRET}"
    assert expected["headers"]["x-custom"] == "1"
    assert via_live == expected


def test_model_name_and_query_reach_the_upstream_unchanged(faked: Faked) -> None:
    for client in faked.direct, faked.client:
        client.models.retrieve("owner/a model?", extra_query={"q": "a b&c"})
    expected, via_live = faked.upstream.received
    assert via_live["line"] == expected["line"]


@pytest.mark.parametrize("kind", COUNTED)
def test_llm_model_changes_only_the_model_and_nothing_in_embeddings(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    connections: DefaultHttpxClient,
    kind: str,
) -> None:
    upstream, upstream_url = fake_upstream
    with server_thread.forwarding(f"{upstream_url}/v1", "custom-model") as live:
        for url in upstream_url, live.url:
            client = client_of(url, connections).with_raw_response
            CALLS[kind](client, user="Zoë")
    expected, via_live = (json.loads(call["body"]) for call in upstream.received)
    model = "custom-model" if kind in GENERATING else MODEL
    assert via_live == {**expected, "model": model}


def test_sdk_retries_reach_the_upstream_and_each_counts_as_a_call(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    upstream.configure(faults_by_prompt={SKY: ["error_500"]})
    with measured_cost(live) as cost:
        CALLS["completion"](client.with_options(max_retries=1))
    assert [entry["attempt"] for entry in settled_journal(upstream)] == [1, 2]
    assert cost["calls"] == 2


# Streams


def test_each_chunk_is_forwarded_before_the_next_one_arrives(faked: Faked) -> None:
    chunks = [b'data: {"a', b'":1}\n\ndata: {"b":"\xe2\x82', b'\xac"}\n\n', b"da"]
    chunks += [b"ta: [DO", b"NE]\n\n"]
    chunk_received = asyncio.Semaphore(0)

    async def step_by_step(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            # Wait until the client has the headers or the previous chunk.
            await chunk_received.acquire()
            await response.write(chunk)
        return response

    faked.upstream.respond = step_by_step
    received = []
    stream = CALLS["chat"](faked.client.with_raw_response, stream=True)
    faked.thread.loop.call_soon_threadsafe(chunk_received.release)
    for chunk in stream.http_response.iter_raw():
        received.append(chunk)
        faked.thread.loop.call_soon_threadsafe(chunk_received.release)
    assert received == chunks


@pytest.mark.parametrize("kind", GENERATING)
def test_closing_a_stream_after_its_first_token_cancels_the_call_upstream(
    client: OpenAI, live: Provider, upstream: Provider, kind: str
) -> None:
    upstream.configure(per_token=600)
    with measured_cost(live) as cost:
        with CALLS[kind](client, stream=True, **token_limit(kind, 1000)) as stream:
            next(iter(stream))
            assert upstream.ask("/_provider/stats")["in_flight"] == 1
        [upstream_call] = settled_journal(upstream)
    [live_call] = settled_journal(live)
    assert (upstream_call["state"], live_call["state"]) == ("cancelled", "cancelled")
    assert cost["tokens"] >= 1000  # it may be billed in full


def test_cancelling_a_call_before_its_response_cancels_it_upstream(
    live: Provider, upstream: Provider
) -> None:
    upstream.configure(first_token=600)

    async def cancel(client: AsyncOpenAI) -> None:
        call = asyncio.ensure_future(CALLS["chat"](client))
        while upstream.ask("/_provider/stats")["in_flight"] == 0:
            await asyncio.sleep(0.01)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    with measured_cost(live) as cost:
        run_async(cancel)
    assert [entry["state"] for entry in settled_journal(upstream)] == ["cancelled"]
    assert cost["calls"] == 1
    assert cost["tokens"] >= LIMIT  # it may be billed in full


# Caps


@pytest.mark.parametrize("name", ["max_calls", "max_tokens"])
@pytest.mark.parametrize("kind", COUNTED)
def test_call_over_a_cap_gets_a_403_without_retries_and_nothing_is_sent(
    client: OpenAI, live: Provider, upstream: Provider, kind: str, name: str
) -> None:
    cap = leave_room(live, name, 0)
    with measured_cost(live) as cost:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            CALLS[kind](client.with_options(max_retries=2))
        assert f"{name}={cap} " in str(caught.value)
    assert request_count(upstream) == 0
    assert request_count(live) == 1
    assert cost == {"calls": 0, "tokens": 0}


def test_calls_are_forwarded_up_to_the_cap_and_again_after_raising_it(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    cap = leave_room(live, "max_calls", 1)
    CALLS["chat"](client)
    with pytest.raises(openai.PermissionDeniedError):
        CALLS["chat"](client)
    live.configure(max_calls=cap + 1)
    CALLS["chat"](client)
    assert request_count(upstream) == 2


@pytest.mark.parametrize(
    ("kind", "options", "answer_tokens"),
    [
        ("completion", {"max_tokens": 100}, 100),
        ("chat", {"max_tokens": 100}, 100),
        ("chat", {"max_tokens": 30, "max_completion_tokens": 100}, 100),
        ("chat", {"max_tokens": openai.omit, "max_completion_tokens": 100}, 100),
        ("response", {"max_output_tokens": 100}, 100),
        ("completion", {"max_tokens": 25, "n": 4}, 100),
        ("chat", {"max_tokens": 25, "n": 4}, 100),
        ("completion", {"max_tokens": 25, "n": 2, "best_of": 4}, 100),
        ("completion", {"max_tokens": 25, "prompt": [SKY] * 4}, 100),
        ("completion", {"max_tokens": 25, "prompt": [SKY] * 2, "n": 2}, 100),
        ("completion", {"max_tokens": 25, "prompt": [[1], [2], [3], [4]]}, 100),
        ("completion", {"max_tokens": 25, "prompt": [5] * 100}, 25),
        ("completion", {"max_tokens": 25, "prompt": "Почему небо голубое?"}, 25),
        ("completion", without_limit("completion"), 16),
        ("chat", without_limit("chat"), 500),
        ("response", without_limit("response"), 500),
        ("chat", {"max_tokens": None}, 500),
        ("chat", without_limit("chat") | {"n": 3}, 1500),
        ("embedding", {"input": "word " * 100}, 0),
        ("embedding", {"input": [[5] * 50, [5] * 50]}, 0),
    ],
)
def test_the_bytes_of_a_call_and_its_longest_answer_must_fit_under_the_token_cap(
    faked: Faked, kind: str, options: Json, answer_tokens: int
) -> None:
    def call() -> int:
        """Make the call; return how many bytes were forwarded."""
        CALLS[kind](faked.client.with_raw_response, **options)
        return len(faked.upstream.received[-1]["body"])

    with measured_cost(faked.live) as cost:
        size = call()
    assert cost == {"calls": 1, "tokens": size + answer_tokens}
    leave_room(faked.live, "max_tokens", size + answer_tokens - 1)
    with pytest.raises(openai.PermissionDeniedError, match="max_tokens="):
        call()
    assert len(faked.upstream.received) == 1
    leave_room(faked.live, "max_tokens", size + answer_tokens)
    call()


class LongAnswers:
    """Writes answers of 4,000 tokens, or up to the limit of the call.

    Each prompt has as many tokens as its call has bytes. No answer starts before
    `started` is set.
    """

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.used = 0

    async def respond(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        limit = json.loads(raw).get("max_tokens", 4000)
        usage = {"prompt_tokens": len(raw), "completion_tokens": min(limit, 4000)}
        usage["total_tokens"] = sum(usage.values())
        self.used += usage["total_tokens"]
        await self.started.wait()
        return web.json_response(chat_body("word " * 4000, usage=usage))


def test_120_concurrent_chats_without_a_limit_stay_under_the_token_cap(
    faked: Faked,
) -> None:
    cap, upstream = 50_000, LongAnswers()
    faked.live.configure(max_tokens=cap, max_calls=120)
    faked.upstream.respond = upstream.respond

    async def ask_all() -> list[Any]:
        async with AsyncOpenAI(
            base_url=f"{faked.live.url}/v1", api_key=SECRET, max_retries=0
        ) as client:
            calls = [
                asyncio.ensure_future(CALLS["chat"](client, **without_limit("chat")))
                for _ in range(120)
            ]
            while len(faked.upstream.received) + sum(c.done() for c in calls) < 120:
                await asyncio.sleep(0.01)
            faked.thread.loop.call_soon_threadsafe(upstream.started.set)
            return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(ask_all())
    stopped = [r for r in results if isinstance(r, openai.PermissionDeniedError)]
    answers = [r for r in results if not isinstance(r, BaseException)]
    assert len(stopped) + len(answers) == 120
    assert 0 < len(answers) == len(faked.upstream.received) < 120
    assert cap - 1000 < upstream.used <= cap
    assert usage_so_far(faked.live)["tokens"] == upstream.used


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", GENERATING)
def test_call_without_a_limit_gets_one_and_its_response_says_which(
    client: OpenAI, live: Provider, kind: str, stream: bool
) -> None:
    live.configure(max_answer_tokens=20)
    options = without_limit(kind) | {"stream": stream}
    response = CALLS[kind](client.with_raw_response, **options).http_response
    limit = 16 if kind == "completion" else 20  # 16 is the API's own default
    assert response.headers["x-live-max-tokens"] == str(limit)
    text = response.read().decode()
    assert '"finish_reason":"length"' in text or "max_output_tokens" in text
    response = CALLS[kind](client.with_raw_response, stream=stream).http_response
    assert "x-live-max-tokens" not in response.headers


def test_limit_for_a_response_is_at_least_16_as_openai_requires(faked: Faked) -> None:
    faked.live.configure(max_answer_tokens=1)
    post(faked.live, "response", BODIES["response"])
    assert json.loads(faked.upstream.received[-1]["body"])["max_output_tokens"] == 16


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", "max_completion_tokens"),
        ("eu.api.openai.com", "max_completion_tokens"),
        ("mine.openai.azure.com", "max_completion_tokens"),
        ("notopenai.com", "max_tokens"),
        ("openai.com.example", "max_tokens"),
    ],
)
def test_chats_get_the_limit_under_the_name_that_the_upstream_knows(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    host: str,
    name: str,
) -> None:
    upstream, os.environ["HTTP_PROXY"] = fake_upstream
    with server_thread.forwarding(f"http://{host}/v1") as live:
        post(live, "chat", BODIES["chat"])
    assert json.loads(upstream.received[0]["body"]) == {**BODIES["chat"], name: 500}


def test_max_completion_tokens_is_repeated_for_upstreams_that_know_only_max_tokens(
    faked: Faked,
) -> None:
    CALLS["chat"](faked.client, max_tokens=openai.omit, max_completion_tokens=70)
    body = json.loads(faked.upstream.received[0]["body"])
    assert (body["max_tokens"], body["max_completion_tokens"]) == (70, 70)


ODD_COUNTS: list[Any] = [None, True, False, 0, -1, 1, 2, 700, 2**31, 10**30, 0.5, 3.0]
ODD_COUNTS += [1e300, "100", "4000", "many", "", [], [5], {}]
ODD_NAMES = ["max_tokens", "max_completion_tokens", "max_output_tokens", "n"]
ODD_NAMES += ["best_of", "Max_Tokens", "MAX_COMPLETION_TOKENS", "N"]
ODD_TEXTS = st.text(max_size=20) | st.sampled_from(['\\"\n\x00', "空" * 50])
TOKEN_IDS = st.lists(st.integers(0, 200_000), max_size=5)
ODD_PROMPTS = ODD_TEXTS | TOKEN_IDS | st.lists(ODD_TEXTS | TOKEN_IDS, max_size=5)


def read_leniently(value: Any) -> int:
    """A count as the most lenient server reads it; 4,000 if it finds no limit."""
    try:
        count = int(float(value))
    except (OverflowError, TypeError, ValueError):
        return 4000
    return count if count > 0 else 4000


def bytes_of_text(value: Any) -> int:
    """The bytes of all texts in a prompt, and one for each token id."""
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(bytes_of_text, value)) if isinstance(value, list) else 1


def most_tokens(kind: str, body: Json) -> int:
    """The most tokens that any server uses for a call.

    A server may ignore the case of names, and may know one name of a limit or all.
    """

    def counts(*names: str) -> list[int]:
        given = [v for name, v in body.items() if name.lower() in names]
        return [read_leniently(value) for value in given if value is not None]

    limits = [read_leniently(body.get(LIMIT_NAMES[kind])), *counts(LIMIT_NAMES[kind])]
    if kind == "chat":
        limits += counts("max_completion_tokens")
    choices = max(counts("n", "best_of"), default=1)
    prompt: Any = body.get("prompt", body.get("input", body.get("messages")))
    if kind == "completion" and any(type(part) is not int for part in prompt):
        choices *= len(prompt) if isinstance(prompt, list) else 1
    return bytes_of_text(prompt) + max(limits) * choices


@given(
    kind=st.sampled_from(GENERATING),
    odd=st.dictionaries(st.sampled_from(ODD_NAMES), st.sampled_from(ODD_COUNTS)),
    prompt=ODD_PROMPTS,
    text=ODD_TEXTS,
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_uses_more_tokens_than_are_counted(
    faked: Faked, kind: str, odd: Json, prompt: Any, text: str
) -> None:
    inputs = {
        "completion": {"prompt": prompt},
        "chat": {"messages": [{"role": "user", "content": text}]},
        "response": {"input": text},
    }
    faked.live.configure(max_calls=UNREACHED_CAP, max_tokens=UNREACHED_CAP)
    faked.upstream.received.clear()
    with measured_cost(faked.live) as cost:
        response = post(faked.live, kind, {"model": MODEL, **inputs[kind], **odd})
    if response.status_code == 200:
        [request] = faked.upstream.received
        assert cost["tokens"] >= most_tokens(kind, json.loads(request["body"]))
    else:
        assert response.status_code in (400, 403)
        assert faked.upstream.received == []
        assert cost == {"calls": 0, "tokens": 0}


DEEP = b"[" * 150 + b"]" * 150
TOO_DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages":[],"max_tokens":9,"max_tokens":4000}',
        b'{"messages":[],"max_tokens":4000,"max_tokens":9}',
        b'{"messages":[{"role":"user","content":"%b"}]}' % (b"\\u7a7a" * 50),
        json.dumps({"messages": [], "user": "空" * 50}).encode("utf-16"),
        '\ufeff{"messages":[]}'.encode(),
        b'{"messages":%b}' % DEEP,
        b'{"messages":%b}' % TOO_DEEP,
        b'{"messages":[],"max_tokens":%b}' % DEEP,
        b'{"messages":[],"tools":[{"type":%b}]}' % DEEP,
        b'{"messages":[{"role":"user","content":[{"type":%b}]}]}' % DEEP,
        b'{"messages":[],"n":1%b}' % (b"0" * 4200),
        b'{"messages":[],"user":1e999}',
        b'{"messages":{},"tools":5,"n":null}',
        b'{"messages":null,"stream":"yes","model":[1]}',
        b'{"messages":"\xff"}',
        b'{"messages":"\\ud800"}',
        b"",
        b"[]",
    ],
    ids=lambda raw: str(raw)[:50],
)
def test_odd_bytes_are_refused_or_forwarded_as_they_were_counted(
    faked: Faked, raw: bytes
) -> None:
    with measured_cost(faked.live) as cost:
        response = post(faked.live, "chat", raw)
    if response.status_code == 200:
        [body] = [request["body"] for request in faked.upstream.received]
        limits = dict(json.loads(body, object_pairs_hook=list))
        assert body.count(b'"max_tokens"') == 1
        assert cost["tokens"] == len(body) + limits["max_tokens"]
    else:
        assert response.status_code in (400, 403)
        assert cost == {"calls": 0, "tokens": 0}


def user_part(part: Any) -> Json:
    return {"messages": [{"role": "user", "content": [part]}]}


def input_item(**item: Any) -> Json:
    return {"input": [{"role": "user", "content": SKY}, item]}


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
INPUT_IMAGE = {"type": "input_image", "image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("kind", "options", "param"),
    [
        ("response", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("response", {"Previous_Response_Id": "resp_1"}, "Previous_Response_Id"),
        ("response", {"conversation": "conv_1"}, "conversation"),
        ("response", {"prompt": {"id": "pmpt_1"}}, "prompt"),
        ("response", {"background": True}, "background"),
        (
            "response",
            {"context_management": [{"type": "compaction"}]},
            "context_management",
        ),
        ("response", {"tools": [{"type": "web_search"}]}, "tools[0]"),
        (
            "response",
            {"tools": [{"type": "function", "name": "f"}, {"type": "mcp"}]},
            "tools[1]",
        ),
        ("response", input_item(type="item_reference", id="msg_1"), "input[1]"),
        ("response", input_item(type="reasoning", id="rs_1", summary=[]), "input[1]"),
        ("response", input_item(type="computer_call_output"), "input[1]"),
        ("response", input_item(id="msg_1"), "input[1]"),
        (
            "response",
            input_item(role="user", content=[INPUT_IMAGE]),
            "input[1].content[0]",
        ),
        (
            "response",
            input_item(role="user", content=[{"type": "input_file", "file_id": "f"}]),
            "input[1].content[0]",
        ),
        (
            "response",
            input_item(type="function_call_output", call_id="c", output=[INPUT_IMAGE]),
            "input[1].output[0]",
        ),
        ("chat", {"web_search_options": {}}, "web_search_options"),
        ("chat", {"plugins": [{"id": "web"}]}, "plugins"),
        ("chat", {"data_sources": [{"type": "x"}]}, "data_sources"),
        ("chat", {"prediction": {"type": "content"}}, "prediction"),
        ("chat", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat", user_part(IMAGE), "messages[0].content[0]"),
        ("chat", user_part({"type": "input_audio"}), "messages[0].content[0]"),
        ("chat", user_part({"type": "file"}), "messages[0].content[0]"),
        ("chat", user_part({"image_url": "a"}), "messages[0].content[0]"),
        (
            "chat",
            {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
            "messages[0]",
        ),
        ("embedding", {"input": [{"image": "https://example.com"}]}, "input[0]"),
        ("embedding", user_part(IMAGE), "messages[0].content[0]"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_call_whose_tokens_cannot_be_bounded_gets_a_403_and_is_not_sent(
    faked: Faked, kind: str, options: Json, param: str
) -> None:
    response = post(faked.live, kind, BODIES[kind] | options)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (403, "live_cap")
    assert error["param"] == param
    assert f"live mode can't limit the cost of '{param}'" in error["message"]
    assert faked.upstream.received == []
    assert usage_so_far(faked.live) == {"calls": 0, "tokens": 0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("chat", user_part({"type": "text", "text": SKY})),
        ("chat", {"tools": [{"type": "function"}, {"type": "custom"}, {"name": "f"}]}),
        ("chat", {"store": True, "modalities": ["text"], "web_search_options": None}),
        ("chat", {"messages": [*MESSAGES, {"role": "assistant", "content": None}]}),
        ("chat", {"unknown_parameter": {"of": ["a", "gateway"]}}),
        ("response", {"store": True, "background": False, "conversation": None}),
        ("response", input_item(role="user", content=[{"type": "input_text"}])),
        ("response", input_item(type="function_call", name="f", arguments="{}")),
        ("response", input_item(type="function_call_output", output="done")),
        (
            "response",
            input_item(type="function_call_output", output=[{"type": "input_text"}]),
        ),
        ("response", input_item(type="custom_tool_call_output", output="done")),
        ("response", input_item(type="reasoning", encrypted_content="a")),
        (
            "response",
            input_item(type="reasoning", content=[{"type": "reasoning_text"}]),
        ),
        ("embedding", {"background": False, "input": [SKY, SKY]}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_call_whose_tokens_can_be_bounded_is_forwarded(
    faked: Faked, kind: str, options: Json
) -> None:
    body = BODIES[kind] | options
    if kind in GENERATING:
        body |= token_limit(kind, LIMIT)
    assert post(faked.live, kind, body).status_code == 200
    assert json.loads(faked.upstream.received[0]["body"]) == body


@pytest.mark.parametrize(
    ("usage", "options", "answer_tokens"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 4000}, {}, 4000),
        ({"prompt_tokens": 9, "completion_tokens": 4000}, {"n": 2}, 2000),
        ({"prompt_tokens": 9, "total_tokens": 4009}, {}, 4000),
    ],
)
def test_longest_answer_of_an_upstream_that_ignores_limits_is_reserved_from_then_on(
    faked: Faked, usage: Json, options: Json, answer_tokens: int
) -> None:
    body = BODIES["chat"] | token_limit("chat", LIMIT)
    faked.upstream.respond = respond_with(chat_body(SKY, usage=usage))
    with measured_cost(faked.live) as cost:
        post(faked.live, "chat", body | options)
    assert cost["tokens"] == 4009
    faked.upstream.respond = respond_with(chat_body(SKY))
    with measured_cost(faked.live) as cost:
        post(faked.live, "chat", body)
    assert cost["tokens"] == len(faked.upstream.received[-1]["body"]) + answer_tokens


def test_tokens_that_an_upstream_adds_to_prompts_are_reserved_from_then_on(
    faked: Faked,
) -> None:
    body = BODIES["chat"] | token_limit("chat", LIMIT)
    usage = {"prompt_tokens": 5000, "completion_tokens": 3, "total_tokens": 5003}
    faked.upstream.respond = respond_with(chat_body(SKY, usage=usage))
    post(faked.live, "chat", body)
    faked.upstream.respond = respond_with(chat_body(SKY))
    with measured_cost(faked.live) as cost:
        post(faked.live, "chat", body)
    assert cost["tokens"] == 5000 + LIMIT


def fifty_at_once(**options: Any) -> list[Any]:
    """Make 50 concurrent calls; return the answers of those under the cap."""

    async def ask(client: AsyncOpenAI) -> list[Any]:
        calls = [CALLS["completion"](client, **options) for _ in range(50)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = run_async(ask)
    stopped = [
        result for result in results if isinstance(result, openai.PermissionDeniedError)
    ]
    answers = [result for result in results if not isinstance(result, BaseException)]
    assert len(answers) + len(stopped) == 50
    return answers


def test_fifty_concurrent_calls_never_exceed_the_call_cap(
    live: Provider, upstream: Provider
) -> None:
    leave_room(live, "max_calls", 10)
    assert len(fifty_at_once()) == 10
    assert request_count(upstream) == 10


def test_fifty_concurrent_calls_never_exceed_the_token_cap(
    live: Provider, upstream: Provider
) -> None:
    leave_room(live, "max_tokens", 1000)
    answers = fifty_at_once(max_tokens=20)
    assert 0 < len(answers) == request_count(upstream)
    stats = upstream.ask("/_provider/stats")
    assert 0 < stats["prompt_tokens"] + stats["completion_tokens"] <= 1000


@pytest.mark.parametrize("kind", COUNTED)
def test_tokens_are_counted_from_the_usage_in_the_response(
    client: OpenAI, live: Provider, kind: str
) -> None:
    with measured_cost(live) as cost:
        usage = CALLS[kind](client).usage
    assert cost == {"calls": 1, "tokens": usage.total_tokens}


def include_usage(kind: str) -> Json:
    """The options that add usage to a stream; /v1/responses always includes it."""
    return {"stream_options": {"include_usage": True}} if kind != "response" else {}


@pytest.mark.parametrize("kind", GENERATING)
def test_tokens_of_a_stream_are_counted_from_its_usage(
    client: OpenAI, direct: OpenAI, live: Provider, kind: str
) -> None:
    total = CALLS[kind](direct).usage.total_tokens
    with measured_cost(live) as cost:
        list(CALLS[kind](client, stream=True, **include_usage(kind)))
    assert cost == {"calls": 1, "tokens": total}


async def stream_without_usage(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"choices":[]}\n\ndata: [DONE]\n\n')
    return response


def respond_with_status(status: int) -> Handler:
    return respond_with({"error": {"message": "No."}}, status=status)


@pytest.mark.parametrize(
    ("respond", "counted"),
    [
        *((respond_with_status(status), False) for status in (400, 401, 404, 422, 429)),
        *((respond_with_status(status), True) for status in (500, 502, 503, 504)),
        (respond_with({}, status=307, headers={"location": DEAD_ADDRESS}), True),
        (respond_with(chat_body(SKY)), True),
        (respond_with(chat_body(SKY, usage=None)), True),
        (respond_with(chat_body(SKY, usage={"prompt_tokens": 9})), True),
        (respond_with(chat_body('"prompt_tokens":1,"total_tokens":1}')), True),
        (stream_without_usage, True),
        (disconnect_midway, True),
    ],
)
def test_call_without_reported_usage_counts_in_full_unless_the_upstream_refused_it(
    faked: Faked, respond: Handler, counted: bool
) -> None:
    faked.upstream.respond = respond
    with contextlib.suppress(httpx.TransportError):
        post(faked.live, "chat", BODIES["chat"])
    size = len(faked.upstream.received[0]["body"])
    tokens = (size + 500) * counted
    assert usage_so_far(faked.live) == {"calls": 1, "tokens": tokens}


def test_journal_estimates_the_prompt_of_a_call_without_reported_usage(
    faked: Faked,
) -> None:
    faked.upstream.respond = stream_without_usage
    list(CALLS["chat"](faked.client, stream=True))
    [entry] = settled_journal(faked.live)
    assert 0 < entry["prompt_tokens"] < 10


def test_listing_models_is_free_and_works_at_the_cap(
    client: OpenAI, live: Provider
) -> None:
    leave_room(live, "max_calls", 0)
    leave_room(live, "max_tokens", 0)
    assert CALLS["models"](client).data


NOT_FORWARDED: dict[str, Callable[[OpenAI], object]] = {
    "/v1/files": lambda client: client.files.list(),
    "/v1/batches": lambda client: client.batches.create(
        input_file_id="file-1", endpoint="/v1/completions", completion_window="24h"
    ),
    "/v1/fine_tuning/jobs": lambda client: client.fine_tuning.jobs.create(
        model=MODEL, training_file="file-1"
    ),
    "/v1/images/generations": lambda client: client.images.generate(prompt=SKY),
    "/v1/audio/speech": lambda client: client.audio.speech.create(
        model=MODEL, voice="alloy", input=SKY
    ),
    "/v1/moderations": lambda client: client.moderations.create(input=SKY),
    "/v1/responses/resp_1": lambda client: client.responses.retrieve("resp_1"),
    "/v1/models/some-model": lambda client: client.models.delete(MODEL),
}


@pytest.mark.parametrize("path", NOT_FORWARDED)
def test_routes_that_no_cap_can_limit_get_a_404_and_are_not_forwarded(
    client: OpenAI, live: Provider, upstream: Provider, path: str
) -> None:
    with pytest.raises(
        openai.NotFoundError, match=f"does not forward [A-Z]+ {path}, because"
    ):
        NOT_FORWARDED[path](client)
    assert request_count(upstream) == 0


def test_path_that_only_starts_like_models_is_not_forwarded(faked: Faked) -> None:
    for path in "/modelsandmore", "/models/%2e%2e/files":
        with pytest.raises(openai.NotFoundError, match="does not forward"):
            faked.client.get(path, cast_to=object)
    assert faked.upstream.received == []


# When the upstream fails


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        port: int = server_socket.getsockname()[1]
    return port


def assert_explains_what_to_do(error: Exception, host: str) -> None:
    assert isinstance(error, openai.InternalServerError)
    assert host in str(error)
    assert "OPENAI_BASE_URL" in str(error)


@pytest.mark.parametrize("stream", [False, True])
def test_upstream_that_is_down_gives_a_502_with_advice_and_costs_nothing(
    server_thread: ServerThread, connections: DefaultHttpxClient, stream: bool
) -> None:
    with server_thread.forwarding(f"http://127.0.0.1:{free_port()}/v1") as live:
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections), stream=stream)
        assert usage_so_far(live) == {"calls": 0, "tokens": 0}
    assert caught.value.status_code == 502
    assert_explains_what_to_do(caught.value, "127.0.0.1")


def test_upstream_without_tls_gives_a_502_with_advice_and_costs_nothing(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    connections: DefaultHttpxClient,
) -> None:
    address = fake_upstream[1].replace("http:", "https:")
    with server_thread.forwarding(f"{address}/v1") as live:
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections))
        assert usage_so_far(live) == {"calls": 0, "tokens": 0}
    assert_explains_what_to_do(caught.value, "127.0.0.1")


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8001/v1",
        "user:hidden@localhost:8001/v1",
        "http://user:hidden@127.0.0.1:99999/v1",
        "nonsense",
    ],
)
def test_invalid_upstream_address_gives_a_502_with_advice_and_costs_nothing(
    server_thread: ServerThread,
    connections: DefaultHttpxClient,
    caplog: pytest.LogCaptureFixture,
    address: str,
) -> None:
    with server_thread.forwarding(address) as live:
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections))
        assert caught.value.status_code == 502
        assert_explains_what_to_do(caught.value, "")
        assert "hidden" not in str(caught.value) + caplog.text
        assert usage_so_far(live) == {"calls": 0, "tokens": 0}


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("fault", ["truncated", "reset_midway"])
def test_response_cut_off_upstream_raises_and_is_never_returned_in_part(
    client: OpenAI, live: Provider, upstream: Provider, fault: str, kind: str
) -> None:
    upstream.configure(faults={fault: 1.0})
    with measured_cost(live) as cost, pytest.raises(openai.APIConnectionError):
        CALLS[kind](client, **token_limit(kind, 1000))
    assert cost["tokens"] >= 1000  # it may be billed in full
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        list(CALLS[kind](client, stream=True))
    assert [entry["state"] for entry in settled_journal(live)] == ["failed", "failed"]


def test_redirect_gives_a_502_because_following_it_would_bypass_the_cap(
    faked: Faked,
) -> None:
    elsewhere = {"location": "http://127.0.0.1:9/v1/chat/completions"}
    faked.upstream.respond = respond_with({}, status=307, headers=elsewhere)
    with pytest.raises(openai.InternalServerError, match="redirects with status 307"):
        CALLS["chat"](faked.client)


@pytest.mark.parametrize("status", [200, 201])
def test_answer_with_a_location_that_is_no_redirect_is_passed_on(
    faked: Faked, status: int
) -> None:
    location = {"location": "http://127.0.0.1:9/v1/chat/completions/1"}
    faked.upstream.respond = respond_with(
        chat_body("Hi."), status=status, headers=location
    )
    assert CALLS["chat"](faked.client).choices[0].message.content == "Hi."


def test_connection_reset_upstream_gives_a_502_and_is_not_retried(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    upstream.configure(faults={"reset": 1.0})
    with (
        measured_cost(live) as cost,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        CALLS["chat"](client)
    assert_explains_what_to_do(caught.value, "127.0.0.1")
    assert request_count(upstream) == 1
    assert cost["calls"] == 1


@contextlib.contextmanager
def short_timeouts() -> Iterator[None]:
    timeout = ClientTimeout(sock_connect=0.2, sock_read=0.2)
    with mock.patch("llm_stub.live.TIMEOUT", timeout):
        yield


def test_upstream_timeout_gives_a_504_with_advice(faked: Faked) -> None:
    faked.upstream.respond = never_respond
    with short_timeouts(), pytest.raises(openai.InternalServerError) as caught:
        CALLS["chat"](faked.client)
    assert caught.value.status_code == 504
    assert_explains_what_to_do(caught.value, "127.0.0.1")
    assert usage_so_far(faked.live)["calls"] == 1


@pytest.mark.parametrize("respond", [stall_midway, disconnect_midway])
def test_upstream_that_stalls_or_disconnects_midway_breaks_the_connection(
    faked: Faked, respond: Handler
) -> None:
    faked.upstream.respond = respond
    with short_timeouts(), pytest.raises(openai.APIConnectionError):
        CALLS["chat"](faked.client)
    assert [entry["state"] for entry in settled_journal(faked.live)] == ["failed"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems reset when the backlog is full"
)
def test_connect_timeout_costs_nothing(
    server_thread: ServerThread, connections: DefaultHttpxClient
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_connection(full.getsockname()),  # fills the backlog
        short_timeouts(),
        server_thread.forwarding(
            f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        ) as live,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections))
        assert usage_so_far(live) == {"calls": 0, "tokens": 0}
    assert_explains_what_to_do(caught.value, "127.0.0.1")


@pytest.mark.skipif(
    sys.platform != "linux", reason="other systems reset when the backlog is full"
)
def test_client_that_hangs_up_before_the_call_is_sent_is_not_charged(
    server_thread: ServerThread, connections: DefaultHttpxClient
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_connection(full.getsockname()),  # fills the backlog
        server_thread.forwarding(
            f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        ) as live,
    ):
        client = client_of(live.url, connections).with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            CALLS["chat"](client)
        [entry] = settled_journal(live)
        assert entry["state"] == "timed out"
        assert usage_so_far(live) == {"calls": 0, "tokens": 0}


def test_unexpected_error_before_anything_is_sent_gives_a_502_and_costs_nothing(
    faked: Faked,
) -> None:
    with (
        mock.patch("aiohttp.ClientRequest.send", side_effect=ValueError(SECRET)),
        pytest.raises(openai.InternalServerError, match="ValueError") as caught,
    ):
        CALLS["chat"](faked.client)
    assert caught.value.status_code == 502
    assert SECRET not in str(caught.value)
    assert usage_so_far(faked.live) == {"calls": 0, "tokens": 0}


# Proxies and .netrc


def test_netrc_is_not_read(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    connections: DefaultHttpxClient,
    tmp_path: Path,
) -> None:
    upstream, url = fake_upstream
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password hidden\n")
    netrc.chmod(0o600)
    os.environ["NETRC"] = str(netrc)
    for address, proxy in (url, ""), ("http://upstream.invalid", url):
        os.environ["HTTP_PROXY"] = proxy
        with server_thread.forwarding(f"{address}/v1") as live:
            CALLS["chat"](client_of(live.url, connections))
        headers = upstream.received.pop()["headers"]
        assert headers["authorization"] == f"Bearer {SECRET}"
        assert "proxy-authorization" not in headers


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_proxy_in_the_environment_is_used_with_its_login(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    connections: DefaultHttpxClient,
    scheme: str,
) -> None:
    upstream, url = fake_upstream
    os.environ["HTTP_PROXY"] = url.replace("http://", f"{scheme}someone:hidden@")
    with server_thread.forwarding("http://upstream.invalid/v1") as live:
        CALLS["chat"](client_of(live.url, connections))
    [request] = upstream.received
    basic = base64.b64encode(b"someone:hidden").decode()
    assert request["headers"]["proxy-authorization"] == f"Basic {basic}"
    assert request["headers"]["authorization"] == f"Bearer {SECRET}"
    assert request["line"].startswith("POST http://upstream.invalid/v1/chat")


def test_upstream_in_no_proxy_is_called_without_the_proxy(faked: Faked) -> None:
    os.environ |= {"HTTP_PROXY": DEAD_ADDRESS, "NO_PROXY": "127.0.0.1"}
    CALLS["chat"](faked.client)


def test_all_proxy_is_ignored(faked: Faked) -> None:
    os.environ["ALL_PROXY"] = "socks5://127.0.0.1:9"
    CALLS["chat"](faked.client)


def test_socks_proxy_gives_a_502_and_costs_nothing(faked: Faked) -> None:
    os.environ["HTTP_PROXY"] = "socks5://127.0.0.1:9"
    with pytest.raises(openai.InternalServerError, match="proxy isn't an http://"):
        CALLS["chat"](faked.client)
    assert usage_so_far(faked.live) == {"calls": 0, "tokens": 0}


# Secrets


def test_key_reaches_the_upstream_and_appears_nowhere_else(
    server_thread: ServerThread,
) -> None:
    os.environ["OPENAI_API_KEY"] = SECRET
    errors: list[openai.APIError] = []

    def record_error(call: Callable[..., Any]) -> None:
        with pytest.raises(openai.APIError) as caught:
            call(client)
        errors.append(caught.value)

    with tempfile.TemporaryFile("w+") as log:
        with server_thread.fake_upstream() as (upstream, url):
            os.environ["OPENAI_BASE_URL"] = f"{url}/v1"
            with mock.patch("tempfile.TemporaryFile", return_value=log):
                provider = connect(live=True, max_calls=5)
            client = OpenAI(max_retries=0)
            CALLS["chat"](client)
            [request] = upstream.received
            assert request["headers"]["authorization"] == f"Bearer {SECRET}"
            for failing in disconnect_midway, respond_with({"error": {}}, status=401):
                upstream.respond = failing
                record_error(CALLS["chat"])
            record_error(lambda client: client.files.list())
            record_error(
                lambda client: client.post("/completions", body=[], cast_to=object)
            )
            record_error(lambda client: CALLS["chat"](client, max_tokens=UNREACHED_CAP))
        record_error(CALLS["chat"])
        assert provider._process is not None
        process = psutil.Process(provider._process.pid)
        outputs = {
            "journal": provider.ask("/_provider/journal"),
            "stats": provider.ask("/_provider/stats"),
            "config": provider.configure(),
            "repr": provider,
            "errors": [(error, str(error), error.body) for error in errors],
            "command line": process.cmdline(),
            "environment": process.environ(),
        }
        provider.stop()
        assert provider._process.stdout is not None
        outputs["stdout"] = provider._process.stdout.read()
        log.seek(0)
        outputs["stderr"] = log.read()
    assert [name for name, text in outputs.items() if SECRET in repr(text)] == []
    assert len(outputs["journal"]["attempts"]) == 7


def test_login_in_the_address_reaches_the_upstream_and_appears_in_no_message(
    server_thread: ServerThread,
    fake_upstream: tuple[FakeUpstream, str],
    connections: DefaultHttpxClient,
) -> None:
    upstream, url = fake_upstream
    secrets = "someone:hidden"
    address = f"{url}/v1".replace("//", f"//{secrets}@", 1)
    OpenAI(base_url=address, api_key=SECRET, max_retries=0).models.list()
    with server_thread.forwarding(address) as live:
        client = client_of(live.url, connections)
        CALLS["models"](client)
        expected, via_live = (call["headers"] for call in upstream.received)
        basic = base64.b64encode(secrets.encode()).decode()
        assert expected["authorization"] == f"Basic {basic}"
        assert via_live["authorization"] == expected["authorization"]
        upstream.respond = disconnect_midway
        with pytest.raises(openai.APIError) as broken:
            CALLS["chat"](client)
        journal = repr(settled_journal(live))
    dead = f"http://{secrets}@127.0.0.1:{free_port()}/v1"
    with (
        server_thread.forwarding(dead) as live,
        pytest.raises(openai.InternalServerError) as down,
    ):
        CALLS["chat"](client_of(live.url, connections))
    for text in str(broken.value), str(down.value), journal:
        assert not any(part in text for part in (*secrets.split(":"), basic))
    assert_explains_what_to_do(down.value, "127.0.0.1")


# Journal and timeline


@pytest.mark.parametrize(
    ("kind", "stream"),
    [(kind, False) for kind in COUNTED] + [(kind, True) for kind in GENERATING],
)
def test_journal_entry_matches_the_upstreams_own(
    client: OpenAI, live: Provider, upstream: Provider, kind: str, stream: bool
) -> None:
    if stream:
        list(CALLS[kind](client, stream=True, **include_usage(kind)))
    else:
        CALLS[kind](client)
    ignored = {"number", "changed", "arrival", "first_byte", "end", "request_id"}
    [live_call], [upstream_call] = (
        [
            {name: value for name, value in entry.items() if name not in ignored}
            for entry in settled_journal(provider)
        ]
        for provider in (live, upstream)
    )
    assert live_call == upstream_call


@pytest.mark.usefixtures("live")
def test_timeline_shows_live_calls(upstream: Provider) -> None:
    upstream.configure(first_token=0.5, jitter=0)

    async def two_calls(client: AsyncOpenAI) -> None:
        await asyncio.gather(*(CALLS[kind](client) for kind in ("chat", "completion")))

    with Timeline("two calls") as run:
        run_async(two_calls)
    assert (run.calls, run.peak_in_flight, run.failed) == (2, 2, 0)
    assert [attempt.prompt for attempt in run.journal] == [SKY, SKY]
    assert run.waits >= 2 * 0.5


# Which server is called, and by whom


def ask_upstream() -> None:
    with OpenAI(max_retries=0, timeout=10) as client:
        CALLS["chat"](client)


@pytest.fixture
def own_address(upstream: Provider) -> str:
    """Live mode forwards to this address."""
    os.environ |= {"OPENAI_BASE_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": SECRET}
    return upstream.url


# What a process or its parent did before, other than making a call.
LIVE, STUB = "connect(live=True)", "connect(live=False)"
VISITS = {
    "live": [LIVE],
    "to stub mode": [STUB, LIVE],
    "live, then to stub mode": [LIVE, STUB, LIVE],
    "failing": [
        LIVE,
        "try: connect(live=False, typo=1)\nexcept ValueError: pass",
        LIVE,
    ],
    "stop": [LIVE + ".stop()", LIVE],
    "kill": [f"process = {LIVE}._process", "process.kill()", "process.wait()", LIVE],
}
CHILD = """
import json, os, urllib.error, urllib.request
from helpers import connect
{visits}
for _ in range(3):
    body = json.dumps(dict(model="m", input="a")).encode()
    try:
        urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/embeddings", body)
    except urllib.error.HTTPError as error:
        assert json.load(error)["error"]["code"] == "live_cap"
    else:
        print("answered")
"""


def calls_of_a_child(visits: list[str]) -> int:
    """How many of three calls are answered in a child that connects like this."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(visits="\n".join(visits))],
        capture_output=True,
        text=True,
        check=True,
    )
    return child.stdout.count("answered")


@pytest.mark.parametrize("visits", VISITS.values(), ids=VISITS)
def test_cap_and_count_stay_whatever_happens_to_the_stub(
    own_address: str, upstream: Provider, visits: list[str]
) -> None:
    connect(live=True, max_calls=2, max_answer_tokens=40)
    ask_upstream()
    exec("\n".join(visits), {"connect": connect})
    ask_upstream()
    with pytest.raises(openai.PermissionDeniedError, match="max_calls=2"):
        ask_upstream()
    live = connection.current()
    assert usage_so_far(live)["calls"] == request_count(upstream) == 2
    assert live.configure()["max_answer_tokens"] == 40


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        (LIVE, "to stub mode"),
        (LIVE, "live, then to stub mode"),
        (STUB, "live"),
    ],
)
def test_children_share_the_cap_and_the_count_of_their_parent(
    own_address: str, upstream: Provider, parent: str, child: str
) -> None:
    connect(live=True, max_calls=4)
    ask_upstream()
    exec(parent, {"connect": connect})
    answered = [calls_of_a_child(VISITS[child]) for _ in range(2)]
    connect(live=True)
    with pytest.raises(openai.PermissionDeniedError, match="max_calls=4"):
        ask_upstream()
    assert answered == [3, 0]
    assert request_count(upstream) == 4


@pytest.mark.parametrize("emptied", [False, True], ids=["deleted", "emptied"])
def test_live_mode_stops_if_its_count_is_lost(
    own_address: str, upstream: Provider, emptied: bool
) -> None:
    connect(live=True, max_calls=1)
    ask_upstream()
    connect(live=False)
    count = Path(environment.record().count)
    count.unlink()
    if emptied:
        count.touch()
    with pytest.raises(ProviderError, match=f"has been deleted: {count}"):
        connect(live=True)
    assert request_count(upstream) == 1


def test_children_of_a_parent_in_stub_mode_share_one_count(
    own_address: str, upstream: Provider
) -> None:
    connect()
    visits = ["connect(live=True, max_calls=4)"]
    assert [calls_of_a_child(visits) for _ in range(2)] == [3, 1]
    assert request_count(upstream) == 4


def test_stubs_at_the_same_time_share_one_count(
    own_address: str, upstream: Provider, tmp_path: Path
) -> None:
    options = "--live", "--count", str(tmp_path / "count")
    with started_by_hand(*options) as one, started_by_hand(*options) as other:
        for stub in one, other:
            stub.configure(max_calls=50)
        clients = [OpenAI(base_url=f"{s.url}/v1", max_retries=0) for s in (one, other)]

        def answered(client: OpenAI) -> bool:
            with contextlib.suppress(openai.PermissionDeniedError):
                CALLS["chat"](client)
                return True
            return False

        with ThreadPoolExecutor(16) as executor:
            done = list(executor.map(answered, clients * 40))

    assert sum(done) == request_count(upstream) == 50


@pytest.mark.parametrize("settings", [{"max_tokens": -1}, {"maxcalls": 1}], ids=str)
def test_live_mode_with_a_rejected_setting_forwards_nothing(
    upstream: Provider, settings: Json
) -> None:
    os.environ |= {"OPENAI_BASE_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": SECRET}
    with pytest.raises(ValueError, match="rejected"):
        connect(live=True, max_calls=1, **settings)
    with pytest.raises(openai.APIConnectionError):
        ask_upstream()
    assert request_count(upstream) == 0


@pytest.mark.parametrize("name", ["LLM_LIVE", "LLM_PROVIDER_URL"])
def test_after_a_failed_connect_nothing_is_forwarded(
    upstream: Provider, name: str
) -> None:
    os.environ |= {"OPENAI_BASE_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": SECRET}
    connect(live=True)
    os.environ[name] = "http://127.0.0.1:1"  # no switch, and no stub
    with pytest.raises((ProviderError, ValueError)):
        connect()
    with pytest.raises(openai.APIConnectionError):
        ask_upstream()
    assert request_count(upstream) == 0


def test_stub_mode_refuses_a_live_stub_at_the_given_address(upstream: Provider) -> None:
    upstream_url = f"{upstream.url}/v1"
    with started_by_hand("--live", OPENAI_BASE_URL=upstream_url) as provider:
        os.environ |= {"LLM_PROVIDER_URL": provider.url, "OPENAI_API_KEY": SECRET}
        with pytest.raises(ProviderError, match=r"live=False.*is in live mode"):
            connect(live=False)
        with pytest.raises(openai.APIConnectionError):
            ask_upstream()
        assert request_count(upstream) == 0
        assert connect().live


def test_two_different_addresses_are_refused(upstream: Provider) -> None:
    addresses = {
        "OPENAI_BASE_URL": f"{upstream.url}/v1",
        "OPENAI_API_BASE": "http://127.0.0.1:1/v1",
    }
    os.environ |= addresses
    with pytest.raises(ProviderError, match=r"different servers.*Unset one"):
        connect(live=True)
    by_hand = subprocess.run(
        [sys.executable, "-m", "llm_stub", "--live", "--port", "0"],
        env=os.environ | addresses,
        capture_output=True,
        text=True,
        check=False,
    )
    assert by_hand.returncode == 2
    assert "name different servers; unset one of them" in by_hand.stderr
    os.environ["OPENAI_API_BASE"] = addresses["OPENAI_BASE_URL"] + "/"
    os.environ["OPENAI_BASE_URL"] = addresses["OPENAI_BASE_URL"]
    assert connect(live=True).live


def test_live_must_be_a_boolean() -> None:
    with pytest.raises(ValueError, match="live='no' must be True, False or None"):
        connect(live="no")  # type: ignore[arg-type]


def test_limit_in_letters_that_some_servers_read_as_ascii_is_counted(
    faked: Faked,
) -> None:
    leave_room(faked.live, "max_tokens", 500)
    body = BODIES["chat"] | {"max_tokens": 5, "max_tokenſ": 9000}
    response = httpx.post(
        f"{faked.live.url}/v1/chat/completions", json=body, trust_env=False
    )
    assert response.status_code == 403
    assert faked.upstream.received == []


def test_expect_is_answered_by_the_stub_and_not_passed_on(faked: Faked) -> None:
    faked.upstream.respond = respond_with(chat_body("Hi."))
    with_expect = faked.client.with_options(default_headers={"expect": "100-continue"})
    assert CALLS["chat"](with_expect).choices[0].message.content == "Hi."
    [request] = faked.upstream.received
    assert "expect" not in request["headers"]


def test_live_mode_works_after_another_live_stub_was_used(upstream: Provider) -> None:
    os.environ |= {"OPENAI_BASE_URL": f"{upstream.url}/v1", "OPENAI_API_KEY": SECRET}
    with started_by_hand("--live") as other:
        os.environ["LLM_PROVIDER_URL"] = other.url
        assert connect().live
    del os.environ["LLM_PROVIDER_URL"]
    assert connect(live=True).live
    ask_upstream()
    assert request_count(upstream) == 1

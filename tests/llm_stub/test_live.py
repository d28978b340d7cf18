import asyncio
import base64
import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

import httpx
import langchain_openai
import openai
import psutil
import pytest
from aiohttp import ClientTimeout, web
from openai import AsyncOpenAI, DefaultHttpxClient, OpenAI

from helpers import Timeline, connect, connection
from helpers.connection import Provider, ProviderError
from llm_stub import server
from llm_stub.answers import answer, tokens
from llm_stub.settings import Settings

PATIENCE = 30.0  # seconds that anything may take on a busy machine
MUCH = 10**9  # a cap that no test reaches
MODEL = "some-model"
SKY = "Why is the sky blue?"
NOWHERE = "http://127.0.0.1:9/v1"
SECRET = "sk-the-readers-own-key"
ADDRESSES = "OPENAI_BASE_URL", "OPENAI_API_BASE"
PASSING = {"date", "openai-processing-ms"}  # headers that tell the time
# Headers of the connection, and the one by which live mode can read the usage.
OF_THE_HOP = {"host", "connection", "accept-encoding"}

Json = dict[str, Any]
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


# Who plays a part


@contextlib.contextmanager
def never_connected() -> Iterator[None]:
    """A process that never called connect(), and its environment afterwards."""
    with (
        mock.patch.object(connection, "_current", None),
        mock.patch.dict(connection._reader, clear=True),
        mock.patch.dict(os.environ),
    ):
        for name in list(os.environ):
            if name.startswith(("OPENAI_", "LLM_")) or name.lower().endswith("_proxy"):
                del os.environ[name]
        yield


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with never_connected():
        yield
        if connection._current is not None:
            connection._current.stop()


@contextlib.contextmanager
def by_hand(*options: str, **environment: str) -> Iterator[Provider]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", "0", *options],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield Provider(json.loads(process.stdout.readline())["url"], process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def second() -> Iterator[Provider]:
    with never_connected(), by_hand() as provider:
        yield provider


@pytest.fixture
def upstream(second: Provider) -> Provider:
    """A second provider, without latency and with an empty journal."""
    settings = Settings(first_token=0, per_token=0).model_dump()
    second.configure(**settings)
    ended(second)
    second.ask("/_provider/reset", "POST")
    return second


@pytest.fixture(scope="module")
def started(second: Provider) -> Iterator[Provider]:
    with never_connected():
        os.environ["OPENAI_BASE_URL"] = f"{second.url}/v1"
        provider = connect(live=True)
    yield provider
    provider.stop()


@pytest.fixture
def live(started: Provider, upstream: Provider) -> Iterator[Provider]:
    """Live mode as connect() gives it, with caps that are far away."""
    with mock.patch.object(connection, "_current", started):
        os.environ["OPENAI_BASE_URL"] = f"{upstream.url}/v1"
        provider = connect(live=True, max_calls=MUCH, max_tokens=MUCH)
        ended(provider)
        provider.ask("/_provider/reset", "POST")
        yield provider


@pytest.fixture
def client(live: Provider, connections: DefaultHttpxClient) -> OpenAI:
    """The SDK's own client, as connect() points it at live mode."""
    return OpenAI(max_retries=0, http_client=connections)


@pytest.fixture
def direct(upstream: Provider, connections: DefaultHttpxClient) -> OpenAI:
    """A client that asks the upstream itself."""
    return client_of(upstream.url, connections)


class Double:
    """An upstream that shows what it received and answers as a test wants it."""

    def __init__(self) -> None:
        self.received: list[Json] = []
        self.answer: Answer = told(chat_body(SKY))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): text for name, text in request.headers.items()}
        self.received.append(
            {
                "line": f"{request.method} {request.raw_path}",
                "headers": {k: v for k, v in headers.items() if k not in OF_THE_HOP},
                "body": await request.read(),
            }
        )
        return await self.answer(request)


class Stage:
    """An event loop in a thread, for servers that need no process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

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
    def double(self) -> Iterator[tuple[Double, str]]:
        double, app = Double(), web.Application()
        app.router.add_route("*", "/{path:.*}", double.handle)
        with self.serving(app) as url:
            yield double, url

    @contextlib.contextmanager
    def forwarding(self, upstream: str, model: str | None = None) -> Iterator[Provider]:
        """Live mode in this process, in front of any address."""
        with self.serving(server.Server(upstream, model).app()) as url:
            yield Provider(url, live=True)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.loop.call_soon_threadsafe(stage.loop.stop)


@pytest.fixture
def double(stage: Stage) -> Iterator[tuple[Double, str]]:
    with stage.double() as double:
        yield double


class Before:
    """Live mode in front of a double, a client of each, and the double."""

    def __init__(
        self,
        stage: Stage,
        double: Double,
        url: str,
        live: Provider,
        http: DefaultHttpxClient,
    ) -> None:
        self.stage, self.double, self.live = stage, double, live
        self.client, self.direct = client_of(live.url, http), client_of(url, http)


@pytest.fixture
def before(
    stage: Stage, double: tuple[Double, str], connections: DefaultHttpxClient
) -> Iterator[Before]:
    with stage.forwarding(f"{double[1]}/v1") as live:
        yield Before(stage, *double, live, connections)


def client_of(url: str, http: DefaultHttpxClient) -> OpenAI:
    return OpenAI(
        base_url=f"{url}/v1",
        api_key=SECRET,
        max_retries=0,
        timeout=PATIENCE,
        http_client=http,
    )


def chat_body(text: str, **fields: Any) -> Json:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    head = {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL}
    return {**head, "choices": [choice], **fields}


def told(body: Json, **options: Any) -> Answer:
    async def tell(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, **options)

    return tell


async def silence(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json"})
    response.content_length = 1000
    await response.prepare(request)
    await response.write(b'{"id": "1",')
    return response


async def break_off(request: web.Request) -> web.StreamResponse:
    await half(request)
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def fall_silent(request: web.Request) -> web.StreamResponse:
    await half(request)
    return await silence(request)


# What is asked

CALLS: dict[str, Callable[..., Any]] = {
    "completion": lambda client, **options: client.completions.create(
        **{"model": MODEL, "prompt": SKY} | options
    ),
    "chat": lambda client, **options: client.chat.completions.create(
        **{"model": MODEL, "messages": [{"role": "user", "content": SKY}]} | options
    ),
    "response": lambda client, **options: client.responses.create(
        **{"model": MODEL, "input": SKY} | options
    ),
    "embedding": lambda client, **options: client.embeddings.create(
        **{"model": MODEL, "input": SKY} | options
    ),
    "models": lambda client: client.models.list(),
    "model": lambda client: client.models.retrieve(MODEL),
}
GENERATING = list(CALLS)[:3]
COSTING = list(CALLS)[:4]


def ended(provider: Provider) -> list[Json]:
    """The journal, when all calls in it have ended."""
    attempts: list[Json] = provider.ask("/_provider/journal?settle=10")["attempts"]
    return attempts


def arrived(provider: Provider) -> int:
    requests: int = provider.ask("/_provider/stats")["requests"]
    return requests


def used(live: Provider) -> Json:
    ended(live)
    counts: Json = live.ask("/_provider/stats")["live"]
    return counts


def allow(live: Provider, name: str, more: int) -> int:
    """Set a cap so that so much more may be used; return the cap."""
    cap: int = used(live)[name.removeprefix("max_")] + more
    live.configure(**{name: cap})
    return cap


@contextlib.contextmanager
def costing(live: Provider) -> Iterator[Json]:
    """Afterwards, what a block has used of the caps."""
    cost: Json = {}
    start = used(live)
    yield cost
    cost.update({name: count - start[name] for name, count in used(live).items()})


def asynchronously(call: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with AsyncOpenAI(max_retries=0) as client:
            return await call(client)

    return asyncio.run(main())


def received(raw: Any) -> tuple[int, str, list[tuple[str, str]]]:
    """All that came over the wire: status, body and headers."""
    response = getattr(raw, "http_response", raw)
    headers = [
        pair for pair in response.headers.multi_items() if pair[0] not in PASSING
    ]
    return response.status_code, response.text, sorted(headers)


def outcome(client: Any) -> tuple[Any, ...]:
    """What a chat brings over the wire, or the error that the client made of it."""
    try:
        return received(CALLS["chat"](client))
    except openai.APIStatusError as error:
        return type(error), str(error), *received(error.response)
    except Exception as error:
        return type(error), str(error)


# Where the calls go


def test_live_mode_calls_the_address_that_connect_had_replaced_and_back_to_the_stub(
    upstream: Provider,
) -> None:
    address = f"{upstream.url}/v1"
    os.environ |= {"OPENAI_BASE_URL": NOWHERE, "OPENAI_API_BASE": address}

    stub = connect(first_token=0, per_token=0)
    assert [os.environ[name] for name in ADDRESSES] == [f"{stub.url}/v1"] * 2
    client = OpenAI(max_retries=0)

    def calls_upstream() -> int:
        before = arrived(upstream)
        assert CALLS["completion"](client).choices[0].text == answer(SKY)
        return arrived(upstream) - before

    assert calls_upstream() == 0

    first = connect(live=True)
    assert first.url == stub.url
    assert calls_upstream() == 1
    assert connect(live=True) is first

    os.environ["LLM_LIVE"] = "1"
    again = connect(live=False)
    assert (again.url, again.live) == (stub.url, False)
    assert calls_upstream() == 0


def test_an_address_set_later_is_called_and_after_a_wrong_one_the_right_one(
    upstream: Provider,
) -> None:
    stub = connect()
    client = OpenAI(max_retries=0)
    os.environ |= {"LLM_LIVE": "1", "OPENAI_BASE_URL": NOWHERE}
    assert connect().live
    with pytest.raises(openai.InternalServerError, match="is OPENAI_BASE_URL right"):
        CALLS["completion"](client)
    os.environ["OPENAI_BASE_URL"] = f"{upstream.url}/v1"
    assert connect().url == stub.url
    assert CALLS["completion"](client).choices[0].text == answer(SKY)
    assert arrived(upstream) == 1


@pytest.mark.parametrize("off", [None, "", "0"])
def test_without_llm_live_there_is_no_live_mode(
    upstream: Provider, off: str | None
) -> None:
    if off is not None:
        os.environ["LLM_LIVE"] = off
    with mock.patch.object(connection, "_current", upstream):
        assert connect() is upstream


def test_started_by_hand_it_replaces_every_calls_model_by_llm_model_and_says_live(
    upstream: Provider,
) -> None:
    address = {"OPENAI_API_BASE": f"{upstream.url}/v1", "OPENAI_BASE_URL": NOWHERE}
    with by_hand("--live", LLM_MODEL="the-readers-model", **address) as live:
        os.environ["LLM_PROVIDER_URL"] = live.url
        provider = connect(max_calls=7, max_tokens=900)
        client = OpenAI(max_retries=0)
        answers = [CALLS[kind](client).model for kind in COSTING]
    assert answers == ["the-readers-model"] * len(COSTING)
    assert [entry["model"] for entry in ended(upstream)] == answers
    assert repr(provider) == "<Provider: LIVE, up to 7 calls and 900 tokens>"


@pytest.mark.parametrize("key", [None, "", "stub"])
def test_openai_itself_is_not_called_without_a_key(
    upstream: Provider, key: str | None
) -> None:
    if key is not None:
        os.environ["OPENAI_API_KEY"] = key
    children = psutil.Process().children()
    with pytest.raises(ProviderError, match=r"OPENAI_API_KEY.*OPENAI_BASE_URL"):
        connect(live=True)
    assert psutil.Process().children() == children
    assert not {*ADDRESSES} & {*os.environ}

    with mock.patch.object(connection, "_current", upstream):
        connect()
        with pytest.raises(ProviderError, match="OPENAI_API_KEY"):
            connect(live=True)
    assert arrived(upstream) == 0  # and the stub was left running


@pytest.mark.parametrize("how", ["live=True", "LLM_LIVE=1"])
def test_live_mode_together_with_llm_provider_url_is_refused(
    upstream: Provider, how: str
) -> None:
    os.environ["LLM_PROVIDER_URL"] = upstream.url
    os.environ["OPENAI_BASE_URL"] = f"{upstream.url}/v1"
    if how == "LLM_LIVE=1":
        os.environ["LLM_LIVE"] = "1"
    children = psutil.Process().children()
    with pytest.raises(ProviderError, match="unset LLM_PROVIDER_URL"):
        connect(live=True if how == "live=True" else None)
    assert psutil.Process().children() == children


def test_the_repr_says_live_and_the_caps(live: Provider) -> None:
    live.configure(max_calls=7, max_tokens=900)
    assert repr(live) == "<Provider: LIVE, up to 7 calls and 900 tokens>"


# What passes through


@pytest.mark.parametrize("kind", CALLS)
def test_an_answer_and_its_headers_are_the_upstreams(
    client: OpenAI, direct: OpenAI, upstream: Provider, kind: str
) -> None:
    upstream.configure(requests_per_minute=10**6, burst=3600)
    there = CALLS[kind](direct.with_raw_response)
    here = CALLS[kind](client.with_raw_response)
    assert here.headers["x-request-id"] == there.headers["x-request-id"]
    assert received(here) == received(there)
    assert arrived(upstream) == 2


@pytest.mark.parametrize("kind", CALLS)
def test_the_async_client_gets_the_upstreams_answer_too(
    live: Provider, direct: OpenAI, upstream: Provider, kind: str
) -> None:
    there = CALLS[kind](direct).model_dump()
    here = asynchronously(CALLS[kind])
    assert here.model_dump() == there
    assert arrived(upstream) == 2


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
def test_langchain_gets_the_upstreams_answer_too(upstream: Provider, kind: str) -> None:
    here = LANGCHAIN[kind]()
    assert arrived(upstream) == 1
    assert here == LANGCHAIN[kind](base_url=f"{upstream.url}/v1")


@pytest.mark.parametrize("kind", GENERATING)
def test_a_stream_is_the_upstreams_to_the_byte(
    client: OpenAI, direct: OpenAI, kind: str
) -> None:
    there, here = (
        CALLS[kind](one.with_raw_response, stream=True).http_response.read()
        for one in (direct, client)
    )
    assert here == there


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
def test_what_goes_wrong_upstream_is_told_as_if_there_were_nobody_between(
    client: OpenAI, direct: OpenAI, upstream: Provider, change: Json
) -> None:
    upstream.configure(**change)
    there = outcome(direct)
    assert issubclass(there[0], openai.APIError | ValueError | AttributeError)
    assert outcome(client) == there


@pytest.mark.parametrize("status", [200, 400, 401, 404, 409, 422, 429, 500, 503])
def test_status_headers_and_error_object_are_passed_on_unchanged(
    before: Before, status: int
) -> None:
    headers = [
        ("x-request-id", "req_1"),
        ("x-ratelimit-remaining-tokens", "17"),
        ("x-ratelimit-reset-tokens", "6m0s"),
        ("retry-after", "20"),
        ("retry-after-ms", "20000"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("server", "upstream"),
    ]
    error = {"message": "No.", "type": "t", "param": "p", "code": "c"}
    before.double.answer = told(
        {"error": error}, status=status, reason="Upstream's Own", headers=headers
    )
    there, here = (
        outcome(client.with_raw_response) for client in (before.direct, before.client)
    )
    assert set(headers) <= set(there[-1])
    assert here == there


def test_a_compressed_answer_stays_readable(before: Before) -> None:
    async def compressed(request: web.Request) -> web.StreamResponse:
        body = gzip.compress(json.dumps(chat_body("Hi.")).encode())
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        return web.Response(body=body, headers=headers)

    before.double.answer = compressed
    chat = CALLS["chat"](before.client)
    assert chat.choices[0].message.content == "Hi."


@pytest.mark.parametrize("kind", CALLS)
def test_a_request_reaches_the_upstream_unchanged(before: Before, kind: str) -> None:
    for client in before.direct, before.client:
        own = client.with_options(default_headers={"x-own": "1"})
        CALLS[kind](own.with_raw_response)
    there, here = before.double.received
    assert there["headers"]["authorization"] == f"Bearer {SECRET}"
    assert there["headers"]["x-own"] == "1"
    assert here == there


def test_a_models_name_and_a_query_reach_the_upstream_unchanged(
    before: Before,
) -> None:
    for client in before.direct, before.client:
        client.models.retrieve("owner/a model?", extra_query={"q": "a b&c"})
    there, here = before.double.received
    assert here["line"] == there["line"]


@pytest.mark.parametrize("kind", COSTING)
def test_llm_model_changes_nothing_but_the_model(
    stage: Stage,
    double: tuple[Double, str],
    connections: DefaultHttpxClient,
    kind: str,
) -> None:
    seen, url = double
    with stage.forwarding(f"{url}/v1", "the-readers-model") as live:
        for place in url, live.url:
            client = client_of(place, connections).with_raw_response
            CALLS[kind](client, user="Zoë")
    there, here = (json.loads(call["body"]) for call in seen.received)
    assert here == {**there, "model": "the-readers-model"}


def test_the_clients_own_retries_reach_the_upstream_and_each_counts_as_a_call(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    upstream.configure(faults_by_prompt={SKY: ["error_500"]})
    with costing(live) as cost:
        CALLS["completion"](client.with_options(max_retries=1))
    assert [entry["attempt"] for entry in ended(upstream)] == [1, 2]
    assert cost["calls"] == 2


# Streams


def test_each_chunk_is_passed_on_before_the_next_one_comes(before: Before) -> None:
    chunks = [b'data: {"a', b'":1}\n\ndata: {"b":"\xe2\x82', b'\xac"}\n\n', b"da"]
    chunks += [b"ta: [DO", b"NE]\n\n"]
    has_it = asyncio.Semaphore(0)

    async def step_by_step(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await has_it.acquire()  # first the headers, then the chunk before
            await response.write(chunk)
        return response

    before.double.answer = step_by_step
    came = []
    stream = CALLS["chat"](before.client.with_raw_response, stream=True)
    before.stage.loop.call_soon_threadsafe(has_it.release)
    for chunk in stream.http_response.iter_raw():
        came.append(chunk)
        before.stage.loop.call_soon_threadsafe(has_it.release)
    assert came == chunks


@pytest.mark.parametrize("kind", GENERATING)
def test_the_first_token_is_there_long_before_the_last_and_to_hang_up_ends_the_call(
    client: OpenAI, live: Provider, upstream: Provider, kind: str
) -> None:
    upstream.configure(per_token=600)
    with costing(live) as cost:
        with CALLS[kind](client, stream=True, **limit(kind, 1000)) as stream:
            next(iter(stream))
            assert upstream.ask("/_provider/stats")["in_flight"] == 1
        [there] = ended(upstream)
    [here] = ended(live)
    assert (there["state"], here["state"]) == ("cancelled", "cancelled")
    assert cost["tokens"] >= 1000  # it may be charged in full


def test_to_cancel_a_call_before_its_answer_ends_it_at_the_upstream_too(
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

    asynchronously(cancel)
    assert [entry["state"] for entry in ended(upstream)] == ["cancelled"]


def limit(kind: str, most: int) -> Json:
    names = {"chat": "max_completion_tokens", "response": "max_output_tokens"}
    return {names.get(kind, "max_tokens"): most}


# Caps


@pytest.mark.parametrize("name", ["max_calls", "max_tokens"])
@pytest.mark.parametrize("kind", COSTING)
def test_past_a_cap_a_call_is_refused_once_and_before_anything_is_sent(
    client: OpenAI, live: Provider, upstream: Provider, kind: str, name: str
) -> None:
    cap = allow(live, name, 0)
    with costing(live) as cost:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            CALLS[kind](client.with_options(max_retries=2))
        assert f"{name}={cap} " in str(caught.value)
    assert arrived(upstream) == 0
    assert arrived(live) == 1
    assert cost == {"calls": 0, "tokens": 0}


def test_the_last_call_under_a_cap_is_let_through_and_more_when_it_is_raised(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    cap = allow(live, "max_calls", 1)
    CALLS["chat"](client)
    with pytest.raises(openai.PermissionDeniedError):
        CALLS["chat"](client)
    live.configure(max_calls=cap + 1)
    CALLS["chat"](client)
    assert arrived(upstream) == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("completion", {"max_tokens": 100}),
        ("chat", {"max_tokens": 100}),
        ("chat", {"max_completion_tokens": 100}),
        ("response", {"max_output_tokens": 100}),
        ("completion", {"max_tokens": 25, "n": 4}),
        ("chat", {"max_tokens": 25, "n": 4}),
        ("completion", {"max_tokens": 25, "best_of": 4}),
        ("completion", {"max_tokens": 25, "prompt": [SKY] * 4}),
        ("completion", {"max_tokens": 25, "prompt": [[1], [2], [3], [4]]}),
        ("completion", {"max_tokens": 1, "prompt": "word " * 100}),
        ("completion", {"max_tokens": 1, "prompt": [5] * 100}),
        ("chat", {"messages": [{"role": "user", "content": "x " * 100}]}),
        ("response", {"max_output_tokens": 16, "input": "word " * 100}),
        ("response", {"max_output_tokens": 16, "instructions": "word " * 100}),
        ("embedding", {"input": "word " * 100}),
        ("embedding", {"input": ["word " * 50, "word " * 50]}),
        ("embedding", {"input": [5] * 100}),
        ("embedding", {"input": [[5] * 50, [5] * 50]}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_call_asks_and_may_generate_must_fit_under_the_cap(
    client: OpenAI, live: Provider, upstream: Provider, kind: str, options: Json
) -> None:
    allow(live, "max_tokens", 99)
    with pytest.raises(openai.PermissionDeniedError, match="max_tokens="):
        CALLS[kind](client, **options)
    assert arrived(upstream) == 0


def fifty_at_once(**options: Any) -> list[Any]:
    """The answers; all other calls were refused."""

    async def ask(client: AsyncOpenAI) -> list[Any]:
        calls = [CALLS["completion"](client, **options) for _ in range(50)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asynchronously(ask)
    refused = [one for one in results if isinstance(one, openai.PermissionDeniedError)]
    answers = [one for one in results if not isinstance(one, BaseException)]
    assert len(answers) + len(refused) == 50
    return answers


def test_of_fifty_calls_at_once_never_more_than_the_cap_are_sent(
    live: Provider, upstream: Provider
) -> None:
    allow(live, "max_calls", 10)
    assert len(fifty_at_once()) == 10
    assert arrived(upstream) == 10


def test_fifty_calls_at_once_never_use_more_tokens_than_the_cap(
    live: Provider, upstream: Provider
) -> None:
    allow(live, "max_tokens", 100)
    answers = fifty_at_once(max_tokens=20)
    assert len(answers) == arrived(upstream)
    stats = upstream.ask("/_provider/stats")
    assert 0 < stats["prompt_tokens"] + stats["completion_tokens"] <= 100


@pytest.mark.parametrize("kind", COSTING)
def test_tokens_are_counted_by_the_usage_of_the_answer(
    client: OpenAI, live: Provider, kind: str
) -> None:
    with costing(live) as cost:
        usage = CALLS[kind](client).usage
    assert cost == {"calls": 1, "tokens": usage.total_tokens}


def telling_usage(kind: str) -> Json:
    """What makes a stream tell its usage; that of a response always does."""
    return {"stream_options": {"include_usage": True}} if kind != "response" else {}


@pytest.mark.parametrize("kind", GENERATING)
def test_tokens_of_a_stream_are_counted_by_the_usage_that_it_tells(
    client: OpenAI, direct: OpenAI, live: Provider, kind: str
) -> None:
    total = CALLS[kind](direct).usage.total_tokens
    with costing(live) as cost:
        list(CALLS[kind](client, stream=True, **telling_usage(kind)))
    assert cost == {"calls": 1, "tokens": total}


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_tokens_of_a_stream_that_tells_no_usage_are_counted_by_its_events(
    client: OpenAI, direct: OpenAI, live: Provider, kind: str
) -> None:
    total = CALLS[kind](direct).usage.total_tokens
    with costing(live) as cost:
        list(CALLS[kind](client, stream=True))
    assert total <= cost["tokens"] <= total + 5


def test_an_answer_that_tells_no_usage_is_not_free(before: Before) -> None:
    text = "word " * 200
    before.double.answer = told(chat_body(text))
    CALLS["chat"](before.client)
    assert used(before.live)["tokens"] >= len(tokens(text))


def test_an_error_of_the_upstream_is_a_call_without_tokens(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    upstream.configure(faults={"error_500": 1.0})
    with costing(live) as cost, pytest.raises(openai.InternalServerError):
        CALLS["chat"](client)
    assert cost == {"calls": 1, "tokens": 0}


def test_to_list_models_costs_nothing_and_no_cap_refuses_it(
    client: OpenAI, live: Provider
) -> None:
    allow(live, "max_calls", 0)
    allow(live, "max_tokens", 0)
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
def test_what_no_cap_could_hold_is_refused_and_not_sent(
    client: OpenAI, live: Provider, upstream: Provider, path: str
) -> None:
    with pytest.raises(openai.NotFoundError, match=f"does not forward {path}:"):
        NOT_FORWARDED[path](client)
    assert arrived(upstream) == 0


def test_a_path_that_only_begins_like_the_models_is_not_sent(before: Before) -> None:
    for path in "/modelsandmore", "/models/%2e%2e/files":
        with pytest.raises(openai.NotFoundError, match="does not forward"):
            before.client.get(path, cast_to=object)
    assert before.double.received == []


# An upstream that fails


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def assert_says_what_to_do(error: Exception, host: str) -> None:
    assert isinstance(error, openai.InternalServerError)
    assert host in str(error)
    assert "OPENAI_BASE_URL" in str(error)


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_down_is_a_502_that_says_what_to_do_and_costs_nothing(
    stage: Stage, connections: DefaultHttpxClient, stream: bool
) -> None:
    with stage.forwarding(f"http://127.0.0.1:{free_port()}/v1") as live:
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections), stream=stream)
        assert used(live) == {"calls": 0, "tokens": 0}
    assert caught.value.status_code == 502
    assert_says_what_to_do(caught.value, "127.0.0.1")


def test_an_upstream_that_speaks_no_tls_is_a_502_that_costs_nothing(
    stage: Stage, double: tuple[Double, str], connections: DefaultHttpxClient
) -> None:
    address = double[1].replace("http:", "https:")
    with stage.forwarding(f"{address}/v1") as live:
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections))
        assert used(live) == {"calls": 0, "tokens": 0}
    assert_says_what_to_do(caught.value, "127.0.0.1")


@pytest.mark.parametrize(
    "address", ["localhost:8001/v1", "user:hidden@localhost:8001/v1", "nonsense"]
)
def test_an_address_that_is_none_is_a_502_that_says_what_to_do_and_costs_nothing(
    stage: Stage,
    connections: DefaultHttpxClient,
    caplog: pytest.LogCaptureFixture,
    address: str,
) -> None:
    with stage.forwarding(address) as live:
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections))
        assert caught.value.status_code == 502
        assert_says_what_to_do(caught.value, "")
        assert "hidden" not in str(caught.value) + caplog.text
        assert used(live) == {"calls": 0, "tokens": 0}


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize("fault", ["truncated", "reset_midway"])
def test_an_upstream_that_dies_in_mid_answer_is_an_error_and_never_half_an_answer(
    client: OpenAI, live: Provider, upstream: Provider, fault: str, kind: str
) -> None:
    upstream.configure(faults={fault: 1.0})
    with costing(live) as cost, pytest.raises(openai.APIConnectionError):
        CALLS[kind](client, **limit(kind, 1000))
    assert cost["tokens"] >= 1000  # it may be charged in full
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        list(CALLS[kind](client, stream=True))
    assert [entry["state"] for entry in ended(live)] == ["failed", "failed"]


def test_a_redirect_is_not_handed_on_since_a_client_would_follow_it_past_the_cap(
    before: Before,
) -> None:
    elsewhere = {"location": "http://127.0.0.1:9/v1/chat/completions"}
    before.double.answer = told({}, status=307, headers=elsewhere)
    with pytest.raises(openai.InternalServerError, match="redirects with status 307"):
        CALLS["chat"](before.client)


def test_an_upstream_that_resets_the_connection_is_a_502_and_is_asked_once(
    client: OpenAI, live: Provider, upstream: Provider
) -> None:
    upstream.configure(faults={"reset": 1.0})
    with costing(live) as cost, pytest.raises(openai.InternalServerError) as caught:
        CALLS["chat"](client)
    assert_says_what_to_do(caught.value, "127.0.0.1")
    assert arrived(upstream) == 1
    assert cost["calls"] == 1


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    timeout = ClientTimeout(sock_connect=0.2, sock_read=0.2)
    with mock.patch("llm_stub.live.TIMEOUT", timeout):
        yield


def test_an_upstream_that_stays_silent_is_a_504_that_says_what_to_do(
    before: Before,
) -> None:
    before.double.answer = silence
    with impatient(), pytest.raises(openai.InternalServerError) as caught:
        CALLS["chat"](before.client)
    assert caught.value.status_code == 504
    assert_says_what_to_do(caught.value, "127.0.0.1")
    assert used(before.live)["calls"] == 1


@pytest.mark.parametrize("how", [fall_silent, break_off])
def test_an_upstream_that_falls_silent_or_leaves_in_mid_answer_breaks_the_connection(
    before: Before, how: Answer
) -> None:
    before.double.answer = how
    with impatient(), pytest.raises(openai.APIConnectionError):
        CALLS["chat"](before.client)
    assert [entry["state"] for entry in ended(before.live)] == ["failed"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full queue resets")
def test_a_connection_that_does_not_come_about_in_time_costs_nothing(
    stage: Stage, connections: DefaultHttpxClient
) -> None:
    with contextlib.ExitStack() as open_:
        full = open_.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        place = full.getsockname()
        open_.enter_context(socket.create_connection(place))
        open_.enter_context(impatient())
        live = open_.enter_context(stage.forwarding(f"http://127.0.0.1:{place[1]}/v1"))
        with pytest.raises(openai.InternalServerError) as caught:
            CALLS["chat"](client_of(live.url, connections))
        assert used(live) == {"calls": 0, "tokens": 0}
    assert_says_what_to_do(caught.value, "127.0.0.1")


# What must stay secret


def test_the_key_reaches_the_upstream_and_stands_nowhere_else(stage: Stage) -> None:
    os.environ["OPENAI_API_KEY"] = SECRET
    errors: list[openai.APIError] = []

    def fails(call: Callable[..., Any]) -> None:
        with pytest.raises(openai.APIError) as caught:
            call(client)
        errors.append(caught.value)

    with tempfile.TemporaryFile("w+") as log:
        with stage.double() as (double, url):
            os.environ["OPENAI_BASE_URL"] = f"{url}/v1"
            with mock.patch("tempfile.TemporaryFile", return_value=log):
                provider = connect(live=True, max_calls=5)
            client = OpenAI(max_retries=0)
            CALLS["chat"](client)
            assert double.received[0]["headers"]["authorization"] == f"Bearer {SECRET}"
            for wrong in break_off, told({"error": {}}, status=401):
                double.answer = wrong
                fails(CALLS["chat"])
            fails(lambda client: client.files.list())
            fails(lambda client: client.post("/completions", body=[], cast_to=object))
            fails(lambda client: CALLS["chat"](client, max_tokens=MUCH))
        fails(CALLS["chat"])
        assert provider._process is not None
        process = psutil.Process(provider._process.pid)
        told_by = {
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
        told_by["stdout"] = provider._process.stdout.read()
        log.seek(0)
        told_by["stderr"] = log.read()
    assert [name for name, text in told_by.items() if SECRET in repr(text)] == []
    assert len(told_by["journal"]["attempts"]) == 7


def test_user_and_password_of_an_address_reach_the_upstream_and_are_in_no_message(
    stage: Stage, double: tuple[Double, str], connections: DefaultHttpxClient
) -> None:
    seen, url = double
    secrets = "someone:hidden"
    address = f"{url}/v1".replace("//", f"//{secrets}@", 1)
    OpenAI(base_url=address, api_key=SECRET, max_retries=0).models.list()
    with stage.forwarding(address) as live:
        client = client_of(live.url, connections)
        CALLS["models"](client)
        there, here = seen.received
        basic = base64.b64encode(secrets.encode()).decode()
        assert there["headers"]["authorization"] == f"Basic {basic}"
        assert here["headers"]["authorization"] == there["headers"]["authorization"]
        seen.answer = break_off
        with pytest.raises(openai.APIError) as broken:
            CALLS["chat"](client)
        journal = repr(ended(live))
    dead = f"http://{secrets}@127.0.0.1:{free_port()}/v1"
    with (
        stage.forwarding(dead) as live,
        pytest.raises(openai.InternalServerError) as down,
    ):
        CALLS["chat"](client_of(live.url, connections))
    for text in str(broken.value), str(down.value), journal:
        assert not any(part in text for part in (*secrets.split(":"), basic))
    assert_says_what_to_do(down.value, "127.0.0.1")


# What is seen of it


@pytest.mark.parametrize(
    ("kind", "stream"),
    [(kind, False) for kind in COSTING] + [(kind, True) for kind in GENERATING],
)
def test_the_journal_tells_of_a_call_what_the_upstreams_own_tells(
    client: OpenAI, live: Provider, upstream: Provider, kind: str, stream: bool
) -> None:
    if stream:
        list(CALLS[kind](client, stream=True, **telling_usage(kind)))
    else:
        CALLS[kind](client)
    passing = {"number", "arrival", "first_byte", "end", "request_id"}
    [here], [there] = (
        [{k: v for k, v in one.items() if k not in passing} for one in ended(provider)]
        for provider in (live, upstream)
    )
    assert here == there


@pytest.mark.usefixtures("live")
def test_a_timeline_shows_the_calls_of_live_mode(upstream: Provider) -> None:
    upstream.configure(first_token=0.5, jitter=0)

    async def two(client: AsyncOpenAI) -> None:
        await asyncio.gather(*(CALLS[kind](client) for kind in ("chat", "completion")))

    with Timeline("two calls") as run:
        asynchronously(two)
    assert (run.calls, run.peak_in_flight, run.failed) == (2, 2, 0)
    assert [attempt.label for attempt in run.journal] == [SKY, SKY]
    assert run.waits >= 2 * 0.5

import asyncio
import http.client
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from helpers.connection import Provider
from llm_stub.answers import answer, tokens
from llm_stub.api.requests import CREATED
from llm_stub.server import MAX_BODY_BYTES
from tests.llm_stub.conftest import Json, undocumented, without_ids

SKY = "Why is the sky blue?"
FRANCE = "What is the capital of France?"
HAMLET = "Who wrote Hamlet?"
ROUTES = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}

MAX_TOKENS = 99  # more than any answer in these tests has


def request_body(kind: str, prompt: str = SKY, **options: Any) -> Json:
    """The body of a request; its token limit is above every answer in these tests."""
    fields: Json = {"prompt": prompt, "max_tokens": MAX_TOKENS}
    if kind == "chat":
        fields = {"messages": [{"role": "user", "content": prompt}]}
    return {"model": "some-model"} | fields | options


def endpoint(client: Any, kind: str) -> Any:
    return client.completions if kind == "completion" else client.chat.completions


def text_of(choice: Any) -> str:
    """The text of a choice, from a body or a chunk of either API."""
    if hasattr(choice, "text"):
        return str(choice.text)
    part = choice.delta if hasattr(choice, "delta") else choice.message
    return part.content or ""


def run_async(call: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with AsyncOpenAI(max_retries=0) as client:
            return await call(client)

    return asyncio.run(main())


@pytest.fixture
def client(provider: Provider, client: OpenAI) -> OpenAI:
    provider.configure(first_token=0, per_token=0)
    return client


@pytest.fixture
def send(client: OpenAI, provider: Provider) -> Callable[..., tuple[int, Any, Any]]:
    """Send a raw body, invalid or not; returns the status, the JSON and the headers."""

    def send(
        method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection(
            provider.url.removeprefix("http://"), timeout=30
        )
        try:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, fields)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), response.headers
        finally:
            connection.close()

    return send


@pytest.mark.parametrize(
    ("kind", "expected"), [("completion", Completion), ("chat", ChatCompletion)]
)
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"max_tokens": 2}])
def test_body_matches_the_sdks_type_exactly(
    client: OpenAI, kind: str, expected: type[BaseModel], options: Json
) -> None:
    raw = endpoint(client, kind).with_raw_response.create(
        **request_body(kind, **options)
    )
    body = expected.model_validate_json(raw.text, strict=True)
    assert raw.headers["content-type"].startswith("application/json")
    assert undocumented(body) == []


def events(client: OpenAI, kind: str, **options: Any) -> list[str]:
    raw = endpoint(client, kind).with_raw_response.create(
        **request_body(kind, stream=True, **options)
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    lines = raw.http_response.read().decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"max_tokens": 2}])
def test_chat_chunks_match_the_sdks_type_exactly(client: OpenAI, options: Json) -> None:
    *chunks, done = events(
        client, "chat", stream_options={"include_usage": True}, **options
    )
    assert done == "[DONE]"
    for chunk in chunks:
        model = ChatCompletionChunk.model_validate_json(chunk, strict=True)
        assert undocumented(model) == []


def test_last_completion_chunk_matches_the_sdks_type_exactly(client: OpenAI) -> None:
    *chunks, last, done = events(client, "completion")
    assert done == "[DONE]"
    assert undocumented(Completion.model_validate_json(last, strict=True)) == []
    # The SDK's type requires a reason in every chunk. The API sends null until the
    # last one.
    reasons = [json.loads(chunk)["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons) == {None}


@pytest.mark.parametrize("kind", ROUTES)
def test_async_client_gets_the_same_body_as_the_sync_client(
    client: OpenAI, kind: str
) -> None:
    body = request_body(kind)
    received = run_async(
        lambda async_client: endpoint(async_client, kind).create(**body)
    )
    expected = endpoint(client, kind).create(**body)
    assert without_ids(received) == without_ids(expected)


@pytest.mark.parametrize("kind", ROUTES)
def test_answer_comes_from_the_answer_table(client: OpenAI, kind: str) -> None:
    [choice] = endpoint(client, kind).create(**request_body(kind)).choices
    assert text_of(choice) == answer(SKY)
    assert choice.finish_reason == "stop"


def test_each_prompt_of_a_list_gets_n_choices_in_prompt_order(client: OpenAI) -> None:
    body = client.completions.create(model="m", prompt=[FRANCE, HAMLET], n=2)
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in body.choices] == [
        answer(FRANCE),
        answer(FRANCE),
        answer(HAMLET),
        answer(HAMLET),
    ]


def test_list_with_one_prompt_equals_that_prompt(client: OpenAI) -> None:
    alone = client.completions.create(model="m", prompt=SKY)
    in_list = client.completions.create(model="m", prompt=[SKY])
    assert without_ids(in_list) == without_ids(alone)


def test_text_parts_of_a_message_are_joined(client: OpenAI) -> None:
    parts = [{"type": "text", "text": SKY[:5]}, {"type": "text", "text": SKY[5:]}]
    messages: Any = [{"role": "user", "content": parts}]
    in_parts = client.chat.completions.create(model="some-model", messages=messages)
    in_one = client.chat.completions.create(**request_body("chat"))
    assert without_ids(in_parts) == without_ids(in_one)


def test_chat_answers_the_last_user_message(client: OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": FRANCE},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": HAMLET},
    ]
    chat = client.chat.completions.create(model="m", messages=messages)
    assert chat.choices[0].message.content == answer(HAMLET)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens > len(tokens(HAMLET))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("completion", "max_tokens"),
        ("chat", "max_tokens"),
        ("chat", "max_completion_tokens"),
    ],
)
def test_answer_over_the_token_limit_is_cut_with_finish_reason_length(
    client: OpenAI, kind: str, name: str
) -> None:
    whole = tokens(answer(SKY))
    for limit, reason in [(4, "length"), (len(whole), "stop"), (999, "stop")]:
        body = endpoint(client, kind).create(**request_body(kind) | {name: limit})
        assert text_of(body.choices[0]) == "".join(whole[:limit])
        assert body.choices[0].finish_reason == reason
        assert body.usage.completion_tokens == min(limit, len(whole))


@pytest.mark.parametrize("limit", [{}, {"max_tokens": None}], ids=["missing", "null"])
def test_completion_without_a_token_limit_gets_16_tokens_and_a_chat_the_whole_answer(
    client: OpenAI, limit: Json
) -> None:
    whole = tokens(answer(SKY))
    completion = client.completions.create(model="m", prompt=SKY, **limit)
    assert completion.choices[0].text == "".join(whole[:16])
    assert completion.choices[0].finish_reason == "length"
    chat = client.chat.completions.create(**request_body("chat", **limit))
    assert chat.choices[0].message.content == "".join(whole)
    assert chat.choices[0].finish_reason == "stop"


def test_chat_with_two_token_limits_gets_a_400(client: OpenAI) -> None:
    limits: Json = {"max_tokens": 9, "max_completion_tokens": 9}
    with pytest.raises(openai.BadRequestError, match="at the same time"):
        client.chat.completions.create(**request_body("chat", **limits))


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"max_tokens": 3}])
@pytest.mark.parametrize("kind", ROUTES)
def test_stream_adds_up_to_the_non_streamed_body(
    client: OpenAI, kind: str, options: Json
) -> None:
    body = request_body(kind, **options)
    whole = endpoint(client, kind).create(**body)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(endpoint(client, kind).create(**body, **usage))

    texts = dict.fromkeys(range(len(whole.choices)), "")
    reasons: dict[int, str | None] = {}
    assert {chunk.created for chunk in chunks} == {whole.created} == {CREATED}
    assert len({chunk.id for chunk in chunks}) == 1
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += text_of(choice)
            assert reasons.get(choice.index) is None
            reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == [text_of(choice) for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}

    *earlier, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert [chunk.usage for chunk in earlier] == [None] * len(earlier)


@pytest.mark.parametrize("kind", ROUTES)
def test_stream_has_no_usage_unless_requested(client: OpenAI, kind: str) -> None:
    chunks = list(endpoint(client, kind).create(**request_body(kind, stream=True)))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert len(chunks) > len(tokens(answer(SKY)))


def test_stream_of_several_prompts_keeps_their_answers_apart(client: OpenAI) -> None:
    texts = ["", ""]
    for chunk in client.completions.create(
        model="m", prompt=[FRANCE, HAMLET], stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [answer(FRANCE), answer(HAMLET)]


@pytest.mark.parametrize("kind", ROUTES)
def test_async_stream_has_the_same_text(client: OpenAI, kind: str) -> None:
    async def streamed_text(async_client: AsyncOpenAI) -> str:
        stream = await endpoint(async_client, kind).create(
            **request_body(kind, stream=True)
        )
        return "".join([text_of(chunk.choices[0]) async for chunk in stream])

    assert run_async(streamed_text) == answer(SKY)


def test_stream_arrives_chunk_by_chunk(client: OpenAI, provider: Provider) -> None:
    provider.configure(per_token=0.05)
    stream = client.completions.create(model="m", prompt=FRANCE, stream=True)
    next(iter(stream))
    assert provider.ask("/_provider/stats")["in_flight"] == 1
    stream.close()


@pytest.mark.parametrize("prompt", ["日本語", "👩‍👩‍👧 ünï", "a\nb\tc", ""])
@pytest.mark.parametrize("kind", ROUTES)
def test_any_text_is_a_valid_prompt(client: OpenAI, kind: str, prompt: str) -> None:
    body = request_body(kind, prompt)
    [choice] = endpoint(client, kind).create(**body).choices
    assert text_of(choice) == answer(prompt)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ROUTES)
def test_response_headers_have_request_id_and_processing_time(
    client: OpenAI, provider: Provider, kind: str, stream: bool
) -> None:
    provider.configure(first_token=0.05, jitter=0)
    raw = endpoint(client, kind).with_raw_response.create(
        **request_body(kind, stream=stream)
    )
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.request_id.startswith("req_")
    assert 50 <= int(raw.headers["openai-processing-ms"]) < 10_000
    raw.http_response.close()


def test_models_can_be_listed_and_retrieved(client: OpenAI) -> None:
    models = client.models.list().data
    assert models
    for model in models:
        raw = client.models.with_raw_response.retrieve(model.id)
        assert Model.model_validate_json(raw.text, strict=True) == model
        assert undocumented(model) == []
        assert raw.request_id is not None
        assert raw.request_id.startswith("req_")


def test_only_configured_models_exist(client: OpenAI, provider: Provider) -> None:
    provider.configure(models=["mine", "org/mine"])
    assert [model.id for model in client.models.list()] == ["mine", "org/mine"]
    assert client.models.retrieve("org/mine").id == "org/mine"
    for kind in ROUTES:
        endpoint(client, kind).create(**request_body(kind) | {"model": "mine"})
        with pytest.raises(openai.NotFoundError, match="other"):
            endpoint(client, kind).create(**request_body(kind) | {"model": "other"})
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"
    assert error.value.type == "invalid_request_error"


MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]

INVALID_FIELDS: list[tuple[str, Json, str, str]] = [
    ("completion", {"model": ...}, "model", MISSING),
    ("completion", {"model": 5}, "model", TYPE),
    ("completion", {"prompt": ...}, "prompt", MISSING),
    ("completion", {"prompt": 5}, "prompt", TYPE),
    ("completion", {"prompt": ["a", 5]}, "prompt", VALUE),
    ("completion", {"prompt": [1, 2]}, "prompt", VALUE),
    ("completion", {"prompt": []}, "prompt", VALUE),
    ("completion", {"n": 0}, "n", VALUE),
    ("completion", {"n": 129}, "n", VALUE),
    ("completion", {"n": "2"}, "n", TYPE),
    ("completion", {"n": True}, "n", TYPE),
    ("completion", {"max_tokens": 0}, "max_tokens", VALUE),
    ("completion", {"temperature": 2.1}, "temperature", VALUE),
    ("completion", {"stream": "yes"}, "stream", TYPE),
    ("completion", {"stream_options": {}}, "stream_options", VALUE),
    ("completion", {"stream": True, "stream_options": 5}, "stream_options", TYPE),
    ("chat", {"messages": ...}, "messages", MISSING),
    ("chat", {"messages": []}, "messages", VALUE),
    ("chat", {"messages": "hello"}, "messages", TYPE),
    ("chat", {"messages": ["hello"]}, "messages[0]", TYPE),
    ("chat", {"messages": [{"content": "a"}]}, "messages[0].role", MISSING),
    ("chat", {"messages": [{"role": "cat", "content": ""}]}, "messages[0].role", VALUE),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0]", VALUE),
    (
        "chat",
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        TYPE,
    ),
    (
        "chat",
        {"messages": [{"role": "user", "content": IMAGE}]},
        "messages[0].content[0].type",
        VALUE,
    ),
    (
        "chat",
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        "messages[0].tool_calls[0].type",
        MISSING,
    ),
    (
        "chat",
        {"tools": [{"type": "function", "function": {"name": "two words"}}]},
        "tools[0].function.name",
        VALUE,
    ),
    ("chat", {"tool_choice": {"type": "function"}}, "tool_choice.function", MISSING),
    ("chat", {"metadata": {"lesson": 5}}, "metadata.lesson", TYPE),
    ("chat", {"stop": ["a", 5]}, "stop[1]", TYPE),
    ("chat", {"n": 129}, "n", VALUE),
    ("chat", {"max_completion_tokens": 0}, "max_completion_tokens", VALUE),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options", VALUE),
]


def assert_error_object(body: Any) -> Json:
    """The body is OpenAI's error object, with no internals in its message."""
    assert set(body) == {"error"}
    error: Json = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    for word in ("Traceback", 'File "', "'None'", "pydantic"):
        assert word not in error["message"]
    return error


@pytest.mark.parametrize(
    ("kind", "fields", "param", "code"),
    INVALID_FIELDS,
    ids=[
        f"{kind}-{json.dumps(fields, default=str)}"
        for kind, fields, _, _ in INVALID_FIELDS
    ],
)
def test_invalid_field_gets_a_400_that_names_it(
    send: Any, client: OpenAI, kind: str, fields: Json, param: str, code: str
) -> None:
    body = {
        name: value
        for name, value in (request_body(kind) | fields).items()
        if value is not ...
    }
    status, error_body, headers = send("POST", ROUTES[kind], json.dumps(body).encode())
    error = assert_error_object(error_body)
    assert (status, error["param"], error["code"]) == (400, param, code)
    assert param in error["message"]
    assert headers["x-request-id"].startswith("req_")
    assert client.completions.create(model="m", prompt=SKY).choices


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"model": "m", "prompt":', id="truncated JSON"),
        pytest.param(b"hello", id="not JSON"),
        pytest.param(b"[]", id="array"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"model": "m", "prompt": "\xff"}', id="invalid UTF-8"),
        pytest.param(b'{"model": "m", "prompt": "\\ud83d"}', id="lone surrogate"),
        pytest.param(b'{"model": "m", "prompt": "\x00"}', id="control character"),
        pytest.param(b"[" * 100_000, id="deeply nested arrays"),
        pytest.param(b'{"model": ' * 100_000, id="deeply nested objects"),
        pytest.param(
            b'{"model": "m", "prompt": "a", "other": %s}'
            % (b"[" * 50_000 + b"]" * 50_000),
            id="deep nesting in an unknown field",
        ),
        pytest.param(
            b'{"model": "m", "prompt": "a", "n": %s}' % (b"9" * 9_999),
            id="huge number",
        ),
    ],
)
@pytest.mark.parametrize("kind", ROUTES)
def test_body_that_is_not_a_json_object_gets_a_400(
    send: Any, client: OpenAI, kind: str, body: bytes
) -> None:
    status, error_body, _ = send("POST", ROUTES[kind], body)
    error = assert_error_object(error_body)
    assert (status, error["param"]) == (400, None)
    assert client.completions.create(model="m", prompt=SKY).choices


def test_body_that_cannot_be_decompressed_gets_a_400(send: Any, client: OpenAI) -> None:
    status, error_body, _ = send(
        "POST", ROUTES["completion"], b"not gzip", content_encoding="gzip"
    )
    assert status == 400
    assert_error_object(error_body)
    assert client.completions.create(model="m", prompt=SKY).choices


def test_oversized_body_gets_a_413_that_names_the_limit(
    send: Any, client: OpenAI
) -> None:
    status, error_body, _ = send(
        "POST", ROUTES["completion"], b" " * (MAX_BODY_BYTES + 1)
    )
    assert status == 413
    assert str(MAX_BODY_BYTES) in assert_error_object(error_body)["message"]
    assert client.completions.create(model="m", prompt=SKY).choices


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v1/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_unknown_route_gets_a_404_and_wrong_method_a_405(
    send: Any, client: OpenAI, method: str, path: str, status: int
) -> None:
    actual, error_body, _ = send(method, path)
    message = assert_error_object(error_body)["message"]
    assert actual == status
    assert method in message
    assert path in message
    assert client.completions.create(model="m", prompt=SKY).choices


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n": 0}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"prompt": " " * (MAX_BODY_BYTES + 1)}, openai.APIStatusError),
    ],
    ids=["400", "404", "413"],
)
def test_sdk_raises_the_exception_for_the_status(
    client: OpenAI,
    provider: Provider,
    fields: Json,
    expected: type[openai.APIStatusError],
) -> None:
    provider.configure(models=["some-model"])
    with pytest.raises(expected) as caught:
        client.completions.create(**request_body("completion") | fields)
    assert_error_object({"error": caught.value.body})
    assert caught.value.request_id

import asyncio
import base64
import inspect
import json
import math
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream, pydantic_function_tool
from openai.pagination import SyncCursorPage, SyncPage
from openai.types import (
    Batch,
    Completion,
    CreateEmbeddingResponse,
    FileDeleted,
    FileObject,
    Model,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from helpers.connection import Provider
from llm_stub import batches, files
from llm_stub.answers import answer, tokens
from llm_stub.api import ENDPOINTS
from llm_stub.api import requests as api_requests
from llm_stub.api.parameters import PARAMETERS, SDK_VERSION
from tests.llm_stub.conftest import Json, undocumented, without_ids
from tests.llm_stub.test_wire import FRANCE, SKY, assert_error_object
from tests.llm_stub.write_parameters import FILE, TYPES, module_text, parameters

Call = Callable[[Any], Any]
Ask = Callable[[Call], Any]
FetchStrictly = Callable[..., Any]

MODEL = "some-model"
WEATHER = "How is the weather in 'Oslo'?"
BOTH = "How is the weather in 'Oslo', and which numbers are 1 and 2?"


class Weather(BaseModel):
    city: str
    day: str
    unit: Literal["celsius", "fahrenheit"]


class Sum(BaseModel):
    numbers: list[int]


TOOLS: Any = [
    pydantic_function_tool(Weather, name="get_weather"),
    pydantic_function_tool(Sum, name="add_numbers"),
]
FLAT_TOOLS: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
SCHEMA = {
    "name": "weather",
    "schema": TOOLS[0]["function"]["parameters"],
    "strict": True,
}


def complete(client: Any, prompt: str = SKY, **options: Any) -> Any:
    options = {"max_tokens": 99, **options}  # by default, only 16
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def chat(client: Any, question: str = SKY, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def respond(client: Any, question: str | list[Json] = SKY, **options: Any) -> Any:
    return client.responses.create(model=MODEL, input=question, **options)


def embed(client: Any, text: Any = SKY, **options: Any) -> Any:
    return client.embeddings.create(model=MODEL, input=text, **options)


CHAT_JSON = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}
RESPONSE_JSON = {"text": {"format": {"type": "json_schema", **SCHEMA}}}
CHATS: dict[str, Json] = {
    "text": {},
    "tool call": {"question": WEATHER, "tools": TOOLS},
    "tool call in each of two choices": {"question": WEATHER, "tools": TOOLS, "n": 2},
    "two tool calls": {"question": BOTH, "tools": TOOLS},
    "tool call cut short": {"question": WEATHER, "tools": TOOLS, "max_tokens": 8},
    "JSON": CHAT_JSON,
}
RESPONSES: dict[str, Json] = {
    "text": {},
    "text cut short": {"max_output_tokens": 16},
    "tool call": {"question": WEATHER, "tools": FLAT_TOOLS},
    "two tool calls": {"question": BOTH, "tools": FLAT_TOOLS},
    "tool call cut short": {
        "question": WEATHER,
        "tools": FLAT_TOOLS,
        "max_output_tokens": 16,
    },
    "JSON": RESPONSE_JSON,
}


# Every client and every route


@pytest.fixture(
    scope="module",
    params=[
        openai.DefaultHttpxClient,
        openai.DefaultAsyncHttpxClient,
        openai.DefaultAioHttpClient,
    ],
    ids=["OpenAI", "AsyncOpenAI", "AsyncOpenAI on aiohttp"],
)
def transport(request: pytest.FixtureRequest) -> Iterator[tuple[Any, asyncio.Runner]]:
    http = request.param()
    with asyncio.Runner() as runner:
        yield http, runner
        runner.run(resolve(http.aclose() if hasattr(http, "aclose") else http.close()))


async def resolve(result: Any) -> Any:
    """The result of a call by any client; for a stream, a list of its events."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, AsyncStream):
        return [event async for event in result]
    return list(result) if isinstance(result, Stream) else result


@pytest.fixture
def no_latency(provider: Provider) -> None:
    provider.configure(first_token=0, per_token=0, batch_speed=1e6)


@pytest.fixture
def client(no_latency: None, client: OpenAI) -> OpenAI:
    return client


@pytest.fixture
def ask(no_latency: None, transport: tuple[Any, asyncio.Runner]) -> Ask:
    http, runner = transport
    kind: Any = AsyncOpenAI if hasattr(http, "aclose") else OpenAI
    client = kind(max_retries=0, http_client=http)
    return lambda call: runner.run(resolve(call(client)))


@pytest.fixture
def fetch_strictly(ask: Ask) -> FetchStrictly:
    """Return a function that makes a call and validates its body strictly.

    The body must have the SDK's type, plus only the extra fields listed.
    With `repeatable`, a second call must return the same body. Ids may differ, except
    in what a GET returns.
    """

    def fetch_strictly(
        call: Call, kind: type[BaseModel], *extra: str, repeatable: bool = True
    ) -> Any:
        raw = ask(lambda client: call(client.with_raw_response))
        body = kind.model_validate_json(raw.content, strict=True)
        assert raw.headers["content-type"].startswith("application/json")
        assert raw.request_id.startswith("req_")
        # Not undocumented(body): iterating a page would request the next one.
        nested = undocumented(list(vars(body).values()))
        assert [*(body.model_extra or {}), *nested] == list(extra)
        assert raw.parse().model_dump() == body.model_dump()
        if repeatable:
            again = ask(call)
            assert without_ids(again) == without_ids(body)
            if raw.http_request.method == "GET":
                assert again.model_dump() == body.model_dump()
        return body

    return fetch_strictly


BODIES: dict[str, tuple[Call, type[BaseModel]]] = {
    "completion": (complete, Completion),
    **{
        f"chat: {name}": (partial(chat, **options), ChatCompletion)
        for name, options in CHATS.items()
    },
    **{
        f"response: {name}": (partial(respond, **options), Response)
        for name, options in RESPONSES.items()
    },
    "embeddings": (
        lambda client: embed(client, [SKY, FRANCE], encoding_format="float"),
        CreateEmbeddingResponse,
    ),
    "model list": (lambda client: client.models.list(), SyncPage[Model]),
    "model": (lambda client: client.models.retrieve("gpt-3.5-turbo"), Model),
}


@pytest.mark.parametrize("name", BODIES)
def test_body_matches_the_sdks_type_exactly_for_every_client(
    fetch_strictly: FetchStrictly, name: str
) -> None:
    fetch_strictly(*BODIES[name])


@pytest.mark.parametrize("create", [complete, chat, respond])
def test_every_client_can_read_a_stream(ask: Ask, create: Callable[..., Any]) -> None:
    def text(event: Any) -> str:
        if hasattr(event, "choices"):
            [choice] = event.choices
            return choice.text if create is complete else choice.delta.content or ""
        return event.delta if event.type == "response.output_text.delta" else ""

    events = ask(lambda client: create(client, stream=True))
    raw = ask(lambda client: create(client.with_raw_response, stream=True))
    assert "".join(map(text, events)) == answer(SKY)
    assert without_ids(ask(lambda _: raw.parse())) == without_ids(events)


# Documented fields of a page that the SDK's type doesn't declare.
PAGE_FIELDS = ("object", "first_id", "last_id")


def upload(client: Any, content: bytes, name: str = "requests.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="batch")


def test_every_client_can_upload_read_and_delete_a_file(
    ask: Ask, fetch_strictly: FetchStrictly
) -> None:
    content = "日本語 \x00".encode() * 1000
    file = fetch_strictly(
        lambda client: upload(client, content), FileObject, repeatable=False
    )
    assert (file.bytes, file.filename) == (len(content), "requests.jsonl")

    def list_files(client: Any) -> Any:
        return client.files.list(purpose="batch")

    found = fetch_strictly(lambda client: client.files.retrieve(file.id), FileObject)
    assert found == file
    page = fetch_strictly(list_files, SyncCursorPage[FileObject], *PAGE_FIELDS)
    assert file in page.data
    assert ask(lambda client: client.files.content(file.id)).content == content
    raw = ask(lambda client: client.with_raw_response.files.content(file.id))
    assert raw.content == content

    deleted = fetch_strictly(
        lambda client: client.files.delete(file.id), FileDeleted, repeatable=False
    )
    assert (deleted.id, deleted.deleted) == (file.id, True)
    assert file.id not in {other.id for other in ask(list_files).data}
    for call in (
        lambda client: client.files.retrieve(file.id),
        lambda client: client.files.content(file.id),
        lambda client: client.files.delete(file.id),
    ):
        with pytest.raises(openai.NotFoundError, match=file.id):
            ask(call)


def batch_input(*bodies: Json) -> bytes:
    request = {"method": "POST", "url": "/v1/chat/completions"}
    return "\n".join(
        json.dumps({"custom_id": str(number), **request, "body": body})
        for number, body in enumerate(bodies)
    ).encode()


CHAT_BODY: Json = {"model": MODEL, "messages": [{"role": "user", "content": SKY}]}


def create_batch(client: Any, file: str) -> Any:
    return client.batches.create(
        input_file_id=file,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"lesson": "5"},
    )


def wait_for_batch(ask: Ask, batch: str) -> Any:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = ask(lambda client: client.batches.retrieve(batch))
        if found.status in ("completed", "failed", "cancelled", "expired"):
            return found
    raise AssertionError(f"the batch hasn't ended: {found}")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        pytest.param(batch_input(CHAT_BODY), "completed", id="all succeed"),
        pytest.param(
            batch_input(CHAT_BODY, {**CHAT_BODY, "n": 0}), "completed", id="one fails"
        ),
        pytest.param(b"not JSON", "failed", id="invalid file"),
    ],
)
def test_every_client_can_run_a_batch(
    ask: Ask, fetch_strictly: FetchStrictly, content: bytes, status: str
) -> None:
    file = ask(lambda client: upload(client, content))
    created = fetch_strictly(
        lambda client: create_batch(client, file.id), Batch, repeatable=False
    )
    assert (created.status, created.metadata) == ("validating", {"lesson": "5"})
    assert wait_for_batch(ask, created.id).status == status
    batch = fetch_strictly(lambda client: client.batches.retrieve(created.id), Batch)
    page = fetch_strictly(
        lambda client: client.batches.list(), SyncCursorPage[Batch], *PAGE_FIELDS
    )
    assert batch in page.data
    if status == "failed":
        assert batch.errors.data[0].line == 1
        return
    output = ask(lambda client: client.files.content(batch.output_file_id))
    [line] = map(json.loads, output.text.splitlines())
    body = ChatCompletion.model_validate_json(
        json.dumps(line["response"]["body"]), strict=True
    )
    assert without_ids(body) == without_ids(ask(chat))
    assert (line["custom_id"], line["error"]) == ("0", None)
    fetch_strictly(
        lambda client: client.files.retrieve(batch.output_file_id), FileObject
    )
    assert (batch.error_file_id is None) == (batch.request_counts.failed == 0)


def test_every_client_can_cancel_a_batch(
    ask: Ask, fetch_strictly: FetchStrictly, provider: Provider
) -> None:
    provider.configure(batch_speed=0.001)
    file = ask(lambda client: upload(client, batch_input(CHAT_BODY, CHAT_BODY)))
    created = ask(lambda client: create_batch(client, file.id))

    def cancel(client: Any) -> Any:
        return client.batches.cancel(created.id)

    assert fetch_strictly(cancel, Batch, repeatable=False).status == "cancelling"
    assert wait_for_batch(ask, created.id).status == "cancelled"
    fetch_strictly(lambda client: client.batches.retrieve(created.id), Batch)
    with pytest.raises(openai.ConflictError, match="cancelled"):
        ask(cancel)


def test_sdk_can_page_through_a_list_newest_first(client: OpenAI) -> None:
    uploaded = [upload(client, b"", name=f"{number}.jsonl").id for number in range(3)]
    listed = {file.id for file in client.files.list(purpose="batch")}
    paged = [file.id for file in client.files.list(purpose="batch", limit=2)]
    assert set(uploaded) <= listed == set(paged)
    assert paged[:3] == uploaded[::-1]
    for id_ in uploaded:
        client.files.delete(id_)


# The events of streams


def sse_events(raw: Any) -> list[tuple[str, str]]:
    """The `event:` line and the data of each event."""
    assert raw.headers["content-type"].startswith("text/event-stream")
    *events, rest = raw.http_response.read().decode().split("\n\n")
    assert rest == ""
    split = [event.rpartition("data: ") for event in events]
    return [(name, data) for name, _, data in split]


@pytest.mark.parametrize("name", CHATS)
def test_chat_chunks_match_the_sdks_type_exactly(client: OpenAI, name: str) -> None:
    raw = chat(client.with_raw_response, stream=True, **CHATS[name])
    *events, end = sse_events(raw)
    assert end == ("", "[DONE]")
    for event, data in events:
        chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
        assert (event, undocumented(chunk)) == ("", [])


def test_completion_chunks_match_the_sdks_type_exactly(client: OpenAI) -> None:
    options: Json = {"stream": True, "stream_options": {"include_usage": True}}
    *events, end = sse_events(complete(client.with_raw_response, **options))
    assert end == ("", "[DONE]")
    for event, data in events:
        fields = json.loads(data)
        for choice in fields["choices"]:
            # The SDK's type requires a reason in every chunk. The API sends null
            # until the last one.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        chunk = Completion.model_validate_json(json.dumps(fields), strict=True)
        assert (event, undocumented(chunk)) == ("", [])


RESPONSE_EVENTS: dict[str, Any] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}


@pytest.mark.parametrize("name", RESPONSES)
def test_response_events_match_the_sdks_types_and_are_numbered_in_order(
    client: OpenAI, name: str
) -> None:
    events = []
    for head, data in sse_events(
        respond(client.with_raw_response, stream=True, **RESPONSES[name])
    ):
        kind = json.loads(data)["type"]
        event = RESPONSE_EVENTS[kind].model_validate_json(data, strict=True)
        assert head == f"event: {kind}\n"
        assert (kind, undocumented(event)) == (kind, [])
        events.append(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))

    created, in_progress, *of_items, last = events
    assert created.type == "response.created"
    assert in_progress.type == "response.in_progress"
    assert created.response == in_progress.response
    assert (created.response.status, created.response.output) == ("in_progress", [])

    whole = last.response
    assert created.response.id == whole.id
    assert last.type == f"response.{whole.status}"
    for index, item in enumerate(whole.output):
        events_of_item = [event for event in of_items if event.output_index == index]
        assert_events_add_up_to_item(events_of_item, item)
    indexes = [event.output_index for event in of_items]
    assert indexes == sorted(indexes)
    assert set(indexes) == set(range(len(whole.output)))
    assert without_ids(whole) == without_ids(respond(client, **RESPONSES[name]))


def assert_events_add_up_to_item(events: list[Any], item: Any) -> None:
    """The events of one item in a streamed response are complete and in order."""
    is_call = item.type == "function_call"
    content = "function_call_arguments" if is_call else "output_text"
    text = item.arguments if is_call else item.content[0].text
    parts = [] if is_call else ["content_part"]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds == [
        "output_item.added",
        *[f"{part}.added" for part in parts],
        *[f"{content}.delta"] * len(tokens(text)),
        f"{content}.done",
        *[f"{part}.done" for part in parts],
        "output_item.done",
    ]
    by_kind = dict(zip(kinds, events, strict=True))
    deltas = [event.delta for event in events if event.type.endswith(".delta")]
    done = by_kind[f"{content}.done"]
    assert "".join(deltas) == (done.arguments if is_call else done.text) == text
    assert by_kind["output_item.done"].item == item
    ids = {getattr(event, "item_id", item.id) for event in events}
    assert ids == {item.id, by_kind["output_item.added"].item.id}


@pytest.mark.parametrize("name", RESPONSES)
def test_response_cut_short_has_status_and_reason(client: OpenAI, name: str) -> None:
    whole = respond(client, **RESPONSES[name])
    cut = "cut" in name
    assert whole.status == whole.output[0].status
    assert whole.status == ("incomplete" if cut else "completed")
    reason = whole.incomplete_details and whole.incomplete_details.reason
    assert reason == ("max_output_tokens" if cut else None)
    if cut:
        assert whole.usage.output_tokens == 16


@pytest.mark.parametrize("name", [name for name in CHATS if "cut" not in name])
def test_sdk_assembles_a_streamed_chat(client: OpenAI, name: str) -> None:
    options = {"question": SKY, **CHATS[name]}
    messages: Any = [{"role": "user", "content": options.pop("question")}]
    with client.chat.completions.stream(
        model=MODEL,
        messages=messages,
        stream_options={"include_usage": True},
        **options,
    ) as stream:
        streamed = stream.get_final_completion()
    whole = chat(client, **CHATS[name])
    assert streamed.usage == whole.usage

    def tool_calls(choice: Any) -> list[tuple[str, str]]:
        calls = choice.message.tool_calls or []
        assert len({call.id for call in calls} - {"", None}) == len(calls)
        return [(call.function.name, call.function.arguments) for call in calls]

    for actual, expected in zip(streamed.choices, whole.choices, strict=True):
        assert actual.finish_reason == expected.finish_reason
        assert actual.message.content == expected.message.content
        assert tool_calls(actual) == tool_calls(expected)


@pytest.mark.parametrize("name", [name for name in RESPONSES if "cut" not in name])
def test_sdk_assembles_a_streamed_response(client: OpenAI, name: str) -> None:
    options = {"question": SKY, **RESPONSES[name]}
    with client.responses.stream(
        model=MODEL, input=options.pop("question"), **options
    ) as stream:
        streamed = stream.get_final_response()
    whole = respond(client, **RESPONSES[name])
    assert streamed.output_text == whole.output_text
    assert streamed.usage == whole.usage

    def function_calls(response: Any) -> list[tuple[str, str]]:
        calls = [item for item in response.output if item.type == "function_call"]
        return [(call.name, call.arguments) for call in calls]

    assert function_calls(streamed) == function_calls(whole)


# Tools


class Outcome(NamedTuple):
    called: str | None
    text: str
    reason: str | None = None


def chat_with_tools(client: OpenAI, question: str, choice: Any) -> Outcome:
    if choice not in ("auto", "required", "none"):
        choice = {"type": "function", "function": {"name": choice}}
    body = chat(client, question, tools=TOOLS, tool_choice=choice)
    [answered] = body.choices
    message, reason = answered.message, answered.finish_reason
    if not message.tool_calls:
        return Outcome(None, message.content, reason)
    [call] = message.tool_calls
    assert message.content is None
    return Outcome(call.function.name, call.function.arguments, reason)


def respond_with_tools(client: OpenAI, question: str, choice: Any) -> Outcome:
    if choice not in ("auto", "required", "none"):
        choice = {"type": "function", "name": choice}
    body = respond(client, question, tools=FLAT_TOOLS, tool_choice=choice)
    [item] = body.output
    if item.type == "message":
        return Outcome(None, body.output_text)
    return Outcome(item.name, item.arguments)


with_either_api = pytest.mark.parametrize(
    "create", [chat_with_tools, respond_with_tools], ids=["chat", "responses"]
)


@with_either_api
@pytest.mark.parametrize(
    ("question", "choice", "called", "reason"),
    [
        (WEATHER, "auto", "get_weather", "tool_calls"),
        (SKY, "auto", None, "stop"),
        (SKY, "required", "get_weather", "tool_calls"),
        (WEATHER, "add_numbers", "add_numbers", "stop"),
        (WEATHER, "none", None, "stop"),
    ],
)
def test_tool_choice_decides_which_tool_is_called(
    client: OpenAI,
    create: Callable[..., Outcome],
    question: str,
    choice: str,
    called: str | None,
    reason: str,
) -> None:
    outcome = create(client, question, choice)
    assert outcome.called == called
    assert outcome.reason in (reason, None)
    if called is None:
        assert outcome.text == answer(question)
    else:
        kind = Weather if called == "get_weather" else Sum
        kind.model_validate_json(outcome.text, strict=True)


@with_either_api
def test_tool_choice_of_an_unknown_tool_gets_a_400(
    client: OpenAI, create: Callable[..., Outcome]
) -> None:
    with pytest.raises(openai.BadRequestError, match="no_such_tool") as error:
        create(client, WEATHER, "no_such_tool")
    assert error.value.param == "tool_choice"


@pytest.mark.parametrize("create", [chat, respond])
def test_tool_choice_required_without_tools_gets_a_400(
    client: OpenAI, create: Callable[..., Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        create(client, tool_choice="required")
    assert error.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("options", "called"),
    [
        ({}, ["get_weather", "add_numbers"]),
        ({"parallel_tool_calls": True}, ["get_weather", "add_numbers"]),
        ({"tool_choice": "required"}, ["get_weather", "add_numbers"]),
        ({"parallel_tool_calls": False}, ["get_weather"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["get_weather"]),
    ],
)
def test_all_tools_that_fit_are_called_together_unless_parallel_calls_are_off(
    client: OpenAI, options: Json, called: list[str]
) -> None:
    [answered] = chat(client, BOTH, tools=TOOLS, **options).choices
    calls = answered.message.tool_calls
    assert [call.function.name for call in calls] == called
    items = respond(client, BOTH, tools=FLAT_TOOLS, **options).output
    assert [item.name for item in items] == called
    assert len({call.id for call in calls}) == len(calls)
    assert len({item.call_id for item in items}) == len(items)


def test_parallel_tool_calls_without_tools_get_a_400(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="parallel_tool_calls"):
        chat(client, parallel_tool_calls=True)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "did not have response messages: 1, 2"),
        (["1"], "did not have response messages: 2"),
        (["1", "3"], "no .* open call with the id '3'"),
        (["1", "2", "2"], "no .* open call with the id '2'"),
    ],
)
def test_chat_whose_tool_results_do_not_match_its_calls_gets_a_400(
    client: OpenAI, results: list[str], message: str
) -> None:
    function = {"name": "get_weather", "arguments": "{}"}
    calls = [{"id": id_, "type": "function", "function": function} for id_ in "12"]
    messages: Any = [{"role": "user", "content": WEATHER}]
    messages.append({"role": "assistant", "tool_calls": calls})
    messages += [
        {"role": "tool", "tool_call_id": id_, "content": "rain"} for id_ in results
    ]
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model=MODEL, messages=messages)


def test_chat_message_between_a_tool_call_and_its_result_gets_a_400(
    client: OpenAI,
) -> None:
    function = {"name": "get_weather", "arguments": "{}"}
    call = {"id": "1", "type": "function", "function": function}
    messages: Any = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": WEATHER},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    with pytest.raises(openai.BadRequestError, match="must be followed"):
        client.chat.completions.create(model=MODEL, messages=messages)


@pytest.mark.parametrize(
    ("calls", "results", "message"),
    [
        ([], ["1"], "No tool call found .* 1"),
        (["1"], [], "No tool output found .* 1"),
        (["1", "2"], ["1"], "No tool output found .* 2"),
    ],
)
def test_response_whose_tool_results_do_not_match_its_calls_gets_a_400(
    client: OpenAI, calls: list[str], results: list[str], message: str
) -> None:
    items: list[Json] = [{"role": "user", "content": WEATHER}]
    items += [
        {"type": "function_call", "call_id": id_, "name": "f", "arguments": "{}"}
        for id_ in calls
    ]
    items += [
        {"type": "function_call_output", "call_id": id_, "output": "rain"}
        for id_ in results
    ]
    with pytest.raises(openai.BadRequestError, match=message) as error:
        respond(client, items)
    assert error.value.param == "input"


def test_chat_answers_after_a_tool_result(client: OpenAI) -> None:
    [call] = chat(client, WEATHER, tools=TOOLS).choices[0].message.tool_calls
    messages: Any = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    body = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert body.choices[0].finish_reason == "stop"
    assert body.choices[0].message.content == answer(WEATHER)


def test_response_answers_after_a_tool_result(client: OpenAI) -> None:
    [call] = respond(client, WEATHER, tools=FLAT_TOOLS).output
    output = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": "rain",
    }
    items = [{"role": "user", "content": WEATHER}, call.to_dict(), output]
    assert respond(client, items, tools=FLAT_TOOLS).output_text == answer(WEATHER)


def test_sdk_parses_tool_call_arguments_into_the_tools_model(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": WEATHER}]
    completion = client.chat.completions.parse(
        model=MODEL, messages=messages, tools=TOOLS
    )
    [call] = completion.choices[0].message.tool_calls or []
    response = client.responses.parse(model=MODEL, input=WEATHER, tools=TOOLS)
    [item] = response.output
    assert item.type == "function_call"
    for parsed in (call.function.parsed_arguments, item.parsed_arguments):
        assert isinstance(parsed, Weather)
        assert parsed.city == "Oslo"


def test_each_of_n_choices_has_a_unique_tool_call_id(client: OpenAI) -> None:
    choices = chat(client, WEATHER, tools=TOOLS, n=3).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3


# JSON answers and stop sequences


def test_sdk_parses_structured_output_into_the_requested_model(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": WEATHER}]
    completion = client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Weather
    )
    response = client.responses.parse(model=MODEL, input=WEATHER, text_format=Weather)
    for parsed in (completion.choices[0].message.parsed, response.output_parsed):
        assert isinstance(parsed, Weather)
        assert parsed.city == "Oslo"


def chat_json(client: OpenAI, question: str) -> str:
    body = chat(client, question, response_format={"type": "json_object"})
    return str(body.choices[0].message.content)


def respond_json(client: OpenAI, question: str) -> str:
    body = respond(client, question, text={"format": {"type": "json_object"}})
    return str(body.output_text)


@pytest.mark.parametrize("create", [chat_json, respond_json])
def test_json_mode_returns_an_object_and_requires_json_in_the_prompt(
    client: OpenAI, create: Callable[[OpenAI, str], str]
) -> None:
    parsed = json.loads(
        create(client, "Answer in JSON with the keys 'city' and 'day'.")
    )
    assert set(parsed) == {"city", "day"}
    with pytest.raises(openai.BadRequestError, match="json"):
        create(client, SKY)


def texts_and_reasons(body: Any) -> list[tuple[str, str]]:
    return [
        (
            choice.text if isinstance(body, Completion) else choice.message.content,
            choice.finish_reason,
        )
        for choice in body.choices
    ]


@pytest.mark.parametrize("create", [complete, chat])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"stop": "capital"}, "The ", "stop"),
        ({"stop": ["Paris", "of"]}, "The capital ", "stop"),
        ({"stop": "London"}, answer(FRANCE), "stop"),
        ({"stop": []}, answer(FRANCE), "stop"),
        ({"stop": "Paris", "max_tokens": 2}, "The capita", "length"),
        ({"stop": "capital", "max_tokens": 2}, "The ", "stop"),
    ],
)
def test_answer_ends_before_the_first_stop_sequence(
    client: OpenAI,
    create: Callable[..., Any],
    stream: bool,
    options: Json,
    text: str,
    reason: str,
) -> None:
    body = create(client, FRANCE, stream=stream, n=2, **options)
    if not stream:
        assert texts_and_reasons(body) == [(text, reason)] * 2
        return
    texts, reasons = ["", ""], ["", ""]
    for chunk in body:
        for choice in chunk.choices:
            delta = choice.text if create is complete else choice.delta.content
            texts[choice.index] += delta or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert (texts, reasons) == ([text] * 2, [reason] * 2)


def test_more_than_four_stop_sequences_get_a_400(client: OpenAI) -> None:
    assert chat(client, stop=list("1234")).choices
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, stop=list("12345"))
    assert error.value.param == "stop"


# Embeddings


def vectors(body: CreateEmbeddingResponse) -> list[list[float]]:
    assert [item.index for item in body.data] == list(range(len(body.data)))
    return [item.embedding for item in body.data]


@pytest.mark.parametrize("dimensions", [None, 1, 3, 256])
def test_embeddings_have_unit_length_and_equal_texts_get_equal_ones(
    ask: Ask, dimensions: int | None
) -> None:
    options = {} if dimensions is None else {"dimensions": dimensions}
    texts = [SKY, FRANCE, SKY, " ", "日本語"]
    found = vectors(ask(lambda client: embed(client, texts, **options)))
    for vector in found:
        assert len(vector) == (dimensions or 1536)
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-6)
    assert found[0] == found[2]
    if dimensions != 1:
        assert len({tuple(vector) for vector in found}) == 4
    assert vectors(ask(lambda client: embed(client, **options))) == found[:1]


def test_base64_embeddings_are_the_same_numbers_as_32_bit_floats(ask: Ask) -> None:
    def embedding(encoding: str) -> Any:
        body = ask(lambda client: embed(client, encoding_format=encoding))
        return body.data[0].embedding

    floats, text = embedding("float"), embedding("base64")
    unpacked = array("f", base64.b64decode(text))
    assert unpacked.tolist() == pytest.approx(floats, abs=1e-6)
    assert vectors(ask(embed)) == [unpacked.tolist()]  # the SDK's default is base64


def test_token_ids_can_be_embedded_and_each_counts_as_one_token(
    client: OpenAI,
) -> None:
    one, two = embed(client, [1, 2, 300]), embed(client, [[1, 2, 300], [4]])
    assert vectors(two)[0] == vectors(one)[0] != vectors(two)[1]
    assert (one.usage.prompt_tokens, two.usage.prompt_tokens) == (3, 4)


def test_text_over_8192_tokens_cannot_be_embedded(client: OpenAI) -> None:
    assert embed(client, [" a" * 8192, "a"]).usage.prompt_tokens == 8193
    with pytest.raises(openai.BadRequestError, match="8192 tokens") as error:
        embed(client, [" a" * 8193, "a"])
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        pytest.param({"text": []}, "input", id="no text"),
        pytest.param({"text": ["a"] * 2049}, "input", id="too many texts"),
        pytest.param({"text": ""}, "input", id="empty text"),
        pytest.param({"text": ["a", ""]}, "input[1]", id="empty text in a list"),
        pytest.param({"text": [[1], ["a"]]}, "input[1][0]", id="not a token id"),
        pytest.param({"dimensions": 0}, "dimensions", id="no dimensions"),
        pytest.param(
            {"encoding_format": "hex"}, "encoding_format", id="unknown encoding"
        ),
    ],
)
def test_invalid_embedding_parameters_get_a_400(
    client: OpenAI, options: Json, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        embed(client, **options)
    assert error.value.param == param


# Parameters


CREATE_BY_ROUTE = {
    "/v1/chat/completions": chat,
    "/v1/completions": complete,
    "/v1/responses": respond,
    "/v1/embeddings": embed,
}
UNSUPPORTED_PARAMS = [
    (route, name)
    for route, kind in ENDPOINTS.items()
    for name in sorted(
        PARAMETERS[route] & set(api_requests.REFUSED) - set(kind.model_fields)
    )
]


@pytest.mark.parametrize("route", TYPES)
def test_every_parameter_in_the_sdk_is_known(route: str) -> None:
    assert set(parameters(TYPES[route])) - PARAMETERS[route] == set()


def test_parameters_were_written_from_this_sdk() -> None:
    if openai.__version__ == SDK_VERSION:  # the locked version; others may differ
        assert FILE.read_text(encoding="utf-8") == module_text()


@pytest.mark.parametrize("route", [*ENDPOINTS, "/v1/batches", "/v1/files"])
def test_every_parameter_that_is_validated_or_refused_is_documented(route: str) -> None:
    kinds: Any = {**ENDPOINTS, "/v1/batches": batches.Create, "/v1/files": files.Upload}
    assert set(kinds[route].model_fields) <= PARAMETERS[route]
    assert set(api_requests.REFUSED) <= set.union(*map(set, PARAMETERS.values()))


def bad_request_code(client: OpenAI, route: str, **fields: Any) -> Any:
    """The code of the 400 for one field, which the error must name."""
    with pytest.raises(openai.BadRequestError) as error:
        CREATE_BY_ROUTE[route](client, extra_body=fields)
    [name] = fields
    details = assert_error_object({"error": error.value.body})
    assert details["param"] == name
    assert name in details["message"]
    return details["code"]


@pytest.mark.parametrize(("route", "name"), UNSUPPORTED_PARAMS)
def test_unsupported_parameter_gets_a_400_that_names_it(
    client: OpenAI, route: str, name: str
) -> None:
    assert bad_request_code(client, route, **{name: 1}) == "unsupported_parameter"
    expected = without_ids(CREATE_BY_ROUTE[route](client))
    for off in (None, False):
        accepted = CREATE_BY_ROUTE[route](client, extra_body={name: off})
        assert without_ids(accepted) == expected


def test_chat_supports_text_output_only(client: OpenAI) -> None:
    accepted = chat(client, modalities=["text"])
    assert without_ids(accepted) == without_ids(chat(client))
    code = bad_request_code(
        client, "/v1/chat/completions", modalities=["text", "audio"]
    )
    assert code == "unsupported_value"


@pytest.mark.parametrize("route", CREATE_BY_ROUTE)
def test_unknown_parameter_gets_a_400_that_names_it(client: OpenAI, route: str) -> None:
    assert bad_request_code(client, route, temprature=0) == "unknown_parameter"


def test_unknown_batch_parameter_gets_a_400_that_names_it(client: OpenAI) -> None:
    file = upload(client, batch_input(CHAT_BODY))
    with pytest.raises(openai.BadRequestError, match="windows"):
        client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_body={"windows": 1},
        )


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"question": [{"role": "cat", "content": SKY}]}, "input[0].role"),
        (
            {"question": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_error_of_a_response_names_the_path_of_the_invalid_field(
    client: OpenAI, options: Json, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, **options)
    assert error.value.param == param
    assert param in error.value.message


@pytest.mark.parametrize(
    ("create", "param"), [(complete, None), (chat, "messages"), (respond, "input")]
)
def test_prompt_over_the_context_length_gets_the_400_of_the_api(
    client: OpenAI, create: Callable[..., Any], param: str | None
) -> None:
    most = api_requests.MAX_PROMPT_TOKENS
    longest = "a" * (most * api_requests.CHARACTERS_PER_TOKEN)
    assert create(client, longest)
    with pytest.raises(openai.BadRequestError, match=f"{most + 1}") as error:
        create(client, longest + "a")
    assert (error.value.code, error.value.param) == ("context_length_exceeded", param)


@pytest.mark.parametrize("stream", [False, True])
def test_stream_options_of_a_response_require_stream(
    client: OpenAI, stream: bool
) -> None:
    options: Json = {"stream": stream, "stream_options": {"include_obfuscation": False}}
    if stream:
        *_, last = respond(client, **options)
        assert without_ids(last.response) == without_ids(respond(client))
        return
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, **options)
    assert error.value.param == "stream_options"


@pytest.mark.parametrize(
    "options",
    [
        {"instructions": "Be brief."},
        {"max_output_tokens": 50},
        {"max_tool_calls": 3},
        {"metadata": {"lesson": "5"}},
        {"parallel_tool_calls": False},
        {"prompt_cache_key": "key"},
        {"reasoning": {"effort": "low"}},
        {"safety_identifier": "reader"},
        {"temperature": 0.5},
        {"text": {"verbosity": "low"}},
        {"tool_choice": "none"},
        {"top_p": 0.5},
        {"truncation": "auto"},
        {"user": "reader"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_response_echoes_the_options_of_the_request(
    client: OpenAI, options: Json
) -> None:
    body = respond(client, **options).to_dict()
    for name, value in options.items():
        echoed = body.get(name)
        assert echoed == ({**echoed, **value} if isinstance(value, dict) else value)


def test_tokens_of_all_answers_count_even_if_only_the_best_are_returned(
    client: OpenAI,
) -> None:
    call: dict[str, Any] = {"model": "m", "prompt": "Why is the sky blue?", "n": 2}
    one = client.completions.create(**call)
    best = client.completions.create(**call, best_of=6)
    assert len(best.choices) == 2
    assert one.usage
    assert best.usage
    assert best.usage.completion_tokens == 3 * one.usage.completion_tokens


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limit_above_the_models_own_is_refused_in_openais_words(
    client: OpenAI, name: str
) -> None:
    limits: dict[str, Any] = {name: 10_000_000}
    with pytest.raises(openai.BadRequestError, match=f"{name} is too large: 10000000"):
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], **limits
        )

import asyncio
import base64
import inspect
import json
import math
import time
from array import array
from collections.abc import Callable, Iterator
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
    batch_create_params,
    completion_create_params,
    embedding_create_params,
    file_create_params,
)
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.responses import (
    Response,
    ResponseStreamEvent,
    response_create_params,
)
from pydantic import BaseModel

from helpers.connection import Provider
from llm_stub import batches
from llm_stub.answers import answer, tokens
from llm_stub.api import ENDPOINTS
from llm_stub.api import requests as api_requests
from tests.llm_stub.test_wire import (
    FRANCE,
    SKY,
    Json,
    assert_is_an_error,
    undocumented,
)

Call = Callable[[Any], Any]
Ask = Callable[[Call], Any]
Strictly = Callable[..., Any]

M = "some-model"
WEATHER = "How is the weather in 'Oslo'?"


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
    return client.completions.create(model=M, prompt=prompt, **options)


def chat(client: Any, question: str = SKY, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=M, messages=messages, **options)


def respond(client: Any, question: str = SKY, **options: Any) -> Any:
    return client.responses.create(model=M, input=question, **options)


def embed(client: Any, text: Any = SKY, **options: Any) -> Any:
    return client.embeddings.create(model=M, input=text, **options)


CHAT_JSON = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}
RESPONSE_JSON = {"text": {"format": {"type": "json_schema", **SCHEMA}}}
CHATS: dict[str, Json] = {
    "text": {},
    "a call": {"question": WEATHER, "tools": TOOLS},
    "two calls": {"question": WEATHER, "tools": TOOLS, "n": 2},
    "a call that is cut": {"question": WEATHER, "tools": TOOLS, "max_tokens": 8},
    "JSON": CHAT_JSON,
}
RESPONSES: dict[str, Json] = {
    "text": {},
    "text that is cut": {"max_output_tokens": 16},
    "a call": {"question": WEATHER, "tools": FLAT_TOOLS},
    "a call that is cut": {
        "question": WEATHER,
        "tools": FLAT_TOOLS,
        "max_output_tokens": 16,
    },
    "JSON": RESPONSE_JSON,
}


# Every client, every route


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
        runner.run(outcome(http.aclose() if hasattr(http, "aclose") else http.close()))


async def outcome(result: Any) -> Any:
    """What a call of any client gives; of a stream, its events."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, AsyncStream):
        return [event async for event in result]
    return list(result) if isinstance(result, Stream) else result


@pytest.fixture
def at_once(provider: Provider) -> None:
    provider.configure(first_token=0, per_token=0, batch_speed=1e6)


@pytest.fixture
def client(at_once: None, client: OpenAI) -> OpenAI:
    return client


@pytest.fixture
def ask(at_once: None, transport: tuple[Any, asyncio.Runner]) -> Ask:
    http, runner = transport
    kind: Any = AsyncOpenAI if hasattr(http, "aclose") else OpenAI
    client = kind(max_retries=0, http_client=http)
    return lambda call: runner.run(outcome(call(client)))


@pytest.fixture
def strictly(ask: Ask) -> Strictly:
    """The body of a call, by the SDK's type and nothing besides."""

    def strictly(
        call: Call, kind: type[BaseModel], *besides: str, stays: bool = True
    ) -> Any:
        raw = ask(lambda client: call(client.with_raw_response))
        body = kind.model_validate_json(raw.content, strict=True)
        assert raw.headers["content-type"].startswith("application/json")
        assert raw.request_id.startswith("req_")
        deeper = undocumented(list(vars(body).values()))  # to iterate a page asks on
        assert [*(body.model_extra or {}), *deeper] == list(besides)
        assert raw.parse().model_dump() == body.model_dump()
        if stays:
            assert ask(call).model_dump() == body.model_dump()
        return body

    return strictly


BODIES: dict[str, tuple[Call, type[BaseModel]]] = {
    "a completion": (complete, Completion),
    **{
        f"a chat: {name}": (lambda client, one=one: chat(client, **one), ChatCompletion)
        for name, one in CHATS.items()
    },
    **{
        f"a response: {name}": (
            lambda client, one=one: respond(client, **one),
            Response,
        )
        for name, one in RESPONSES.items()
    },
    "embeddings": (
        lambda client: embed(client, [SKY, FRANCE], encoding_format="float"),
        CreateEmbeddingResponse,
    ),
    "all models": (lambda client: client.models.list(), SyncPage[Model]),
    "a model": (lambda client: client.models.retrieve("gpt-3.5-turbo"), Model),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_strictly_of_the_sdks_type_for_every_client(
    strictly: Strictly, name: str
) -> None:
    strictly(*BODIES[name])


@pytest.mark.parametrize("create", [complete, chat, respond])
def test_every_client_reads_a_stream(ask: Ask, create: Callable[..., Any]) -> None:
    def text(event: Any) -> str:
        if hasattr(event, "choices"):
            [choice] = event.choices
            return choice.text if create is complete else choice.delta.content or ""
        return event.delta if event.type == "response.output_text.delta" else ""

    events = ask(lambda client: create(client, stream=True))
    raw = ask(lambda client: create(client.with_raw_response, stream=True))
    assert "".join(map(text, events)) == answer(SKY)
    assert ask(lambda _: raw.parse()) == events


LISTED = ("object", "first_id", "last_id")  # documented; not in the SDK's page


def upload(client: Any, content: bytes, name: str = "requests.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="batch")


def test_every_client_keeps_a_file(ask: Ask, strictly: Strictly) -> None:
    content = "日本語 \x00".encode() * 1000
    file = strictly(lambda client: upload(client, content), FileObject, stays=False)
    assert (file.bytes, file.filename) == (len(content), "requests.jsonl")

    def found(client: Any) -> Any:
        return client.files.list(purpose="batch")

    assert strictly(lambda client: client.files.retrieve(file.id), FileObject) == file
    page = strictly(found, SyncCursorPage[FileObject], *LISTED)
    assert file in page.data
    assert ask(lambda client: client.files.content(file.id)).content == content
    raw = ask(lambda client: client.with_raw_response.files.content(file.id))
    assert raw.content == content

    gone = strictly(
        lambda client: client.files.delete(file.id), FileDeleted, stays=False
    )
    assert (gone.id, gone.deleted) == (file.id, True)
    assert file.id not in {one.id for one in ask(found).data}
    for lost in ("retrieve", "content", "delete"):
        with pytest.raises(openai.NotFoundError, match=file.id):
            ask(lambda client, lost=lost: getattr(client.files, lost)(file.id))


def lines(*bodies: Json) -> bytes:
    request = {"method": "POST", "url": "/v1/chat/completions"}
    return "\n".join(
        json.dumps({"custom_id": str(number), **request, "body": body})
        for number, body in enumerate(bodies)
    ).encode()


ASKED: Json = {"model": M, "messages": [{"role": "user", "content": SKY}]}


def begin(client: Any, file: str) -> Any:
    return client.batches.create(
        input_file_id=file,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"lesson": "5"},
    )


def ended(ask: Ask, batch: str) -> Any:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = ask(lambda client: client.batches.retrieve(batch))
        if found.status in ("completed", "failed", "cancelled", "expired"):
            return found
    raise AssertionError(found)


@pytest.mark.parametrize(
    ("content", "end"),
    [
        pytest.param(lines(ASKED), "completed", id="all answered"),
        pytest.param(lines(ASKED, {**ASKED, "n": 0}), "completed", id="one refused"),
        pytest.param(b"no JSON", "failed", id="invalid"),
    ],
)
def test_every_client_has_a_batch_done(
    ask: Ask, strictly: Strictly, content: bytes, end: str
) -> None:
    file = ask(lambda client: upload(client, content))
    begun = strictly(lambda client: begin(client, file.id), Batch, stays=False)
    assert (begun.status, begun.metadata) == ("validating", {"lesson": "5"})
    assert ended(ask, begun.id).status == end
    batch = strictly(lambda client: client.batches.retrieve(begun.id), Batch)
    page = strictly(
        lambda client: client.batches.list(), SyncCursorPage[Batch], *LISTED
    )
    assert batch in page.data
    if end == "failed":
        assert batch.errors.data[0].line == 1
        return
    written = ask(lambda client: client.files.content(batch.output_file_id))
    [line] = map(json.loads, written.text.splitlines())
    body = ChatCompletion.model_validate_json(
        json.dumps(line["response"]["body"]), strict=True
    )
    assert body == ask(chat)
    assert (line["custom_id"], line["error"]) == ("0", None)
    strictly(lambda client: client.files.retrieve(batch.output_file_id), FileObject)
    assert (batch.error_file_id is None) == (batch.request_counts.failed == 0)


def test_every_client_cancels_a_batch(
    ask: Ask, strictly: Strictly, provider: Provider
) -> None:
    provider.configure(batch_speed=0.001)
    file = ask(lambda client: upload(client, lines(ASKED, ASKED)))
    begun = ask(lambda client: begin(client, file.id))

    def cancel(client: Any) -> Any:
        return client.batches.cancel(begun.id)

    assert strictly(cancel, Batch, stays=False).status == "cancelling"
    assert ended(ask, begun.id).status == "cancelled"
    strictly(lambda client: client.batches.retrieve(begun.id), Batch)
    with pytest.raises(openai.ConflictError, match="cancelled"):
        ask(cancel)


def test_the_sdk_pages_through_a_list(client: OpenAI) -> None:
    made = [upload(client, b"", name=f"{number}.jsonl").id for number in range(3)]
    kept = {file.id for file in client.files.list(purpose="batch")}
    paged = [file.id for file in client.files.list(purpose="batch", limit=2)]
    assert set(made) <= kept == set(paged)
    assert paged[:3] == made[::-1]
    for number in made:
        client.files.delete(number)


# Streams, event by event


def sse(raw: Any) -> list[tuple[str, str]]:
    """The name and the data of each event."""
    assert raw.headers["content-type"].startswith("text/event-stream")
    *events, end = raw.http_response.read().decode().split("\n\n")
    assert end == ""
    split = [event.rpartition("data: ") for event in events]
    return [(name, data) for name, _, data in split]


@pytest.mark.parametrize("name", CHATS)
def test_each_event_of_a_chat_is_strictly_of_the_sdks_type(
    client: OpenAI, name: str
) -> None:
    raw = chat(client.with_raw_response, stream=True, **CHATS[name])
    *events, end = sse(raw)
    assert end == ("", "[DONE]")
    for event, data in events:
        chunk = ChatCompletionChunk.model_validate_json(data, strict=True)
        assert (event, undocumented(chunk)) == ("", [])


def test_each_event_of_a_completion_is_strictly_of_the_sdks_type(
    client: OpenAI,
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, end = sse(complete(client.with_raw_response, **options))
    assert end == ("", "[DONE]")
    for event, data in events:
        said = json.loads(data)
        for choice in said["choices"]:
            # The SDK's type wants a reason in each event; the API has one in the last.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        chunk = Completion.model_validate_json(json.dumps(said), strict=True)
        assert (event, undocumented(chunk)) == ("", [])


EVENTS: dict[str, Any] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}


@pytest.mark.parametrize("name", RESPONSES)
def test_the_events_of_a_response_are_strict_numbered_and_in_order(
    client: OpenAI, name: str
) -> None:
    events = []
    for head, data in sse(
        respond(client.with_raw_response, stream=True, **RESPONSES[name])
    ):
        kind = json.loads(data)["type"]
        event = EVENTS[kind].model_validate_json(data, strict=True)
        assert head == f"event: {kind}\n"
        assert (kind, undocumented(event)) == (kind, [])
        events.append(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))

    whole = respond(client, **RESPONSES[name])
    [item] = whole.output
    called = item.type == "function_call"
    piece = "function_call_arguments" if called else "output_text"
    text = item.arguments if called else whole.output_text
    part = [] if called else ["content_part"]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress", "output_item.added"),
        *[f"{one}.added" for one in part],
        *[f"{piece}.delta"] * len(tokens(text)),
        f"{piece}.done",
        *[f"{one}.done" for one in part],
        *("output_item.done", whole.status),
    ]
    by_kind = dict(zip(kinds, events, strict=True))
    deltas = [event.delta for event in events if event.type.endswith(".delta")]
    done = by_kind[f"{piece}.done"]
    assert "".join(deltas) == (done.arguments if called else done.text) == text
    assert by_kind["output_item.done"].item == item
    assert by_kind[whole.status].response == whole
    assert by_kind["created"].response.status == "in_progress"
    assert by_kind["created"].response.output == []
    ids = {getattr(event, "item_id", item.id) for event in events}
    assert ids == {item.id, by_kind["output_item.added"].item.id}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_says_why_it_is_incomplete(client: OpenAI, name: str) -> None:
    whole = respond(client, **RESPONSES[name])
    cut = "cut" in name
    assert whole.status == whole.output[0].status
    assert whole.status == ("incomplete" if cut else "completed")
    reason = whole.incomplete_details and whole.incomplete_details.reason
    assert reason == ("max_output_tokens" if cut else None)
    if cut:
        assert whole.usage.output_tokens == 16


@pytest.mark.parametrize("name", ["text", "a call", "two calls", "JSON"])
def test_the_sdk_puts_a_chat_together_from_its_stream(
    client: OpenAI, name: str
) -> None:
    options = {"question": SKY, **CHATS[name]}
    messages: Any = [{"role": "user", "content": options.pop("question")}]
    with client.chat.completions.stream(
        model=M, messages=messages, stream_options={"include_usage": True}, **options
    ) as stream:
        made = stream.get_final_completion()
    whole = chat(client, **CHATS[name])
    assert made.usage == whole.usage
    for one, other in zip(made.choices, whole.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.message.content == other.message.content
        calls = [
            [(call.id, call.function.name, call.function.arguments) for call in calls]
            for calls in (one.message.tool_calls or [], other.message.tool_calls or [])
        ]
        assert calls[0] == calls[1]


@pytest.mark.parametrize("name", ["text", "a call", "JSON"])
def test_the_sdk_puts_a_response_together_from_its_stream(
    client: OpenAI, name: str
) -> None:
    options = {"question": SKY, **RESPONSES[name]}
    with client.responses.stream(
        model=M, input=options.pop("question"), **options
    ) as stream:
        made = stream.get_final_response()
    whole = respond(client, **RESPONSES[name])
    assert (made.id, made.output_text) == (whole.id, whole.output_text)
    assert made.usage == whole.usage


# Tools


class Said(NamedTuple):
    called: str | None
    text: str
    reason: str | None = None


def chat_with_tools(client: OpenAI, question: str, choice: Any) -> Said:
    if choice not in ("auto", "required", "none"):
        choice = {"type": "function", "function": {"name": choice}}
    [said] = chat(client, question, tools=TOOLS, tool_choice=choice).choices
    if not said.message.tool_calls:
        return Said(None, said.message.content, said.finish_reason)
    [call] = said.message.tool_calls
    assert said.message.content is None
    return Said(call.function.name, call.function.arguments, said.finish_reason)


def respond_with_tools(client: OpenAI, question: str, choice: Any) -> Said:
    if choice not in ("auto", "required", "none"):
        choice = {"type": "function", "name": choice}
    body = respond(client, question, tools=FLAT_TOOLS, tool_choice=choice)
    [item] = body.output
    if item.type == "message":
        return Said(None, body.output_text)
    return Said(item.name, item.arguments)


with_either_api = pytest.mark.parametrize(
    "say", [chat_with_tools, respond_with_tools], ids=["chat", "responses"]
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
def test_the_tool_that_tool_choice_says_is_called(
    client: OpenAI,
    say: Callable[..., Said],
    question: str,
    choice: str,
    called: str | None,
    reason: str,
) -> None:
    said = say(client, question, choice)
    assert said.called == called
    assert said.reason in (reason, None)
    if called is None:
        assert said.text == answer(question)
    else:
        kind = Weather if called == "get_weather" else Sum
        kind.model_validate_json(said.text, strict=True)


@with_either_api
def test_a_tool_that_does_not_exist_cannot_be_called(
    client: OpenAI, say: Callable[..., Said]
) -> None:
    with pytest.raises(openai.BadRequestError, match="no_such_tool") as error:
        say(client, WEATHER, "no_such_tool")
    assert error.value.param == "tool_choice"


@pytest.mark.parametrize("create", [chat, respond])
def test_a_tool_cannot_be_required_where_there_is_none(
    client: OpenAI, create: Callable[..., Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        create(client, tool_choice="required")
    assert error.value.param == "tool_choice"


def test_a_chat_goes_on_with_what_the_tool_gave(client: OpenAI) -> None:
    [call] = chat(client, WEATHER, tools=TOOLS).choices[0].message.tool_calls
    messages: Any = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    body = client.chat.completions.create(model=M, messages=messages, tools=TOOLS)
    assert body.choices[0].finish_reason == "stop"
    assert body.choices[0].message.content == answer(WEATHER)


def test_a_response_goes_on_with_what_the_tool_gave(client: OpenAI) -> None:
    [call] = respond(client, WEATHER, tools=FLAT_TOOLS).output
    given = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": "rain",
    }
    items = [{"role": "user", "content": WEATHER}, call.to_dict(), given]
    assert respond(client, items, tools=FLAT_TOOLS).output_text == answer(WEATHER)


def test_the_arguments_of_a_call_become_the_tools_model(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": WEATHER}]
    completion = client.chat.completions.parse(model=M, messages=messages, tools=TOOLS)
    [call] = completion.choices[0].message.tool_calls or []
    response = client.responses.parse(model=M, input=WEATHER, tools=TOOLS)
    [item] = response.output
    assert item.type == "function_call"
    for made in (call.function.parsed_arguments, item.parsed_arguments):
        assert isinstance(made, Weather)
        assert made.city == "Oslo"


def test_each_of_n_choices_calls_under_an_id_of_its_own(client: OpenAI) -> None:
    choices = chat(client, WEATHER, tools=TOOLS, n=3).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3


# What the answer looks like


def test_an_answer_becomes_the_model_that_was_asked_for(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": WEATHER}]
    completion = client.chat.completions.parse(
        model=M, messages=messages, response_format=Weather
    )
    response = client.responses.parse(model=M, input=WEATHER, text_format=Weather)
    for made in (completion.choices[0].message.parsed, response.output_parsed):
        assert isinstance(made, Weather)
        assert made.city == "Oslo"


def chat_json(client: OpenAI, question: str) -> str:
    body = chat(client, question, response_format={"type": "json_object"})
    return str(body.choices[0].message.content)


def respond_json(client: OpenAI, question: str) -> str:
    body = respond(client, question, text={"format": {"type": "json_object"}})
    return str(body.output_text)


@pytest.mark.parametrize("say", [chat_json, respond_json])
def test_json_mode_gives_an_object_and_wants_the_word_in_the_prompt(
    client: OpenAI, say: Callable[[OpenAI, str], str]
) -> None:
    made = json.loads(say(client, "Answer in JSON with the keys 'city' and 'day'."))
    assert set(made) == {"city", "day"}
    with pytest.raises(openai.BadRequestError, match="json"):
        say(client, SKY)


def ends(body: Any) -> list[tuple[str, str]]:
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
    ("options", "end", "reason"),
    [
        ({"stop": "capital"}, "The ", "stop"),
        ({"stop": ["Paris", "of"]}, "The capital ", "stop"),
        ({"stop": "London"}, answer(FRANCE), "stop"),
        ({"stop": []}, answer(FRANCE), "stop"),
        ({"stop": "Paris", "max_tokens": 2}, "The capita", "length"),
        ({"stop": "capital", "max_tokens": 2}, "The ", "stop"),
    ],
)
def test_an_answer_ends_before_the_first_stop_sequence(
    client: OpenAI,
    create: Callable[..., Any],
    stream: bool,
    options: Json,
    end: str,
    reason: str,
) -> None:
    body = create(client, FRANCE, stream=stream, n=2, **options)
    if not stream:
        assert ends(body) == [(end, reason)] * 2
        return
    texts, reasons = ["", ""], ["", ""]
    for chunk in body:
        for choice in chunk.choices:
            piece = choice.text if create is complete else choice.delta.content
            texts[choice.index] += piece or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert (texts, reasons) == ([end] * 2, [reason] * 2)


def test_there_are_at_most_four_stop_sequences(client: OpenAI) -> None:
    assert chat(client, stop=list("1234")).choices
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, stop=list("12345"))
    assert str(error.value.param).startswith("stop")


# Embeddings


def vectors(body: CreateEmbeddingResponse) -> list[list[float]]:
    assert [one.index for one in body.data] == list(range(len(body.data)))
    return [one.embedding for one in body.data]


@pytest.mark.parametrize("dimensions", [None, 1, 3, 256])
def test_embeddings_are_of_unit_length_and_equal_for_equal_texts(
    ask: Ask, dimensions: int | None
) -> None:
    options = {} if dimensions is None else {"dimensions": dimensions}
    texts = [SKY, FRANCE, SKY, "", "日本語"]
    found = vectors(ask(lambda client: embed(client, texts, **options)))
    for vector in found:
        assert len(vector) == (dimensions or 1536)
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-6)
    assert found[0] == found[2]
    if dimensions != 1:
        assert len({tuple(vector) for vector in found}) == 4
    assert vectors(ask(lambda client: embed(client, **options))) == found[:1]


def test_base64_holds_the_same_numbers_as_32_bit_floats(ask: Ask) -> None:
    def encoded(name: str) -> Any:
        return ask(lambda client: embed(client, encoding_format=name)).data[0]

    floats, text = encoded("float").embedding, encoded("base64").embedding
    unpacked = array("f", base64.b64decode(text))
    assert unpacked.tolist() == pytest.approx(floats, abs=1e-6)
    assert vectors(ask(embed)) == [unpacked.tolist()]  # the SDK's own way


def test_tokens_may_be_embedded_as_numbers(client: OpenAI) -> None:
    [one] = vectors(embed(client, [1, 2, 3]))
    assert vectors(embed(client, [[1, 2, 3], [4]]))[0] == one


@pytest.mark.parametrize(
    ("options", "param"),
    [
        pytest.param({"text": []}, "input", id="no text"),
        pytest.param({"text": ["a"] * 2049}, "input", id="too many texts"),
        pytest.param({"dimensions": 0}, "dimensions", id="no numbers"),
        pytest.param({"encoding_format": "hex"}, "encoding_format", id="hex"),
    ],
)
def test_embeddings_that_cannot_be_made_are_refused(
    client: OpenAI, options: Json, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        embed(client, **options)
    assert error.value.param == param


# Parameters


DOCUMENTED: dict[str, set[str]] = {
    route: set(params.__annotations__)
    for route, params in {
        "/v1/chat/completions": chat_create_params.CompletionCreateParamsStreaming,
        "/v1/completions": completion_create_params.CompletionCreateParamsStreaming,
        "/v1/responses": response_create_params.ResponseCreateParamsStreaming,
        "/v1/embeddings": embedding_create_params.EmbeddingCreateParams,
        "/v1/batches": batch_create_params.BatchCreateParams,
        "/v1/files": file_create_params.FileCreateParams,
    }.items()
}
MODELLED: dict[str, set[str]] = {
    **{route: set(kind.model_fields) for route, kind in ENDPOINTS.items()},
    "/v1/batches": set(batches.Create.model_fields),
    "/v1/files": {"file", "purpose"},
}
CREATE = {
    "/v1/chat/completions": chat,
    "/v1/completions": complete,
    "/v1/responses": respond,
    "/v1/embeddings": embed,
}
REFUSED = [
    (route, name)
    for route, kind in ENDPOINTS.items()
    for name in sorted(
        DOCUMENTED[route] & set(api_requests.REFUSED) - set(kind.model_fields)
    )
]


@pytest.mark.parametrize("route", DOCUMENTED)
def test_every_parameter_that_the_sdk_documents_is_known(route: str) -> None:
    listed = {*api_requests.NO_EFFECT, *api_requests.REFUSED, "modalities"}
    assert DOCUMENTED[route] - MODELLED[route] - listed == set()
    assert MODELLED[route] <= DOCUMENTED[route]


def test_only_what_the_sdk_documents_is_listed() -> None:
    listed = {*api_requests.NO_EFFECT, *api_requests.REFUSED, "modalities"}
    assert listed - set.union(*DOCUMENTED.values()) == set()
    assert not api_requests.NO_EFFECT & set(api_requests.REFUSED)


def refusal(client: OpenAI, route: str, **fields: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as error:
        CREATE[route](client, extra_body=fields)
    [name] = fields
    told = assert_is_an_error({"error": error.value.body})
    assert told["param"] == name
    assert name in told["message"]
    return told["code"]


@pytest.mark.parametrize(("route", "name"), REFUSED)
def test_what_the_stub_cannot_follow_is_refused_by_its_name(
    client: OpenAI, route: str, name: str
) -> None:
    assert refusal(client, route, **{name: 1}) == "unsupported_parameter"
    asked = CREATE[route](client)
    for nothing in (None, False):
        assert CREATE[route](client, extra_body={name: nothing}) == asked


def test_a_chat_answers_with_text_only(client: OpenAI) -> None:
    assert chat(client, modalities=["text"]) == chat(client)
    code = refusal(client, "/v1/chat/completions", modalities=["text", "audio"])
    assert code == "unsupported_value"


@pytest.mark.parametrize("route", CREATE)
def test_an_unknown_parameter_is_refused_by_its_name(
    client: OpenAI, route: str
) -> None:
    assert refusal(client, route, temprature=0) == "unknown_parameter"


def test_an_unknown_parameter_of_a_batch_is_refused_by_its_name(
    client: OpenAI,
) -> None:
    file = upload(client, lines(ASKED))
    with pytest.raises(openai.BadRequestError, match="windows"):
        client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_body={"windows": 1},
        )


@pytest.mark.parametrize("stream", [False, True])
def test_the_stream_options_of_a_response_belong_to_its_stream(
    client: OpenAI, stream: bool
) -> None:
    options = {"stream": stream, "stream_options": {"include_obfuscation": False}}
    if stream:
        *_, last = respond(client, **options)
        assert last.response == respond(client)
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
def test_a_response_repeats_the_options_it_was_asked_with(
    client: OpenAI, options: Json
) -> None:
    body = respond(client, **options).to_dict()
    for name, value in options.items():
        known = body.get(name)
        assert known == ({**known, **value} if isinstance(value, dict) else value)

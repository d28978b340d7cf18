"""What works with the stub works with OpenAI: the same ranges, names and limits.

Most tests send a request that OpenAI refuses, and the closest one that it accepts.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import DefaultHttpxClient, OpenAI
from pydantic import BaseModel, Field, create_model

from helpers.connection import Provider
from llm_stub.api.requests import MAX_PROMPT_TOKENS, ApiObject
from tests.llm_stub.conftest import Json, upload

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSE, EMBEDDING = "/v1/responses", "/v1/embeddings"
BATCH, FILE = "/v1/batches", "/v1/files"
CHOICES, TALKS, TEXTS = (
    [COMPLETION, CHAT],
    [CHAT, RESPONSE],
    [COMPLETION, CHAT, RESPONSE],
)

HELLO = {"role": "user", "content": "Hello how are you?"}
VALID: dict[str, Json] = {
    COMPLETION: {"model": "m", "prompt": "a", "max_tokens": 1},
    CHAT: {"model": "m", "messages": [HELLO]},
    RESPONSE: {"model": "m", "input": [HELLO]},
    EMBEDDING: {"model": "m", "input": "a"},
    BATCH: {"input_file_id": "", "endpoint": CHAT, "completion_window": "24h"},
    FILE: {"purpose": "batch"},
}
MESSAGES = {CHAT: "messages", RESPONSE: "input"}
RATE_HEADERS = {
    f"x-ratelimit-{field}-{name}"
    for field in ("limit", "remaining", "reset")
    for name in ("requests", "tokens")
}
Post = Callable[..., Any]


def subclasses(kind: type[ApiObject]) -> Iterator[str]:
    for one in kind.__subclasses__():
        yield one.__name__
        yield from subclasses(one)


CLASS_NAMES = set(subclasses(ApiObject))


@pytest.fixture
def post(provider: Provider, client: OpenAI, connections: DefaultHttpxClient) -> Post:
    """Send a request to a route: a valid one with some changes."""
    provider.configure(first_token=0, per_token=0)

    def post(route: str, **changes: Any) -> Any:
        body, url = VALID[route] | changes, provider.url + route
        if route == FILE:
            create: Any = client.files.with_raw_response.create
            try:
                purpose = body.pop("purpose")
                raw = create(file=("f", b"{}"), purpose=purpose, extra_body=body)
                return raw.http_response
            except openai.APIStatusError as error:
                return error.response
        if route == BATCH:
            body["input_file_id"] = upload(client, b"{}").id
        return connections.post(url, json=body, timeout=30)

    return post


def refusal(response: Any) -> Json:
    """The error of a 400, which contains no name of the stub's own classes."""
    assert response.status_code == 400, response.text
    error: Json = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    words = set(re.findall(r"\w+", f"{error['param']} {error['message']}"))
    assert not words & CLASS_NAMES, error
    return error


def assert_refused_by_name(response: Any, name: str) -> None:
    """The error is a 400 that names the parameter, or a part of it."""
    error = refusal(response)
    named = error["param"] or error["message"].partition(name)[1]
    assert re.match(rf"{re.escape(name)}(?!\w)", named), error


def rate_headers(response: Any) -> set[str]:
    return RATE_HEADERS & {*response.headers}


# Ranges


LETTERS = ["a", "b", "c", "d", "e"]
PAIRS = {str(number): "" for number in range(16)}
METADATA = (
    [{**PAIRS, "a": ""}, {"a" * 65: ""}, {"a": "a" * 513}, {"a": 1}, ["a"]],
    [PAIRS, {"a" * 64: "a" * 512}, {}, None],
)


EXPIRIES = (
    [{"anchor": "created_at", "seconds": 3599}, {"anchor": "now", "seconds": 3600}],
    [{"anchor": "created_at", "seconds": 3600}],
)


def said(role: str, kind: str) -> list[Json]:
    return [{"role": role, "content": [{"type": kind, "text": "a"}]}]


RESPONSE_INPUTS = (
    [
        [{"role": "tool", "content": "a"}],
        [{"role": "function", "content": "a"}],
        said("user", "text"),
        said("user", "output_text"),
        said("assistant", "input_text"),
        [{"role": "user", "content": [{"type": "input_text"}]}],
        [{"role": "assistant", "content": [{"type": "refusal", "text": "a"}]}],
    ],
    [said("user", "input_text"), said("assistant", "output_text")],
)
SILENT: Json = {"role": "assistant", "content": None}
CHAT_CONTENTS = (
    [
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "content": [{"type": "refusal", "text": "a"}]}],
        [{"role": "user", "content": None}],
        [SILENT],
    ],
    [
        [{"role": "user", "content": [{"type": "text", "text": ""}]}],
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}]}],
        [
            SILENT | {"function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "a"},
        ],
        [SILENT | {"refusal": "a"}],
    ],
)
# Routes, parameter, values that are refused, values that are accepted.
VALUES: list[tuple[list[str], str, list[Any], list[Any]]] = [
    (TEXTS, "temperature", [-0.1, 2.1, "1"], [0, 2, None]),
    (TEXTS, "top_p", [-0.1, 1.1], [0, 1]),
    (CHOICES, "frequency_penalty", [-2.1, 2.1, "0"], [-2, 2]),
    (CHOICES, "presence_penalty", [-2.1, 2.1, "0"], [-2, 2]),
    (CHOICES, "logit_bias", [{"50": 101}, {"a": 1}, [1]], [{"50": 100}, {}]),
    (CHOICES, "n", [0, 129, "1", 1.5], [1, 128]),
    (CHOICES, "seed", ["1", 1.5, 2**63, -(2**63) - 1], [1, -1, 2**63 - 1]),
    (CHOICES, "stop", [LETTERS, 5], [LETTERS[:4], "a", None]),
    (CHOICES, "max_tokens", [0, -1, "1", 2**31], [1, 10_000]),
    ([COMPLETION], "prompt", [[1, 2], [[1]], ["a", 1]], ["a", ["a", "b"]]),
    ([COMPLETION], "logprobs", [1, 5], [None]),
    ([COMPLETION], "best_of", [0, 21], [1, 20]),
    ([COMPLETION], "prompt", [{}, 5], [None, ""]),
    ([CHAT], "messages", *CHAT_CONTENTS),
    (TALKS, "prompt_cache_retention", ["5h", 5], ["in_memory", "24h", None]),
    ([RESPONSE], "include", ["x", 5], [[], ["message.output_text.logprobs"]]),
    ([COMPLETION], "echo", [True], [False]),
    ([CHAT], "logprobs", [True], [False]),
    ([CHAT], "max_completion_tokens", [0], [1]),
    ([CHAT], "reasoning_effort", ["huge", 1], ["none", "high", None]),
    ([CHAT], "verbosity", ["huge"], ["low"]),
    ([CHAT], "modalities", [["text", "audio"]], [["text"]]),
    (TALKS, "metadata", *METADATA),
    (TALKS, "service_tier", ["cheap", 1], ["auto", "flex", "priority"]),
    (TALKS, "safety_identifier", ["a" * 129], ["a" * 128]),
    (TALKS, "top_logprobs", [2], [None]),
    ([RESPONSE], "input", *RESPONSE_INPUTS),
    ([RESPONSE], "max_output_tokens", [15], [16]),
    ([RESPONSE], "max_tool_calls", [0], [1]),
    ([RESPONSE], "truncation", ["no"], ["auto"]),
    ([RESPONSE], "text", [{"verbosity": "huge"}], [{"verbosity": "high"}]),
    ([RESPONSE], "reasoning", [{"effort": "huge"}], [{"effort": "high"}, {}]),
    ([RESPONSE], "previous_response_id", ["resp_1"], [None]),
    ([RESPONSE], "conversation", ["conv_1"], [None]),
    ([RESPONSE], "background", [True], [False]),
    ([EMBEDDING], "input", ["", ["a", ""], [], [[]]], ["a", ["a", "b"], [1], [[1]]]),
    ([EMBEDDING], "input", [["a"] * 2049, []], [["a"] * 2048, [1] * 8192]),
    ([EMBEDDING], "dimensions", [0, 4097, 1.5], [1, 4096]),
    ([EMBEDDING], "encoding_format", ["int8"], ["float", "base64"]),
    ([BATCH], "metadata", *METADATA),
    ([BATCH], "output_expires_after", *EXPIRIES),
    ([FILE], "purpose", ["batch_output", "nonsense"], ["evals", "user_data"]),
    ([FILE], "expires_after", *EXPIRIES),
]


@pytest.mark.parametrize(
    ("route", "name", "wrong", "right"),
    [
        pytest.param(route, name, wrong, right, id=f"{route[4:]}-{name}")
        for routes, name, wrong, right in VALUES
        for route in routes
    ],
)
def test_only_documented_values_are_accepted(
    post: Post, route: str, name: str, wrong: list[Any], right: list[Any]
) -> None:
    expected = set() if route in (BATCH, FILE) else RATE_HEADERS
    for value in wrong:
        response = post(route, **{name: value})
        assert_refused_by_name(response, name)
        assert rate_headers(response) == expected
    for value in right:
        response = post(route, **{name: value})
        assert response.status_code == 200, response.text
        assert rate_headers(response) == expected


SMALL, LARGE = "text-embedding-3-small", "text-embedding-3-large"
ADA = "text-embedding-ada-002"
SAID = {"role": "assistant", "content": "a"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
# Route, parameters that contradict each other, the change that makes them valid.
CONTRADICTIONS: list[tuple[str, Json, Json]] = [
    (COMPLETION, {"best_of": 1, "n": 2}, {"best_of": 2}),
    (COMPLETION, {"best_of": 2, "stream": True}, {"n": 2}),
    (CHAT, {"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": None}),
    (CHAT, {"parallel_tool_calls": True}, {"tools": [FUNCTION]}),
    (CHAT, {"tool_choice": "auto"}, {"tools": [FUNCTION]}),
    (CHAT, {"messages": [{"role": "assistant"}]}, {"messages": [SAID]}),
    (CHAT, {"model": ""}, {"model": "m"}),
    (EMBEDDING, {"dimensions": 1537, "model": SMALL}, {"dimensions": 1536}),
    (EMBEDDING, {"dimensions": 3073, "model": LARGE}, {"dimensions": 3072}),
    (EMBEDDING, {"dimensions": 1536, "model": ADA}, {"dimensions": None}),
]


@pytest.mark.parametrize(("route", "wrong", "change"), CONTRADICTIONS, ids=str)
def test_parameters_that_contradict_each_other_are_refused(
    post: Post, route: str, wrong: Json, change: Json
) -> None:
    assert_refused_by_name(post(route, **wrong), next(iter(wrong)))
    assert post(route, **wrong | change).status_code == 200


UNKNOWN = {
    COMPLETION: "messages tools metadata service_tier max_completion_tokens nonsense",
    CHAT: "best_of truncation input prompt instructions max_output_tokens nonsense",
    RESPONSE: "n messages max_tokens stop seed logit_bias frequency_penalty nonsense",
    EMBEDDING: "temperature n messages stream metadata nonsense",
    BATCH: "model expires_after nonsense",
    FILE: "model metadata nonsense",
}


@pytest.mark.parametrize("route", UNKNOWN)
def test_parameter_of_another_route_is_refused(post: Post, route: str) -> None:
    for name in UNKNOWN[route].split():
        error = refusal(post(route, **{name: 1}))
        assert (error["param"], error["code"]) == (name, "unknown_parameter")


@pytest.mark.parametrize(
    ("route", "wrong", "right"),
    [
        (FILE, ["limit=0", "limit=10001", "limit=a", "limit="], "limit=10000"),
        (FILE, ["order=up", "order="], "order=asc"),
        (BATCH, ["limit=0", "limit=101", "limit=1.5"], "limit=100"),
    ],
)
def test_lists_have_documented_limits_and_orders(
    provider: Provider,
    connections: DefaultHttpxClient,
    route: str,
    wrong: list[str],
    right: str,
) -> None:
    for query in wrong:
        response = connections.get(f"{provider.url}{route}?{query}")
        assert_refused_by_name(response, query.partition("=")[0])
    assert connections.get(f"{provider.url}{route}?{right}").status_code == 200


# Functions


def function(route: str, name: str = "f", **fields: Any) -> Json:
    described = {"name": name, **fields}
    flat = {"type": "function", **described}
    return {"type": "function", "function": described} if route == CHAT else flat


@pytest.mark.parametrize("route", TALKS)
def test_names_have_at_most_64_letters_digits_underscores_and_hyphens(
    post: Post, route: str
) -> None:
    def named(name: str) -> list[Json]:
        schema = {"name": name, "schema": {"type": "object"}}
        if route == CHAT:
            answer = {"type": "json_schema", "json_schema": schema}
            return [{"tools": [function(route, name)]}, {"response_format": answer}]
        answer = {"format": {"type": "json_schema", **schema}}
        return [{"tools": [function(route, name)]}, {"text": answer}]

    for name in ("two words", "", "naïve", "a.b", "a" * 65):
        for changes in named(name):
            assert_refused_by_name(post(route, **changes), next(iter(changes)))
    for name in ("get-it_2", "a" * 64):
        for changes in named(name):
            assert post(route, **changes).status_code == 200


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5"}
CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT_ITEM = {"type": "function_call_output", "call_id": "c1", "output": "5"}


@pytest.mark.parametrize(
    ("route", "wrong", "words"),
    [
        (CHAT, [HELLO, RESULT], "must be a response to a preceding message"),
        (CHAT, [HELLO, CALLED, RESULT, RESULT], "must be a response to a preceding"),
        (CHAT, [HELLO, CALLED], "did not have response messages: c1"),
        (CHAT, [HELLO, CALLED, HELLO, RESULT], "did not have response messages: c1"),
        (CHAT, [HELLO, {**CALLED, "tool_calls": []}], "messages[1].tool_calls"),
        (RESPONSE, [HELLO, RESULT_ITEM], "No tool call found for function call output"),
        (RESPONSE, [HELLO, CALL_ITEM], "No tool output found for function call c1"),
    ],
)
def test_each_function_call_must_have_its_result(
    post: Post, route: str, wrong: list[Json], words: str
) -> None:
    assert words in refusal(post(route, **{MESSAGES[route]: wrong}))["message"]
    both = [CALLED, RESULT] if route == CHAT else [CALL_ITEM, RESULT_ITEM]
    assert post(route, **{MESSAGES[route]: [HELLO, *both]}).status_code == 200


# Unsupported features


@pytest.mark.parametrize(
    ("route", "changes", "words"),
    [
        *(
            (route, {"tools": [{"type": "web_search"}]}, "'function'")
            for route in TALKS
        ),
        *(
            (
                route,
                {"tools": [function(route)], "tool_choice": {"type": "allowed_tools"}},
                "'allowed_tools'",
            )
            for route in TALKS
        ),
        (RESPONSE, {"input": [HELLO, {"type": "item_reference"}]}, "'store' to false"),
    ],
)
def test_unsupported_features_are_refused_with_a_workaround(
    post: Post, route: str, changes: Json, words: str
) -> None:
    error = refusal(post(route, **changes))
    assert error["param"] in ("tools[0]", "tool_choice", "input[1]")
    assert "the stub " in error["message"]
    assert words in error["message"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/images/generations", f"The stub answers only {BATCH}, {BATCH}/"),
        ("/v1/images/generations", f"{CHAT}, {COMPLETION}, {EMBEDDING}, {FILE}"),
        ("/chat/completions", f"Did you mean {CHAT}? The base URL must end with /v1."),
        ("/responses", f"Did you mean {RESPONSE}?"),
    ],
)
def test_error_for_an_unknown_route_lists_the_existing_routes(
    provider: Provider, connections: DefaultHttpxClient, path: str, words: str
) -> None:
    response = connections.post(provider.url + path, json={})
    assert response.status_code == 404
    assert words in response.json()["error"]["message"]


# Lengths


TOO_LONG = "a" * (4 * MAX_PROMPT_TOKENS + 1)
LONG = " ".join(["a"] * 8000)
MAXIMUM = rf"This model's maximum context length is {MAX_PROMPT_TOKENS} tokens"
OVERFLOWS: list[tuple[str, Json, str]] = [
    (COMPLETION, {"prompt": TOO_LONG}, f"{MAXIMUM}, however you requested "),
    (
        CHAT,
        {"messages": [{"role": "user", "content": TOO_LONG}]},
        rf"{MAXIMUM}\. However, your messages resulted in \d+ tokens\. Please reduce ",
    ),
    (RESPONSE, {"input": TOO_LONG}, "Your input exceeds the context window of this"),
    (EMBEDDING, {"input": TOO_LONG}, f"{MAXIMUM}, however you requested "),
    (EMBEDDING, {"input": ["a", LONG + " a" * 193]}, "context length is 8192 tokens"),
]


@pytest.mark.parametrize(
    ("route", "changes", "wording"), OVERFLOWS, ids=[route for route, _, _ in OVERFLOWS]
)
def test_context_overflow_has_openais_wording_and_code(
    post: Post, route: str, changes: Json, wording: str
) -> None:
    error = refusal(post(route, **changes))
    assert error["code"] == "context_length_exceeded"
    assert re.search(wording, error["message"])


@pytest.mark.parametrize("responses_api", [False, True])
@pytest.mark.parametrize("method", ["invoke", "stream"])
def test_langchain_passes_on_the_code_of_a_context_overflow(
    post: Post, responses_api: bool, method: str
) -> None:
    llm = ChatOpenAI(model="m", timeout=30, use_responses_api=responses_api)
    with pytest.raises(openai.BadRequestError, match=r"model's max|exceeds") as caught:
        list(getattr(llm, method)(TOO_LONG))
    assert caught.value.code == "context_length_exceeded"


def test_embeddings_have_at_most_300_000_tokens_per_request(post: Post) -> None:
    error = refusal(post(EMBEDDING, input=[LONG] * 38))
    assert error["code"] == "max_tokens_per_request"
    assert "max 300000 tokens per request" in error["message"]
    assert post(EMBEDDING, input=[LONG] * 37, dimensions=1).status_code == 200


def test_completion_has_16_tokens_by_default(post: Post) -> None:
    answer = post(COMPLETION, prompt="Why is the sky blue?", max_tokens=None).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_vector_length_depends_on_the_model(post: Post) -> None:
    for model, length in ((SMALL, 1536), (LARGE, 3072), (ADA, 1536), ("m", 1536)):
        [vector] = post(EMBEDDING, model=model).json()["data"]
        assert len(vector["embedding"]) == length


# Rate-limit headers


@pytest.mark.parametrize("limits", [{}, {"requests_per_minute": 60}], ids=str)
@pytest.mark.parametrize("route", [*TEXTS, EMBEDDING])
def test_every_response_except_a_401_has_six_rate_headers(
    post: Post, provider: Provider, route: str, limits: Json
) -> None:
    provider.configure(**limits)
    cases: list[tuple[Json, int]] = [
        ({}, 200),
        ({"model": 5}, 400),
        ({"user": "a"}, 200),
    ]
    for changes, status in cases:
        response = post(route, **changes)
        assert (response.status_code, rate_headers(response)) == (status, RATE_HEADERS)
    if route != EMBEDDING:
        assert rate_headers(post(route, stream=True)) == RATE_HEADERS
    provider.configure(keys=["another"])
    response = post(route)
    assert (response.status_code, rate_headers(response)) == (401, set())


# A limit so low that less than one request is added while a test runs.
@pytest.mark.parametrize(("per_minute", "size"), [(6, 10), (7, 11)])
def test_remaining_header_equals_the_number_of_calls_that_are_still_admitted(
    post: Post, provider: Provider, per_minute: float, size: int
) -> None:
    def remaining(response: Any) -> int:
        return int(response.headers["x-ratelimit-remaining-requests"])

    provider.configure(requests_per_minute=per_minute, burst=100)
    assert remaining(post(COMPLETION)) == size - 1
    assert remaining(post(COMPLETION, n=0)) == size - 2  # a 400 uses up a request, too
    with ThreadPoolExecutor(8) as executor:
        responses = list(executor.map(lambda _: post(COMPLETION), range(size + 5)))
    assert [one.status_code for one in responses].count(200) == size - 2
    assert {remaining(one) for one in responses} == set(range(size - 2))
    assert remaining(post(COMPLETION, n=0)) == 0


def test_remaining_header_equals_the_number_of_tokens_that_are_still_admitted(
    post: Post, provider: Provider
) -> None:
    def remaining(tokens: int) -> tuple[int, str]:
        response = post(EMBEDDING, input=[1] * tokens)
        return response.status_code, response.headers["x-ratelimit-remaining-tokens"]

    provider.configure(tokens_per_minute=6, burst=1000)
    assert remaining(40) == (200, "60")
    assert remaining(62) == (429, "60")
    assert remaining(60) == (200, "0")


# Schemas of functions


class Card(BaseModel):
    kind: Literal["card"]
    digits: Annotated[str, Field(pattern=r"^\d{4}$")]


class Cash(BaseModel):
    kind: Literal["cash"]


ORDINARY_TYPES: dict[str, Any] = {
    "set": set[str],
    "pattern": Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{4}$")],
    "discriminated union": Annotated[Card | Cash, Field(discriminator="kind")],
    "dict of literals": dict[Literal["small", "large"], float],
    "bytes": bytes,
    "path": Path,
}


@pytest.mark.parametrize("kind", ORDINARY_TYPES.values(), ids=ORDINARY_TYPES)
@pytest.mark.parametrize("route", TALKS)
def test_function_may_take_any_pydantic_type_and_gets_valid_arguments(
    post: Post, route: str, kind: Any
) -> None:
    model = create_model("place_order", thing=(kind, ...))
    schema = model.model_json_schema()
    tools = [
        function(route, "place_order", parameters=schema),
        function(route, "hello"),
    ]
    assert post(route, tools=tools).status_code == 200  # which calls the other one

    order = [{"role": "user", "content": "Place an order"}]
    answer = post(route, tools=tools, **{MESSAGES[route]: order}).json()
    if route == CHAT:
        [call] = answer["choices"][0]["message"]["tool_calls"]
        model.model_validate_json(call["function"]["arguments"])
    else:
        model.model_validate_json(answer["output"][0]["arguments"])

    llm = ChatOpenAI(model="m", timeout=30, use_responses_api=route == RESPONSE)
    [call] = llm.bind_tools([model]).invoke("Place an order").tool_calls
    model.model_validate(call["args"])


STRICT: Json = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}


PAIR = {"type": "array", "items": {}, "prefixItems": [{"type": "string"}]}


def closed(count: int, kind: Json = STRICT["properties"]["a"]) -> Json:
    """A strict object with this many properties."""
    names = [f"a{number}" for number in range(count)]
    return STRICT | {"properties": dict.fromkeys(names, kind), "required": names}


def nested(levels: int) -> Json:
    return closed(1, nested(levels - 1)) if levels else {"type": "string"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"additionalProperties": True}, "'additionalProperties' is required to be"),
        ({"required": []}, "Missing 'a'"),
        ({"properties": {"a": {"oneOf": []}}}, "'oneOf' is not permitted"),
        ({"properties": {"a": {"uniqueItems": True}}}, "'uniqueItems' is not"),
        ({"$defs": {"b": {"format": "path"}}}, "'path' is not a valid format"),
        ({"properties": {"a": {}}}, "schema must have a 'type' key"),
        ({"properties": {"a": {"enum": ["b"]}}}, "schema must have a 'type' key"),
        ({"properties": {"a": {"type": "array"}}}, "array schema missing items"),
        ({"properties": {"a": PAIR}}, "'prefixItems' is not permitted"),
        (
            {"properties": {"a": {"$ref": "#/$defs/b", "description": "c"}}},
            "$ref cannot have keywords {'description'}",
        ),
        ({"properties": {"a": nested(10)}}, "more than 10 levels of nesting"),
        ({"$defs": {"b": closed(5000)}}, "it has more than 5000 properties"),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", TALKS)
def test_strict_schema_that_openai_refuses_is_refused_even_if_it_is_not_used(
    post: Post, route: str, change: Json, words: str
) -> None:
    other: Json = {"name": "other", "parameters": STRICT | change}
    tools = [function(route, "hello", parameters=STRICT, strict=True)]
    for tool_choice in ("none", "auto"):
        strict = function(route, **other, strict=True)
        error = refusal(post(route, tools=[*tools, strict], tool_choice=tool_choice))
        assert error["code"] == "invalid_function_parameters"
        place = "function.parameters" if route == CHAT else "parameters"
        assert error["param"] == f"tools[1].{place}"
        assert words in error["message"]
    assert post(route, tools=[*tools, function(route, **other)]).status_code == 200


def test_strict_schema_at_the_limits_is_accepted(post: Post) -> None:
    for schema in (nested(9), closed(5000)):
        tools = [function(CHAT, "hello", parameters=schema, strict=True)]
        assert post(CHAT, tools=tools, tool_choice="none").status_code == 200


def test_stream_of_a_response_cannot_be_asked_for_its_usage(post: Post) -> None:
    for options, status in (({"include_usage": True}, 400), ({}, 200)):
        response = post(RESPONSE, stream=True, stream_options=options)
        assert response.status_code == status


# Several function calls in one answer


QUESTION = "The weather in 'Rome', and the traffic of the next 3 hours?"
WEATHER = create_model("get_weather", city=(str, ...))
TRAFFIC = create_model("get_traffic", city=(str, ...), hours=(int, ...))
MODELS = {one.__name__: one for one in (WEATHER, TRAFFIC)}
FUNCTIONS = [openai.pydantic_function_tool(one) for one in MODELS.values()]
FLAT_FUNCTIONS: Any = [{"type": "function", **one["function"]} for one in FUNCTIONS]
BOTH = [WEATHER(city="Rome"), TRAFFIC(city="Rome", hours=3)]


def chat_calls(client: OpenAI, **options: Any) -> list[list[BaseModel]]:
    """The calls in a complete answer, and in a stream that the SDK has assembled."""
    request: Any = {"messages": [{"role": "user", "content": QUESTION}], **options}
    request |= {"model": "m", "tools": FUNCTIONS}
    found: list[Any] = [client.chat.completions.parse(**request)]
    with client.chat.completions.stream(**request) as events:
        found.append(events.get_final_completion())
    assert {one.choices[0].finish_reason for one in found} == {"tool_calls"}
    calls = [one.choices[0].message.tool_calls or [] for one in found]
    return [[one.function.parsed_arguments for one in each] for each in calls]


def response_calls(client: OpenAI, **options: Any) -> list[list[BaseModel]]:
    """The same with a response."""
    request: Any = {"model": "m", "input": QUESTION, "tools": FLAT_FUNCTIONS, **options}
    found: list[Any] = [client.responses.create(**request)]
    with client.responses.stream(**request) as events:
        found.append(events.get_final_response())
    return [
        [MODELS[one.name].model_validate_json(one.arguments) for one in each.output]
        for each in found
    ]


@pytest.mark.parametrize("calls", [chat_calls, response_calls])
def test_one_answer_calls_several_functions_unless_that_is_turned_off(
    client: OpenAI, post: Post, calls: Callable[..., list[list[BaseModel]]]
) -> None:
    assert calls(client) == [BOTH, BOTH]
    assert calls(client, parallel_tool_calls=True) == [BOTH, BOTH]
    for each in calls(client, parallel_tool_calls=False):
        assert each in ([BOTH[0]], [BOTH[1]])


@pytest.mark.parametrize("responses_api", [False, True])
def test_langchain_gets_several_function_calls(post: Post, responses_api: bool) -> None:
    llm = ChatOpenAI(model="m", timeout=30, use_responses_api=responses_api)
    bound = llm.bind_tools(list(MODELS.values()))
    first, *others = bound.stream(QUESTION)
    for message in (bound.invoke(QUESTION), sum(others, first)):
        assert [one["name"] for one in message.tool_calls] == list(MODELS)
        assert len({one["id"] for one in message.tool_calls}) == 2

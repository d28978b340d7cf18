"""What all requests share: reading and checking them, ids and encoding.

Source: OpenAI's API reference (platform.openai.com/docs/api-reference), the
pages Completions, Chat, Responses, Embeddings, Streaming and Models; and the
types of the openai SDK.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeVar

from propcache.api import cached_property
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import to_json

from ..answers import tokens
from . import errors
from .errors import ApiError, Json, missing_parameter, model_not_found

MAX_PROMPT_TOKENS = 2**18  # in one call, estimated from its characters
CHARACTERS_PER_TOKEN = 4
MAX_ANSWERS = 2048  # choices, or vectors, in one call
CREATED = 1_767_225_600  # the time of every answer: the start of 2026
_random = random.Random()  # asking the system for each id would be slower
Limit = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = str | Annotated[list[str], Field(max_length=4)]

# The names of functions and schemas: at most 64 letters, digits, _ and -.
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=64)]
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Key, Value], Field(max_length=16)]

# Parameters that are refused, because the stub can't do what they ask for. Any
# other documented parameter that no class declares is accepted and has no effect.
REFUSED = {
    "audio": "it returns only text",
    "background": "it stores no responses",
    "background_options": "it stores no responses",
    "conversation": "it stores no conversations; send the earlier items in 'input'",
    "echo": "it does not repeat prompts",
    "function_call": "use 'tool_choice' instead",
    "functions": "use 'tools' instead",
    "image": "it returns only text",
    "logprobs": "its answers come from a table, without probabilities",
    "previous_response_id": "it stores no responses; send the earlier items in 'input'",
    "prompt": "it stores no prompt templates",
    "suffix": "it can't insert text before a suffix",
    "top_logprobs": "its answers come from a table, without probabilities",
    "web_search_options": "it has no hosted tools",
}


class ApiObject(BaseModel):
    """An object of the API; fields that aren't declared are ignored."""

    model_config = ConfigDict(strict=True)


class TextPart(ApiObject):
    """A part of a message's content. The text of a refusal is no part of the prompt."""

    type: str
    text: str = ""
    refusal: str = ""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        needed = "refusal" if self.type == "refusal" else "text"
        if needed not in self.model_fields_set:
            raise ValueError(f"a part of type '{self.type}' needs '{needed}'")
        return self


ObjectT = TypeVar("ObjectT", bound=ApiObject)


class Call(ApiObject):
    """A request with a model and a prompt."""

    model_config = ConfigDict(
        strict=True, extra="allow", ignored_types=(cached_property,)
    )

    model: Annotated[str, Field(min_length=1)]

    @cached_property
    def prompts(self) -> list[str]:
        """The texts that ids and latency depend on, one per answer."""
        raise NotImplementedError

    @cached_property
    def questions(self) -> list[str]:
        """The texts that are answered, one per prompt."""
        return self.prompts

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens in all prompts, by the stub's own estimate."""
        return sum(len(tokens(prompt)) for prompt in self.prompts)

    @cached_property
    def completion_tokens(self) -> int:
        """Tokens in all answers."""
        return 0

    @cached_property
    def longest_answer(self) -> int:
        """Tokens in the longest answer."""
        return 0

    @property
    def streams(self) -> bool:
        """Whether the request asks for a stream of events."""
        return False

    def body(self, key: str) -> Json:
        """The answer as one JSON body; ids are made from the key."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ApiError 400 for an error that must have OpenAI's own wording."""

    def context_length_exceeded(self, limit: int, prompt_tokens: int) -> ApiError:
        """The error for a prompt that is too long, in the route's own wording."""
        return errors.context_length_exceeded(limit, prompt_tokens)


@dataclass(frozen=True)
class FunctionCall:
    """A function call, with the tokens of its arguments, which are JSON text."""

    name: str
    tokens: list[str]

    @property
    def arguments(self) -> str:
        """The whole JSON text."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Choice:
    """One answer: a text, or function calls."""

    tokens: list[str]
    """The tokens of the text, or of the arguments of all calls."""
    reason: str
    calls: tuple[FunctionCall, ...] = ()

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)


def cut(text: str, limit: int | None, stop: Stop | None = None) -> Choice:
    """The text up to the first stop sequence, with at most `limit` tokens."""
    for sequence in [stop] if isinstance(stop, str) else stop or []:
        text = text.partition(sequence)[0] if sequence else text
    whole = tokens(text)
    kept = whole[:limit]
    return Choice(kept, "length" if len(kept) < len(whole) else "stop")


class StreamOptions(ApiObject):
    """What a stream contains besides the answer."""

    include_usage: bool = False


class Generation(Call):
    """A request for text, in one body or as a stream of server-sent events."""

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: str | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_for_a_stream(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options and not info.data.get("stream"):
            raise ValueError("it is only allowed when 'stream' is true")
        return options

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @cached_property
    def choices(self) -> list[Choice]:
        """The answers, in the order of their index."""
        raise NotImplementedError

    @cached_property
    def completion_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    @cached_property
    def longest_answer(self) -> int:
        return max(len(choice.tokens) for choice in self.choices)

    def filtered(self) -> Self:
        """This call with empty answers, as if a content filter had removed them."""
        copy = self.model_copy()
        for name in ("completion_tokens", "longest_answer"):
            copy.__dict__.pop(name, None)
        copy.__dict__["choices"] = [Choice([], "content_filter")] * len(self.choices)
        return copy

    def events(self, key: str) -> Iterator[list[bytes]]:
        """The answer as server-sent events, in groups.

        The first group precedes all tokens. Then there is one group per token,
        for all choices at once. The last group ends the stream.
        """
        raise NotImplementedError


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Conversation(Generation):
    """What chats and responses have in common."""

    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None
    service_tier: (
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None
    ) = None
    store: bool | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None

    @property
    def tier(self) -> str:
        """The service tier of the answer; the stub treats all tiers alike."""
        tier = "priority" if self.service_tier == "fast" else self.service_tier
        return tier if tier in ("flex", "priority") else "default"


def read(kind: type[ObjectT], raw: bytes, parameters: frozenset[str]) -> ObjectT:
    """Read the body of a request to a route that has these parameters.

    Raises an ApiError 400 that names the invalid parameter.
    """
    call = parse(kind, raw)
    for name, value in (call.model_extra or {}).items():
        _check_extra(name, value, parameters)
    if isinstance(call, Call):
        _check_size(call)
        call.check()
    return call


def parse(kind: type[ObjectT], raw: bytes) -> ObjectT:
    """Read an object; raises an ApiError 400 that names the invalid field."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        # A value that fits no member of a union has one error for each member.
        # The deepest one is the most helpful, and a wrong length beats a type.
        problem = max(
            error.errors(),
            key=lambda one: (
                one["type"] == "too_long",
                len(one["loc"]),
                one["type"] in ("value_error", "too_short"),
            ),
        )
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        raise ApiError(400, f"The body could not be parsed. {reason}.")
    missing = problem["type"] == "missing"
    param = _path(problem["loc"], json.loads(raw), missing=missing) or None
    match problem["type"]:
        case "missing":
            raise missing_parameter(param)
        case "value_error" if param is None:
            message, code = f"{reason}.", "invalid_value"
        case _ if param is None:
            message = "The body could not be parsed: it isn't a JSON object."
            raise ApiError(400, message)
        case "literal_error" | "union_tag_invalid":
            message, code = f"Invalid value for '{param}': {reason}.", "invalid_value"
            if param.endswith("type"):  # OpenAI may have others
                message += " The stub supports no other value."
        case kind_of if kind_of.endswith("_type"):
            message = f"Invalid type for '{param}': {reason}."
            code = "invalid_type"
        case _:
            message, code = f"Invalid value for '{param}': {reason}.", "invalid_value"
    raise ApiError(400, message, param, code)


def _check_size(call: Call) -> None:
    """Refuse a call so large that it would hold up all other calls."""
    prompts = call.prompts
    characters = sum(map(len, prompts))
    if characters > MAX_PROMPT_TOKENS * CHARACTERS_PER_TOKEN:
        prompt_tokens = math.ceil(characters / CHARACTERS_PER_TOKEN)
        raise call.context_length_exceeded(MAX_PROMPT_TOKENS, prompt_tokens)
    answers = len(prompts) * (getattr(call, "n", None) or 1)
    if answers > MAX_ANSWERS:
        message = (
            f"The request asks for {answers} answers, but the stub allows at most "
            f"{MAX_ANSWERS} per call. Split it into several calls."
        )
        raise ApiError(400, message, code="invalid_value")


def _check_extra(name: str, value: object, parameters: frozenset[str]) -> None:
    """Refuse a parameter that is unknown, or that the stub can't act on."""
    if name not in parameters:
        message = f"Unrecognized request argument supplied: {name}"
        raise ApiError(400, message, name, "unknown_parameter")
    if name == "modalities" and value not in (None, ["text"]):
        message = f"Invalid value for '{name}': {value!r}. The stub returns only text."
        raise ApiError(400, message, name, "unsupported_value")
    if name in REFUSED and value:  # null, false, 0 and [] ask for nothing
        message = f"'{name}' is not supported by the stub: {REFUSED[name]}."
        raise ApiError(400, message, name, "unsupported_parameter")


def _path(loc: tuple[int | str, ...], body: object, *, missing: bool) -> str:
    """Where an error is, in the API's notation: messages[0].role

    Pydantic's location also names the members of unions, which aren't in the body.
    If a field is `missing`, the last step isn't in the body either.
    """
    path = ""
    for number, step in enumerate(loc, 1):
        if isinstance(step, int):
            path += f"[{step}]"
            body = body[step] if isinstance(body, list) else None
        elif isinstance(body, dict) and (
            step in body or (missing and number == len(loc))
        ):
            path += f".{step}" if path else step
            body = body.get(step)
    return path


def check_model(model: str, models: list[str] | None) -> None:
    """Raise the API's 404 unless the model is one of these; None accepts all."""
    if models is not None and model not in models:
        raise model_not_found(model)


# Answers


def unique_key() -> str:
    """32 random hexadecimal digits, used to make all ids of one answer."""
    return f"{_random.getrandbits(128):032x}"


def encode(body: object) -> bytes:
    """The body as JSON. Pydantic's encoder is five times as fast as that of json."""
    return to_json(body, inf_nan_mode="null")


def server_sent_event(event: Json, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, encode(event))


def model_object(model: str) -> Json:
    """A model, as `GET /v1/models/{id}` returns it."""
    return {
        "id": model,
        "object": "model",
        "created": CREATED,
        "owned_by": "stub",
    }

"""What all requests share: reading and checking them, ids and encoding.

Source: OpenAI's API reference (platform.openai.com/docs/api-reference), the
pages Completions, Chat, Responses, Embeddings, Streaming and Models; and the
types of the openai SDK.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import to_json

from ..answers import tokens
from .errors import ApiError, Json, missing_parameter, model_not_found

MAX_PROMPT_CHARACTERS = 2**20  # in one call
MAX_ANSWERS = 2048  # choices, or vectors, in one call
Limit = Annotated[int, Field(ge=1)]
Stop = str | Annotated[list[str], Field(max_length=4)]

# Documented parameters that are accepted but have no effect: answers come from
# a table, and nothing is stored.
NO_EFFECT = frozenset(
    """
    access_programs best_of context_management expires_after frequency_penalty include
    logit_bias max_tool_calls metadata moderation output_expires_after
    parallel_tool_calls prediction presence_penalty prompt_cache_key
    prompt_cache_options prompt_cache_retention reasoning reasoning_effort
    safety_identifier seed service_tier store temperature top_p truncation user
    verbosity
    """.split()
)
# Documented parameters that are refused: the stub can't do what they ask for.
REFUSED = {
    "audio": "it returns only text",
    "background": "it stores no responses",
    "background_options": "it stores no responses",
    "conversation": "it stores no conversations",
    "echo": "it does not repeat prompts",
    "function_call": "use 'tool_choice' instead",
    "functions": "use 'tools' instead",
    "image": "it returns only text",
    "logprobs": "its answers come from a table, without probabilities",
    "previous_response_id": "it stores no responses",
    "prompt": "it stores no prompt templates",
    "suffix": "it can't insert text before a suffix",
    "top_logprobs": "its answers come from a table, without probabilities",
    "web_search_options": "it has no hosted tools",
}


class ApiObject(BaseModel):
    """An object of the API; fields that aren't declared are ignored."""

    model_config = ConfigDict(strict=True)


ObjectT = TypeVar("ObjectT", bound=ApiObject)


class Call(ApiObject):
    """A request with a model and a prompt."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str

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


@dataclass(frozen=True)
class Choice:
    """One answer: a text, or the arguments of a function call."""

    tokens: list[str]
    reason: str
    function: str | None = None

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

    def events(self, key: str) -> Iterator[list[bytes]]:
        """The answer as server-sent events, in groups.

        The first group precedes all tokens. Then there is one group per token,
        for all choices at once. The last group ends the stream.
        """
        raise NotImplementedError


def read(kind: type[ObjectT], raw: bytes) -> ObjectT:
    """Read a request's body, including extra parameters.

    Raises an ApiError 400 that names the invalid parameter.
    """
    call = parse(kind, raw)
    for name, value in (call.model_extra or {}).items():
        _check_extra(name, value)
    if isinstance(call, Call):
        _check_size(call)
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
                one["type"] == "too_short",
            ),
        )
    reason = problem["msg"].removeprefix("Value error, ")
    param = _path(problem["loc"]) or None
    match problem["type"]:
        case "json_invalid":
            message, code = f"The body could not be parsed. {reason}.", None
        case "missing":
            raise missing_parameter(param)
        case "value_error" if param is None:
            message, code = f"{reason}.", "invalid_value"
        case _ if param is None:
            message, code = (
                "The body could not be parsed: it isn't a JSON object.",
                None,
            )
        case "literal_error" | "union_tag_invalid":
            message = (
                f"Invalid value for '{param}': {reason}. The stub supports no other "
                "value."
            )
            code = "invalid_value"
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
    if characters > MAX_PROMPT_CHARACTERS:
        message = (
            f"This stub's maximum context length is {MAX_PROMPT_CHARACTERS} "
            f"characters, but the request has {characters}. Shorten the prompt."
        )
        raise ApiError(400, message, code="context_length_exceeded")
    answers = len(prompts) * (getattr(call, "n", None) or 1)
    if answers > MAX_ANSWERS:
        message = (
            f"The request asks for {answers} answers, but the stub allows at most "
            f"{MAX_ANSWERS} per call. Split it into several calls."
        )
        raise ApiError(400, message, code="invalid_value")


def _check_extra(name: str, value: object) -> None:
    """Refuse a parameter that is unknown, or that the stub can't act on."""
    if name in NO_EFFECT:
        return
    if name == "modalities" and value in (None, ["text"]):
        return
    if name == "modalities":
        message = f"Invalid value for '{name}': {value!r}. The stub returns only text."
        raise ApiError(400, message, name, "unsupported_value")
    if name not in REFUSED:
        message = f"Unrecognized request argument supplied: {name}"
        raise ApiError(400, message, name, "unknown_parameter")
    if value:  # null, false, 0 and [] ask for nothing
        message = f"'{name}' is not supported by the stub: {REFUSED[name]}."
        raise ApiError(400, message, name, "unsupported_parameter")


def _path(loc: tuple[int | str, ...]) -> str:
    """Where an error is, in the API's notation: messages[0].role"""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step != "str":  # else: a member of a union
            path += f".{step}" if path else step
    return path


def check_model(model: str, models: list[str] | None) -> None:
    """Raise the API's 404 unless the model is one of these; None accepts all."""
    if models is not None and model not in models:
        raise model_not_found(model)


# Answers


def created(key: str) -> int:
    """A time in seconds since 1970 that depends only on the key."""
    return 1_700_000_000 + int(key[:6], 16)


def request_id(key: str) -> str:
    """The id of a request, made from the key."""
    return f"req_{key[:32]}"


def encode(body: Json) -> bytes:
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
        "created": created("0" * 6),
        "owned_by": "stub",
    }

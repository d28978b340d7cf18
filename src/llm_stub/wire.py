"""OpenAI's wire format: what all requests have in common, and completions.

Source: OpenAI's API reference (platform.openai.com/docs/api-reference), the
pages Completions, Chat, Responses, Embeddings, Streaming, Models, Rate limits
and Errors; and the types of the openai SDK.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import to_json

from .answers import answer, tokens
from .behaviour import Refusal

Json = dict[str, Any]
TEXT_MOST = 2**20  # characters in the prompts of one call
ANSWERS_MOST = 2048  # choices, or vectors, of one call
Limit = Annotated[int, Field(ge=1)]
Stop = str | Annotated[list[str], Field(max_length=4)]

# Documented, accepted, and without effect: the answers come from a table, and
# nothing is stored.
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
# Documented, and refused: the stub could not honestly do as it is told.
REFUSED = {
    "audio": "it makes no sound",
    "background": "it keeps no responses",
    "background_options": "it keeps no responses",
    "conversation": "it keeps no conversations",
    "echo": "it does not repeat prompts",
    "function_call": "use 'tool_choice' in its place",
    "functions": "use 'tools' in their place",
    "image": "it makes no pictures",
    "logprobs": "a table has no probabilities",
    "previous_response_id": "it keeps no responses",
    "prompt": "it keeps no prompt templates",
    "suffix": "it fills nothing in",
    "top_logprobs": "a table has no probabilities",
    "web_search_options": "it has no tools of its own",
}


# Errors


class ApiError(Exception):
    """An error that the API documents: a status and an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: Json = {"error": error}


def no_model(model: str) -> ApiError:
    """What the API says of a model that it does not have."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def no_route(method: str, path: str) -> ApiError:
    """What the API says of a route that it does not have."""
    return ApiError(404, f"Invalid URL ({method} {path})")


def no_method(method: str, path: str, allowed: Sequence[str]) -> ApiError:
    """What the API says of a method that a route does not take."""
    message = f"Not allowed to {method} on {path}."
    headers = {"allow": ", ".join(sorted(allowed))}
    return ApiError(405, message, code="method_not_supported", headers=headers)


def no_key(given: bool) -> ApiError:
    """What the API says of a key that it does not know; the key is not told."""
    if given:
        return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
    message = (
        "You didn't provide an API key. You need to provide your API key in an "
        "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
    )
    return ApiError(401, message)


def rate_limit(refusal: Refusal) -> ApiError:
    """What the API says of a call that goes past a limit, and when to retry."""
    name, bucket, wait = refusal.bucket.name, refusal.bucket, refusal.retry_after
    unit = {"requests": "RPM", "tokens": "TPM"}[name]
    code = "rate_limit_exceeded"
    if math.isinf(wait):
        message = (
            f"Request too large on {name} per min ({unit}): at most "
            f"{bucket.size:.0f} at once, Requested {refusal.asked:.0f}."
        )
        return ApiError(429, message, code=code, kind=name)
    message = (
        f"Rate limit reached on {name} per min ({unit}): Limit "
        f"{bucket.per_minute:.0f}, Requested {refusal.asked:.0f}. "
        f"Please try again in {wait:.3f}s."
    )
    headers = {
        "retry-after": str(math.ceil(wait)),
        "retry-after-ms": str(math.ceil(wait * 1000)),
    }
    return ApiError(429, message, code=code, kind=name, headers=headers)


def failure(status: int) -> ApiError:
    """What the API says of a failure on its side."""
    if status == 503:
        message = "The engine is currently overloaded, please try again later."
    else:
        message = "The server had an error while processing your request. Sorry!"
    return ApiError(status, message, kind="server_error")


# Requests


class Checked(BaseModel):
    """An object of the API; fields that are not named here are ignored."""

    model_config = ConfigDict(strict=True)


CheckedT = TypeVar("CheckedT", bound=Checked)


class Call(Checked):
    """A request with a model and a prompt: what all such routes have in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    ROUTE: ClassVar[str]

    model: str

    @cached_property
    def prompts(self) -> list[str]:
        """The texts that ids and latency depend on, one for each answer."""
        raise NotImplementedError

    @property
    def questions(self) -> list[str]:
        """The texts that are answered, one for each of the prompts."""
        return self.prompts

    @cached_property
    def asked(self) -> int:
        """The tokens of the prompts, by the stub's own rough count."""
        return sum(len(tokens(prompt)) for prompt in self.prompts)

    @cached_property
    def generated(self) -> int:
        """The tokens of all answers."""
        return 0

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest answer."""
        return 0

    def body(self, key: str) -> Json:
        """The answer as one JSON body; ids come from the `key`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """One answer: a text, or the arguments of a function that is called."""

    tokens: list[str]
    reason: str
    function: str | None = None

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)


def cut(text: str, limit: int | None, stop: Stop | None = None) -> Choice:
    """The text up to the first stop sequence, and no longer than the limit."""
    for sequence in [stop] if isinstance(stop, str) else stop or []:
        text = text.partition(sequence)[0] if sequence else text
    whole = tokens(text)
    kept = whole[:limit]
    return Choice(kept, "length" if len(kept) < len(whole) else "stop")


class StreamOptions(Checked):
    """What a stream should carry besides the answer."""

    include_usage: bool = False


class Generation(Call):
    """A request for a text, whole or as a stream of server-sent events."""

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
            raise ValueError("it goes with 'stream': true")
        return options

    @cached_property
    def choices(self) -> list[Choice]:
        """The answers, by their index."""
        raise NotImplementedError

    @cached_property
    def generated(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    @cached_property
    def longest(self) -> int:
        return max(len(choice.tokens) for choice in self.choices)

    def events(self, key: str) -> Iterator[list[bytes]]:
        """The answer as server-sent events, in groups.

        The first group comes before any token; then one group a token, for
        all choices at once; the last group closes the stream.
        """
        raise NotImplementedError


class Numbered(Generation):
    """Completions and chats: `n` choices, told apart by their index."""

    PREFIX: ClassVar[str]
    KIND: ClassVar[str]
    KIND_OF_EVENT: ClassVar[str]

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Limit | None = None
    stop: Stop | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens that each answer may have."""
        return self.max_tokens

    @cached_property
    def choices(self) -> list[Choice]:
        each = [self.reply(question) for question in self.questions]
        return [choice for choice in each for _ in range(self.n or 1)]

    def reply(self, question: str) -> Choice:
        """The answer to one question."""
        return cut(answer(question), self.limit, self.stop)

    @property
    def usage(self) -> Json:
        """The usage object; tokens are the stub's own rough count."""
        return {
            "prompt_tokens": self.asked,
            "completion_tokens": self.generated,
            "total_tokens": self.asked + self.generated,
        }

    def whole(self, choice: Choice, key: str) -> Json:
        """The part of a choice that holds the whole answer."""
        raise NotImplementedError

    def opening(self, choice: Choice, key: str) -> list[Json]:
        """The parts of a choice that come before its first token."""
        return []

    def piece(self, choice: Choice, token: str) -> Json:
        """The part of an event's choice that holds a token, or '' at the end."""
        raise NotImplementedError

    def head(self, key: str, kind: str) -> Json:
        """What a body and every event begin with; ids come from the `key`."""
        return {
            "id": f"{self.PREFIX}-{key[:29]}",
            "object": kind,
            "created": created(key),
            "model": self.model,
            "system_fingerprint": "fp_stub",
        }

    def body(self, key: str) -> Json:
        choices = [
            {**_indexed(index, choice.reason), **self.whole(choice, f"{index}{key}")}
            for index, choice in enumerate(self.choices)
        ]
        return {**self.head(key, self.KIND), "choices": choices, "usage": self.usage}

    def events(self, key: str) -> Iterator[list[bytes]]:
        head = self.head(key, self.KIND_OF_EVENT)
        if self.stream_options and self.stream_options.include_usage:
            head["usage"] = None
        choices = list(enumerate(self.choices))

        def event(index: int, piece: Json, reason: str | None = None) -> bytes:
            return sse({**head, "choices": [{**_indexed(index, reason), **piece}]})

        yield [
            event(index, piece)
            for index, choice in choices
            for piece in self.opening(choice, f"{index}{key}")
        ]
        for position in range(self.longest):
            yield [
                event(index, self.piece(choice, choice.tokens[position]))
                for index, choice in choices
                if position < len(choice.tokens)
            ]
        last = [
            event(index, self.piece(choice, ""), choice.reason)
            for index, choice in choices
        ]
        if "usage" in head:
            last.append(sse({**head, "choices": [], "usage": self.usage}))
        yield [*last, b"data: [DONE]\n\n"]


class Completion(Numbered):
    """POST /v1/completions; tokens as numbers are refused: there is no table."""

    ROUTE = "/v1/completions"
    PREFIX, KIND, KIND_OF_EVENT = "cmpl", "text_completion", "text_completion"

    prompt: str | Annotated[list[str], Field(min_length=1)]

    @cached_property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def whole(self, choice: Choice, key: str) -> Json:
        return {"text": choice.text}

    def piece(self, choice: Choice, token: str) -> Json:
        return {"text": token}


def read(kind: type[CheckedT], raw: bytes) -> CheckedT:
    """Read a call's body; raises ApiError 400 with the field at fault."""
    call = parse(kind, raw)
    for name, value in (call.model_extra or {}).items():
        _check_extra(name, value)
    if isinstance(call, Call):
        _check_size(call)
    return call


def parse(kind: type[CheckedT], raw: bytes) -> CheckedT:
    """Read an object; raises ApiError 400 with the field at fault."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        # A value that fits no member of a union has an error for each: the
        # one that went deepest says most, and a wrong length more than a type.
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
            message = f"Missing required parameter: '{param}'."
            code = "missing_required_parameter"
        case "value_error" if param is None:
            message, code = f"{reason}.", "invalid_value"
        case _ if param is None:
            message, code = "The body could not be parsed: it is no JSON object.", None
        case "literal_error" | "union_tag_invalid":
            message = f"Invalid value for '{param}': {reason}. This stub has no other."
            code = "invalid_value"
        case kind_of if kind_of.endswith("_type"):
            message = f"Invalid type for '{param}': {reason}."
            code = "invalid_type"
        case _:
            message, code = f"Invalid value for '{param}': {reason}.", "invalid_value"
    raise ApiError(400, message, param, code)


def _check_size(call: Call) -> None:
    """Refuse a call that would keep this process from all others for long."""
    prompts = call.prompts
    if sum(map(len, prompts)) > TEXT_MOST:
        message = f"The maximum context length of this stub is {TEXT_MOST} characters."
        raise ApiError(400, message, code="context_length_exceeded")
    if len(prompts) * (getattr(call, "n", None) or 1) > ANSWERS_MOST:
        message = f"More than {ANSWERS_MOST} answers in one call."
        raise ApiError(400, message, code="invalid_value")


def _check_extra(name: str, value: object) -> None:
    """Refuse a parameter that nobody knows, or that this stub cannot follow."""
    if name in NO_EFFECT:
        return
    if name == "modalities" and value in (None, ["text"]):
        return
    if name == "modalities":
        message = f"'{name}' = {value!r}: this stub answers with text only."
        raise ApiError(400, message, name, "unsupported_value")
    if name not in REFUSED:
        message = f"Unrecognized request argument supplied: {name}"
        raise ApiError(400, message, name, "unknown_parameter")
    if value:  # not asked for: null, false, 0, an empty list
        message = f"'{name}' is not supported by this stub: {REFUSED[name]}."
        raise ApiError(400, message, name, "unsupported_parameter")


# Bodies


def models_body(names: Sequence[str]) -> Json:
    """What `GET /v1/models` gives."""
    return {"object": "list", "data": [model_body(name) for name in names]}


def model_body(model: str) -> Json:
    """A model object, as `GET /v1/models/{id}` gives it."""
    return {
        "id": model,
        "object": "model",
        "created": created("0" * 6),
        "owned_by": "stub",
    }


def created(key: str) -> int:
    """A time in seconds since 1970, by the key alone."""
    return 1_700_000_000 + int(key[:6], 16)


def request_id(key: str) -> str:
    """The id of a request, by the key alone."""
    return f"req_{key[:32]}"


def encode(body: Json) -> bytes:
    """The body as JSON, by pydantic's encoder: five times as fast as json's."""
    return to_json(body, inf_nan_mode="null")


def sse(event: Json, name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, encode(event))


def _path(loc: tuple[int | str, ...]) -> str:
    """pydantic's place of an error, as the API writes it: messages[0].role"""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step != "str":  # else: a member of a union
            path += f".{step}" if path else step
    return path


def _indexed(index: int, reason: str | None) -> Json:
    return {"index": index, "logprobs": None, "finish_reason": reason}

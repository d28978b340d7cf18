"""OpenAI's wire format: requests in, bodies, events and errors out.

Source: OpenAI's API reference (platform.openai.com/docs/api-reference), the
pages Completions, Chat, Streaming, Models and Errors; and the types of the
openai SDK.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .answers import answer, tokens

Json = dict[str, Any]
Role = Literal["developer", "system", "user", "assistant", "tool", "function"]
Limit = Annotated[int, Field(ge=1)]


class ApiError(Exception):
    """An error that the API documents: a status and an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: Json = {"error": error}


class Checked(BaseModel):
    """An object of the API; fields that are not named here are ignored."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Checked):
    """What a stream should carry besides the answer."""

    include_usage: bool = False


class Generation(Checked):
    """A request for an answer: what completions and chats have in common."""

    PREFIX: ClassVar[str]
    KIND: ClassVar[str]
    KIND_OF_EVENT: ClassVar[str]

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_for_a_stream(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options and not info.data.get("stream"):
            raise ValueError("it goes with 'stream': true")
        return options

    @property
    def prompts(self) -> list[str]:
        """The texts that ids and latency depend on, one for each answer."""
        raise NotImplementedError

    @property
    def questions(self) -> list[str]:
        """The texts that are answered, one for each of the prompts."""
        return self.prompts

    @property
    def limit(self) -> int | None:
        """The most tokens that each answer may have."""
        return self.max_tokens

    @cached_property
    def choices(self) -> list[tuple[list[str], str]]:
        """The tokens and the finish reason of each choice, by its index."""
        found = []
        for question in self.questions:
            whole = tokens(answer(question))
            cut = whole[: self.limit]
            reason = "length" if len(cut) < len(whole) else "stop"
            found += [(cut, reason)] * (self.n or 1)
        return found

    @cached_property
    def usage(self) -> Json:
        """The usage object; tokens are the stub's own rough count."""
        asked = sum(len(tokens(prompt)) for prompt in self.prompts)
        generated = sum(len(cut) for cut, _ in self.choices)
        return {
            "prompt_tokens": asked,
            "completion_tokens": generated,
            "total_tokens": asked + generated,
        }

    def whole(self, text: str) -> Json:
        """The part of a choice that holds the whole answer."""
        raise NotImplementedError

    def piece(self, text: str) -> Json:
        """The part of an event's choice that holds a token, or '' at the end."""
        raise NotImplementedError

    def head(self, key: str, kind: str) -> Json:
        """What a body and every event begin with; ids come from the `key`."""
        return {
            "id": f"{self.PREFIX}-{key[:29]}",
            "object": kind,
            "created": 1_700_000_000 + int(key[:6], 16),
            "model": self.model,
            "system_fingerprint": "fp_stub",
        }

    def body(self, key: str) -> Json:
        """The answer as one JSON body."""
        choices = [
            {**_choice(index, reason), **self.whole("".join(cut))}
            for index, (cut, reason) in enumerate(self.choices)
        ]
        return {**self.head(key, self.KIND), "choices": choices, "usage": self.usage}

    def events(self, key: str) -> Iterator[list[bytes]]:
        """The answer as server-sent events, in groups.

        The first group comes before any token; then one group a token, for
        all choices at once; the last group closes the stream.
        """
        head = self.head(key, self.KIND_OF_EVENT)
        if self.stream_options and self.stream_options.include_usage:
            head["usage"] = None

        def event(index: int, piece: Json, reason: str | None = None) -> bytes:
            return _sse({**head, "choices": [{**_choice(index, reason), **piece}]})

        yield [
            event(i, piece) for i in range(len(self.choices)) for piece in self.first
        ]
        for position in range(max(len(cut) for cut, _ in self.choices)):
            yield [
                event(index, self.piece(cut[position]))
                for index, (cut, _) in enumerate(self.choices)
                if position < len(cut)
            ]
        last = [
            event(index, self.piece(""), reason)
            for index, (_, reason) in enumerate(self.choices)
        ]
        if "usage" in head:
            last.append(_sse({**head, "choices": [], "usage": self.usage}))
        yield [*last, b"data: [DONE]\n\n"]

    first: ClassVar[list[Json]] = []


class Completion(Generation):
    """POST /v1/completions; tokens as numbers are refused: there is no table."""

    PREFIX, KIND, KIND_OF_EVENT = "cmpl", "text_completion", "text_completion"

    prompt: str | Annotated[list[str], Field(min_length=1)]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def whole(self, text: str) -> Json:
        return {"text": text}

    piece = whole


class Text(Checked):
    """A text part of a message; the stub reads no other."""

    type: Literal["text"]
    text: str


class Message(Checked):
    """One message of a chat."""

    role: Role
    content: str | list[Text] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role '{self.role}' needs 'content'")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Chat(Generation):
    """POST /v1/chat/completions"""

    PREFIX, KIND, KIND_OF_EVENT = "chatcmpl", "chat.completion", "chat.completion.chunk"
    first: ClassVar[list[Json]] = [
        {"delta": {"role": "assistant", "content": "", "refusal": None}}
    ]

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None

    @property
    def prompts(self) -> list[str]:
        return ["\n".join(message.text for message in self.messages)]

    @property
    def questions(self) -> list[str]:
        asked = [message for message in self.messages if message.role == "user"]
        return [(asked or self.messages)[-1].text]

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @cached_property
    def usage(self) -> Json:
        details = {
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
        return super().usage | details

    def head(self, key: str, kind: str) -> Json:
        return {**super().head(key, kind), "service_tier": "default"}

    def whole(self, text: str) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": {**message, "annotations": []}}

    def piece(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}


def read(kind: type[Generation], raw: bytes) -> Generation:
    """Read a request's body; raises ApiError 400 with the field at fault."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        # A value that fits no member of a union has an error for each: the
        # one that went deepest says most, and a wrong length more than a type.
        problem = max(
            error.errors(),
            key=lambda one: (len(one["loc"]), one["type"] == "too_short"),
        )
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        raise ApiError(400, f"The body could not be parsed. {reason}.")
    param = _path(problem["loc"]) or None
    if param is None:
        raise ApiError(400, "The body could not be parsed: it is not a JSON object.")
    if problem["type"] == "missing":
        message, code = "Missing required parameter", "missing_required_parameter"
        raise ApiError(400, f"{message}: '{param}'.", param, code)
    if problem["type"].endswith("_type"):
        raise ApiError(
            400, f"Invalid type for '{param}': {reason}.", param, "invalid_type"
        )
    raise ApiError(
        400, f"Invalid value for '{param}': {reason}.", param, "invalid_value"
    )


def no_model(model: str) -> ApiError:
    """What the API says of a model that it does not have."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def no_route(method: str, path: str) -> ApiError:
    """What the API says of a route that it does not have."""
    return ApiError(404, f"Invalid URL ({method} {path})")


def no_method(method: str, path: str) -> ApiError:
    """What the API says of a method that a route does not take."""
    message = f"Not allowed to {method} on {path}."
    return ApiError(405, message, code="method_not_supported")


def model_body(model: str) -> Json:
    """A model object, as `GET /v1/models/{id}` gives it."""
    return {
        "id": model,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "stub",
    }


def _path(loc: tuple[int | str, ...]) -> str:
    """pydantic's place of an error, as the API writes it: messages[0].role"""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step != "str":  # else: a member of a union
            path += f".{step}" if path else step
    return path


def _choice(index: int, reason: str | None) -> Json:
    return {"index": index, "logprobs": None, "finish_reason": reason}


def _sse(event: Json) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()

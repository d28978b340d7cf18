"""POST /v1/chat/completions: messages, function tools and response formats."""

from typing import Annotated, Any, Literal, Self

from propcache.api import cached_property
from pydantic import Field, model_validator

from ..answers import answer
from .completions import Penalties, WithChoices
from .errors import ApiError, Json
from .requests import (
    MAX_PROMPT_TOKENS,
    ApiObject,
    Choice,
    Conversation,
    Effort,
    Limit,
    Name,
    TextPart,
    cut,
)
from .schema import Schema, check_schema, json_object, json_text
from .tools import (
    Function,
    FunctionChoice,
    FunctionTool,
    call_functions,
    call_id,
    check_functions,
    choose_functions,
)

MAX_TOOLS = 128
Role = Literal["developer", "system", "user", "assistant", "tool", "function"]


class Tool(FunctionTool):
    """A function tool in a chat request."""

    function: Function


class Named(ApiObject):
    """The name of a function."""

    name: Name


class Forced(FunctionChoice):
    """A function that the model must call, in a chat request."""

    function: Named


class Format(ApiObject):
    """The format that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("'json_schema' is missing")
        return self


class Part(TextPart):
    """A text part of a message; the stub accepts no other kind."""

    type: Literal["text", "refusal"]


class Arguments(ApiObject):
    """The function that the model called, and its arguments as JSON text."""

    name: Name
    arguments: str


class Called(ApiObject):
    """A call that the model made earlier."""

    id: str
    type: Literal["function"]
    function: Arguments


class Message(ApiObject):
    """One message of a chat."""

    role: Role
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    name: str | None = None
    refusal: str | None = None
    function_call: Arguments | None = None  # the older form of tool_calls
    tool_calls: Annotated[list[Called], Field(min_length=1)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message with role '{self.role}' needs 'content'")
        said = self.tool_calls or self.function_call or self.refusal
        if self.role == "assistant" and self.content is None and not said:
            raise ValueError("a message with role 'assistant' needs 'content'")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message with role 'tool' needs 'tool_call_id'")
        if self.role == "function" and self.name is None:
            raise ValueError("a message with role 'function' needs 'name'")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Chat(Conversation, Penalties, WithChoices):
    """POST /v1/chat/completions"""

    PREFIX, KIND, KIND_OF_EVENT = "chatcmpl", "chat.completion", "chat.completion.chunk"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = (
        None
    )
    tool_choice: Literal["none", "auto", "required"] | Forced | None = None
    response_format: Format | None = None
    reasoning_effort: Effort | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError(
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is "
                "not supported"
            )
        if self.parallel_tool_calls is not None and not self.tools:
            raise ValueError(
                "'parallel_tool_calls' is only allowed when 'tools' are specified"
            )
        if any(one.tool_calls or one.role == "tool" for one in self.messages):
            _check_tool_messages(self.messages)
        return self

    def check(self) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            given = getattr(self, name) or 0
            if given > MAX_PROMPT_TOKENS:
                message = (
                    f"{name} is too large: {given}. This model supports at most "
                    f"{MAX_PROMPT_TOKENS} completion tokens, whereas you provided "
                    f"{given}."
                )
                raise ApiError(400, message, name, "invalid_value")
        if self.tool_choice is not None and not self.tools:
            message = "'tool_choice' is only allowed when 'tools' are specified."
            raise ApiError(400, message, "tool_choice")
        check_functions(
            [tool.function for tool in self.tools or ()],
            "tools[{}].function.parameters",
        )
        wanted = self.response_format
        if wanted and wanted.json_schema:
            format_ = wanted.json_schema
            check_schema(
                format_.schema_,
                f"response_format '{format_.name}'",
                "response_format",
                strict=bool(format_.strict),
            )

    def context_length_exceeded(self, limit: int, prompt_tokens: int) -> ApiError:
        message = (
            f"This model's maximum context length is {limit} tokens. However, your "
            f"messages resulted in {prompt_tokens} tokens. Please reduce the length of "
            "the messages."
        )
        return ApiError(400, message, "messages", "context_length_exceeded")

    @cached_property
    def prompts(self) -> list[str]:
        return ["\n".join(message.text for message in self.messages)]

    @cached_property
    def questions(self) -> list[str]:
        from_user = [message for message in self.messages if message.role == "user"]
        return [(from_user or self.messages)[-1].text]

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usage(self) -> Json:
        details = {
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
        return super().usage | details

    def reply(self, question: str) -> Choice:
        forced = self.tool_choice
        name = forced.function.name if isinstance(forced, Forced) else None
        functions = choose_functions(
            [tool.function for tool in self.tools or ()],
            name or (forced if isinstance(forced, str) else "auto"),
            question,
            done=self.messages[-1].role == "tool",
            parallel=self.parallel_tool_calls is not False,
        )
        if functions:
            return call_functions(functions, question, self.limit, named=bool(name))
        wanted = self.response_format
        if wanted and wanted.json_schema:
            text = json_text(
                wanted.json_schema.schema_,
                question,
                "response_format.json_schema.schema",
                strict=bool(wanted.json_schema.strict),
            )
        elif wanted and wanted.type == "json_object":
            text = json_object(self.prompts[0], question)
        else:
            text = answer(question)
        return cut(text, self.limit, self.stop)

    def head(self, key: str, kind: str) -> Json:
        return {**super().head(key, kind), "service_tier": self.tier}

    def whole(self, choice: Choice, index: int, key: str) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = None
            message["tool_calls"] = [
                {
                    "id": _call_id(key, index, position),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for position, call in enumerate(choice.calls)
            ]
        return {"message": {**message, "annotations": []}}

    def opening(self, choice: Choice, index: int, key: str) -> list[Json]:
        content = None if choice.calls else ""
        delta: Json = {"role": "assistant", "content": content, "refusal": None}
        return [{"delta": delta}]

    def pieces(self, choice: Choice, index: int, key: str) -> list[list[Json]]:
        if not choice.calls:
            return [[{"delta": {"content": token}}] for token in choice.tokens]
        pieces = []
        for position, call in enumerate(choice.calls):
            begun: Json = {
                "index": position,
                "id": _call_id(key, index, position),
                "type": "function",
                "function": {"name": call.name, "arguments": ""},
            }
            deltas: list[list[Any]] = [
                [{"index": position, "function": {"arguments": token}}]
                for token in call.tokens
            ]
            deltas[0].insert(0, begun)
            pieces += [
                [{"delta": {"tool_calls": [delta]}} for delta in each]
                for each in deltas
            ]
        return pieces

    def closing(self) -> Json:
        return {"delta": {}}


def _call_id(key: str, index: int, position: int) -> str:
    return call_id(key, index * MAX_TOOLS + position)


def _check_tool_messages(messages: list[Message]) -> None:
    """Raise ValueError unless each tool call is followed by exactly one result."""
    pending: list[str] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in pending:
                raise ValueError(
                    f"messages[{index}].role: messages with role 'tool' must be a "
                    "response to a preceding message with 'tool_calls'. Here, no such "
                    f"message has an open call with the id '{message.tool_call_id}'"
                )
            pending.remove(message.tool_call_id)
            continue
        _check_all_answered(pending)
        pending = [call.id for call in message.tool_calls or ()]
    _check_all_answered(pending)


def _check_all_answered(pending: list[str]) -> None:
    if pending:
        raise ValueError(
            "An assistant message with 'tool_calls' must be followed by tool messages "
            "responding to each 'tool_call_id'. The following tool_call_ids did not "
            f"have response messages: {', '.join(pending)}"
        )

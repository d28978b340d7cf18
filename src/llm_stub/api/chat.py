"""POST /v1/chat/completions: messages, function tools and response formats."""

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..answers import answer
from .completions import WithChoices
from .errors import Json
from .requests import ApiObject, Choice, Limit, cut
from .schema import Schema, json_object, json_text
from .tools import Function, call_function, call_id, choose_function

Role = Literal["developer", "system", "user", "assistant", "tool", "function"]


class Tool(ApiObject):
    """A function tool; the stub has no hosted tools."""

    type: Literal["function"]
    function: Function


class Name(ApiObject):
    """The name of a function."""

    name: str


class Forced(ApiObject):
    """The tool that must be called."""

    type: Literal["function"]
    function: Name


class Format(ApiObject):
    """The format that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("'json_schema' is missing")
        return self


class Part(ApiObject):
    """A text part of a message; the stub accepts no other kind."""

    type: Literal["text", "refusal"]
    text: str = ""


class Called(ApiObject):
    """A call that the model made earlier."""

    id: str


class Message(ApiObject):
    """One message of a chat."""

    role: Role
    content: str | list[Part] | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message with role '{self.role}' needs 'content'")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message with role 'tool' needs 'tool_call_id'")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Chat(WithChoices):
    """POST /v1/chat/completions"""

    PREFIX, KIND, KIND_OF_EVENT = "chatcmpl", "chat.completion", "chat.completion.chunk"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Forced | None = None
    response_format: Format | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _answers_a_call(self) -> Self:
        called: set[str | None] = set()
        for index, message in enumerate(self.messages):
            if message.tool_calls:
                called.update(call.id for call in message.tool_calls)
            if message.role == "tool" and message.tool_call_id not in called:
                raise ValueError(
                    f"messages[{index}].tool_call_id: no earlier message has "
                    f"'tool_calls' with the id '{message.tool_call_id}'"
                )
        return self

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
        function = choose_function(
            [tool.function for tool in self.tools or ()],
            name or (forced if isinstance(forced, str) else "auto"),
            question,
            done=self.messages[-1].role == "tool",
        )
        if function:
            return call_function(function, question, self.limit, named=bool(name))
        wanted = self.response_format
        if wanted and wanted.json_schema:
            schema = wanted.json_schema.schema_
            text = json_text(schema, question, "response_format.json_schema.schema")
        elif wanted and wanted.type == "json_object":
            text = json_object(self.prompts[0], question)
        else:
            text = answer(question)
        return cut(text, self.limit, self.stop)

    def head(self, key: str, kind: str) -> Json:
        return {**super().head(key, kind), "service_tier": "default"}

    def whole(self, choice: Choice, key: str) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.function:
            call = {"name": choice.function, "arguments": choice.text}
            message["content"] = None
            message["tool_calls"] = [
                {"id": call_id(key), "type": "function", "function": call}
            ]
        return {"message": {**message, "annotations": []}}

    def opening(self, choice: Choice, key: str) -> list[Json]:
        delta: Json = {"role": "assistant", "content": "", "refusal": None}
        if choice.function:
            call = {"name": choice.function, "arguments": ""}
            delta["content"] = None
            delta["tool_calls"] = [
                {"index": 0, "id": call_id(key), "type": "function", "function": call}
            ]
        return [{"delta": delta}]

    def piece(self, choice: Choice, token: str) -> Json:
        if not token:
            return {"delta": {}}
        if choice.function:
            return {
                "delta": {
                    "tool_calls": [{"index": 0, "function": {"arguments": token}}]
                }
            }
        return {"delta": {"content": token}}

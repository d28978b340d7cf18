"""POST /v1/responses: input items, output items, and the events of a stream."""

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..answers import answer
from .chat import Role
from .errors import Json
from .requests import ApiObject, Choice, Generation, created, cut, server_sent_event
from .schema import Schema, json_object, json_text
from .tools import Function, call_function, call_id, choose_function

Text = Literal["input_text", "output_text", "text", "refusal"]


class Part(ApiObject):
    """A text part of an item; the stub accepts no other kind."""

    type: Text
    text: str = ""


class Item(ApiObject):
    """A message, a function call, or the result of one."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = (
        "message"
    )
    role: Role | None = None
    content: str | list[Part] | None = None
    output: str | list[Part] | None = None
    call_id: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.type == "message" and (self.role is None or self.content is None):
            raise ValueError("a message needs 'role' and 'content'")
        if self.type.startswith("function") and self.call_id is None:
            raise ValueError(f"an item of type '{self.type}' needs 'call_id'")
        return self

    @property
    def text(self) -> str:
        """The content or output as one string."""
        said = self.output if self.type == "function_call_output" else self.content
        if isinstance(said, list):
            return "".join(part.text for part in said)
        return said or ""


class Tool(Function):
    """A function tool; the stub has no hosted tools."""

    type: Literal["function"]


class Forced(ApiObject):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


class Format(Schema):
    """The format that an answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""


class TextOptions(ApiObject):
    """Options for the text of the answer."""

    format: Format = Format()
    verbosity: Literal["low", "medium", "high"] | None = None


class Response(Generation):
    """POST /v1/responses; the stub stores no responses."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=16)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Forced | None = None
    text: TextOptions | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    reasoning: Json | None = None
    safety_identifier: str | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def items(self) -> list[Item]:
        """The input as a list of items."""
        if isinstance(self.input, str):
            return [Item(role="user", content=self.input)]
        return self.input

    @cached_property
    def prompts(self) -> list[str]:
        said = [item.text for item in self.items]
        return ["\n".join([self.instructions, *said] if self.instructions else said)]

    @cached_property
    def questions(self) -> list[str]:
        from_user = [item for item in self.items if item.role == "user"]
        return [(from_user or self.items)[-1].text]

    @cached_property
    def choices(self) -> list[Choice]:
        question, limit = self.questions[0], self.max_output_tokens
        forced = self.tool_choice
        tool_choice = forced.name if isinstance(forced, Forced) else forced or "auto"
        function = choose_function(
            list(self.tools or ()),
            tool_choice,
            question,
            done=self.items[-1].type == "function_call_output",
        )
        if function:
            return [call_function(function, question, limit, named=False)]
        wanted = self.text.format if self.text else Format()
        if wanted.type == "json_schema":
            text = json_text(wanted.schema_, question, "text.format.schema")
        elif wanted.type == "json_object":
            text = json_object(self.prompts[0], question)
        else:
            text = answer(question)
        return [cut(text, limit)]

    def item(self, key: str, status: str) -> Json:
        """The only item of the output: a message or a function call."""
        choice, in_progress = self.choices[0], status == "in_progress"
        if choice.function:
            return {
                "id": f"fc_{key[:32]}",
                "type": "function_call",
                "status": status,
                "call_id": call_id(key),
                "name": choice.function,
                "arguments": "" if in_progress else choice.text,
            }
        return {
            "id": f"msg_{key[:32]}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if in_progress else [_text_part(choice.text)],
        }

    @property
    def status(self) -> str:
        """The final status of the response."""
        return "incomplete" if self.choices[0].reason == "length" else "completed"

    def body(self, key: str) -> Json:
        return self.envelope(key, self.status)

    def envelope(self, key: str, status: str) -> Json:
        """The API's response object; `output` is empty until the response ends."""
        ended = status != "in_progress"
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        options = (self.text or TextOptions()).model_dump(by_alias=True)["format"]
        if options["type"] != "json_schema":
            options = {"type": options["type"]}
        verbosity = self.text.verbosity if self.text else None
        forced = self.tool_choice
        return {
            "id": f"resp_{key[:32]}",
            "object": "response",
            "created_at": created(key),
            "completed_at": created(key) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "model": self.model,
            "output": [self.item(key, status)] if ended else [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None} | (self.reasoning or {}),
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": options, "verbosity": verbosity or "medium"},
            "tool_choice": forced.model_dump()
            if isinstance(forced, Forced)
            else forced or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": self.truncation or "disabled",
            "usage": usage if ended else None,
            "user": self.user,
        }

    def events(self, key: str) -> Iterator[list[bytes]]:
        choice, number = self.choices[0], 0
        item = self.item(key, "in_progress")
        place: Json = {"output_index": 0}
        inner: Json = {"item_id": item["id"], **place}

        def event(kind: str, **fields: object) -> bytes:
            nonlocal number
            name = f"response.{kind}"
            number += 1
            return server_sent_event(
                {"type": name, "sequence_number": number - 1, **fields}, name
            )

        started = self.envelope(key, "in_progress")
        first = [
            event("created", response=started),
            event("in_progress", response=started),
            event("output_item.added", item=item, **place),
        ]
        if choice.function:
            yield first
            kind = "function_call_arguments"
            for token in choice.tokens:
                yield [event(f"{kind}.delta", delta=token, **inner)]
            last = [event(f"{kind}.done", arguments=choice.text, **inner)]
        else:
            inner["content_index"] = 0
            yield [*first, event("content_part.added", part=_text_part(""), **inner)]
            for token in choice.tokens:
                yield [event("output_text.delta", delta=token, logprobs=[], **inner)]
            last = [
                event("output_text.done", text=choice.text, logprobs=[], **inner),
                event("content_part.done", part=_text_part(choice.text), **inner),
            ]
        done = self.item(key, self.status)
        yield [
            *last,
            event("output_item.done", item=done, **place),
            event(self.status, response=self.body(key)),
        ]


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

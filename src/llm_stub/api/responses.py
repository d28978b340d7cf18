"""POST /v1/responses: input items, output items, and the events of a stream."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from propcache.api import cached_property
from pydantic import ConfigDict, Field, model_validator

from ..answers import answer
from .errors import ApiError, Json
from .requests import (
    CREATED,
    ApiObject,
    Choice,
    Conversation,
    Effort,
    FunctionCall,
    Name,
    StreamOptions,
    TextPart,
    cut,
    server_sent_event,
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

Role = Literal["user", "assistant", "system", "developer"]
InputText = Literal["input_text"]
OutputText = Literal["output_text", "refusal"]


class Part(TextPart):
    """A text part of an item; the stub accepts no other kind."""

    type: InputText | OutputText | Literal["reasoning_text", "summary_text"]


class Item(ApiObject):
    """A message, a function call, or the result of one."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = (
        "message"
    )
    role: Role | None = None
    content: str | list[Part] | None = None
    output: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_no_reference(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "item_reference":
            raise ValueError(
                "the stub stores no items, so it can't look up an item_reference. Send "
                "the whole item instead, and set 'store' to false"
            )
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.type == "message" and (self.role is None or self.content is None):
            raise ValueError("a message needs 'role' and 'content'")
        if self.type == "message" and isinstance(self.content, list):
            kinds = get_args(OutputText if self.role == "assistant" else InputText)
            for part in self.content:
                if part.type not in kinds:
                    raise ValueError(
                        f"content of type '{part.type}' in a message with role "
                        f"'{self.role}'. Supported values are: {', '.join(kinds)}"
                    )
        if self.type.startswith("function") and self.call_id is None:
            raise ValueError(f"an item of type '{self.type}' needs 'call_id'")
        if self.type == "function_call" and None in (self.name, self.arguments):
            raise ValueError("a function_call needs 'name' and 'arguments'")
        if self.type == "function_call_output" and self.output is None:
            raise ValueError("a function_call_output needs 'output'")
        return self

    @property
    def text(self) -> str:
        """The content or output as one string."""
        said = self.output if self.type == "function_call_output" else self.content
        if isinstance(said, list):
            return "".join(part.text for part in said)
        return said or ""


class Tool(FunctionTool, Function):
    """A function tool in a responses request."""


class Forced(FunctionChoice):
    """A function that the model must call, in a responses request."""

    name: Name


class Format(Schema):
    """The format that an answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "schema"

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        given = {"name", "schema_"} <= self.model_fields_set
        if self.type == "json_schema" and not given:
            raise ValueError("a json_schema needs 'name' and 'schema'")
        return self


class TextOptions(ApiObject):
    """Options for the text of the answer."""

    format: Format = Format()
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(StreamOptions):
    """Options for a stream. Unlike a chat's, it always contains the usage."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_usage(cls, value: Any) -> Any:
        if isinstance(value, dict) and "include_usage" in value:
            raise ValueError("unknown parameter 'include_usage'")
        return value


class Reasoning(ApiObject):
    """Options for reasoning; they have no effect."""

    model_config = ConfigDict(strict=True, extra="allow")

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class Response(Conversation):
    """POST /v1/responses; the stub stores no responses."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=16)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Forced | None = None
    text: TextOptions | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None

    def check(self) -> None:
        """Raise ApiError 400 for an invalid schema, or a call without a result."""
        check_functions(self.tools or (), "tools[{}].parameters")
        wanted = self.text.format if self.text else None
        if wanted and wanted.type == "json_schema":
            check_schema(
                wanted.schema_,
                f"response_format '{wanted.name}'",
                "text.format.schema",
                strict=bool(wanted.strict),
            )
        pending: list[str | None] = []
        for item in self.items:
            if item.type == "function_call":
                pending.append(item.call_id)
            elif item.type == "function_call_output":
                if item.call_id not in pending:
                    message = (
                        "No tool call found for function call output with call_id "
                        f"{item.call_id}."
                    )
                    raise ApiError(400, message, "input")
                pending.remove(item.call_id)
        if pending:
            message = f"No tool output found for function call {pending[0]}."
            raise ApiError(400, message, "input")

    def context_length_exceeded(self, limit: int, prompt_tokens: int) -> ApiError:
        message = (
            "Your input exceeds the context window of this model. Please adjust your "
            f"input and try again. (It has {prompt_tokens} tokens, and the limit is "
            f"{limit}.)"
        )
        return ApiError(400, message, "input", "context_length_exceeded")

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
        functions = choose_functions(
            self.tools or (),
            tool_choice,
            question,
            done=self.items[-1].type == "function_call_output",
            parallel=self.parallel_tool_calls is not False,
        )
        if functions:
            return [call_functions(functions, question, limit, named=False)]
        wanted = self.text.format if self.text else Format()
        if wanted.type == "json_schema":
            text = json_text(
                wanted.schema_,
                question,
                "text.format.schema",
                strict=bool(wanted.strict),
            )
        elif wanted.type == "json_object":
            text = json_object(self.prompts[0], question)
        else:
            text = answer(question)
        return [cut(text, limit)]

    def output(self, key: str, status: str) -> list[Json]:
        """The items of the output: a message, or the function calls."""
        choice = self.choices[0]
        if not choice.calls:
            return [_message(choice.text, key, status)]
        return [
            _function_call(call, key, number, status)
            for number, call in enumerate(choice.calls)
        ]

    @property
    def incomplete_because(self) -> str | None:
        """Why the answer is incomplete, in the API's words; None if it is complete."""
        reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
        return reasons.get(self.choices[0].reason)

    @property
    def status(self) -> str:
        """The final status of the response."""
        return "incomplete" if self.incomplete_because else "completed"

    def body(self, key: str) -> Json:
        return self.envelope(key, self.status)

    def envelope(self, key: str, status: str) -> Json:
        """The API's response object; `output` is empty until the response ends."""
        ended = status != "in_progress"
        reason = self.incomplete_because
        incomplete = {"reason": reason} if ended and reason else None
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
            "id": f"resp_{key}",
            "object": "response",
            "created_at": CREATED,
            "completed_at": CREATED if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "model": self.model,
            "output": self.output(key, status) if ended else [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": (self.reasoning or Reasoning()).model_dump(),
            "safety_identifier": self.safety_identifier,
            "service_tier": self.tier,
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
        ]
        if choice.calls:
            yield first
            last: list[bytes] = []
            for position, call in enumerate(choice.calls):
                begun = _function_call(call, key, position, "in_progress")
                place = {"output_index": position}
                inner = {"item_id": begun["id"], **place}
                group = [*last, event("output_item.added", item=begun, **place)]
                for token in call.tokens:
                    delta = event("function_call_arguments.delta", delta=token, **inner)
                    yield [*group, delta]
                    group = []
                last = [
                    event(
                        "function_call_arguments.done",
                        arguments=call.arguments,
                        **inner,
                    ),
                    event(
                        "output_item.done",
                        item=_function_call(call, key, position, self.status),
                        **place,
                    ),
                ]
        else:
            begun = _message("", key, "in_progress")
            place = {"output_index": 0}
            inner = {"item_id": begun["id"], **place, "content_index": 0}
            yield [
                *first,
                event("output_item.added", item=begun, **place),
                event("content_part.added", part=_text_part(""), **inner),
            ]
            for token in choice.tokens:
                yield [event("output_text.delta", delta=token, logprobs=[], **inner)]
            done = _message(choice.text, key, self.status)
            last = [
                event("output_text.done", text=choice.text, logprobs=[], **inner),
                event("content_part.done", part=_text_part(choice.text), **inner),
                event("output_item.done", item=done, **place),
            ]
        yield [*last, event(self.status, response=self.body(key))]


def _message(text: str, key: str, status: str) -> Json:
    return {
        "id": f"msg_{key}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if status == "in_progress" else [_text_part(text)],
    }


def _function_call(call: FunctionCall, key: str, number: int, status: str) -> Json:
    return {
        "id": f"fc_{number:04x}{key[:28]}",
        "type": "function_call",
        "status": status,
        "call_id": call_id(key, number),
        "name": call.name,
        "arguments": "" if status == "in_progress" else call.arguments,
    }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

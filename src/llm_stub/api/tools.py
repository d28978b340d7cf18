"""Function tools: which functions are called, and with which arguments.

Source: OpenAI's guide *Function calling*.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from .errors import ApiError, Json
from .requests import ApiObject, Choice, FunctionCall, Name, cut
from .schema import check_schema, json_text


class Function(ApiObject):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class OnlyFunctions(ApiObject):
    """An object of type `function`; the stub supports no other type."""

    REFUSAL: ClassVar[str]
    """The error for another type; `{}` is that type."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise ValueError(cls.REFUSAL.format(kind))
        return value


class FunctionTool(OnlyFunctions):
    """A tool that is a function; the stub has no other kind."""

    REFUSAL = (
        "the stub has no tools of type '{}'. Define a tool of type 'function' instead, "
        "and run it in your own code"
    )


class FunctionChoice(OnlyFunctions):
    """A choice of the function that the model must call."""

    REFUSAL = (
        "the stub doesn't support the type '{}'. Use 'none', 'auto', 'required' or a "
        "function; to allow only some tools, send only those"
    )


def check_functions(functions: Sequence[Function], param: str) -> None:
    """Raise ApiError 400 unless OpenAI would accept the schema of every function.

    `param` is where a function's schema is, such as `tools[{}].parameters`.
    """
    for index, function in enumerate(functions):
        schema = function.parameters
        if schema is None:
            continue
        where = f"function '{function.name}'"
        strict = bool(function.strict)
        check_schema(schema, where, param.format(index), strict=strict)


def choose_functions(
    functions: Sequence[Function],
    tool_choice: str,
    question: str,
    *,
    done: bool,
    parallel: bool,
) -> list[Function]:
    """The functions to call; an empty list for an answer in text.

    `tool_choice` is none, auto, required, or a name. With auto, the stub calls the
    functions whose names have words in common with the question, unless `done`:
    then the last message is the result of a call. Unless `parallel`, it calls only
    the one with the most words in common. Raises ApiError 400 if none of the
    functions fits.
    """
    if tool_choice == "none" or not functions:
        if tool_choice not in ("none", "auto"):
            raise ApiError(
                400,
                "'tool_choice' is only allowed when 'tools' are specified.",
                "tool_choice",
            )
        return []

    def common(function: Function) -> int:
        words = re.findall(r"[^\W_]{4,}", function.name.casefold())
        return sum(word in question.casefold() for word in words)

    if tool_choice in ("auto", "required"):
        best = max(functions, key=common)
        if tool_choice == "auto" and (done or not common(best)):
            return []
        return [one for one in functions if parallel and common(one)] or [best]
    for function in functions:
        if function.name == tool_choice:
            return [function]
    raise ApiError(400, f"There is no tool '{tool_choice}' in 'tools'.", "tool_choice")


def call_functions(
    functions: Sequence[Function], question: str, limit: int | None, *, named: bool
) -> Choice:
    """Calls of the functions, with arguments made from their schemas.

    All calls together have at most `limit` tokens. If `tool_choice` `named` the
    function, finish_reason is the same as for text.
    """
    calls: list[FunctionCall] = []
    reason = "stop" if named else "tool_calls"
    used = 0
    for function in functions:
        schema = function.parameters or {"type": "object"}
        text = json_text(schema, question, "tools", strict=bool(function.strict))
        made = cut(text, None if limit is None else limit - used)
        if made.tokens:
            calls.append(FunctionCall(function.name, made.tokens))
            used += len(made.tokens)
        if made.reason == "length":
            reason = "length"
            break
    return Choice(
        [token for call in calls for token in call.tokens], reason, tuple(calls)
    )


def call_id(key: str, number: int) -> str:
    """The id of the function call with this number in an answer."""
    return f"call_{number:04x}{key[:20]}"

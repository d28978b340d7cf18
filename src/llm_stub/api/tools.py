"""Function tools: which function is called, and with which arguments."""

import re

from .errors import ApiError, Json
from .requests import ApiObject, Choice, cut
from .schema import json_text


class Function(ApiObject):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


def choose_function(
    functions: list[Function], tool_choice: str, question: str, *, done: bool
) -> Function | None:
    """The function to call, or None.

    `tool_choice` is none, auto, required, or a name. With auto, the stub calls the
    function whose name has the most words in common with the question, unless
    `done`: then the last message is the result of a call. Raises ApiError 400 if
    none of the functions fits.
    """
    if tool_choice == "none" or not functions:
        if tool_choice not in ("none", "auto"):
            raise ApiError(
                400,
                "'tool_choice' is only allowed when 'tools' are specified.",
                "tool_choice",
            )
        return None

    def common(function: Function) -> int:
        words = re.findall(r"[^\W_]{4,}", function.name.casefold())
        return sum(word in question.casefold() for word in words)

    if tool_choice in ("auto", "required"):
        best = max(functions, key=common)
        return (
            best if tool_choice == "required" or (common(best) and not done) else None
        )
    for function in functions:
        if function.name == tool_choice:
            return function
    raise ApiError(400, f"There is no tool '{tool_choice}' in 'tools'.", "tool_choice")


def call_function(
    function: Function, question: str, limit: int | None, *, named: bool
) -> Choice:
    """A call of the function, with arguments made from its schema.

    If `tool_choice` `named` the function, finish_reason is the same as for text.
    """
    text = json_text(function.parameters or {"type": "object"}, question, "tools")
    made = cut(text, limit)
    if made.reason == "stop" and not named:
        return Choice(made.tokens, "tool_calls", function.name)
    return Choice(made.tokens, made.reason, function.name)


def call_id(key: str) -> str:
    """The id of a function call."""
    return f"call_{key[:24]}"

"""Caps: how many calls and tokens live mode may use, and how many it has used.

Before a call is sent, we reserve the most tokens that it can use: one for each byte
of its body, plus the token limit of each answer. A call without a limit gets the one
in the settings. We refuse a call whose tokens we can't bound. When the upstream
reports the actual usage, that replaces the reservation. A call that never reached the
upstream doesn't count. A `Ledger` stores the count and the caps.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from .answers import tokens
from .api.completions import DEFAULT_MAX_TOKENS
from .api.errors import ApiError, Json
from .api.requests import encode
from .journal import Attempt
from .ledger import Ledger
from .settings import Settings

CHATS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
# The parameters that limit an answer. A call without any of them gets the first.
LIMIT_NAMES: dict[str, tuple[str, ...]] = {
    CHATS: ("max_tokens",),
    COMPLETIONS: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
    "/v1/embeddings": (),
}
# OpenAI's newer models refuse `max_tokens` in chats. Ollama ignores the other name.
OPENAI_CHAT_LIMITS = ("max_completion_tokens", "max_tokens")
OPENAI_HOST = re.compile(r"(^|\.)openai(\.azure)?\.com$")
MIN_OUTPUT_TOKENS = 16  # the lowest limit that OpenAI accepts for a response
MAX_COUNT = 2**31 - 1  # the largest integer that every server can read

# Parameters that are refused, because we can't bound the tokens that they add.
STORED = (
    "the provider adds stored text to the prompt. Put the text itself into 'input'."
)
HOSTED = (
    "hosted tools add text to the prompt and cost extra. Use tools of type 'function'."
)
NOT_TEXT = (
    "only text, function calls and their results are sure to have at most one token "
    "per byte. Send only those."
)
UNBOUNDED = {
    "background": "the response doesn't report its token usage. Leave it out.",
    "context_management": "it uses tokens beyond the answer's limit. Leave it out.",
    "conversation": STORED,
    "data_sources": HOSTED,
    "plugins": HOSTED,
    "prediction": "rejected tokens count on top of the answer's limit. Leave it out.",
    "previous_response_id": STORED,
    "web_search_options": HOSTED,
}
TEXT_PARTS = (
    "text",
    "input_text",
    "output_text",
    "reasoning_text",
    "summary_text",
    "refusal",
)
TEXT_ITEMS = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
)


@dataclass
class Reservation:
    """The most tokens that a call can use. They count until its usage is known."""

    body: bytes = b""
    """What is sent. The prompt has at most one token per byte."""
    prompt: int = 0
    answer: int = 0
    """Tokens in each answer."""
    answers: int = 1
    estimate: int = 0
    """The stub's own estimate of the prompt's tokens, for the journal."""
    limit_set: int | None = None
    """The token limit that live mode added to the call."""
    sent: bool = False
    """Whether any part of the call may have reached the upstream."""

    @property
    def tokens(self) -> int:
        """All tokens that are reserved."""
        return self.prompt + self.answer * self.answers


class Caps:
    """Counts what the calls to an upstream use, and refuses calls over a cap."""

    def __init__(self, host: str, ledger: Ledger) -> None:
        self._ledger = ledger
        self._host = host
        # The longest answer that exceeded its limit, and the most prompt tokens that
        # the upstream has counted beyond the body's bytes.
        self._longest_answer = self._extra_prompt = 0

    def reserve(self, path: str, body: Json, settings: Settings) -> Reservation:
        """The most that the call can use. Adds a token limit to a body without one.

        Raises ApiError 400 for an invalid limit, and 403 if the call's tokens can't
        be bounded.
        """
        refuse_unbounded(path, body)
        prompts = named(body, "prompt", "input", "messages", "instructions")
        reserved = Reservation(estimate=estimate([value for _, value in prompts]))
        names = self._limit_names(path)
        if names:
            limits = counts(
                body, "max_completion_tokens", "max_output_tokens", "max_tokens"
            )
            if all(body.get(name) is None for name in names):
                limit = max(limits, default=default_limit(path, settings))
                body[names[0]] = reserved.limit_set = limit
                limits.append(limit)
            reserved.answer = max(*limits, self._longest_answer)
            reserved.answers = max(counts(body, "n", "best_of"), default=1)
            reserved.answers *= prompt_count(body)
        reserved.body = encode(body)  # the original could contain a name twice
        reserved.prompt = len(reserved.body) + self._extra_prompt
        return reserved

    def take(self, reserved: Reservation, settings: Settings) -> None:
        """Count the call and its reservation; ApiError 403 if it could exceed a cap."""
        caps = settings.max_calls, settings.max_tokens
        if self._ledger.take(reserved.tokens, *caps):
            return
        calls, tokens = self._ledger.used
        name, cap, used, more = "max_tokens", caps[1], tokens, reserved.tokens
        if calls + 1 > caps[0]:
            name, cap, used, more = "max_calls", caps[0], calls, 1
        message = (
            f"Not sent: this call could exceed live mode's cap {name}={cap} "
            f"({used} used so far, and up to {more} for this call). To raise "
            f"the cap, run connect(live=True, {name}=…)."
        )
        raise ApiError(403, message, name, "live_cap", kind="live_cap")

    def give_back(self, reserved: Reservation) -> None:
        """Undo `take` for a call that never reached the upstream."""
        self._ledger.add(-1, -reserved.tokens)

    def settle(self, reserved: Reservation, entry: Attempt, status: int) -> None:
        """Replace the reservation with the call's usage, if the upstream reported it.

        A call that the upstream rejected (4xx) uses no tokens. Any other reservation
        stays counted in full, because you may be charged even for a broken answer, or
        for one that a gateway replaced with a 504.
        """
        if 400 <= status < 500:
            self._ledger.add(0, -reserved.tokens)
        elif entry.prompt_tokens:
            used = entry.prompt_tokens + entry.completion_tokens
            self._ledger.add(0, used - reserved.tokens)
            self._learn(reserved, entry)
        elif status < 400:
            entry.prompt_tokens = reserved.estimate

    def _limit_names(self, path: str) -> tuple[str, ...]:
        """The parameters that limit an answer at this upstream, the usual one first."""
        if path == CHATS and OPENAI_HOST.search(self._host):
            return OPENAI_CHAT_LIMITS
        return LIMIT_NAMES[path]

    def _learn(self, reserved: Reservation, entry: Attempt) -> None:
        """Reserve more from now on if the upstream used more than was reserved."""
        extra = entry.prompt_tokens - len(reserved.body)
        self._extra_prompt = max(self._extra_prompt, extra)
        if entry.completion_tokens > reserved.answer * reserved.answers:
            longest = math.ceil(entry.completion_tokens / reserved.answers)
            self._longest_answer = max(self._longest_answer, longest)


def default_limit(path: str, settings: Settings) -> int:
    """The token limit of a call that doesn't set one.

    A completion gets the API's own default, so that it ends where it would without
    live mode. In the API, chats and responses have no default.
    """
    if path == COMPLETIONS:
        return DEFAULT_MAX_TOKENS
    least = MIN_OUTPUT_TOKENS if path == RESPONSES else 1
    return max(least, settings.max_answer_tokens)


def refuse_unbounded(path: str, body: Json) -> None:
    """Raise ApiError 403 for a call that can use more tokens than its body shows."""
    for name, value in named(body, *UNBOUNDED):
        if value is not False:
            raise unbounded(name, UNBOUNDED[name.casefold()])
    for name, value in named(body, "modalities"):
        if value not in ([], ["text"]):
            raise unbounded(name, NOT_TEXT)
    if path == RESPONSES and named(body, "prompt"):
        raise unbounded("prompt", STORED)
    for name, tools in named(body, "tools"):
        for index, tool in enumerate(_list(tools)):
            kind = isinstance(tool, dict) and tool.get("type")
            if kind and kind not in ("function", "custom"):
                raise unbounded(f"{name}[{index}]", HOSTED, kind)
    for name, items in named(body, "messages", "input", "instructions"):
        for index, item in enumerate(_list(items)):
            if isinstance(item, dict):
                refuse_unbounded_item(f"{name}[{index}]", item)


def refuse_unbounded_item(where: str, item: Json) -> None:
    """Raise ApiError 403 for a message or input item that isn't only text."""
    kind = item.get("type") or ("message" if "role" in item else None)
    # Without its content, the provider looks reasoning up by its id.
    by_id = kind == "reasoning" and not any(
        item.get(name) for name in ("content", "encrypted_content")
    )
    if by_id or kind == "item_reference":
        raise unbounded(where, STORED, kind)
    if kind not in TEXT_ITEMS or item.get("audio"):
        raise unbounded(where, NOT_TEXT, kind)
    for name, parts in named(item, "content", "output"):
        for index, part in enumerate(_list(parts)):
            if isinstance(part, dict) and part.get("type") not in TEXT_PARTS:
                param = f"{where}.{name}[{index}]"
                raise unbounded(param, NOT_TEXT, part.get("type"))


def unbounded(param: str, reason: str, kind: object = None) -> ApiError:
    """403 for a parameter, or an item of this kind, whose tokens we can't bound."""
    what = f"'{param}' of type {kind!r:.40}" if kind else f"'{param}'"
    message = f"Not sent: live mode can't limit the cost of {what}, because {reason}"
    return ApiError(403, message, param, "live_cap", kind="live_cap")


def named(body: Json, *names: str) -> list[tuple[str, Any]]:
    """The parameters with these names that aren't null.

    The case of names is ignored, because servers written in Go ignore it.
    """
    return [
        (name, value)
        for name, value in body.items()
        if name.casefold() in names and value is not None
    ]


def counts(body: Json, *names: str) -> list[int]:
    """The values of parameters that must be counts.

    Raises ApiError 400 for any other value, because servers interpret it differently.
    """
    found = []
    for name, value in named(body, *names):
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            message = (
                f"Invalid value for '{name}': {value!r:.40}. Live mode's caps need a "
                f"whole number from 1 to {MAX_COUNT}."
            )
            raise ApiError(400, message, name, "invalid_value")
        found.append(value)
    return found


def prompt_count(body: Json) -> int:
    """How many prompts a completion has; a list of token ids is one prompt."""
    return max(
        [
            len(prompts)
            for _, prompts in named(body, "prompt")
            if isinstance(prompts, list)
            and not all(isinstance(p, int) for p in prompts)
        ],
        default=1,
    )


def estimate(value: Any) -> int:
    """Estimate the tokens in all texts of a value."""
    if isinstance(value, str):
        return len(tokens(value))
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(estimate, value))
    return int(isinstance(value, int))  # a prompt may consist of token ids


def usage(tail: bytes) -> tuple[int, int]:
    """Prompt and answer tokens, read from the end of an answer; (0, 0) if absent."""
    text = tail.decode(errors="replace")

    def last(*names: str) -> int | None:
        found = re.findall(rf'"(?:{"|".join(names)})"\s*:\s*(\d+)', text)
        return int(found[-1]) if found else None

    prompt = last("prompt_tokens", "input_tokens")
    answer = last("completion_tokens", "output_tokens")
    total = last("total_tokens")
    if not prompt or (answer is None and total is None):
        return 0, 0
    # Some servers omit the total, others don't count reasoning as part of the answer.
    return prompt, max(answer or 0, (total or 0) - prompt)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

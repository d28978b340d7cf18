"""Completions, and what they share with chats: `n` choices, each with an index."""

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field

from ..answers import answer
from .errors import Json
from .requests import (
    Choice,
    Generation,
    Limit,
    Stop,
    created,
    cut,
    server_sent_event,
)


class WithChoices(Generation):
    """Completions and chats: `n` choices, each with an index."""

    PREFIX: ClassVar[str]
    KIND: ClassVar[str]
    KIND_OF_EVENT: ClassVar[str]

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Limit | None = None
    stop: Stop | None = None

    @property
    def limit(self) -> int | None:
        """The maximum number of tokens in each answer."""
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
        """The API's usage object; tokens are the stub's own estimate."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def whole(self, choice: Choice, key: str) -> Json:
        """The part of a choice that contains the whole answer."""
        raise NotImplementedError

    def opening(self, choice: Choice, key: str) -> list[Json]:
        """The parts of a choice that precede its first token."""
        return []

    def piece(self, choice: Choice, token: str) -> Json:
        """The part of an event's choice that contains one token, or '' at the end."""
        raise NotImplementedError

    def head(self, key: str, kind: str) -> Json:
        """The fields at the start of a body and of every event."""
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
            return server_sent_event(
                {**head, "choices": [{**_indexed(index, reason), **piece}]}
            )

        yield [
            event(index, piece)
            for index, choice in choices
            for piece in self.opening(choice, f"{index}{key}")
        ]
        for position in range(self.longest_answer):
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
            last.append(server_sent_event({**head, "choices": [], "usage": self.usage}))
        yield [*last, b"data: [DONE]\n\n"]


class Completion(WithChoices):
    """POST /v1/completions. Prompts given as token ids are refused."""

    PREFIX, KIND, KIND_OF_EVENT = "cmpl", "text_completion", "text_completion"

    prompt: str | Annotated[list[str], Field(min_length=1)]

    @cached_property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def whole(self, choice: Choice, key: str) -> Json:
        return {"text": choice.text}

    def piece(self, choice: Choice, token: str) -> Json:
        return {"text": token}


def _indexed(index: int, reason: str | None) -> Json:
    return {"index": index, "logprobs": None, "finish_reason": reason}

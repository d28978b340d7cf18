"""Completions, and what they share with chats: `n` choices, each with an index."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Self

from propcache.api import cached_property
from pydantic import Field, field_validator, model_validator

from ..answers import answer
from .errors import ApiError, Json, context_length_exceeded
from .requests import (
    CREATED,
    MAX_PROMPT_TOKENS,
    ApiObject,
    Choice,
    Generation,
    Limit,
    Stop,
    cut,
    server_sent_event,
)

DEFAULT_MAX_TOKENS = 16  # in a completion that sets no limit
TokenId = Annotated[str, Field(pattern=r"^\d+$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]


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

    def whole(self, choice: Choice, index: int, key: str) -> Json:
        """The part of a choice that contains the whole answer."""
        raise NotImplementedError

    def opening(self, choice: Choice, index: int, key: str) -> list[Json]:
        """The parts of a stream's choice that precede its first token."""
        return []

    def pieces(self, choice: Choice, index: int, key: str) -> list[list[Json]]:
        """For each token, the parts of a stream's choice that contain it."""
        raise NotImplementedError

    def closing(self) -> Json:
        """The part of a stream's choice that ends it."""
        raise NotImplementedError

    def head(self, key: str, kind: str) -> Json:
        """The fields at the start of a body and of every event."""
        return {
            "id": f"{self.PREFIX}-{key[:29]}",
            "object": kind,
            "created": CREATED,
            "model": self.model,
            "system_fingerprint": "fp_stub",
        }

    def body(self, key: str) -> Json:
        choices = [
            {**_indexed(index, choice.reason), **self.whole(choice, index, key)}
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
            for piece in self.opening(choice, index, key)
        ]
        pieces = [self.pieces(choice, index, key) for index, choice in choices]
        for position in range(self.longest_answer):
            yield [
                event(index, piece)
                for index, of_choice in enumerate(pieces)
                if position < len(of_choice)
                for piece in of_choice[position]
            ]
        last = [
            event(index, self.closing(), choice.reason) for index, choice in choices
        ]
        if "usage" in head:
            last.append(server_sent_event({**head, "choices": [], "usage": self.usage}))
        yield [*last, b"data: [DONE]\n\n"]


class Penalties(ApiObject):
    """Parameters that must be in the documented range, but have no effect."""

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class Completion(Penalties, WithChoices):
    """POST /v1/completions. Prompts given as token ids are refused."""

    PREFIX, KIND, KIND_OF_EVENT = "cmpl", "text_completion", "text_completion"

    prompt: str | Annotated[list[str], Field(min_length=1)] | None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(not isinstance(p, str) for p in prompt):
            raise ValueError("the stub doesn't accept token ids; send text instead")
        return prompt

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.best_of and self.best_of < (self.n or 1):
            raise ValueError("'best_of' must be at least 'n'")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise ValueError(
                "results can't be streamed if 'best_of' is greater than 'n'"
            )
        return self

    @cached_property
    def prompts(self) -> list[str]:
        if isinstance(self.prompt, list):
            return self.prompt
        return [self.prompt or ""]

    @cached_property
    def completion_tokens(self) -> int:
        """Tokens in all answers, also in those that are not among the best."""
        returned = sum(len(choice.tokens) for choice in self.choices)
        made, kept = self.best_of or self.n or 1, self.n or 1
        return returned * made // kept

    def check(self) -> None:
        if self.limit > MAX_PROMPT_TOKENS:
            raise self.context_length_exceeded(MAX_PROMPT_TOKENS, self.prompt_tokens)

    @property
    def limit(self) -> int:
        return self.max_tokens or DEFAULT_MAX_TOKENS

    def context_length_exceeded(self, limit: int, prompt_tokens: int) -> ApiError:
        return context_length_exceeded(limit, prompt_tokens, self.limit)

    def whole(self, choice: Choice, index: int, key: str) -> Json:
        return {"text": choice.text}

    def pieces(self, choice: Choice, index: int, key: str) -> list[list[Json]]:
        return [[{"text": token}] for token in choice.tokens]

    def closing(self) -> Json:
        return {"text": ""}


def _indexed(index: int, reason: str | None) -> Json:
    return {"index": index, "logprobs": None, "finish_reason": reason}

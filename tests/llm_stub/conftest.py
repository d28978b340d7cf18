"""Helpers shared by several test files of the stub."""

from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion, FileObject
from pydantic import BaseModel

from helpers.connection import Provider
from tests.llm_stub.test_wire import undocumented

Json = dict[str, Any]
Ids = tuple[str, int, str | None]
AskForIds = Callable[..., Ids]


def finished_attempts(provider: Provider) -> list[Json]:
    """The journal's attempts in order of arrival, once all of them have ended."""
    attempts: list[Json] = provider.ask("/_provider/journal?settle=10")["attempts"]
    assert all(entry["end"] is not None for entry in attempts)
    return attempts


def ids_of(completion: Completion) -> Ids:
    """Everything in a completion that identifies it."""
    return completion.id, completion.created, completion._request_id


@pytest.fixture
def ask_for_ids(client: OpenAI) -> AskForIds:
    """Send a prompt as the client's nth attempt; returns the ids of the answer."""

    def ask(prompt: str, attempt: int = 1) -> Ids:
        header = {"x-stainless-retry-count": str(attempt - 1)}
        return ids_of(
            client.completions.create(model="m", prompt=prompt, extra_headers=header)
        )

    return ask


def upload(client: OpenAI, content: bytes, purpose: Any = "batch") -> FileObject:
    return client.files.create(file=("requests.jsonl", content), purpose=purpose)


def assert_matches_exactly(kind: type[BaseModel], raw: Any) -> None:
    """The raw response is of the SDK's type and has no other fields."""
    assert undocumented(kind.model_validate_json(raw.text, strict=True)) == []

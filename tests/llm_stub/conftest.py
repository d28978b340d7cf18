"""Helpers shared by several test files of the stub."""

from typing import Any

from openai import OpenAI
from openai.types import FileObject
from pydantic import BaseModel

from helpers.connection import Provider

Json = dict[str, Any]

ID_FIELDS = {"id", "call_id", "item_id", "tool_call_id", "request_id"}


def without_ids(body: Any) -> Any:
    """A body, or a list of bodies, as dicts and lists without the random ids."""
    if isinstance(body, BaseModel):
        body = body.model_dump()
    if isinstance(body, dict):
        return {
            name: without_ids(value)
            for name, value in body.items()
            if name not in ID_FIELDS
        }
    return [*map(without_ids, body)] if isinstance(body, list) else body


def undocumented(value: Any) -> list[str]:
    """Names of the fields, at any depth, that the SDK's type doesn't declare."""
    if isinstance(value, list):
        return [name for item in value for name in undocumented(item)]
    if not isinstance(value, BaseModel):
        return []
    nested = [name for _, field in value for name in undocumented(field)]
    return list(value.model_extra or {}) + nested


def assert_matches_exactly(kind: type[BaseModel], raw: Any) -> None:
    """The raw response is of the SDK's type and has no other fields."""
    assert undocumented(kind.model_validate_json(raw.text, strict=True)) == []


def finished_attempts(provider: Provider) -> list[Json]:
    """The journal's attempts in order of arrival, once all of them have ended."""
    attempts: list[Json] = provider.ask("/_provider/journal?settle=10")["attempts"]
    assert all(entry["end"] is not None for entry in attempts)
    return attempts


def upload(client: OpenAI, content: bytes, purpose: Any = "batch") -> FileObject:
    return client.files.create(file=("requests.jsonl", content), purpose=purpose)

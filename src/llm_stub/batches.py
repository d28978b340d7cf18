"""Batches: /v1/batches, kept in memory.

Source: OpenAI's API reference, the page Batch. The error codes of a failed
validation are from the Batch guide.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web
from pydantic import ConfigDict, field_validator

from .api import ENDPOINTS, read_call
from .api.errors import ApiError, Json, internal_error
from .api.parameters import PARAMETERS
from .api.requests import (
    ApiObject,
    Metadata,
    check_model,
    parse,
    read,
    unique_key,
)
from .files import ExpiresAfter, Files, page
from .state import State

MAX_LINES = 50_000  # requests in one batch
MAX_ERRORS = 100  # reported for one failed validation
SLICE = 0.01  # seconds that a batch works before it lets other requests run


class Create(ApiObject):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(strict=True, extra="allow")

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("endpoint")
    @classmethod
    def _exists(cls, endpoint: str) -> str:
        if endpoint not in ENDPOINTS:
            raise ValueError(f"it must be one of {', '.join(ENDPOINTS)}")
        return endpoint


class Line(ApiObject):
    """One line of an input file."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass
class Batch:
    """A batch and its progress."""

    id: str
    request: Create
    expires_after: float
    created_at: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    started: float = field(default_factory=time.monotonic)
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    errors: list[Json] = field(default_factory=list)
    total: int = 0
    model: str | None = None
    outputs: list[bytes] = field(default_factory=list)
    failures: list[bytes] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    files: dict[str, str] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    @property
    def age(self) -> float:
        """Seconds since it was created."""
        return time.monotonic() - self.started

    def enter(self, status: str) -> None:
        """Change to another status, and record the time."""
        self.status = status
        self.times[f"{status}_at"] = self.created_at + int(self.age)

    def body(self) -> Json:
        """The API's batch object."""
        moments = "in_progress finalizing completed failed expired cancelling cancelled"
        prompt_tokens, answer_tokens = self.tokens
        failed = {"object": "list", "data": self.errors} if self.errors else None
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.request.endpoint,
            "model": self.model,
            "errors": failed,
            "input_file_id": self.request.input_file_id,
            "completion_window": self.request.completion_window,
            "status": self.status,
            "output_file_id": self.files.get("output"),
            "error_file_id": self.files.get("error"),
            "created_at": self.created_at,
            "expires_at": self.created_at + int(self.expires_after),
            **{f"{name}_at": self.times.get(f"{name}_at") for name in moments.split()},
            "request_counts": {
                "total": self.total,
                "completed": len(self.outputs),
                "failed": len(self.failures),
            },
            "metadata": self.request.metadata,
            "usage": {
                "input_tokens": prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": answer_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt_tokens + answer_tokens,
            },
        }


class Batches:
    """The batches, and their routes."""

    def __init__(self, state: State, files: Files) -> None:
        self._state, self._files = state, files
        self._batches: dict[str, Batch] = {}

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/batches"""
        wanted = read(Create, await request.read(), PARAMETERS["/v1/batches"])
        file = self._files.find(wanted.input_file_id)
        if file is None or file.purpose != "batch":
            message = (
                f"There is no file '{wanted.input_file_id}' with purpose 'batch'. "
                "Upload it first."
            )
            raise ApiError(400, message, "input_file_id", "invalid_value")
        id_ = f"batch_{unique_key()}"
        batch = Batch(id_, wanted, self._state.settings.batch_window)
        self._batches[id_] = batch
        batch.task = asyncio.create_task(self._work(batch, file.content))
        return web.json_response(batch.body())

    async def list_batches(self, request: web.Request) -> web.Response:
        """GET /v1/batches?limit=&after="""
        bodies = [batch.body() for batch in reversed(self._batches.values())]
        return page(request, bodies, default_limit=20, max_limit=100)

    async def get(self, request: web.Request) -> web.Response:
        """GET /v1/batches/{id}"""
        return web.json_response(self._requested(request).body())

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /v1/batches/{id}/cancel"""
        batch = self._requested(request)
        if batch.status not in ("validating", "in_progress"):
            message = f"Cannot cancel a batch with status '{batch.status}'."
            raise ApiError(409, message)
        batch.enter("cancelling")
        return web.json_response(batch.body())

    def _requested(self, request: web.Request) -> Batch:
        id_ = request.match_info["id"]
        if id_ not in self._batches:
            raise ApiError(404, f"No batch found with id '{id_}'.", "id")
        return self._batches[id_]

    async def _work(self, batch: Batch, content: bytes) -> None:
        """Take a batch from `validating` to its final status, at the set speed."""
        numbered = [
            (number, line)
            for number, line in enumerate(content.split(b"\n"), 1)
            if line.strip()
        ]
        lines = [line for _, line in numbered]
        batch.total = len(lines)
        async for _ in _in_turns(self._validate(batch, numbered)):
            if batch.status == "cancelling":
                break
        if batch.errors:
            batch.total = 0
            batch.enter("failed")
            return
        if batch.status != "cancelling":
            batch.enter("in_progress")
        started, done = time.monotonic(), 0
        while done < len(lines) and batch.status == "in_progress":
            if batch.age > batch.expires_after:
                break
            due = (time.monotonic() - started) * self._state.settings.batch_speed
            turn = time.monotonic() + SLICE
            while done < min(due, len(lines)) and time.monotonic() < turn:
                self._answer(batch, json.loads(lines[done]), done)
                done += 1
            # If more lines are due, don't sleep: only let other requests run.
            await asyncio.sleep(0 if done < min(due, len(lines)) else SLICE)
        left = lines[done:]
        end = "expired" if left else "completed"
        if batch.status == "cancelling":
            end = "cancelled"
        if "in_progress_at" in batch.times:  # all lines have been validated
            self._write_unfinished(batch, left, end)
        batch.enter("finalizing")
        await asyncio.sleep(0)
        for kind, written in (("output", batch.outputs), ("error", batch.failures)):
            if written:
                name = f"{batch.id}_{kind}.jsonl"
                expiry = batch.request.output_expires_after
                file = self._files.add(
                    name,
                    "batch_output",
                    b"".join(written),
                    expires_after=expiry.seconds if expiry else None,
                )
                batch.files[kind] = file.id
        batch.enter(end)

    def _validate(self, batch: Batch, lines: list[tuple[int, bytes]]) -> Iterator[None]:
        """Check all lines, one per step, and add the problems to `batch.errors`."""

        def wrong(code: str, message: str, line: int | None, param: str | None) -> None:
            problem = {"code": code, "message": message, "line": line, "param": param}
            batch.errors.append(problem)

        if not lines:
            wrong("empty_file", "The input file is empty.", None, None)
        if len(lines) > MAX_LINES:
            message = f"The file has {len(lines)} lines; the limit is {MAX_LINES}."
            wrong("too_many_tasks", message, None, None)
            return
        seen: set[str] = set()
        for number, raw in lines:
            yield
            if len(batch.errors) >= MAX_ERRORS:
                return
            try:
                line = parse(Line, raw)
            except ApiError as error:
                problem = error.body["error"]
                code = problem["code"] or "invalid_json_line"
                wrong(code, problem["message"], number, problem["param"])
                continue
            model = line.body.get("model")
            if line.body.get("stream"):
                message = "Streaming is not supported in a batch."
                wrong("invalid_request", message, number, "body.stream")
            if line.custom_id in seen:
                message = f"The custom_id '{line.custom_id}' is not unique."
                wrong("duplicate_custom_id", message, number, "custom_id")
            if line.url != batch.request.endpoint:
                message = (
                    f"The url '{line.url}' differs from the batch's endpoint "
                    f"'{batch.request.endpoint}'."
                )
                wrong("url_mismatch", message, number, "url")
            if batch.model is not None and model != batch.model:
                message = (
                    f"The model '{model}' differs from '{batch.model}' in an earlier "
                    "line."
                )
                wrong("model_mismatch", message, number, "body.model")
            seen.add(line.custom_id)
            batch.model = batch.model or model

    def _answer(self, batch: Batch, line: Mapping[str, Any], number: int) -> None:
        """Answer one line as its route would answer a direct request."""
        settings = self._state.settings
        try:
            call = read_call(line["url"], json.dumps(line["body"]).encode())
            check_model(call.model, settings.models)
            body = call.body(unique_key())
            status, written = 200, batch.outputs
            batch.tokens[0] += call.prompt_tokens
            batch.tokens[1] += call.completion_tokens
        except ApiError as error:
            status, written, body = error.status, batch.failures, error.body
        except Exception as error:  # one line must not stop the others
            logging.exception("line %d of %s", number + 1, batch.id)
            status, written, body = 500, batch.failures, internal_error(error).body
        response = {
            "status_code": status,
            "request_id": f"req_{unique_key()}",
            "body": body,
        }
        written.append(_result(line["custom_id"], response, None))

    def _write_unfinished(self, batch: Batch, lines: Iterable[bytes], end: str) -> None:
        """Write the requests that were not executed to the error file.

        Source of the codes: OpenAI's OpenAPI description, BatchRequestOutput.
        """
        for raw in lines:
            message = f"The batch was {end} before this request was executed."
            error = {"code": f"batch_{end}", "message": message}
            result = _result(json.loads(raw)["custom_id"], None, error)
            batch.failures.append(result)


async def _in_turns(steps: Iterator[None]) -> Any:
    """Run the steps, but let other requests run every few milliseconds."""
    turn = time.monotonic() + SLICE
    for _ in steps:
        if time.monotonic() > turn:
            await asyncio.sleep(0)
            turn = time.monotonic() + SLICE
            yield


def _result(custom_id: str, response: Json | None, error: Any) -> bytes:
    line = {
        "id": f"batch_req_{unique_key()}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line).encode() + b"\n"

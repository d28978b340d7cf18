"""Files and batches: /v1/files and /v1/batches, kept in memory.

Source: OpenAI's API reference, the pages Files and Batch, and its Batch guide
for the codes of a failed validation.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError
from pydantic import ConfigDict

from . import wire
from .behaviour import Settings, digest
from .chat import Chat
from .embeddings import Embedding
from .responses import Response
from .wire import ApiError, Call, Checked, Json

FILE_MOST = 200 * 2**20  # bytes of one file
FILES_MOST = 2**30  # bytes of all files together
LINES_MOST = 50_000  # requests in one batch
ERRORS_MOST = 100  # of a failed validation that are told
TURN = 0.01  # seconds that a batch works before others have their turn
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
ENDPOINTS: dict[str, type[Call]] = {
    kind.ROUTE: kind for kind in (Chat, wire.Completion, Response, Embedding)
}


class Create(Checked):
    """POST /v1/batches"""

    model_config = ConfigDict(strict=True, extra="allow")

    input_file_id: str
    endpoint: Literal[
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
    ]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class Line(Checked):
    """One line of a batch's input file."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass
class File:
    """An uploaded file, or one that a batch has written."""

    id: str
    name: str
    purpose: str
    content: bytes

    def body(self) -> Json:
        """The file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": wire.created(digest(self.id)),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


@dataclass
class Batch:
    """A batch and how far it has come."""

    id: str
    request: Create
    expires_after: float
    begun: float = field(default_factory=time.monotonic)
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
        return time.monotonic() - self.begun

    @property
    def created_at(self) -> int:
        """When it was created, in seconds since 1970, by its id alone."""
        return wire.created(digest(self.id))

    def enter(self, status: str) -> None:
        """Go on to another status, and note the time."""
        self.status = status
        self.times[f"{status}_at"] = self.created_at + int(self.age)

    def body(self) -> Json:
        """The batch object."""
        moments = "in_progress finalizing completed failed expired cancelling cancelled"
        asked, generated = self.tokens
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
                "input_tokens": asked,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": asked + generated,
            },
        }


class Batches:
    """The routes, the files and the batches."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._files: dict[str, File] = {}
        self._batches: dict[str, Batch] = {}
        self._made = 0

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add all routes of files and batches."""
        router.add_post("/v1/files", self.upload)
        router.add_get("/v1/files", self.list_files, allow_head=False)
        router.add_get("/v1/files/{id}", self.get_file, allow_head=False)
        router.add_delete("/v1/files/{id}", self.delete_file)
        router.add_get("/v1/files/{id}/content", self.content, allow_head=False)
        router.add_post("/v1/batches", self.create)
        router.add_get("/v1/batches", self.list_batches, allow_head=False)
        router.add_get("/v1/batches/{id}", self.get_batch, allow_head=False)
        router.add_post("/v1/batches/{id}/cancel", self.cancel)

    # Files

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files, multipart/form-data with `file` and `purpose`."""
        if request.content_type != "multipart/form-data":
            raise ApiError(400, "The body must be multipart/form-data.")
        purpose, name, content = "", None, bytearray()
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader):
                    raise ValueError("it has a form within a form")
                if part.name == "purpose":
                    purpose = await part.text()
                elif part.name == "file":
                    name = part.filename or "file"
                    while chunk := await part.read_chunk(2**20):
                        content += chunk
                        self._check_size(len(content))
        except (
            *(ValueError, AssertionError, LookupError, RuntimeError),
            HttpProcessingError,  # a part's own headers
        ) as error:
            raise ApiError(400, f"The form could not be read: {error}") from None
        if name is None:
            raise _missing("file")
        if not purpose:
            raise _missing("purpose")
        if purpose not in PURPOSES:
            message = f"'{purpose}' is not one of {', '.join(PURPOSES)}."
            raise ApiError(400, message, "purpose", "invalid_value")
        return web.json_response(self.add(name, purpose, bytes(content)).body())

    def add(self, name: str, purpose: str, content: bytes) -> File:
        """Keep a file; its id depends on what it is and on its place."""
        self._made += 1
        id_ = f"file-{digest(self._made, name, purpose, digest(content))[:24]}"
        self._files[id_] = File(id_, name, purpose, content)
        return self._files[id_]

    async def list_files(self, request: web.Request) -> web.Response:
        """GET /v1/files?purpose=&limit=&order=&after="""
        purpose = request.query.get("purpose")
        files = [
            file
            for file in self._files.values()
            if purpose is None or file.purpose == purpose
        ]
        if request.query.get("order", "desc") == "desc":
            files.reverse()
        return _page(request, [file.body() for file in files], 10_000)

    async def get_file(self, request: web.Request) -> web.Response:
        """GET /v1/files/{id}"""
        return web.json_response(self.file(request.match_info["id"]).body())

    async def delete_file(self, request: web.Request) -> web.Response:
        """DELETE /v1/files/{id}"""
        file = self.file(request.match_info["id"])
        del self._files[file.id]
        return web.json_response({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.Response:
        """GET /v1/files/{id}/content"""
        file = self.file(request.match_info["id"])
        return web.Response(body=file.content, content_type="application/octet-stream")

    def file(self, id_: str) -> File:
        """The file of this id, or the API's 404."""
        if id_ not in self._files:
            raise ApiError(404, f"No such File object: {id_}", "id")
        return self._files[id_]

    def _check_size(self, size: int) -> None:
        kept = sum(len(file.content) for file in self._files.values())
        if size > FILE_MOST:
            raise ApiError(413, f"The file is larger than {FILE_MOST} bytes.")
        if kept + size > FILES_MOST:
            message = f"The files take more than {FILES_MOST} bytes: delete some first."
            raise ApiError(413, message)

    # Batches

    async def create(self, request: web.Request) -> web.Response:
        """POST /v1/batches"""
        asked = wire.read(Create, await request.read())
        file = self._files.get(asked.input_file_id)
        if file is None or file.purpose != "batch":
            message = f"There is no file '{asked.input_file_id}' of purpose 'batch'."
            raise ApiError(400, message, "input_file_id", "invalid_value")
        self._made += 1
        id_ = f"batch_{digest(self._made, file.id)[:32]}"
        batch = Batch(id_, asked, self._settings().batch_window)
        self._batches[id_] = batch
        batch.task = asyncio.create_task(self._work(batch, file.content))
        return web.json_response(batch.body())

    async def list_batches(self, request: web.Request) -> web.Response:
        """GET /v1/batches?limit=&after="""
        bodies = [batch.body() for batch in reversed(self._batches.values())]
        return _page(request, bodies, 20)

    async def get_batch(self, request: web.Request) -> web.Response:
        """GET /v1/batches/{id}"""
        return web.json_response(self.batch(request.match_info["id"]).body())

    async def cancel(self, request: web.Request) -> web.Response:
        """POST /v1/batches/{id}/cancel"""
        batch = self.batch(request.match_info["id"])
        if batch.status not in ("validating", "in_progress"):
            message = f"Cannot cancel a batch with status '{batch.status}'."
            raise ApiError(409, message)
        batch.enter("cancelling")
        return web.json_response(batch.body())

    def batch(self, id_: str) -> Batch:
        """The batch of this id, or the API's 404."""
        if id_ not in self._batches:
            raise ApiError(404, f"No batch found with id '{id_}'.", "id")
        return self._batches[id_]

    async def _work(self, batch: Batch, content: bytes) -> None:
        """Take a batch through its life; requests are answered at its speed."""
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
        begun, done = time.monotonic(), 0
        while done < len(lines) and batch.status == "in_progress":
            if batch.age > batch.expires_after:
                break
            due = (time.monotonic() - begun) * self._settings().batch_speed
            turn = time.monotonic() + TURN
            while done < min(due, len(lines)) and time.monotonic() < turn:
                self._answer(batch, json.loads(lines[done]), done)
                done += 1
            # With more to do, others have their turn and no more.
            await asyncio.sleep(0 if done < min(due, len(lines)) else TURN)
        left = lines[done:]
        end = "expired" if left else "completed"
        if batch.status == "cancelling":
            end = "cancelled"
        if "in_progress_at" in batch.times:  # so all lines have been checked
            self._name_left(batch, left, end)
        batch.enter("finalizing")
        await asyncio.sleep(0)
        for kind, written in (("output", batch.outputs), ("error", batch.failures)):
            if written:
                name = f"{batch.id}_{kind}.jsonl"
                file = self.add(name, "batch_output", b"".join(written))
                batch.files[kind] = file.id
        batch.enter(end)

    def _validate(self, batch: Batch, lines: list[tuple[int, bytes]]) -> Iterator[None]:
        """Check all lines, one a step; what is wrong goes to `batch.errors`."""

        def wrong(code: str, message: str, line: int | None, param: str | None) -> None:
            problem = {"code": code, "message": message, "line": line, "param": param}
            batch.errors.append(problem)

        if not lines:
            wrong("empty_file", "The input file is empty.", None, None)
        if len(lines) > LINES_MOST:
            message = f"The file has {len(lines)} lines, more than {LINES_MOST}."
            wrong("too_many_tasks", message, None, None)
            return
        seen: set[str] = set()
        for number, raw in lines:
            yield
            if len(batch.errors) >= ERRORS_MOST:
                return
            try:
                line = wire.parse(Line, raw)
            except ApiError as error:
                told = error.body["error"]
                code = told["code"] or "invalid_json_line"
                wrong(code, told["message"], number, told["param"])
                continue
            model = line.body.get("model")
            if line.custom_id in seen:
                message = f"The custom_id '{line.custom_id}' is not unique."
                wrong("duplicate_custom_id", message, number, "custom_id")
            if line.url != batch.request.endpoint:
                message = f"The url '{line.url}' is not the batch's endpoint."
                wrong("url_mismatch", message, number, "url")
            if batch.model is not None and model != batch.model:
                message = f"The model '{model}' is not that of the first line."
                wrong("model_mismatch", message, number, "body.model")
            seen.add(line.custom_id)
            batch.model = batch.model or model

    def _answer(self, batch: Batch, line: Mapping[str, Any], number: int) -> None:
        """Answer one line as the route itself would."""
        settings = self._settings()
        try:
            call = wire.read(ENDPOINTS[line["url"]], json.dumps(line["body"]).encode())
            if settings.models is not None and call.model not in settings.models:
                raise wire.no_model(call.model)
            body = call.body(digest(settings.seed, *call.prompts, 1))
            status, written = 200, batch.outputs
            batch.tokens[0] += call.asked
            batch.tokens[1] += call.generated
        except ApiError as error:
            status, written, body = error.status, batch.failures, error.body
        except Exception:  # one line must not hold up the others
            logging.exception("line %d of %s", number + 1, batch.id)
            problem = wire.failure(500)
            status, written, body = 500, batch.failures, problem.body
        key = digest(batch.id, number)
        response = {
            "status_code": status,
            "request_id": wire.request_id(key),
            "body": body,
        }
        written.append(_result(key, line["custom_id"], response, None))

    def _name_left(self, batch: Batch, lines: Iterable[bytes], end: str) -> None:
        """Write the requests that nobody came to into the error file.

        Source of the codes: OpenAI's OpenAPI description, BatchRequestOutput.
        """
        for number, raw in enumerate(lines):
            message = f"The batch was {end} before this request was executed."
            error = {"code": f"batch_{end}", "message": message}
            key = digest(batch.id, end, number)
            result = _result(key, json.loads(raw)["custom_id"], None, error)
            batch.failures.append(result)


async def _in_turns(steps: Iterator[None]) -> Any:
    """Go through the steps; others have their turn every few milliseconds."""
    turn = time.monotonic() + TURN
    for _ in steps:
        if time.monotonic() > turn:
            await asyncio.sleep(0)
            turn = time.monotonic() + TURN
            yield


def _result(key: str, custom_id: str, response: Json | None, error: Any) -> bytes:
    line = {
        "id": f"batch_req_{key[:32]}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line).encode() + b"\n"


def _missing(param: str) -> ApiError:
    message = f"Missing required parameter: '{param}'."
    return ApiError(400, message, param, "missing_required_parameter")


def _page(request: web.Request, bodies: list[Json], default: int) -> web.Response:
    """A page of a list, by the query's `limit` and `after`."""
    try:
        limit = int(request.query.get("limit", default))
    except ValueError:
        limit = 0
    if limit < 1:
        message = f"'{request.query['limit']}' is not a positive whole number."
        raise ApiError(400, message, "limit", "invalid_value")
    ids = [body["id"] for body in bodies]
    after = request.query.get("after")
    if after is not None and after not in ids:
        raise ApiError(404, f"There is no '{after}' in this list.", "after")
    start = ids.index(after) + 1 if after is not None else 0
    page = bodies[start : start + limit]
    return web.json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(bodies),
        }
    )

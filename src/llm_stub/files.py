"""Files: /v1/files, kept in memory.

Source: OpenAI's API reference, the page Files.
"""

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError
from pydantic import ConfigDict, Field

from .api.errors import ApiError, Json, missing_parameter
from .api.parameters import PARAMETERS
from .api.requests import ApiObject, read, unique_key

MAX_FILE_BYTES = 200 * 2**20
MAX_TOTAL_BYTES = 2**30  # of all files together
DAY = 86_400  # seconds


class ExpiresAfter(ApiObject):
    """When a file expires. The stub reports this, but keeps the file until it stops."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * DAY)]


class Upload(ApiObject):
    """The fields of an upload, except the file."""

    model_config = ConfigDict(strict=True, extra="allow")

    purpose: Literal["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]
    expires_after: ExpiresAfter | None = None


@dataclass(frozen=True)
class File:
    """A file that a client uploaded or a batch wrote."""

    id: str
    name: str
    purpose: str
    content: bytes
    created_at: int
    """Seconds since 1970."""
    expires_at: int | None = None

    def body(self) -> Json:
        """The API's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": self.expires_at,
        }


class Files:
    """The files, and their routes."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files, multipart/form-data with `file` and `purpose`."""
        if request.content_type != "multipart/form-data":
            message = (
                f"The body must be multipart/form-data, not {request.content_type}."
            )
            raise ApiError(400, message)
        name, content, fields = None, bytearray(), dict[str, str]()
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader):
                    raise ValueError("it contains a nested form, which isn't supported")
                if part.name != "file":
                    fields[str(part.name)] = await part.text()
                    continue
                name = part.filename or "file"
                while chunk := await part.read_chunk(2**20):
                    content += chunk
                    self._check_size(len(content))
        except (
            *(ValueError, AssertionError, LookupError, RuntimeError),
            HttpProcessingError,  # in the headers of a part
        ) as error:
            raise ApiError(400, f"The form could not be read: {error}") from None
        if name is None:
            raise missing_parameter("file")
        form = _read_form(fields)
        expiry = form.expires_after
        seconds = expiry.seconds if expiry else None
        file = self.add(name, form.purpose, bytes(content), expires_after=seconds)
        return web.json_response(file.body())

    def add(
        self, name: str, purpose: str, content: bytes, expires_after: int | None = None
    ) -> File:
        """Store a file until the stub stops, even if the file expires earlier."""
        if expires_after is None and purpose == "batch":
            expires_after = 30 * DAY
        now = int(time.time())
        expires_at = None if expires_after is None else now + expires_after
        id_ = f"file-{unique_key()[:24]}"
        self._files[id_] = File(id_, name, purpose, content, now, expires_at)
        return self._files[id_]

    async def list_files(self, request: web.Request) -> web.Response:
        """GET /v1/files?purpose=&limit=&order=&after="""
        purpose = request.query.get("purpose")
        files = [
            file
            for file in self._files.values()
            if purpose is None or file.purpose == purpose
        ]
        order = request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            message = f"Invalid value for 'order': '{order}' isn't 'asc' or 'desc'."
            raise ApiError(400, message, "order", "invalid_value")
        if order == "desc":
            files.reverse()
        bodies = [file.body() for file in files]
        return page(request, bodies, default_limit=10_000, max_limit=10_000)

    async def get(self, request: web.Request) -> web.Response:
        """GET /v1/files/{id}"""
        return web.json_response(self._requested(request).body())

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /v1/files/{id}"""
        file = self._requested(request)
        del self._files[file.id]
        return web.json_response({"id": file.id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.Response:
        """GET /v1/files/{id}/content"""
        content = self._requested(request).content
        return web.Response(body=content, content_type="application/octet-stream")

    def find(self, id_: str) -> File | None:
        """The file with this id, if there is one."""
        return self._files.get(id_)

    def _requested(self, request: web.Request) -> File:
        id_ = request.match_info["id"]
        file = self.find(id_)
        if file is None:
            raise ApiError(404, f"No such File object: {id_}", "id")
        return file

    def _check_size(self, size: int) -> None:
        stored = sum(len(file.content) for file in self._files.values())
        if size > MAX_FILE_BYTES:
            raise ApiError(413, f"The file is larger than {MAX_FILE_BYTES} bytes.")
        if stored + size > MAX_TOTAL_BYTES:
            message = (
                f"All files together would exceed {MAX_TOTAL_BYTES} bytes. Delete some "
                "files first."
            )
            raise ApiError(413, message)


def _read_form(fields: dict[str, str]) -> Upload:
    """The fields of a form, in which `a[b]` is the field b of the object a."""
    body: dict[str, Any] = {}
    for name, text in fields.items():
        outer, _, inner = name.partition("[")
        if inner:
            value = int(text) if text.isdecimal() and len(text) < 10 else text
            before = body.get(outer)
            others = before if isinstance(before, dict) else {}
            body[outer] = {**others, inner.removesuffix("]"): value}
        else:
            body[outer] = text
    return read(Upload, json.dumps(body).encode(), PARAMETERS["/v1/files"])


def page(
    request: web.Request, bodies: list[Json], *, default_limit: int, max_limit: int
) -> web.Response:
    """One page of a list, chosen by `limit` and `after` in the query."""
    try:
        limit = int(request.query.get("limit", default_limit))
    except ValueError:
        limit = 0
    if not 1 <= limit <= max_limit:
        message = (
            f"Invalid value for 'limit': '{request.query['limit']}' isn't a whole "
            f"number from 1 to {max_limit}."
        )
        raise ApiError(400, message, "limit", "invalid_value")
    ids = [body["id"] for body in bodies]
    after = request.query.get("after")
    if after is not None and after not in ids:
        raise ApiError(
            404, f"Invalid value for 'after': this list has no '{after}'.", "after"
        )
    start = ids.index(after) + 1 if after is not None else 0
    found = bodies[start : start + limit]
    return web.json_response(
        {
            "object": "list",
            "data": found,
            "first_id": found[0]["id"] if found else None,
            "last_id": found[-1]["id"] if found else None,
            "has_more": start + limit < len(bodies),
        }
    )

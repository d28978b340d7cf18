"""Files: /v1/files, kept in memory.

Source: OpenAI's API reference, the page Files.
"""

from dataclasses import dataclass

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError

from .api.errors import ApiError, Json, missing_parameter
from .api.requests import created
from .stable import digest

MAX_FILE_BYTES = 200 * 2**20
MAX_TOTAL_BYTES = 2**30  # of all files together
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")


@dataclass(frozen=True)
class File:
    """A file that a client uploaded or a batch wrote."""

    id: str
    name: str
    purpose: str
    content: bytes

    def body(self) -> Json:
        """The API's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": created(digest(self.id)),
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


class Files:
    """The files, and their routes."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self._made = 0

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files, multipart/form-data with `file` and `purpose`."""
        if request.content_type != "multipart/form-data":
            message = (
                f"The body must be multipart/form-data, not {request.content_type}."
            )
            raise ApiError(400, message)
        purpose, name, content = "", None, bytearray()
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader):
                    raise ValueError("it contains a nested form, which isn't supported")
                if part.name == "purpose":
                    purpose = await part.text()
                elif part.name == "file":
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
        if not purpose:
            raise missing_parameter("purpose")
        if purpose not in PURPOSES:
            message = f"The purpose '{purpose}' is not one of {', '.join(PURPOSES)}."
            raise ApiError(400, message, "purpose", "invalid_value")
        return web.json_response(self.add(name, purpose, bytes(content)).body())

    def add(self, name: str, purpose: str, content: bytes) -> File:
        """Store a file. Its id depends on its content and how many came earlier."""
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
        return page(request, [file.body() for file in files], 10_000)

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


def page(request: web.Request, bodies: list[Json], default_limit: int) -> web.Response:
    """One page of a list, chosen by `limit` and `after` in the query."""
    try:
        limit = int(request.query.get("limit", default_limit))
    except ValueError:
        limit = 0
    if limit < 1:
        message = (
            f"Invalid value for 'limit': '{request.query['limit']}' isn't a positive "
            "whole number."
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

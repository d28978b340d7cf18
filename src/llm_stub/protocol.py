"""What becomes of a request that aiohttp itself refuses, or cannot read."""

import json
import warnings
from typing import Any

import aiohttp
from aiohttp import web

from .wire import ApiError

warnings.simplefilter("ignore", aiohttp.BadContentDispositionHeader)
warnings.simplefilter("ignore", aiohttp.BadContentDispositionParam)


def error_response(problem: ApiError) -> web.Response:
    """The API's error object."""
    return web.Response(
        text=json.dumps(problem.body),
        status=problem.status,
        headers=problem.headers,
        content_type="application/json",
    )


class Connection(web.RequestHandler):
    """Refuses what is no HTTP as the API would; what clients do is not logged."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):  # the client has gone
            raise exc
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        text = " ".join((message or "The request could not be read.").split())
        response = error_response(ApiError(status, text))
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            resp = error_response(ApiError(resp.status, resp.text or resp.reason))
        return await super().finish_response(request, resp, start)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        if not isinstance(kw.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kw)

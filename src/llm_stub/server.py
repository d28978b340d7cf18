"""The server: its routes, the journal of every request, and how errors look."""

import asyncio
import json
import logging
import re
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from .api import ENDPOINTS, errors, read_call
from .api.errors import ApiError
from .api.requests import check_model, model_object, unique_key
from .batches import Batches
from .control import Control
from .faults import ConnectionBrokenError
from .files import Files
from .generate import generate
from .journal import Attempt
from .ledger import Ledger
from .live import Live, RelayedResponse
from .plan import plan
from .state import State
from .trusted_host import why_untrusted

CONTROL = "/_provider/"
MAX_BODY_BYTES = 32 * 2**20  # of any request except a file upload
DEFAULT_MODELS = ["gpt-3.5-turbo-instruct", "gpt-3.5-turbo"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ENTRY = web.RequestKey("entry", Attempt)
LIMITS = web.RequestKey("limits", dict[str, str])
TIMEOUT = re.compile(r"[0-9]{1,9}([.][0-9]{1,30})?")  # seconds

warnings.simplefilter("ignore", aiohttp.BadContentDispositionHeader)
warnings.simplefilter("ignore", aiohttp.BadContentDispositionParam)


class Server:
    """The stub: OpenAI's routes, answered from a table with a configurable latency.

    With an `upstream`, calls are forwarded there instead, and counted in the ledger
    at `count`; without that, in one of its own.
    """

    def __init__(
        self,
        upstream: str | None = None,
        model: str | None = None,
        count: str = ":memory:",
    ) -> None:
        self._state = State()
        self._live = (
            Live(upstream, model, Ledger(count), self._state) if upstream else None
        )

    def app(self) -> web.Application:
        """The aiohttp application with all routes."""
        app = web.Application(
            middlewares=[self._handle],
            client_max_size=MAX_BODY_BYTES,
        )
        app.on_response_prepare.append(self._before_first_byte)
        control = Control(self._state, self._live)
        app.add_routes(
            [
                web.get("/_provider/config", control.get_config),
                web.patch("/_provider/config", control.patch_config),
                web.get("/_provider/journal", control.get_journal),
                web.get("/_provider/stats", control.get_stats),
                web.post("/_provider/reset", control.reset),
            ]
        )
        app.add_routes(self._live_routes(app) if self._live else self._stub_routes())
        return app

    def _stub_routes(self) -> list[web.RouteDef]:
        files = Files()
        batches = Batches(self._state, files)
        return [
            *(web.post(path, self._generate) for path in ENDPOINTS),
            _get("/v1/models", self._list_models),
            _get("/v1/models/{id:.+}", self._get_model),
            web.post("/v1/files", files.upload),
            _get("/v1/files", files.list_files),
            _get("/v1/files/{id}", files.get),
            web.delete("/v1/files/{id}", files.delete),
            _get("/v1/files/{id}/content", files.content),
            web.post("/v1/batches", batches.create),
            _get("/v1/batches", batches.list_batches),
            _get("/v1/batches/{id}", batches.get),
            web.post("/v1/batches/{id}/cancel", batches.cancel),
        ]

    def _live_routes(self, app: web.Application) -> list[web.RouteDef]:
        live = self._live
        assert live is not None
        app.on_cleanup.append(live.close)

        async def call(request: web.Request) -> web.StreamResponse:
            return await live.call(request, request[ENTRY])

        async def models(request: web.Request) -> web.StreamResponse:
            return await live.models(request, request[ENTRY])

        return [
            *(web.post(path, call) for path in ENDPOINTS),
            _get("/v1/models", models),
            _get("/v1/models/{id:.+}", models),
        ]

    # Around every request

    @web.middleware
    async def _handle(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """Record an API request and the end of its response in the journal."""
        reason = why_untrusted(request.headers)
        if reason:
            return _forbidden(request, reason)
        if request.path.startswith(CONTROL):
            return await self._control(request, handler)
        journal = self._state.journal
        route = f"{request.method} {request.path}"
        entry = journal.arrive(route, _attempt(request), _timeout(request))
        request[ENTRY] = entry
        complete = False  # if it stays False, the client has hung up
        try:
            response = await self._respond(request, handler)
            await response.prepare(request)
            await response.write_eof()
            complete = True
        except ConnectionBrokenError:
            complete = True
            raise
        finally:
            journal.end(entry, disconnected=not complete)
        return response

    async def _before_first_byte(
        self, request: web.Request, response: web.StreamResponse
    ) -> None:
        """Record the time of the first byte, and add the headers that the API sends."""
        entry = request.get(ENTRY)
        if entry is None:
            return
        self._state.journal.first_byte(entry, response.status)
        if isinstance(response, RelayedResponse):
            return
        entry.request_id = f"req_{unique_key()}"
        elapsed = self._state.journal.now() - entry.arrival
        response.headers["x-request-id"] = entry.request_id
        response.headers["openai-processing-ms"] = str(round(elapsed * 1000))
        response.headers["openai-version"] = "2020-10-01"
        response.headers.update(request.get(LIMITS, {}))

    async def _control(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """The response of a control route; for invalid input, an error as JSON."""
        try:
            return await handler(request)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        except web.HTTPException as error:
            return web.json_response({"error": str(error)}, status=error.status)

    async def _respond(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """The response of an API route; for an exception, the API's error object."""
        try:
            if self._live is None:
                self._check_key(request)
            return await handler(request)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            return error_response(self._api_error(request, error))

    def _api_error(self, request: web.Request, error: Exception) -> ApiError:
        """The API's error for an exception that a route raised."""
        match error:
            case ApiError():
                return error
            case web.HTTPNotFound() | web.HTTPMethodNotAllowed() if self._live:
                return self._live.not_forwarded(request)
            case web.HTTPNotFound():
                return errors.route_not_found(
                    request.method, request.path, _api_routes(request.app)
                )
            case web.HTTPMethodNotAllowed():
                return errors.method_not_allowed(
                    request.method, request.path, error.allowed_methods
                )
            case web.HTTPRequestEntityTooLarge():
                return ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
            case web.RequestPayloadError():
                return ApiError(400, "The body could not be read.")
        logging.error("%s %s", request.method, request.path, exc_info=error)
        return errors.internal_error(error)

    def _check_key(self, request: web.Request) -> None:
        keys = self._state.settings.keys
        given = request.headers.get("authorization", "")
        if keys is not None and given.removeprefix("Bearer ") not in keys:
            raise errors.key_rejected(bool(given))

    # The API

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        """Answer a completion, a chat, a response or embeddings."""
        state, entry = self._state, request[ENTRY]
        settings, limits = state.settings, state.limits  # as of its arrival
        raw = await request.read()
        try:
            call = read_call(request.path, raw)
        except ApiError:  # this uses up a request, as it does at OpenAI
            limits.admit(0, state.journal.now())
            request[LIMITS] = limits.headers()
            raise
        state.journal.describe(entry, call.model, call.questions[0], call.streams)
        check_model(call.model, settings.models)
        entry.prompt_tokens = call.prompt_tokens
        tokens = call.prompt_tokens + call.completion_tokens
        rejection = limits.admit(tokens, state.journal.now())
        request[LIMITS] = limits.headers()
        if rejection:
            raise errors.rate_limit_exceeded(rejection)
        tries = state.tries.count(settings, call.questions[0], entry.attempt)
        planned = plan(settings, call, entry.attempt, tries)
        entry.fault = planned.fault or ""
        key = unique_key()
        return await generate(
            request, entry, call, planned, key, state.capacity, state.journal.now
        )

    async def _list_models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        names = self._state.settings.models or DEFAULT_MODELS
        models = [model_object(name) for name in names]
        return web.json_response({"object": "list", "data": models})

    async def _get_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        name = request.match_info["id"]
        check_model(name, self._state.settings.models)
        return web.json_response(model_object(name))


class Connection(web.RequestHandler):
    """A connection that answers invalid HTTP with an API error, too.

    It doesn't log the mistakes of clients.
    """

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):  # the client has hung up
            raise exc
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        text = " ".join((message or "The request could not be read.").split())
        # What aiohttp quotes from a header may be a key.
        text = re.sub(r": b(['\"]).*", ".", text)
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


def error_response(error: ApiError) -> web.Response:
    """The API's error object as a response."""
    return web.Response(
        text=json.dumps(error.body),
        status=error.status,
        headers=error.headers,
        content_type="application/json",
    )


def _forbidden(request: web.Request, reason: str) -> web.Response:
    """403 for a request that may come from a web page."""
    if request.path.startswith(CONTROL):
        return web.json_response({"error": reason}, status=403)
    return error_response(ApiError(403, reason, code="forbidden"))


def _api_routes(app: web.Application) -> list[str]:
    paths = {resource.canonical for resource in app.router.resources()}
    return sorted(path for path in paths if not path.startswith(CONTROL))


def _get(path: str, handler: Handler) -> web.RouteDef:
    return web.get(path, handler, allow_head=False)


def _attempt(request: web.Request) -> int:
    """Which attempt this is, from the SDK's header with its number of retries."""
    retries = request.headers.get("x-stainless-retry-count", "0")
    return 1 + int(retries) if retries.isdecimal() and len(retries) < 10 else 1


def _timeout(request: web.Request) -> float | None:
    """The client's read timeout in seconds, from the SDK's header; None without one."""
    text = request.headers.get("x-stainless-read-timeout", "")
    return float(text) if TIMEOUT.fullmatch(text) else None

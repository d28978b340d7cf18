"""The provider's routes: OpenAI's API and, under /_provider, its control."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from . import behaviour, wire
from .journal import PREVIEW, Attempt, Journal

BODY_MOST = 32 * 2**20  # bytes of a request's body
FRAME = 0.02  # seconds: the least time between two writes of one stream
DEFAULT_MODELS = ("gpt-3.5-turbo-instruct", "gpt-3.5-turbo")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ENTRY = web.RequestKey("entry", Attempt)


class Provider:
    """The stub: OpenAI's routes, answered by a table after a chosen wait."""

    def __init__(self) -> None:
        self.settings = behaviour.Settings()
        self.journal = Journal()

    def app(self) -> web.Application:
        """The aiohttp application, with every route."""
        app = web.Application(middlewares=[self.record], client_max_size=BODY_MOST)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models, allow_head=False)
        app.router.add_get("/v1/models/{id:.+}", self.model, allow_head=False)
        app.router.add_get("/_provider/config", self.config)
        app.router.add_patch("/_provider/config", self.config)
        app.router.add_get("/_provider/journal", self.read_journal)
        app.router.add_get("/_provider/stats", self.stats)
        app.router.add_post("/_provider/reset", self.reset)
        return app

    # What every request goes through

    @web.middleware
    async def record(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """Enter an API request in the journal and send what it answers."""
        if request.path.startswith("/_provider/"):
            return await handler(request)
        entry = self.journal.arrive(
            f"{request.method} {request.path}", _attempt(request)
        )
        entry.request_id = _request_id(self.settings.seed, entry.route, entry.attempt)
        request[ENTRY] = entry
        disconnected = True
        try:
            response = await _answer(request, handler)
            if not response.prepared:
                response.headers.update(self.headers(entry))
                self.journal.first_byte(entry, response.status)
                await response.prepare(request)
            await response.write_eof()
            disconnected = False
        finally:
            # Cancelled, or writing failed: the client has hung up.
            self.journal.end(entry, disconnected=disconnected)
        return response

    def headers(self, entry: Attempt) -> dict[str, str]:
        """The headers that the API sends with every answer."""
        return {
            "x-request-id": entry.request_id,
            "openai-processing-ms": str(round(self.elapsed(entry) * 1000)),
            "openai-version": "2020-10-01",
        }

    def elapsed(self, entry: Attempt) -> float:
        """Seconds since this request arrived."""
        return self.journal.now() - entry.arrival

    # OpenAI's API

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        return await self.generate(request, wire.Completion)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        return await self.generate(request, wire.Chat)

    async def generate(
        self, request: web.Request, kind: type[wire.Generation]
    ) -> web.StreamResponse:
        """Answer a request for a completion when it is due."""
        settings, entry = self.settings, request[ENTRY]
        call = wire.read(kind, await request.read())
        entry.model, entry.stream = call.model, bool(call.stream)
        entry.prompt = call.questions[0][:PREVIEW]
        self.check_model(call.model)
        entry.prompt_tokens = call.usage["prompt_tokens"]
        # Several prompts in one request are worked on side by side.
        pace = max(
            behaviour.pace(settings, prompt, entry.attempt) for prompt in call.prompts
        )
        key = behaviour.digest(settings.seed, *call.prompts, entry.attempt)
        entry.request_id = _request_id(key)
        if call.stream:
            return await self.stream(request, call, key, pace)
        tokens = max(len(cut) for cut, _ in call.choices)
        await asyncio.sleep(pace.duration(tokens) - self.elapsed(entry))
        entry.completion_tokens = call.usage["completion_tokens"]
        return web.json_response(call.body(key))

    async def stream(
        self,
        request: web.Request,
        call: wire.Generation,
        key: str,
        pace: behaviour.Pace,
    ) -> web.StreamResponse:
        """Send the answer token by token, each when it is due."""
        entry = request[ENTRY]
        response = web.StreamResponse(
            headers={
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
            }
        )
        first, *groups, last = call.events(key)
        sent = 0
        while sent < len(groups):
            next_due = pace.duration(sent + 1) if sent else pace.first_token
            wait = next_due - self.elapsed(entry)
            await asyncio.sleep(max(wait, FRAME if sent else 0))
            elapsed = self.elapsed(entry)
            due = max(sent + 1, pace.tokens_due(elapsed, len(groups)))
            if not sent:
                response.headers.update(self.headers(entry))
                await response.prepare(request)
                self.journal.first_byte(entry, response.status)
                await response.write(b"".join(first))
            await response.write(b"".join(b"".join(g) for g in groups[sent:due]))
            entry.completion_tokens += sum(map(len, groups[sent:due]))
            sent = due
        await response.write(b"".join(last))
        return response

    def check_model(self, model: str) -> None:
        """Raise the API's 404 where only some models exist and not this one."""
        models = self.settings.models
        if models is not None and model not in models:
            raise wire.no_model(model)

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        names = self.settings.models or DEFAULT_MODELS
        return web.json_response(
            {"object": "list", "data": [wire.model_body(name) for name in names]}
        )

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        name = request.match_info["id"]
        self.check_model(name)
        return web.json_response(wire.model_body(name))

    # Control

    async def config(self, request: web.Request) -> web.Response:
        """GET and PATCH /_provider/config: the settings, and some of them anew."""
        if request.method == "PATCH":
            try:
                self.settings = self.settings.changed(dict(await request.json()))
            except (TypeError, ValueError) as error:
                return web.json_response({"error": str(error)}, status=400)
        return web.json_response(self.settings.model_dump())

    async def read_journal(self, request: web.Request) -> web.Response:
        """GET /_provider/journal?since=N&settle=S: the attempts from number N on."""
        try:
            since = int(request.query.get("since", 0))
            settle = float(request.query.get("settle", 0))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(await self.journal.since(since, settle))

    async def stats(self, request: web.Request) -> web.Response:
        """GET /_provider/stats: counts since the last reset."""
        return web.json_response(self.journal.stats())

    async def reset(self, request: web.Request) -> web.Response:
        """POST /_provider/reset: empty the journal, zero the counts."""
        self.journal.reset()
        return web.json_response(self.journal.stats())


def _request_id(*parts: object) -> str:
    return f"req_{behaviour.digest(*parts)[:32]}"


def _attempt(request: web.Request) -> int:
    """Which try this is, by what the SDK says of its own retries."""
    retries = request.headers.get("x-stainless-retry-count", "0")
    return 1 + int(retries) if retries.isdecimal() and len(retries) < 10 else 1


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's answer, or the API's error object in its place."""
    try:
        return await handler(request)
    except wire.ApiError as error:
        problem = error
    except web.HTTPNotFound:
        problem = wire.no_route(request.method, request.path)
    except web.HTTPMethodNotAllowed:
        problem = wire.no_method(request.method, request.path)
    except web.HTTPRequestEntityTooLarge:
        problem = wire.ApiError(413, f"The body is larger than {BODY_MOST} bytes.")
    except web.RequestPayloadError:
        problem = wire.ApiError(400, "The body could not be read.")
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        logging.exception("%s %s", request.method, request.path)
        problem = wire.ApiError(
            500,
            "The provider had an error of its own; its log says more.",
            kind="server_error",
        )
    return web.Response(
        text=json.dumps(problem.body),
        status=problem.status,
        content_type="application/json",
    )

"""The provider's routes: OpenAI's API and, under /_provider, its control."""

import asyncio
import copy
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NoReturn

from aiohttp import web

from . import behaviour, faults, wire
from .batches import ENDPOINTS, Batches
from .behaviour import Fault, digest, normal
from .journal import PREVIEW, Attempt, Journal
from .live import Live
from .protocol import error_response

BODY_MOST = 32 * 2**20  # bytes of a request's body; files have their own limit
FRAME = 0.02  # seconds: the least time between two writes of one stream
SETTLE_MOST = 3600  # seconds
TRIES_MOST = 100_000  # prompts whose tries are counted
DEFAULT_MODELS = ("gpt-3.5-turbo-instruct", "gpt-3.5-turbo")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ENTRY = web.RequestKey("entry", Attempt)
LIMITS = web.RequestKey("limits", dict[str, str])


class Provider:
    """The stub: OpenAI's routes, answered by a table after a chosen wait.

    With an `upstream` it answers nothing itself and forwards to it.
    """

    def __init__(self, upstream: str | None = None, model: str | None = None) -> None:
        self.settings = behaviour.Settings()
        self.journal = Journal()
        self.limits = behaviour.Limits()
        self.capacity = behaviour.Capacity()
        self.batches = Batches(lambda: self.settings)
        self.live = (
            Live(upstream, model, lambda: self.settings, self.journal)
            if upstream
            else None
        )
        self._tries: Counter[str] = Counter()

    def app(self) -> web.Application:
        """The aiohttp application, with every route."""
        app = web.Application(middlewares=[self.record], client_max_size=BODY_MOST)
        for route in ENDPOINTS:
            app.router.add_post(route, self.generate)
        app.router.add_get("/v1/models", self.models, allow_head=False)
        app.router.add_get("/v1/models/{id:.+}", self.model, allow_head=False)
        self.batches.add_routes(app.router)
        app.router.add_get("/_provider/config", self.config)
        app.router.add_patch("/_provider/config", self.config)
        app.router.add_get("/_provider/journal", self.read_journal)
        app.router.add_get("/_provider/stats", self.stats)
        app.router.add_post("/_provider/reset", self.reset)
        if self.live:
            app.on_cleanup.append(self.live.close)
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
        request[ENTRY] = entry
        ended = False  # if not: the client has hung up
        try:
            response = await self.answer(request, handler)
            if not response.prepared:
                response.headers.update(self.headers(request))
                self.journal.first_byte(entry, response.status)
                await response.prepare(request)
            await response.write_eof()
            ended = True
        except faults.BrokenOffError:
            ended = True
            raise
        finally:
            self.journal.end(entry, disconnected=not ended)
        return response

    async def answer(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """The handler's answer, or the API's error object in its place."""
        try:
            if self.live:
                return await self.live.forward(request, request[ENTRY])
            self.check_key(request)
            return await handler(request)
        except wire.ApiError as error:
            problem = error
        except web.HTTPNotFound:
            problem = wire.no_route(request.method, request.path)
        except web.HTTPMethodNotAllowed as error:
            allowed = error.allowed_methods
            problem = wire.no_method(request.method, request.path, list(allowed))
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
        return error_response(problem)

    def headers(self, request: web.Request) -> dict[str, str]:
        """The headers that the API sends with every answer."""
        entry = request[ENTRY]
        if not entry.request_id:  # it has not come as far as its prompt
            key = digest(self.settings.seed, entry.route, entry.attempt)
            entry.request_id = wire.request_id(key)
        return {
            "x-request-id": entry.request_id,
            "openai-processing-ms": str(
                round((self.journal.now() - entry.arrival) * 1000)
            ),
            "openai-version": "2020-10-01",
            **request.get(LIMITS, {}),
        }

    def check_key(self, request: web.Request) -> None:
        """Raise the API's 401 where only some keys are accepted and not this one."""
        keys = self.settings.keys
        if keys is not None:
            given = request.headers.get("authorization", "")
            if given.removeprefix("Bearer ") not in keys:
                raise wire.no_key(bool(given))

    def check_model(self, model: str, settings: behaviour.Settings) -> None:
        """Raise the API's 404 where only some models exist and not this one."""
        models = settings.models
        if models is not None and model not in models:
            raise wire.no_model(model)

    # OpenAI's API

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answer a request for a completion, a chat, … when its turn comes."""
        settings, limits, entry = self.settings, self.limits, request[ENTRY]
        call = wire.read(ENDPOINTS[request.path], await request.read())
        generation = call if isinstance(call, wire.Generation) else None
        prompts, question = call.prompts, call.questions[0]
        entry.model, entry.prompt = call.model[:PREVIEW], question[:PREVIEW]
        entry.stream = bool(generation and generation.stream)
        self.check_model(call.model, settings)
        entry.prompt_tokens = call.asked
        self.admit(request, call, limits)
        tries = self.count_try(question, entry.attempt)
        fault = behaviour.fault(settings, question, tries)
        # Several prompts in one request are worked on side by side.
        pace = max(
            behaviour.pace(settings, prompt, entry.attempt, tries) for prompt in prompts
        )
        if fault == "slow":
            later = pace.first_token + settings.slow
            pace = dataclasses.replace(pace, first_token=later)
        key = digest(settings.seed, *prompts, entry.attempt)
        entry.request_id, entry.fault = wire.request_id(key), fault or ""
        begun = self.journal.now() if await self.capacity.enter() else entry.arrival
        try:
            if fault in faults.EARLY:
                await asyncio.sleep(begun + pace.first_token - self.journal.now())
                await self.fail(request, fault)
            if generation and generation.stream and fault != "wrong_type":
                return await self.stream(request, generation, key, pace, begun)
            await asyncio.sleep(
                begun + pace.duration(call.longest) - self.journal.now()
            )
            entry.completion_tokens = call.generated
            return await self.whole(request, call.body(key), fault)
        finally:
            self.capacity.leave()

    def admit(
        self, request: web.Request, call: wire.Call, limits: behaviour.Limits
    ) -> None:
        """Raise the API's 429 where the call goes past a limit."""
        tokens = call.asked + call.generated
        refusal = limits.admit(tokens, self.journal.now())
        request[LIMITS] = limits.headers()
        if refusal:
            raise wire.rate_limit(refusal)

    def count_try(self, question: str, attempt: int) -> int:
        """How often this prompt was sent since the settings were last changed.

        Only faults and the tail want to know, so only for them it is counted.
        """
        settings = self.settings
        if not (settings.faults or settings.faults_by_prompt or settings.tail):
            return attempt
        if len(self._tries) >= TRIES_MOST:
            self._tries.clear()
        key = digest(normal(question))
        self._tries[key] += 1
        return self._tries[key]

    async def fail(self, request: web.Request, fault: Fault | None) -> NoReturn:
        """Fail before a byte of the answer."""
        if fault == "hang":
            await faults.hang()
        if fault == "reset":
            faults.reset(request)
            raise faults.BrokenOffError
        raise wire.failure(503 if fault == "error_503" else 500)

    async def whole(
        self, request: web.Request, body: wire.Json, fault: Fault | None
    ) -> web.StreamResponse:
        """The answer as one body, unless a fault is to spoil it."""
        if fault in ("truncated", "reset_midway"):
            self.journal.first_byte(request[ENTRY], 200)
            await faults.broken_off(
                request, self.headers(request), body, abruptly=fault == "reset_midway"
            )
        if fault == "malformed":
            return faults.malformed(body)
        if fault == "wrong_type":
            return faults.wrong_type()
        return web.Response(body=wire.encode(body), content_type="application/json")

    async def stream(
        self,
        request: web.Request,
        call: wire.Generation,
        key: str,
        pace: behaviour.Pace,
        begun: float,
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
        broken = entry.fault in faults.MIDWAY
        end = len(groups) // 2 if broken else len(groups)
        sent = 0
        while sent < end or not response.prepared:
            next_due = pace.duration(sent + 1) if sent else pace.first_token
            wait = begun + next_due - self.journal.now()
            await asyncio.sleep(max(wait, FRAME if sent else 0))
            elapsed = self.journal.now() - begun
            due = max(sent + 1, pace.tokens_due(elapsed, end))
            if not response.prepared:
                response.headers.update(self.headers(request))
                await response.prepare(request)
                self.journal.first_byte(entry, response.status)
                await response.write(b"".join(first))
            await response.write(b"".join(b"".join(g) for g in groups[sent:due]))
            entry.completion_tokens += sum(map(len, groups[sent:due]))
            sent = due
        if broken:
            following = [*groups, last][min(sent, len(groups))]
            await faults.broken_stream(request, response, entry.fault, following[0])
        else:
            await response.write(b"".join(last))
        return response

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        names = self.settings.models or DEFAULT_MODELS
        return web.json_response(wire.models_body(names))

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        name = request.match_info["id"]
        self.check_model(name, self.settings)
        return web.json_response(wire.model_body(name))

    # Control

    async def config(self, request: web.Request) -> web.Response:
        """GET and PATCH /_provider/config: the settings, and some of them anew."""
        if request.method == "PATCH":
            try:
                changes = json.loads(await request.read())
                if not isinstance(changes, dict):
                    raise ValueError("the body must be a JSON object")
                changed = self.settings.changed(changes)
            except (ValueError, RecursionError, web.RequestPayloadError) as error:
                return web.json_response({"error": str(error)}, status=400)
            if changed != self.settings:
                self.settings = changed
                self.limits = copy.copy(self.limits)  # the old hold for calls begun
                self.limits.change(changed, self.journal.now())
                self.capacity.change(changed.capacity)
                self._tries.clear()
        return web.json_response(self.settings.model_dump())

    async def read_journal(self, request: web.Request) -> web.Response:
        """GET /_provider/journal?since=N&settle=S: the attempts from number N on."""
        try:
            since = int(request.query.get("since", 0))
            settle = float(request.query.get("settle", 0))
            if since < 0 or not 0 <= settle <= SETTLE_MOST:
                raise ValueError(f"settle is 0 to {SETTLE_MOST}, since 0 or more")
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(await self.journal.since(since, settle))

    async def stats(self, request: web.Request) -> web.Response:
        """GET /_provider/stats: counts since the last reset."""
        live = self.live
        used = {"calls": live.calls, "tokens": live.tokens} if live else None
        return web.json_response({**self.journal.stats(), "live": used})

    async def reset(self, request: web.Request) -> web.Response:
        """POST /_provider/reset: empty the journal, zero the counts."""
        self.journal.reset()
        return web.json_response(self.journal.stats())


def _attempt(request: web.Request) -> int:
    """Which try this is, by what the SDK says of its own retries."""
    retries = request.headers.get("x-stainless-retry-count", "0")
    return 1 + int(retries) if retries.isdecimal() and len(retries) < 10 else 1

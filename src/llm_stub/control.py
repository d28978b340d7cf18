"""The stub's own routes, under /_provider/: settings, journal, statistics."""

import asyncio
import json
import math
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from .api.requests import encode
from .live import Live
from .state import State

MAX_SETTLE = 3600  # seconds
SLICE = 500  # attempts to encode before other requests can run

Number = TypeVar("Number", int, float)


class Control:
    """Shows and changes how the stub behaves; raises ValueError for invalid input."""

    def __init__(self, state: State, live: Live | None) -> None:
        self._state, self._live = state, live

    async def get_config(self, request: web.Request) -> web.Response:
        """GET /_provider/config: all settings."""
        return web.json_response(self._state.settings.model_dump())

    async def patch_config(self, request: web.Request) -> web.Response:
        """PATCH /_provider/config: change some settings; returns all."""
        try:
            changes = json.loads(await request.read())
        except web.RequestPayloadError:
            raise ValueError("the body could not be read or decompressed") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the body isn't valid JSON: {error}") from None
        if not isinstance(changes, dict):
            raise ValueError("the body must be a JSON object")
        self._state.change(changes)
        if self._live and changes:
            self._live.remember_caps()
        return await self.get_config(request)

    async def get_journal(self, request: web.Request) -> web.Response:
        """GET /_provider/journal?since=N&settle=S&changed=C (see `Journal.since`)."""
        since = _number(request, "since", int, math.inf)
        settle = _number(request, "settle", float, MAX_SETTLE)
        changed = _number(request, "changed", int, math.inf)
        head, attempts = await self._state.journal.since(since, settle, changed)
        slices = []
        for start in range(0, len(attempts), SLICE):
            bodies = [entry.body() for entry in attempts[start : start + SLICE]]
            slices.append(encode(bodies)[1:-1])
            await asyncio.sleep(0)  # let other requests run
        body = b'%b,"attempts":[%b]}' % (encode(head)[:-1], b",".join(slices))
        return web.Response(body=body, content_type="application/json")

    async def get_stats(self, request: web.Request) -> web.Response:
        """GET /_provider/stats: counts since the last reset."""
        stats = self._state.journal.stats()
        return web.json_response({**stats, "live": self._live and self._live.used})

    async def reset(self, request: web.Request) -> web.Response:
        """POST /_provider/reset: empty the journal and set all counts to zero."""
        self._state.journal.reset()
        self._state.tries.clear()
        return web.json_response(self._state.journal.stats())


def _number(
    request: web.Request, name: str, kind: Callable[[str], Number], maximum: float
) -> Number:
    """A query parameter as a number from 0 to the maximum; by default 0."""
    text = request.query.get(name, "0")
    try:
        number = kind(text)
        if not 0 <= number <= maximum:
            raise ValueError
    except ValueError:
        wanted = "0 or more" if math.isinf(maximum) else f"from 0 to {maximum}"
        raise ValueError(f"{name}={text[:40]!r} must be a number {wanted}") from None
    return number

"""The stub's own routes, under /_provider/: settings, journal, statistics."""

import json

from aiohttp import web

from .live import Live
from .state import State

MAX_SETTLE = 3600  # seconds


class Control:
    """Shows and changes how the stub behaves; raises ValueError for bad input."""

    def __init__(self, state: State, live: Live | None) -> None:
        self._state, self._live = state, live

    async def get_config(self, request: web.Request) -> web.Response:
        """GET /_provider/config: all settings."""
        return web.json_response(self._state.settings.model_dump())

    async def patch_config(self, request: web.Request) -> web.Response:
        """PATCH /_provider/config: change some settings; returns all."""
        try:
            changes = json.loads(await request.read())
        except (RecursionError, web.RequestPayloadError) as error:
            raise ValueError(str(error)) from None
        if not isinstance(changes, dict):
            raise ValueError("the body must be a JSON object")
        self._state.change(changes)
        return await self.get_config(request)

    async def get_journal(self, request: web.Request) -> web.Response:
        """GET /_provider/journal?since=N&settle=S: attempts from number N on."""
        since = int(request.query.get("since", 0))
        settle = float(request.query.get("settle", 0))
        if since < 0 or not 0 <= settle <= MAX_SETTLE:
            raise ValueError(f"settle must be 0 to {MAX_SETTLE}, since 0 or more")
        return web.json_response(await self._state.journal.since(since, settle))

    async def get_stats(self, request: web.Request) -> web.Response:
        """GET /_provider/stats: counts since the last reset."""
        stats = self._state.journal.stats()
        return web.json_response({**stats, "live": self._live and self._live.used})

    async def reset(self, request: web.Request) -> web.Response:
        """POST /_provider/reset: empty the journal and set the counts to zero."""
        self._state.journal.reset()
        return web.json_response(self._state.journal.stats())

"""Answer a call as planned: wait for a slot, then send each byte when it is due."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from aiohttp import web

from . import faults
from .api.errors import Json
from .api.requests import Call, Generation, encode
from .capacity import Capacity
from .journal import Attempt
from .plan import Plan

MANY_PROMPTS = 16  # in one call
_thread = ThreadPoolExecutor(max_workers=1)  # more would only compete for the CPU
MIN_STREAM_INTERVAL = 0.02  # seconds between two writes to one stream


@dataclass(frozen=True)
class Turn:
    """The time since a call got its slot, in seconds."""

    started: float
    now: Callable[[], float]

    @property
    def elapsed(self) -> float:
        """Seconds since the turn began."""
        return self.now() - self.started

    async def until(self, due: float, at_least: float = 0) -> None:
        """Sleep until `due` seconds have passed, and for `at_least` seconds."""
        await asyncio.sleep(max(due - self.elapsed, at_least))


async def generate(
    request: web.Request,
    entry: Attempt,
    call: Call,
    plan: Plan,
    key: str,
    capacity: Capacity,
    now: Callable[[], float],
) -> web.StreamResponse:
    """Answer the call when it gets a slot; its ids are made from the key.

    Raises ApiError or ConnectionBrokenError if the plan contains such a fault.
    """
    if plan.fault == "content_filter" and isinstance(call, Generation):
        call = call.filtered()
    queued = await capacity.enter()
    turn = Turn(now() if queued else entry.arrival, now)
    try:
        if plan.fault in faults.BEFORE_FIRST_BYTE:
            await turn.until(plan.pace.first_token)
            await faults.instead_of_answer(request, plan.fault)
        if isinstance(call, Generation) and call.streams and plan.fault != "wrong_type":
            return await _stream(request, entry, call, plan, key, turn)
        await turn.until(plan.pace.duration(call.longest_answer))
        entry.completion_tokens = call.completion_tokens
        # Many long vectors take seconds; meanwhile, the event loop answers others.
        in_thread = len(call.prompts) >= MANY_PROMPTS
        body = await _in_thread(call.body, key) if in_thread else call.body(key)
        if plan.fault in faults.IN_ANSWER:
            return await faults.spoiled_answer(request, body, plan.fault)
        return web.Response(body=encode(body), content_type="application/json")
    finally:
        capacity.leave()


def _in_thread(work: Callable[[str], Json], key: str) -> Awaitable[Json]:
    return asyncio.get_running_loop().run_in_executor(_thread, work, key)


async def _stream(
    request: web.Request,
    entry: Attempt,
    call: Generation,
    plan: Plan,
    key: str,
    turn: Turn,
) -> web.StreamResponse:
    """Send the answer token by token."""
    response = web.StreamResponse(
        headers={
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
        }
    )
    first, *groups, last = call.events(key)
    end = len(groups)
    if plan.fault in faults.IN_STREAM and groups:
        end = max(1, end // 2)
    await turn.until(plan.pace.first_token)
    await response.prepare(request)
    await response.write(b"".join(first))
    sent = 0
    while sent < end:
        if sent:
            await turn.until(plan.pace.duration(sent + 1), MIN_STREAM_INTERVAL)
        due = max(sent + 1, plan.pace.tokens_due(turn.elapsed, end))
        await response.write(b"".join(b"".join(group) for group in groups[sent:due]))
        entry.completion_tokens += sum(map(len, groups[sent:due]))
        sent = due
    if plan.fault in faults.IN_STREAM:
        following = [*groups, last][min(sent, len(groups))]
        await faults.spoiled_stream(request, response, plan.fault, following[0])
    else:
        await response.write(b"".join(last))
    return response

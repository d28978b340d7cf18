"""The journal: one entry for each HTTP attempt, on one clock."""

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

PROMPT_PREVIEW = 80  # characters of each prompt that the journal keeps
MAX_ATTEMPTS = 20_000  # that the journal keeps; older ones are dropped
# Share of its timeout after which a client that hangs up has timed out. Not 1, because
# the client's clock starts when it sends, and a busy machine reads that late.
TIMEOUT_SHARE = 0.8
# Faults with which the client still gets a complete, well-formed answer.
HARMLESS_FAULTS = frozenset({"slow", "content_filter"})


@dataclass(slots=True)
class Attempt:
    """One HTTP request; times are seconds since the stub started."""

    number: int
    """Position in the journal, from 0; never used twice."""
    route: str
    attempt: int
    """1 for a first try; 2, 3, … for the client's own retries."""
    arrival: float
    first_byte: float | None = None
    end: float | None = None
    status: int | None = None
    """HTTP status; None until it is sent."""
    disconnected: bool = False
    """Whether the client hung up before it got the whole answer."""
    timeout: float | None = None
    """Seconds that the client waits for the next byte; None if it didn't say so."""
    request_id: str = ""
    model: str = ""
    prompt: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fault: str = ""
    """The fault that the stub caused, or `upstream` if the upstream failed."""
    changed: int = 0
    """Number of this attempt's latest change; all attempts share one counter."""

    def body(self) -> dict[str, Any]:
        """The attempt as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "state": self.state
        }

    @property
    def state(self) -> str:
        """in flight, cancelled or timed out (the client hung up), failed or answered.

        A client that hangs up during the answer counts as cancelled, because its
        timeout starts again with each byte.
        """
        if self.end is None:
            return "in flight"
        if self.disconnected:
            waited = self.end - self.arrival
            silent = self.first_byte is None and self.timeout is not None
            timed_out = silent and waited >= TIMEOUT_SHARE * (self.timeout or 0)
            return "timed out" if timed_out else "cancelled"
        spoiled = self.fault and self.fault not in HARMLESS_FAULTS
        return "failed" if spoiled or (self.status or 500) >= 400 else "answered"


class Journal:
    """The latest attempts, and totals of all attempts since the last reset."""

    def __init__(self, kept: int = MAX_ATTEMPTS) -> None:
        self._start = time.perf_counter()
        self._attempts: deque[Attempt] = deque(maxlen=kept)
        self._next = self._in_flight = self._changes = 0
        self.reset()

    def now(self) -> float:
        """Seconds since the stub started."""
        return time.perf_counter() - self._start

    def reset(self) -> None:
        """Drop the attempts that have ended, and set the totals to zero.

        Calls in flight stay and the numbering continues, so a client that
        remembers a number isn't misled.
        """
        open_attempts = [entry for entry in self._attempts if entry.end is None]
        self._attempts.clear()
        self._attempts.extend(open_attempts)
        self._peak = self._in_flight
        self._statuses: Counter[str] = Counter()
        self._sums = Counter(requests=0, prompt_tokens=0, completion_tokens=0)

    def arrive(self, route: str, attempt: int, timeout: float | None = None) -> Attempt:
        """Add an entry for a request whose head has been read."""
        entry = Attempt(self._next, route, attempt, self.now(), timeout=timeout)
        self._next += 1
        self._attempts.append(entry)
        self._change(entry)
        self._sums["requests"] += 1
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        return entry

    def describe(self, entry: Attempt, model: str, prompt: str, stream: bool) -> None:
        """Record what the request asks for, once it has been read."""
        entry.model, entry.prompt = model[:PROMPT_PREVIEW], prompt[:PROMPT_PREVIEW]
        entry.stream = stream
        self._change(entry)

    def first_byte(self, entry: Attempt, status: int) -> None:
        """Record that the response is starting."""
        entry.first_byte, entry.status = self.now(), status
        self._change(entry)

    def end(self, entry: Attempt, *, disconnected: bool = False) -> None:
        """Record that the response is complete, or that the client has hung up."""
        entry.end, entry.disconnected = self.now(), disconnected
        self._change(entry)
        self._in_flight -= 1
        self._statuses[
            "disconnected" if disconnected else str(entry.status or entry.fault)
        ] += 1
        self._sums["prompt_tokens"] += entry.prompt_tokens
        self._sums["completion_tokens"] += entry.completion_tokens

    async def since(
        self, number: int, settle: float = 0, changed: int = 0
    ) -> tuple[dict[str, float], list[Attempt]]:
        """The attempts with this number or a later one that changed after `changed`.

        Waits up to `settle` seconds for those in flight to end, because a client
        may finish or hang up a moment before this process notices. `dropped` is how
        many attempts with these numbers are no longer kept. To read only what is new,
        pass the `changed` that the last call returned.
        """
        now, until, changes = self.now(), self._next, self._changes
        kept = [entry for entry in self._attempts if number <= entry.number < until]
        while any(entry.end is None for entry in kept) and self.now() < now + settle:
            await asyncio.sleep(0.01)
        head = {
            "now": now,
            "next": until,
            "changed": changes,
            "dropped": max(until - number, 0) - len(kept),
        }
        return head, [entry for entry in kept if entry.changed > changed]

    def stats(self) -> dict[str, Any]:
        """Counts since the last reset."""
        return {
            **self._sums,
            "in_flight": self._in_flight,
            "peak_in_flight": self._peak,
            "statuses": dict(self._statuses),
        }

    def _change(self, entry: Attempt) -> None:
        self._changes += 1
        entry.changed = self._changes

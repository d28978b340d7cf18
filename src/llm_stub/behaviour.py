"""When the provider answers, and whether: latency, limits, capacity, faults.

All but the queue of `Capacity` is a function of (seed, prompt, attempt) or of
a clock that is passed in.
"""

import asyncio
import hashlib
import math
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

Seconds = Annotated[float, Field(ge=0, le=3600)]
PerMinute = Annotated[float, Field(gt=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]
Fault = Literal[
    "error_500",  # the API's error object, after the time to the first token
    "error_503",
    "reset",  # the connection is reset before a byte of the answer
    "reset_midway",  # … in the middle of the body
    "truncated",  # the connection is closed in the middle of the body
    "malformed",  # a whole answer whose JSON breaks off
    "wrong_type",  # a page of HTML with status 200, as a proxy sends it
    "slow",  # the first byte comes `slow` seconds late
    "hang",  # no byte ever
]


def _at_most_all(rates: dict[Fault, float]) -> dict[Fault, float]:
    if math.fsum(rates.values()) > 1:
        raise ValueError("the rates add up to more than 1")
    return rates


class Settings(BaseModel):
    """How the provider behaves; a change holds for calls that come after it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    seed: int = 0
    first_token: Seconds = 0.3
    """From the start of a call's turn to the first token of its answer."""
    per_token: Seconds = 0.01
    """For each token of the answer."""
    jitter: Share = 0.2
    """Share by which a prompt's latency may lie above or below."""
    tail: Annotated[float, Field(ge=0, le=3)] = 0
    """Sigma of a log-normal factor on an attempt's latency; 0: no tail."""
    models: Names | None = None
    """The only models that exist; None: a call may name any model."""
    keys: Names | None = None
    """The only API keys that are accepted; None: any, and none at all."""
    capacity: Annotated[int, Field(ge=1)] | None = None
    """Answers generated at once; further calls queue. None: no bound."""
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    """Of prompts and answers together; like the requests, refused with 429."""
    burst: Annotated[float, Field(gt=0, le=3600)] = 10
    """How many seconds' allowance may be used at once."""
    faults: Annotated[dict[Fault, Share], AfterValidator(_at_most_all)] = {}
    """Share of the attempts that end in each fault."""
    faults_by_prompt: dict[str, list[Fault | None]] = {}
    """What becomes of the first, second, … attempt at a prompt; then no fault."""
    slow: Seconds = 10
    """How late the fault `slow` is."""
    batch_speed: Annotated[float, Field(gt=0, le=1e6)] = 100
    """Requests of a batch that are answered in a second."""
    batch_window: Annotated[float, Field(gt=0, le=86_400)] = 86_400
    """Seconds after which a batch expires."""
    max_calls: Annotated[int, Field(ge=0)] = 100
    """Live only: how many calls are forwarded before all are refused."""
    max_tokens: Annotated[int, Field(ge=0)] = 50_000
    """Live only: how many tokens these may use, prompts and answers together."""

    def changed(self, changes: dict[str, Any]) -> Self:
        """These settings with some replaced.

        Raises ValueError where a name is unknown or a value out of range.
        """
        try:
            return self.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            problem = error.errors()[0]
        name, reason = str((*problem["loc"], "a name")[0]), problem["msg"]
        if problem["type"] == "extra_forbidden":
            reason = "there is no such setting; there are " + ", ".join(vars(self))
        raise ValueError(f"{name}={changes.get(name)!r}: {reason}")


# Latency


@dataclass(frozen=True, order=True)
class Pace:
    """How long one answer takes, in seconds."""

    first_token: float
    per_token: float

    def duration(self, tokens: int) -> float:
        """Seconds from the start to the last of so many tokens."""
        return self.first_token + self.per_token * tokens

    def tokens_due(self, elapsed: float, tokens: int) -> int:
        """How many of so many tokens have been generated after `elapsed`."""
        if elapsed < self.first_token:
            return 0
        if self.per_token == 0:
            return tokens
        due = math.floor((elapsed - self.first_token) / self.per_token)
        return min(tokens, max(1, due))


def pace(settings: Settings, prompt: str, attempt: int, tries: int = 1) -> Pace:
    """The pace of this attempt at this prompt, the same in every run.

    The jitter belongs to the client's attempt. The tail belongs to the try,
    so that a second request for the same prompt draws anew.
    """
    scale = 1.0
    if settings.jitter:
        share = unit(settings.seed, prompt, attempt, "latency")
        scale += settings.jitter * (2 * share - 1)
    if settings.tail:
        share = unit(settings.seed, prompt, tries, "tail")
        scale *= math.exp(settings.tail * NormalDist().inv_cdf(share))
    return Pace(settings.first_token * scale, settings.per_token * scale)


class Capacity:
    """Turns: so many calls at once generate, the others queue in order."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self._used = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    def change(self, limit: int | None) -> None:
        """Set another limit; those who now have a turn begin."""
        self.limit = limit
        self._admit()

    async def enter(self) -> bool:
        """Wait for a turn, which `leave` ends; returns whether there was a queue."""
        if self._free():  # nobody waits where there is room
            self._used += 1
            return False
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came just before it was cancelled
                self.leave()
            raise
        return True

    def leave(self) -> None:
        """End a turn."""
        self._used -= 1
        self._admit()

    def _free(self) -> bool:
        return self.limit is None or self._used < self.limit

    def _admit(self) -> None:
        while self._queue and self._free():
            turn = self._queue.popleft()
            if not turn.done():  # else it was cancelled while it waited
                self._used += 1
                turn.set_result(None)


# Limits


ROUNDING = 1e-6  # of a request or token: what may be lost in adding up floats


class Bucket:
    """A token bucket: what is not used adds up, to a burst's worth at most."""

    def __init__(self, name: str, per_minute: float, burst: float, now: float) -> None:
        self.name, self.per_minute = name, per_minute
        self.rate = per_minute / 60
        self.size = max(1, self.rate * burst)
        self.level, self._at = self.size, now

    def refill(self, now: float) -> None:
        """Add what has come in since the last look at the clock."""
        self.level = min(self.size, self.level + self.rate * (now - self._at))
        self._at = now

    def wait(self, amount: float) -> float:
        """Seconds until so much can be taken; infinite where it never can."""
        if amount > self.size + ROUNDING:
            return math.inf
        missing = amount - self.level
        return missing / self.rate if missing > ROUNDING else 0

    def headers(self) -> dict[str, str]:
        """The three x-ratelimit headers of this limit."""
        full_in = (self.size - self.level) / self.rate
        remaining = max(0, math.floor(self.level + ROUNDING))
        return {
            f"x-ratelimit-limit-{self.name}": f"{self.per_minute:.0f}",
            f"x-ratelimit-remaining-{self.name}": f"{remaining}",
            f"x-ratelimit-reset-{self.name}": duration(full_in),
        }


@dataclass(frozen=True)
class Refusal:
    """Why a call was not admitted."""

    bucket: Bucket
    asked: float
    retry_after: float
    """Seconds; infinite where the call is larger than the limit allows."""


class Limits:
    """Requests and tokens per minute. A call that is refused uses neither up."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []

    def change(self, settings: Settings, now: float) -> None:
        """Set other limits. The share of an earlier one that is used stays used."""
        before = {bucket.name: bucket for bucket in self._buckets}
        self._buckets = []
        for name, limit in (
            ("requests", settings.requests_per_minute),
            ("tokens", settings.tokens_per_minute),
        ):
            if limit is None:
                continue
            bucket = Bucket(name, limit, settings.burst, now)
            if name in before:
                before[name].refill(now)
                bucket.level *= before[name].level / before[name].size
            self._buckets.append(bucket)

    def admit(self, tokens: int, now: float) -> Refusal | None:
        """Take a request and so many tokens, or say why not."""
        asked = {"requests": 1, "tokens": tokens}
        for bucket in self._buckets:
            bucket.refill(now)
        refusals = [
            Refusal(bucket, asked[bucket.name], wait)
            for bucket in self._buckets
            if (wait := bucket.wait(asked[bucket.name])) > 0
        ]
        if refusals:
            return max(refusals, key=lambda refusal: refusal.retry_after)
        for bucket in self._buckets:
            bucket.level -= asked[bucket.name]
        return None

    def headers(self) -> dict[str, str]:
        """The x-ratelimit headers, as of the last call that asked."""
        found: dict[str, str] = {}
        for bucket in self._buckets:
            found |= bucket.headers()
        return found


def duration(seconds: float) -> str:
    """A time as the API writes it in its headers: 120ms, 8.64s, 6m0s."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


# Faults


def fault(settings: Settings, prompt: str, tries: int) -> Fault | None:
    """What goes wrong with this try, the same in every run."""
    for listed, kinds in settings.faults_by_prompt.items():
        if normal(listed) == normal(prompt):
            return kinds[tries - 1] if tries <= len(kinds) else None
    if settings.faults:
        share = unit(settings.seed, normal(prompt), tries, "fault")
        for kind, rate in sorted(settings.faults.items()):
            if share < rate:
                return kind
            share -= rate
    return None


def normal(prompt: str) -> str:
    """The prompt without what does not matter: white space and case."""
    return " ".join(prompt.casefold().split())


def unit(*parts: object) -> float:
    """A number between 0 and 1, both excluded, by the parts alone."""
    return (int(digest(*parts)[:8], 16) + 0.5) / 2**32


def digest(*parts: object) -> str:
    """64 hexadecimal digits that depend on the parts and on nothing else."""
    joined = "\x1f".join(map(str, parts))
    return hashlib.blake2b(
        joined.encode(errors="surrogatepass"), digest_size=32
    ).hexdigest()

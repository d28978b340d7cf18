"""Rate limits: requests and tokens per minute, and the headers that report them.

Source: OpenAI's guide *Rate limits*, section *Rate limits in headers*.
"""

import math
from dataclasses import dataclass

from .settings import MAX_PER_MINUTE, Settings

ROUNDING = 1e-6  # requests or tokens: tolerance for adding up floats


class Bucket:
    """A token bucket: the unused part accumulates, up to one burst."""

    def __init__(self, name: str, per_minute: float, burst: float, now: float) -> None:
        self.name, self.per_minute = name, per_minute
        self.rate = per_minute / 60
        self.size = max(1, self.rate * burst)
        self.level, self._at = self.size, now

    def refill(self, now: float) -> None:
        """Add what has accumulated since the last refill."""
        self.level = min(self.size, self.level + self.rate * (now - self._at))
        self._at = now

    def wait(self, amount: float) -> float:
        """Seconds until this amount is available; infinite if it never will be."""
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
            f"x-ratelimit-reset-{self.name}": format_duration(full_in),
        }


# Some clients choose their concurrency by these headers, so we send them even for a
# limit that isn't set.
UNLIMITED = {
    f"x-ratelimit-{field}-{name}": value
    for name in ("requests", "tokens")
    for field, value in (
        ("limit", f"{MAX_PER_MINUTE:.0f}"),
        ("remaining", f"{MAX_PER_MINUTE:.0f}"),
        ("reset", "0s"),
    )
}


@dataclass(frozen=True)
class Rejection:
    """Why a call was not admitted."""

    bucket: Bucket
    requested: float
    retry_after: float
    """Seconds; infinite if the call is too large to be ever admitted."""


class Limits:
    """Requests and tokens per minute. A rejected call uses up neither.

    `remaining` and `reset` in the headers describe what can be used at once: with
    a limit of 600 per minute and a burst of 10 seconds, `remaining` is at most 100.
    """

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []

    def change(self, settings: Settings, now: float) -> None:
        """Change the limits. If half of a limit is used up, half of the new one is."""
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

    def admit(self, tokens: int, now: float) -> Rejection | None:
        """Use up one request and this many tokens, or return the reason why not."""
        requested = {"requests": 1, "tokens": tokens}
        for bucket in self._buckets:
            bucket.refill(now)
        rejections = [
            Rejection(bucket, requested[bucket.name], wait)
            for bucket in self._buckets
            if (wait := bucket.wait(requested[bucket.name])) > 0
        ]
        if rejections:
            return max(rejections, key=lambda rejection: rejection.retry_after)
        for bucket in self._buckets:
            bucket.level -= requested[bucket.name]
        return None

    def headers(self) -> dict[str, str]:
        """The six x-ratelimit headers, as of the last call to `admit`."""
        found = UNLIMITED.copy()
        for bucket in self._buckets:
            found |= bucket.headers()
        return found


def format_duration(seconds: float) -> str:
    """A duration in the format of the API's headers: 120ms, 8.64s, 6m0s."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text

"""When the provider answers: pure functions of (seed, prompt, attempt)."""

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Seconds = Annotated[float, Field(ge=0, le=3600)]


class Settings(BaseModel):
    """How the provider behaves; a change holds for calls that come after it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    seed: int = 0
    first_token: Seconds = 0.3
    """From a request's arrival to the first token of its answer."""
    per_token: Seconds = 0.01
    """For each token of the answer."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share by which a prompt's latency may lie above or below."""
    models: Annotated[list[str], Field(min_length=1)] | None = None
    """The only models that exist; None: a call may name any model."""

    def changed(self, changes: dict[str, Any]) -> Self:
        """These settings with some replaced.

        Raises ValueError where a name is unknown or a value out of range.
        """
        try:
            return self.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            problem = error.errors()[0]
        name, reason = problem["loc"][0], problem["msg"]
        if problem["type"] == "extra_forbidden":
            reason = "there is no such setting; there are " + ", ".join(vars(self))
        raise ValueError(f"{name}={changes[str(name)]!r}: {reason}")


@dataclass(frozen=True, order=True)
class Pace:
    """How long one answer takes, in seconds."""

    first_token: float
    per_token: float

    def duration(self, tokens: int) -> float:
        """Seconds from arrival to the last of so many tokens."""
        return self.first_token + self.per_token * tokens

    def tokens_due(self, elapsed: float, tokens: int) -> int:
        """How many of so many tokens have been generated after `elapsed`."""
        if elapsed < self.first_token:
            return 0
        if self.per_token == 0:
            return tokens
        due = math.floor((elapsed - self.first_token) / self.per_token)
        return min(tokens, max(1, due))


def pace(settings: Settings, prompt: str, attempt: int) -> Pace:
    """The pace of this attempt at this prompt, the same in every run."""
    share = int(digest(settings.seed, prompt, attempt, "latency")[:8], 16) / 0xFFFFFFFF
    scale = 1 + settings.jitter * (2 * share - 1)
    return Pace(settings.first_token * scale, settings.per_token * scale)


def digest(*parts: object) -> str:
    """64 hexadecimal digits that depend on the parts and on nothing else."""
    joined = "\x1f".join(map(str, parts))
    return hashlib.blake2b(
        joined.encode(errors="surrogatepass"), digest_size=32
    ).hexdigest()

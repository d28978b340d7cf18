"""The stub's settings: latency, limits, capacity, faults, batches, caps."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Seconds = Annotated[float, Field(ge=0, le=3600)]
MAX_PER_MINUTE = 1e9
PerMinute = Annotated[float, Field(gt=0, le=MAX_PER_MINUTE)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]

# faults.py describes what each fault does.
Fault = Literal[
    "error_500",
    "error_503",
    "insufficient_quota",
    "reset",
    "reset_midway",
    "truncated",
    "malformed",
    "wrong_type",
    "error_in_stream",
    "null_choices",
    "content_filter",
    "slow",
    "hang",
]


def _at_most_one(rates: dict[Fault, float]) -> dict[Fault, float]:
    if math.fsum(rates.values()) > 1:
        raise ValueError("the rates add up to more than 1; lower some of them")
    return rates


CAPS = ("max_calls", "max_tokens", "max_answer_tokens")  # live mode's settings


class Settings(BaseModel):
    """How the stub behaves. A change applies to requests that arrive after it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    seed: int = 0
    first_token: Seconds = 0.3
    """Seconds until the first token, counted from when the call gets a slot."""
    per_token: Seconds = 0.01
    """Seconds for each token of the answer."""
    jitter: Share = 0.2
    """How far a prompt's latency may deviate, as a fraction of the latency."""
    tail: Annotated[float, Field(ge=0, le=3)] = 0
    """Sigma of a log-normal factor on each attempt's latency; 0 turns it off."""
    models: Names | None = None
    """The only models that exist; None accepts any name."""
    keys: Names | None = None
    """The only API keys that are accepted; None accepts any key, and also no key."""
    capacity: Annotated[int, Field(ge=1)] | None = None
    """How many calls are answered at once; others queue. None for no limit."""
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    """Prompt and answer tokens together. A call over a rate limit gets a 429."""
    burst: Annotated[float, Field(gt=0, le=3600)] = 10
    """How many seconds' worth of a rate limit can be used at once."""
    faults: Annotated[dict[Fault, Share], AfterValidator(_at_most_one)] = {}
    """The share of attempts that end in each fault."""
    faults_by_prompt: dict[str, list[Fault | None]] = {}
    """For each prompt, the fault of its first, second, … attempt; then none."""
    slow: Seconds = 10
    """The extra seconds that the fault `slow` adds before the first token."""
    batch_speed: Annotated[float, Field(gt=0, le=1e6)] = 100
    """How many requests of a batch are answered per second."""
    batch_window: Annotated[float, Field(gt=0, le=86_400)] = 86_400
    """Seconds until a batch expires."""
    max_calls: Annotated[int, Field(ge=0)] = 100
    """Live mode only: how many calls are forwarded before the rest are refused."""
    max_tokens: Annotated[int, Field(ge=0)] = 50_000
    """Live mode only: how many prompt and answer tokens these calls may use."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 500
    """Live mode only: the token limit of a chat or response that sets none."""

    def changed(self, changes: dict[str, Any]) -> Self:
        """These settings with some of them replaced.

        Raises ValueError if a name is unknown or a value is out of range.
        """
        try:
            return self.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            problem = error.errors()[0]
        name, reason = str((*problem["loc"], "settings")[0]), problem["msg"]
        if problem["type"] == "extra_forbidden":
            reason = "unknown setting; the settings are " + ", ".join(vars(self))
        raise ValueError(f"{name}={changes.get(name)!r}: {reason}")

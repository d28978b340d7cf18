"""What will happen to a call: its latency and its fault.

A plan is a pure function of (settings, prompt, attempt): the same in every run.
"""

import math
from collections import Counter
from statistics import NormalDist
from typing import NamedTuple

from .api.requests import Call
from .faults import applied, wait_before
from .settings import Fault, Settings
from .stable import digest, normal, unit

MAX_COUNTED_PROMPTS = 100_000


class Pace(NamedTuple):
    """How fast one answer is generated, in seconds."""

    first_token: float
    per_token: float

    def duration(self, tokens: int) -> float:
        """Seconds from the start until this many tokens are generated."""
        return self.first_token + self.per_token * tokens

    def tokens_due(self, elapsed: float, tokens: int) -> int:
        """How many of `tokens` tokens are generated after `elapsed` seconds."""
        if elapsed < self.first_token:
            return 0
        if self.per_token == 0:
            return tokens
        due = math.floor((elapsed - self.first_token) / self.per_token)
        return min(tokens, max(1, due))


class Plan(NamedTuple):
    """What will happen to one call."""

    pace: Pace
    fault: Fault | None


class Tries:
    """Counts how often each prompt was sent since the settings last changed.

    Only faults and the tail depend on it, so it counts only if they are set.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def count(self, settings: Settings, question: str, attempt: int) -> int:
        """Count one more try of this prompt; return which one it is, from 1."""
        if not (settings.faults or settings.faults_by_prompt or settings.tail):
            return attempt
        if len(self._counts) >= MAX_COUNTED_PROMPTS:
            self._counts.clear()
        key = digest(normal(question))
        self._counts[key] += 1
        return self._counts[key]

    def clear(self) -> None:
        """Set all counts to zero."""
        self._counts.clear()


def plan(settings: Settings, call: Call, attempt: int, tries: int) -> Plan:
    """The plan for a call.

    `attempt` counts the client's own retries of this call, from 1. `tries` counts
    all requests for this prompt (see Tries).
    """
    fault = choose_fault(settings, call.questions[0], tries)
    fault = applied(fault, stream=call.streams)
    # Several prompts in one request are answered in parallel.
    pace = max(choose_pace(settings, text, attempt, tries) for text in call.prompts)
    first_token = wait_before(fault, pace.first_token, settings)
    return Plan(Pace(first_token, pace.per_token), fault)


def choose_pace(settings: Settings, prompt: str, attempt: int, tries: int = 1) -> Pace:
    """The pace of this attempt at this prompt.

    The jitter depends on the client's attempt. The tail depends on the try, so a
    second request for the same prompt gets a different latency.
    """
    scale = 1.0
    if settings.jitter:
        share = unit(settings.seed, prompt, attempt, "latency")
        scale += settings.jitter * (2 * share - 1)
    if settings.tail:
        share = unit(settings.seed, prompt, tries, "tail")
        scale *= math.exp(settings.tail * NormalDist().inv_cdf(share))
    return Pace(settings.first_token * scale, settings.per_token * scale)


def choose_fault(settings: Settings, prompt: str, tries: int) -> Fault | None:
    """The fault for this try of this prompt, or None."""
    for listed, faults in settings.faults_by_prompt.items():
        if normal(listed) == normal(prompt):
            return faults[tries - 1] if tries <= len(faults) else None
    if settings.faults:
        share = unit(settings.seed, normal(prompt), tries, "fault")
        for fault, rate in sorted(settings.faults.items()):
            if share < rate:
                return fault
            share -= rate
    return None

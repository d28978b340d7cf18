import asyncio
import math
import random
import statistics
from collections import Counter
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from helpers.connection import Provider
from llm_stub.plan import Pace, choose_fault, choose_pace
from llm_stub.settings import Fault, Settings
from tests.llm_stub.conftest import Json, finished_attempts, without_ids

PROMPTS = [f"What is {number} times {number}?" for number in range(500)]
DEFAULTS = Settings()


# Latency


def test_pace_does_not_depend_on_the_order_of_prompts() -> None:
    in_order = {prompt: choose_pace(DEFAULTS, prompt, 1) for prompt in PROMPTS}
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    assert {prompt: choose_pace(DEFAULTS, prompt, 1) for prompt in shuffled} == in_order


def test_pace_is_the_same_in_every_run() -> None:
    first_token = choose_pace(DEFAULTS, "Hello how are you?", 1).first_token
    assert first_token == pytest.approx(0.308790843)


@pytest.mark.parametrize(
    ("seed", "prompt", "attempt"),
    [(1, "Why?", 1), (0, "How?", 1), (0, "Why?", 2)],
    ids=["seed", "prompt", "attempt"],
)
def test_pace_depends_on_seed_prompt_and_attempt(
    seed: int, prompt: str, attempt: int
) -> None:
    other = choose_pace(Settings(seed=seed), prompt, attempt)
    assert other != choose_pace(DEFAULTS, "Why?", 1)


@pytest.mark.parametrize("jitter", [0.0, 0.2, 1.0])
def test_pace_varies_over_the_whole_range_of_the_jitter(jitter: float) -> None:
    settings = Settings(first_token=2.0, per_token=0.5, jitter=jitter)
    paces = [choose_pace(settings, prompt, 1) for prompt in PROMPTS]
    shares = [pace.first_token / 2.0 - 1 for pace in paces]
    assert min(shares) >= -jitter - 1e-9
    assert max(shares) <= jitter + 1e-9
    assert min(shares) <= -0.9 * jitter
    assert max(shares) >= 0.9 * jitter
    assert abs(sum(shares) / len(shares)) <= 0.1 * jitter
    for pace in paces:
        assert pace.first_token >= 0
        assert pace.per_token == pytest.approx(pace.first_token / 4)


WITH_TAIL = Settings(tail=1, jitter=0)


def test_tail_makes_latencies_log_normal() -> None:
    factors = [
        choose_pace(WITH_TAIL, prompt, 1).first_token / 0.3 for prompt in PROMPTS[:300]
    ]
    logs = [math.log(factor) for factor in factors]
    assert statistics.median(factors) == pytest.approx(1, rel=0.2)
    assert statistics.mean(logs) == pytest.approx(0, abs=0.2)
    assert statistics.stdev(logs) == pytest.approx(1, rel=0.15)
    assert statistics.quantiles(factors, n=100)[98] > 5 * statistics.median(factors)
    within = sum(abs(log) <= 1 for log in logs) / len(logs)
    assert within == pytest.approx(0.68, abs=0.06)


def test_tail_is_the_same_in_every_run_with_the_same_seed() -> None:
    first_token = choose_pace(WITH_TAIL, "Hello how are you?", 1).first_token
    assert first_token == pytest.approx(0.522688541)
    other = choose_pace(Settings(tail=1, jitter=0, seed=1), "Hello how are you?", 1)
    assert other.first_token != pytest.approx(first_token)


def test_tail_scales_first_token_and_per_token_equally() -> None:
    pace = choose_pace(WITH_TAIL, "Why?", 1)
    assert pace.per_token / 0.01 == pytest.approx(pace.first_token / 0.3)


def test_wider_tail_moves_each_prompt_further_from_the_median() -> None:
    for prompt in PROMPTS[:50]:
        narrow, wide = (
            choose_pace(Settings(tail=tail, jitter=0), prompt, 1).first_token / 0.3
            for tail in (0.5, 1.5)
        )
        assert math.log(wide) == pytest.approx(3 * math.log(narrow))


def test_each_request_for_a_prompt_gets_a_new_tail_but_the_same_jitter() -> None:
    numbers = range(1, 5)
    for prompt in PROMPTS[:50]:
        tails = {choose_pace(WITH_TAIL, prompt, 1, number) for number in numbers}
        jitters = {choose_pace(DEFAULTS, prompt, 1, number) for number in numbers}
        assert (len(tails), len(jitters)) == (4, 1)


def test_tails_of_two_requests_for_a_prompt_are_independent() -> None:
    first, second = (
        [choose_pace(WITH_TAIL, prompt, 1, number).first_token for prompt in PROMPTS]
        for number in (1, 2)
    )
    logs = [math.log(value) for value in first], [math.log(value) for value in second]
    assert abs(statistics.correlation(*logs)) < 0.15


def test_stub_gives_each_request_for_a_prompt_a_new_tail(
    provider: Provider, client: OpenAI
) -> None:
    settings: Json = {"first_token": 0.05, "per_token": 0, "jitter": 0, "tail": 1}
    provider.configure(**settings)
    for _ in range(3):
        client.completions.create(model="m", prompt="Why?")
    for number, entry in enumerate(finished_attempts(provider), 1):
        expected = choose_pace(Settings(**settings), "Why?", 1, number).first_token
        assert expected <= entry["end"] - entry["arrival"] < expected + 0.5


def test_tokens_become_due_one_by_one() -> None:
    pace = Pace(first_token=0.3, per_token=0.01)
    times = [milliseconds / 1000 for milliseconds in range(1000)]
    due = [pace.tokens_due(time, 20) for time in times]
    assert due == sorted(due)
    before = {tokens for tokens, time in zip(due, times, strict=True) if time < 0.3}
    after = {tokens for tokens, time in zip(due, times, strict=True) if time >= 0.3}
    assert before == {0}
    assert after == {*range(1, 21)}
    assert pace.tokens_due(pace.duration(20) + 0.001, 20) == 20


def test_all_tokens_are_due_together_if_a_token_takes_no_time() -> None:
    assert Pace(0.3, 0).tokens_due(0.29, 20) == 0
    assert Pace(0.3, 0).tokens_due(0.3, 20) == 20


# Faults


@pytest.mark.parametrize(
    ("prompt", "same"),
    [("Why?", "why?"), (" a\n\tb ", "A B"), ("Straße", "STRASSE"), ("", " \n")],
)
def test_fault_does_not_depend_on_case_and_whitespace(prompt: str, same: str) -> None:
    for rate in (0.3, 0.7):
        rates = Settings(faults={"error_500": rate})
        assert choose_fault(rates, prompt, 1) == choose_fault(rates, same, 1)
    listed = Settings(faults_by_prompt={prompt: ["hang"]})
    assert choose_fault(listed, same, 1) == "hang"


RATES: dict[Fault, float] = {"error_500": 0.2, "hang": 0.05, "slow": 0.5}


@pytest.mark.parametrize("tries", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_fault_occurs_at_its_rate(seed: int, tries: int) -> None:
    settings = Settings(faults=RATES, seed=seed)
    counts = Counter(choose_fault(settings, prompt, tries) for prompt in PROMPTS)
    assert counts.keys() == {*RATES, None}
    for fault, rate in RATES.items():
        sigma = math.sqrt(rate * (1 - rate) / len(PROMPTS))
        assert counts[fault] / len(PROMPTS) == pytest.approx(rate, abs=4 * sigma)


def test_fault_depends_only_on_seed_prompt_and_try() -> None:
    def faults(tries: int = 1, **changes: Any) -> list[Fault | None]:
        settings = Settings(faults=RATES).changed(changes)
        return [choose_fault(settings, prompt, tries) for prompt in PROMPTS]

    assert faults() == faults(first_token=1, tail=1, capacity=1)
    assert faults() == faults(faults=dict(reversed(RATES.items())))
    assert faults() != faults(seed=1)
    assert faults() != faults(tries=2)


def test_rate_1_affects_every_request_and_rate_0_none() -> None:
    always, never = Settings(faults={"reset": 1}), Settings(faults={"reset": 0})
    for prompt in PROMPTS:
        assert {choose_fault(always, prompt, tries) for tries in (1, 2, 3)} == {"reset"}
        assert (
            choose_fault(never, prompt, 1) is choose_fault(DEFAULTS, prompt, 1) is None
        )


def test_faults_by_prompt_override_the_rates_even_after_the_last_entry() -> None:
    settings = Settings(
        faults={"reset": 1}, faults_by_prompt={"Why?": ["hang", None, "slow"]}
    )
    listed = [choose_fault(settings, "Why?", tries) for tries in range(1, 6)]
    assert listed == ["hang", None, "slow", None, None]
    assert choose_fault(settings, "How?", 1) == "reset"


# Answers


def test_text_and_latency_do_not_depend_on_order_or_concurrency(
    provider: Provider, client: OpenAI
) -> None:
    settings: Json = {"first_token": 0.1, "per_token": 0, "jitter": 1}
    provider.configure(**settings)

    async def ask_concurrently(prompts: list[str]) -> list[Completion]:
        async with AsyncOpenAI(max_retries=0) as client:
            calls = [
                client.completions.create(model="m", prompt=prompt, max_tokens=99)
                for prompt in prompts
            ]
            return await asyncio.gather(*calls)

    prompts = PROMPTS[:10]
    concurrent = asyncio.run(ask_concurrently(prompts[::-1]))[::-1]
    sequential = [
        client.completions.create(model="m", prompt=prompt, max_tokens=99)
        for prompt in prompts
    ]
    assert without_ids(concurrent) == without_ids(sequential)
    assert len({body.choices[0].text for body in sequential}) == len(prompts)
    for entry in finished_attempts(provider):
        expected = choose_pace(Settings(**settings), entry["prompt"], 1).first_token
        assert expected <= entry["end"] - entry["arrival"] < expected + 0.5


@pytest.mark.parametrize(
    ("changes", "headers"),
    [
        ({"seed": 1}, {}),
        ({"first_token": 0.01, "jitter": 0.9, "models": ["m"]}, {}),
        ({"faults": {"slow": 1}, "slow": 0.01, "tail": 1}, {}),
        ({}, {"x-stainless-retry-count": "1"}),
    ],
    ids=["seed", "settings", "fault", "attempt"],
)
def test_answer_depends_only_on_the_prompt(
    provider: Provider, client: OpenAI, changes: Any, headers: dict[str, str]
) -> None:
    def ask(prompt: str = "Why?", **options: Any) -> Any:
        body = client.completions.create(
            model="m", prompt=prompt, max_tokens=99, **options
        )
        return without_ids(body)

    provider.configure(first_token=0, per_token=0)
    expected = ask()
    assert ask("How?") != expected
    provider.configure(**changes)
    assert ask(extra_headers=headers) == expected

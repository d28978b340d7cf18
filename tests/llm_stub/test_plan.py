import asyncio
import contextlib
import http.client
import json
import math
import random
import statistics
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from helpers.connection import Provider
from llm_stub.limits import format_duration
from llm_stub.plan import Pace, choose_fault, choose_pace
from llm_stub.settings import Fault, Settings
from llm_stub.stable import digest, normal, unit

PROMPTS = [f"What is {number} times {number}?" for number in range(500)]
DEFAULTS = Settings()


def test_a_pace_does_not_depend_on_what_was_asked_before() -> None:
    in_order = {prompt: choose_pace(DEFAULTS, prompt, 1) for prompt in PROMPTS}
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    assert {prompt: choose_pace(DEFAULTS, prompt, 1) for prompt in shuffled} == in_order


def test_a_pace_is_the_same_in_every_run() -> None:
    first_token = choose_pace(DEFAULTS, "Hello how are you?", 1).first_token
    assert first_token == pytest.approx(0.308790843)


@pytest.mark.parametrize(
    ("seed", "prompt", "attempt"),
    [(1, "Why?", 1), (0, "How?", 1), (0, "Why?", 2)],
    ids=["seed", "prompt", "attempt"],
)
def test_a_pace_depends_on(seed: int, prompt: str, attempt: int) -> None:
    other = choose_pace(Settings(seed=seed), prompt, attempt)
    assert other != choose_pace(DEFAULTS, "Why?", 1)


@pytest.mark.parametrize("jitter", [0.0, 0.2, 1.0])
def test_a_pace_lies_within_the_jitter_and_uses_all_of_it(jitter: float) -> None:
    settings = Settings(first_token=2.0, per_token=0.5, jitter=jitter)
    paces = [choose_pace(settings, prompt, 1) for prompt in PROMPTS]
    shares = [one.first_token / 2.0 - 1 for one in paces]
    assert min(shares) >= -jitter - 1e-9
    assert max(shares) <= jitter + 1e-9
    assert min(shares) <= -0.9 * jitter
    assert max(shares) >= 0.9 * jitter
    assert abs(sum(shares) / len(shares)) <= 0.1 * jitter
    for one in paces:
        assert one.first_token >= 0
        assert one.per_token == pytest.approx(one.first_token / 4)


TAILED = Settings(tail=1, jitter=0)


def test_a_tail_makes_latencies_log_normal() -> None:
    factors = [
        choose_pace(TAILED, prompt, 1).first_token / 0.3 for prompt in PROMPTS[:300]
    ]
    logs = [math.log(factor) for factor in factors]
    assert statistics.median(factors) == pytest.approx(1, rel=0.2)
    assert statistics.mean(logs) == pytest.approx(0, abs=0.2)
    assert statistics.stdev(logs) == pytest.approx(1, rel=0.15)
    assert statistics.quantiles(factors, n=100)[98] > 5 * statistics.median(factors)
    within = sum(abs(log) <= 1 for log in logs) / len(logs)
    assert within == pytest.approx(0.68, abs=0.06)


def test_a_tail_is_the_same_in_every_run_and_another_with_another_seed() -> None:
    first_token = choose_pace(TAILED, "Hello how are you?", 1).first_token
    assert first_token == pytest.approx(0.522688541)
    other = choose_pace(Settings(tail=1, jitter=0, seed=1), "Hello how are you?", 1)
    assert other.first_token != pytest.approx(first_token)


def test_a_tail_stretches_a_token_like_the_first_one() -> None:
    one = choose_pace(TAILED, "Why?", 1)
    assert one.per_token / 0.01 == pytest.approx(one.first_token / 0.3)


def test_a_wider_tail_puts_each_prompt_further_from_the_median() -> None:
    for prompt in PROMPTS[:50]:
        narrow, wide = (
            choose_pace(Settings(tail=tail, jitter=0), prompt, 1).first_token / 0.3
            for tail in (0.5, 1.5)
        )
        assert math.log(wide) == pytest.approx(3 * math.log(narrow))


def test_each_try_draws_its_tail_anew_but_not_its_jitter() -> None:
    for prompt in PROMPTS[:50]:
        tries = [
            choose_pace(TAILED, prompt, 1, tries).first_token for tries in range(1, 5)
        ]
        assert len(set(tries)) == 4
        assert (
            len({choose_pace(DEFAULTS, prompt, 1, tries) for tries in range(1, 5)}) == 1
        )
    logs = [
        [
            math.log(choose_pace(TAILED, prompt, 1, tries).first_token)
            for prompt in PROMPTS
        ]
        for tries in (1, 2)
    ]
    assert abs(statistics.correlation(*logs)) < 0.15


def test_a_second_request_for_the_same_prompt_draws_anew(
    provider: Provider, client: OpenAI
) -> None:
    settings = {"first_token": 0.05, "per_token": 0, "jitter": 0, "tail": 1}
    provider.configure(**settings)
    for _ in range(3):
        client.completions.create(model="m", prompt="Why?")
    found = provider.ask("/_provider/journal?settle=5")["attempts"]
    for tries, entry in enumerate(found, 1):
        expected = choose_pace(Settings(**settings), "Why?", 1, tries).first_token
        assert expected <= entry["end"] - entry["arrival"] < expected + 0.5


def test_tokens_fall_due_one_after_another() -> None:
    one = Pace(first_token=0.3, per_token=0.01)
    moments = [moment / 1000 for moment in range(1000)]
    due = [one.tokens_due(moment, 20) for moment in moments]
    assert due == sorted(due)
    assert {n for n, at in zip(due, moments, strict=True) if at < 0.3} == {0}
    assert {n for n, at in zip(due, moments, strict=True) if at >= 0.3} == {
        *range(1, 21)
    }
    assert one.tokens_due(one.duration(20) + 0.001, 20) == 20


def test_all_tokens_are_due_at_once_where_a_token_takes_no_time() -> None:
    assert Pace(0.3, 0).tokens_due(0.29, 20) == 0
    assert Pace(0.3, 0).tokens_due(0.3, 20) == 20


def test_a_digest_tells_its_parts_apart() -> None:
    assert digest(0, "a") == digest(0, "a")
    parts: list[tuple[object, ...]] = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1)]
    assert len({digest(*each) for each in parts}) == len(parts)
    assert len(digest("\ud800")) == 64


def test_a_unit_lies_within_0_and_1_and_fills_it_evenly() -> None:
    drawn = [unit(0, prompt, 1, "latency") for prompt in PROMPTS]
    assert drawn == [unit(0, prompt, 1, "latency") for prompt in PROMPTS]
    assert len(set(drawn)) == len(PROMPTS)
    assert 0 < min(drawn) < 0.02
    assert 0.98 < max(drawn) < 1
    tenths = Counter(math.floor(10 * value) for value in drawn)
    assert all(25 <= tenths[tenth] <= 75 for tenth in range(10))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (2.007, "2.007s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (61.5, "1m1.5s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90_061.25, "25h1m1.25s"),
    ],
)
def test_a_duration_is_written_as_the_api_does_and_never_too_short(
    seconds: float, text: str
) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("prompt", "same"),
    [("Why?", "why?"), (" a\n\tb ", "A B"), ("Straße", "STRASSE"), ("", " \n")],
)
def test_a_prompt_is_the_same_whatever_its_white_space_and_case(
    prompt: str, same: str
) -> None:
    assert normal(prompt) == normal(same)
    for rate in (0.3, 0.7):
        rates = Settings(faults={"error_500": rate})
        assert choose_fault(rates, prompt, 1) == choose_fault(rates, same, 1)
    listed = Settings(faults_by_prompt={prompt: ["hang"]})
    assert choose_fault(listed, same, 1) == "hang"


RATES: dict[Fault, float] = {"error_500": 0.2, "hang": 0.05, "slow": 0.5}


@pytest.mark.parametrize("tries", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_fault_has_its_share(seed: int, tries: int) -> None:
    settings = Settings(faults=RATES, seed=seed)
    counts = Counter(choose_fault(settings, prompt, tries) for prompt in PROMPTS)
    assert counts.keys() == {*RATES, None}
    for kind, rate in RATES.items():
        sigma = math.sqrt(rate * (1 - rate) / len(PROMPTS))
        assert counts[kind] / len(PROMPTS) == pytest.approx(rate, abs=4 * sigma)


def test_a_fault_depends_on_seed_and_try_and_on_nothing_else() -> None:
    def faults(tries: int = 1, **changes: Any) -> list[Fault | None]:
        settings = Settings(faults=RATES).changed(changes)
        return [choose_fault(settings, prompt, tries) for prompt in PROMPTS]

    assert faults() == faults(first_token=1, tail=1, capacity=1)
    assert faults() == faults(faults=dict(reversed(RATES.items())))
    assert faults() != faults(seed=1)
    assert faults() != faults(tries=2)


def test_a_rate_of_1_hits_every_try_and_no_rate_none() -> None:
    always, never = Settings(faults={"reset": 1}), Settings(faults={"reset": 0})
    for prompt in PROMPTS:
        assert {choose_fault(always, prompt, tries) for tries in (1, 2, 3)} == {"reset"}
        assert (
            choose_fault(never, prompt, 1) is choose_fault(DEFAULTS, prompt, 1) is None
        )


def test_a_prompts_own_list_goes_before_the_rates_and_then_there_is_no_fault() -> None:
    settings = Settings(
        faults={"reset": 1}, faults_by_prompt={"Why?": ["hang", None, "slow"]}
    )
    listed = [choose_fault(settings, "Why?", tries) for tries in range(1, 6)]
    assert listed == ["hang", None, "slow", None, None]
    assert choose_fault(settings, "How?", 1) == "reset"


def seen(completion: Completion) -> tuple[str, int, str | None]:
    return completion.id, completion.created, completion._request_id


Ask = Callable[..., tuple[str, int, str | None]]


@pytest.fixture
def ask(client: OpenAI) -> Ask:
    def ask(prompt: str, attempt: int = 1) -> tuple[str, int, str | None]:
        header = {"x-stainless-retry-count": str(attempt - 1)}
        return seen(
            client.completions.create(model="m", prompt=prompt, extra_headers=header)
        )

    return ask


def test_an_answer_does_not_depend_on_order_or_company(
    provider: Provider, ask: Ask
) -> None:
    provider.configure(first_token=0.05, per_token=0, jitter=1)

    async def at_once(prompts: list[str]) -> list[Completion]:
        async with AsyncOpenAI(max_retries=0) as client:
            calls = [client.completions.create(model="m", prompt=p) for p in prompts]
            return await asyncio.gather(*calls)

    prompts = PROMPTS[:10]
    together = asyncio.run(at_once(prompts[::-1]))[::-1]
    assert [ask(prompt) for prompt in prompts] == [seen(one) for one in together]
    assert len({one.id for one in together}) == len(prompts)
    assert len({one.created for one in together}) == len(prompts)


def test_ids_depend_on_seed_prompt_and_attempt(provider: Provider, ask: Ask) -> None:
    provider.configure(first_token=0, per_token=0)
    first = ask("Why?")
    others = [ask("How?"), ask("Why?", attempt=2)]
    with provider.behaving(seed=1):
        others.append(ask("Why?"))
    for other in others:
        assert not set(other) & set(first)
    with provider.behaving(first_token=0.01, jitter=0.9, models=["m"]):
        assert ask("Why?") == first


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_token", -1),
        ("first_token", "1"),
        ("first_token", float("nan")),
        ("first_token", float("inf")),
        ("per_token", 3601),
        ("per_token", None),
        ("jitter", 1.01),
        ("jitter", -0.01),
        ("seed", 1.5),
        ("seed", True),
        ("models", []),
        ("models", "gpt-4"),
        ("models", [5]),
        ("latency", 1),
        ("tail", -0.1),
        ("tail", 3.1),
        ("keys", []),
        ("capacity", 0),
        ("capacity", 1.5),
        ("capacity", True),
        ("requests_per_minute", 0),
        ("requests_per_minute", "60"),
        ("tokens_per_minute", -1),
        ("tokens_per_minute", float("inf")),
        ("burst", 0),
        ("burst", 3601),
        ("faults", ["reset"]),
        ("faults", {"boom": 0.1}),
        ("faults", {"reset": 1.1}),
        ("faults", {"reset": 0.6, "hang": 0.5}),
        ("faults_by_prompt", {"Why?": "reset"}),
        ("faults_by_prompt", {"Why?": ["boom"]}),
        ("slow", -1),
        ("batch_speed", 0),
        ("batch_window", 0),
        ("batch_window", 86_401),
        ("max_calls", -1),
        ("max_tokens", 0.5),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_and_value(
    provider: Provider, name: str, value: Any
) -> None:
    before = provider.configure()
    with pytest.raises(ValueError, match=name) as error:
        provider.configure(**{"seed": 7} | {name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert provider.configure() == before


def test_the_refusal_of_an_unknown_setting_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="latency=1") as error:
        DEFAULTS.changed({"latency": 1})
    assert all(name in str(error.value) for name in Settings.model_fields)


def test_changed_settings_leave_the_others_and_the_old_ones_alone() -> None:
    changed = DEFAULTS.changed({"jitter": 0, "models": ["m"]})
    assert changed == Settings(jitter=0, models=["m"])
    assert Settings() == DEFAULTS


def test_a_change_holds_for_calls_that_come_after_it(
    provider: Provider, ask: Ask, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=1, per_token=0, jitter=0)
    earlier: list[object] = []
    thread = threading.Thread(target=lambda: earlier.append(ask("Why?")))
    thread.start()
    until_in_flight(1)
    provider.configure(first_token=0, seed=1)
    later = ask("Why?")
    thread.join()

    slow, fast = provider.ask("/_provider/journal")["attempts"]
    assert slow["end"] - slow["arrival"] >= 1
    assert fast["end"] < slow["end"]
    provider.configure(seed=0)
    assert earlier == [ask("Why?")]
    assert later not in earlier


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"keys": ["other"]}, openai.AuthenticationError),
        ({"models": ["other"]}, openai.NotFoundError),
        ({"tokens_per_minute": 1}, openai.RateLimitError),
        ({"faults": {"error_503": 1}, "per_token": 9}, openai.InternalServerError),
        (
            {"faults_by_prompt": {"Why?": ["reset"]}, "seed": 1, "tail": 3},
            openai.APIConnectionError,
        ),
    ],
    ids=["keys", "models", "limits", "faults", "faults by prompt"],
)
def test_a_call_in_flight_ends_by_the_settings_it_began_with(
    provider: Provider,
    client: OpenAI,
    changes: dict[str, Any],
    refusal: type[Exception],
) -> None:
    def begin() -> openai.Stream[Completion]:
        return client.completions.create(model="m", prompt="Why?", stream=True)

    provider.configure(first_token=0, per_token=0.02, jitter=0)
    whole, earlier = list(begin()), begin()
    provider.configure(**changes)
    with pytest.raises(refusal):
        begin()
    assert list(earlier) == whole


@pytest.mark.parametrize(
    "change",
    [{"models": ["other"]}, {"tokens_per_minute": 1}, {"faults": {"error_500": 1}}],
    ids=["models", "limits", "faults"],
)
def test_a_change_does_not_hold_for_a_call_whose_body_is_still_on_its_way(
    provider: Provider,
    until_in_flight: Callable[[int], None],
    change: dict[str, Any],
) -> None:
    body = json.dumps({"model": "m", "prompt": "Why?"}).encode()
    address = provider.url.removeprefix("http://")
    provider.configure(first_token=0, per_token=0)
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        until_in_flight(1)
        provider.configure(**change)
        connection.send(body)
        assert connection.getresponse().status == 200


def test_behaving_holds_for_its_block_only(provider: Provider) -> None:
    before = provider.configure(jitter=0.1)

    def fail() -> None:
        with provider.behaving(first_token=0, seed=3) as same:
            assert same is provider
            assert provider.configure() == before | {"first_token": 0, "seed": 3}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert provider.configure() == before

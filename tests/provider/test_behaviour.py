import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from helpers.connection import Provider
from helpers.provider.behaviour import Pace, Settings, digest, pace

PROMPTS = [f"What is {number} times {number}?" for number in range(500)]
DEFAULTS = Settings()


def test_a_pace_does_not_depend_on_what_was_asked_before() -> None:
    in_order = {prompt: pace(DEFAULTS, prompt, 1) for prompt in PROMPTS}
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    assert {prompt: pace(DEFAULTS, prompt, 1) for prompt in shuffled} == in_order


def test_a_pace_is_the_same_in_every_run() -> None:
    first_token = pace(DEFAULTS, "Hello how are you?", 1).first_token
    assert first_token == pytest.approx(0.308790843)


@pytest.mark.parametrize(
    ("seed", "prompt", "attempt"),
    [(1, "Why?", 1), (0, "How?", 1), (0, "Why?", 2)],
    ids=["seed", "prompt", "attempt"],
)
def test_a_pace_depends_on(seed: int, prompt: str, attempt: int) -> None:
    other = pace(Settings(seed=seed), prompt, attempt)
    assert other != pace(DEFAULTS, "Why?", 1)


@pytest.mark.parametrize("jitter", [0.0, 0.2, 1.0])
def test_a_pace_lies_within_the_jitter_and_uses_all_of_it(jitter: float) -> None:
    settings = Settings(first_token=2.0, per_token=0.5, jitter=jitter)
    paces = [pace(settings, prompt, 1) for prompt in PROMPTS]
    shares = [one.first_token / 2.0 - 1 for one in paces]
    assert min(shares) >= -jitter - 1e-9
    assert max(shares) <= jitter + 1e-9
    assert min(shares) <= -0.9 * jitter
    assert max(shares) >= 0.9 * jitter
    assert abs(sum(shares) / len(shares)) <= 0.1 * jitter
    for one in paces:
        assert one.first_token >= 0
        assert one.per_token == pytest.approx(one.first_token / 4)


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

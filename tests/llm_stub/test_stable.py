import math
from collections import Counter

import pytest

from llm_stub.stable import digest, normal, unit


def test_digest_depends_on_every_part() -> None:
    assert digest(0, "a") == digest(0, "a")
    parts: list[tuple[object, ...]] = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1)]
    assert len({digest(*each) for each in parts}) == len(parts)


def test_digest_accepts_lone_surrogates() -> None:
    assert len(digest("\ud800")) == 64


def test_unit_is_spread_evenly_between_0_and_1() -> None:
    values = [unit(0, number, "latency") for number in range(500)]
    assert values == [unit(0, number, "latency") for number in range(500)]
    assert len(set(values)) == len(values)
    assert 0 < min(values) < 0.02
    assert 0.98 < max(values) < 1
    tenths = Counter(math.floor(10 * value) for value in values)
    assert all(25 <= tenths[tenth] <= 75 for tenth in range(10))


@pytest.mark.parametrize(
    ("prompt", "same"),
    [("Why?", "why?"), (" a\n\tb ", "A B"), ("Straße", "STRASSE"), ("", " \n")],
)
def test_normal_ignores_case_and_whitespace(prompt: str, same: str) -> None:
    assert normal(prompt) == normal(same)


def test_normal_keeps_different_prompts_apart() -> None:
    assert len({normal(prompt) for prompt in ("ab", "a b", "a-b", "ä b")}) == 4

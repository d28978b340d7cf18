import random
from pathlib import Path

import pytest

from llm_stub.answers import answer, tokens

PROMPTS = (
    (Path(__file__).parents[2] / "notebooks" / "prompts.txt")
    .read_text("utf-8")
    .splitlines()
)
AWKWARD = ["", " ", "\n", "日本語", "👩‍👩‍👧", "é", "e\u0301", "\x00", "\x1f", "\u3000"]
AWKWARD += ["a", "Z", "0", "_", ".", "…", "\t", "\r\n", "\u2028", "ß", "שלום", "\\"]


def test_tokens_joined_give_the_text_again() -> None:
    chance = random.Random(0)
    for length in range(400):
        text = "".join(chance.choices(AWKWARD, k=length % 40))
        assert "".join(tokens(text)) == text


@pytest.mark.parametrize("text", AWKWARD + ["Hello, world!  ", "  \n  a\n\n", "a" * 99])
def test_a_token_is_never_empty(text: str) -> None:
    assert "" not in tokens(text)
    assert bool(tokens(text)) == bool(text)


def test_an_empty_text_has_no_tokens() -> None:
    assert tokens("") == []


def test_a_long_text_is_cut_in_no_time() -> None:
    text = "word, " * 100_000 + " " * 100_000
    assert "".join(tokens(text)) == text


def is_a_stubs(text: str) -> bool:
    return "stub" in text


def test_there_are_prompts() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) >= 10


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_of_the_notebooks_has_an_answer(prompt: str) -> None:
    assert answer(prompt)
    assert answer(prompt) == answer(prompt).strip()
    assert not is_a_stubs(answer(prompt))


@pytest.mark.parametrize("known", [True, False])
def test_white_space_and_case_do_not_matter(known: bool) -> None:
    prompt = PROMPTS[0] if known else "Is the answer ÄÖÜ straße?"
    for written in (
        prompt.upper(),
        prompt.lower(),
        f"\n  {prompt}\t",
        prompt.replace(" ", " \n "),
    ):
        assert answer(written) == answer(prompt)


def test_another_prompt_gets_a_text_that_says_it_is_a_stubs() -> None:
    others = ["", "What is love?", "日本語で答えて。"]
    assert all(is_a_stubs(answer(other)) for other in others)
    assert len({answer(other) for other in others}) == len(others)


def test_the_stubs_text_is_the_same_in_every_run() -> None:
    assert answer("What is love?").endswith(": 2e52b5fb.")

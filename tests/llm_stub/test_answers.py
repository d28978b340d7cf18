import random
from pathlib import Path

import pytest

from llm_stub.answers import answer, tokens

PROMPTS = (
    (Path(__file__).parents[2] / "notebooks" / "prompts.txt")
    .read_text("utf-8")
    .splitlines()
)
UNUSUAL = ["", " ", "\n", "日本語", "👩‍👩‍👧", "é", "e\u0301", "\x00", "\x1f", "\u3000"]
UNUSUAL += ["a", "Z", "0", "_", ".", "…", "\t", "\r\n", "\u2028", "ß", "שלום", "\\"]


def test_joined_tokens_are_the_text() -> None:
    generator = random.Random(0)
    for length in range(400):
        text = "".join(generator.choices(UNUSUAL, k=length % 40))
        assert "".join(tokens(text)) == text


@pytest.mark.parametrize("text", UNUSUAL + ["Hello, world!  ", "  \n  a\n\n", "a" * 99])
def test_token_is_never_empty(text: str) -> None:
    assert "" not in tokens(text)
    assert bool(tokens(text)) == bool(text)


def test_empty_text_has_no_tokens() -> None:
    assert tokens("") == []


def test_long_text_is_tokenized_quickly() -> None:
    text = "word, " * 100_000 + " " * 100_000
    assert "".join(tokens(text)) == text


def is_default_answer(text: str) -> bool:
    return "stub" in text


def test_notebooks_have_prompts_without_duplicates() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) >= 10


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_of_the_notebooks_has_its_own_answer(prompt: str) -> None:
    assert answer(prompt)
    assert answer(prompt) == answer(prompt).strip()
    assert not is_default_answer(answer(prompt))


@pytest.mark.parametrize("known", [True, False])
def test_case_and_whitespace_of_the_prompt_do_not_matter(known: bool) -> None:
    prompt = PROMPTS[0] if known else "Is the answer ÄÖÜ straße?"
    for variant in (
        prompt.upper(),
        prompt.lower(),
        f"\n  {prompt}\t",
        prompt.replace(" ", " \n "),
    ):
        assert answer(variant) == answer(prompt)


def test_unknown_prompt_gets_its_own_default_answer() -> None:
    unknown = ["", "What is love?", "日本語で答えて。"]
    assert all(is_default_answer(answer(prompt)) for prompt in unknown)
    assert len({answer(prompt) for prompt in unknown}) == len(unknown)


def test_default_answer_is_the_same_in_every_run() -> None:
    assert answer("What is love?").endswith(": 2e52b5fb.")

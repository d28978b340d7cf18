"""What the stub says: texts from answers.toml, by prompt."""

import re
import tomllib
from functools import cache
from importlib.resources import files

from .stable import digest, normal

# A rough tokenizer, as no table can be fetched: up to six letters or digits,
# or one other sign, with the white space before it.
_TOKEN = re.compile(r"\s*(?:\w{1,6}|[^\w\s])|\s+\Z")


def tokens(text: str) -> list[str]:
    """The text cut into tokens; joined, they give the text again."""
    return _tokens_of_answers().get(text) or _TOKEN.findall(text)


def answer(prompt: str) -> str:
    """The stub's answer; white space and case of the prompt do not matter."""
    key = normal(prompt)
    known = _texts().get(key)
    if known is not None:
        return known
    return (
        "I am a stub and know no answer to this prompt. "
        f"To others I would answer otherwise: {digest(key)[:8]}."
    )


@cache
def _texts() -> dict[str, str]:
    table = tomllib.loads(
        files(__package__).joinpath("answers.toml").read_text("utf-8")
    )
    return {normal(prompt): text.strip() for prompt, text in table.items()}


@cache
def _tokens_of_answers() -> dict[str, list[str]]:
    """The texts of the table, each cut once and not for every call."""
    return {text: _TOKEN.findall(text) for text in _texts().values()}

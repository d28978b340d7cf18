"""The stub's answers: texts from answers.toml, looked up by prompt."""

import re
import tomllib
from functools import cache
from importlib.resources import files

from .stable import digest, normal

# A rough tokenizer, because real ones download their vocabularies. A token
# is up to six letters or digits, or one other character, with the space before it.
_TOKEN = re.compile(r"\s*(?:\w{1,6}|[^\w\s])|\s+\Z")


def tokens(text: str) -> list[str]:
    """The tokens of the text; joining them gives the text again."""
    return _tokens_of_answers().get(text) or _TOKEN.findall(text)


def answer(prompt: str) -> str:
    """The answer to a prompt; case and white space don't matter."""
    key = normal(prompt)
    known = _texts().get(key)
    if known is not None:
        return known
    return (
        "I am a stub and have no answer for this prompt. "
        f"Other prompts get another text: {digest(key)[:8]}."
    )


@cache
def _texts() -> dict[str, str]:
    table = tomllib.loads(
        files(__package__).joinpath("answers.toml").read_text("utf-8")
    )
    return {normal(prompt): text.strip() for prompt, text in table.items()}


@cache
def _tokens_of_answers() -> dict[str, list[str]]:
    """The tokens of each text in the table, computed only once."""
    return {text: _TOKEN.findall(text) for text in _texts().values()}

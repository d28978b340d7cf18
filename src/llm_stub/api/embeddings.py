"""POST /v1/embeddings: unit vectors that depend only on the text."""

import base64
import hashlib
import math
import sys
from array import array
from typing import Annotated, Literal, Self

from propcache.api import cached_property
from pydantic import AfterValidator, Field, model_validator

from ..answers import tokens
from .errors import ApiError, Json
from .requests import Call

# The vectors of OpenAI's models: their length, and whether it can be changed.
MODELS = {
    "text-embedding-3-small": (1536, True),
    "text-embedding-3-large": (3072, True),
    "text-embedding-ada-002": (1536, False),
}
DEFAULT_DIMENSIONS, MAX_DIMENSIONS = 1536, 4096  # of any other model
MAX_TOKENS = 8192  # in one input
MAX_TOTAL_TOKENS = 300_000  # in one request


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("input cannot be an empty string")
    return text


Text = Annotated[str, AfterValidator(_not_empty)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=2048)]
Token = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Token], Field(min_length=1)]
ListsOfTokens = Annotated[list[Tokens], Field(min_length=1, max_length=2048)]


class Embedding(Call):
    """POST /v1/embeddings; the input is text or token ids."""

    input: Text | Texts | Tokens | ListsOfTokens
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _has_possible_dimensions(self) -> Self:
        if self.dimensions is None:
            return self
        most, can_change = MODELS.get(self.model, (MAX_DIMENSIONS, True))
        if not can_change:
            raise ValueError("This model does not support specifying dimensions")
        if self.dimensions > most:
            raise ValueError(
                f"Invalid value for 'dimensions' = {self.dimensions}. Must be less "
                f"than or equal to {most}"
            )
        return self

    @cached_property
    def inputs(self) -> list[str | list[int]]:
        """The texts or lists of token ids, one per vector."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)

    @cached_property
    def prompts(self) -> list[str]:
        return [str(one) for one in self.inputs]

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens in each input."""
        return [
            len(tokens(one)) if isinstance(one, str) else len(one)
            for one in self.inputs
        ]

    @cached_property
    def prompt_tokens(self) -> int:
        return sum(self.sizes)

    def check(self) -> None:
        if max(self.sizes) > MAX_TOKENS:
            raise self.context_length_exceeded(MAX_TOKENS, max(self.sizes))
        if self.prompt_tokens > MAX_TOTAL_TOKENS:
            message = (
                f"Requested {self.prompt_tokens} tokens, max {MAX_TOTAL_TOKENS} tokens "
                "per request."
            )
            raise ApiError(400, message, code="max_tokens_per_request")

    def body(self, key: str) -> Json:
        """The vectors, in the order of the texts."""
        data = [
            {"object": "embedding", "index": index, "embedding": self.encoded(text)}
            for index, text in enumerate(self.prompts)
        ]
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens,
        }
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    def encoded(self, text: str) -> list[float] | str:
        """The vector of a text in the requested encoding."""
        default, _ = MODELS.get(self.model, (DEFAULT_DIMENSIONS, True))
        vector = unit_vector(text, self.dimensions or default)
        if self.encoding_format != "base64":
            return vector
        floats = array("f", vector)
        if sys.byteorder == "big":
            floats.byteswap()
        return base64.b64encode(floats.tobytes()).decode()


def unit_vector(text: str, length: int) -> list[float]:
    """A vector of norm 1. Similar texts don't have similar vectors."""
    seed = text.encode(errors="surrogatepass")
    drawn = array("i", hashlib.shake_256(seed).digest(4 * length))
    norm = math.sqrt(math.fsum(value * value for value in drawn))
    return [value / norm for value in drawn]

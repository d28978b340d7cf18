"""POST /v1/embeddings: unit vectors that depend only on the text."""

import base64
import hashlib
import math
import sys
from array import array
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from .errors import Json
from .requests import Call

DEFAULT_DIMENSIONS = 1536  # length of a vector, if the request doesn't set it
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
Tokens = Annotated[list[int], Field(min_length=1)]


class Embedding(Call):
    """POST /v1/embeddings; the input is text or token ids."""

    input: str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    dimensions: Annotated[int, Field(ge=1, le=4096)] | None = None
    encoding_format: Literal["float", "base64"] | None = None

    @cached_property
    def prompts(self) -> list[str]:
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [str(self.input)]
        return [str(one) for one in self.input]

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
        vector = unit_vector(text, self.dimensions or DEFAULT_DIMENSIONS)
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

"""Deterministic values: they depend only on their inputs, in every run."""

import hashlib


def digest(*parts: object) -> str:
    """64 hexadecimal digits that depend only on the parts."""
    joined = "\x1f".join(map(str, parts))
    return hashlib.blake2b(
        joined.encode(errors="surrogatepass"), digest_size=32
    ).hexdigest()


def unit(*parts: object) -> float:
    """A number strictly between 0 and 1 that depends only on the parts."""
    return (int(digest(*parts)[:8], 16) + 0.5) / 2**32


def normal(prompt: str) -> str:
    """The prompt in lower case with single spaces, to ignore such differences."""
    return " ".join(prompt.casefold().split())

"""Values that depend on their inputs alone, the same in every run."""

import hashlib


def digest(*parts: object) -> str:
    """64 hexadecimal digits that depend on the parts and on nothing else."""
    joined = "\x1f".join(map(str, parts))
    return hashlib.blake2b(
        joined.encode(errors="surrogatepass"), digest_size=32
    ).hexdigest()


def unit(*parts: object) -> float:
    """A number strictly between 0 and 1 that depends on the parts alone."""
    return (int(digest(*parts)[:8], 16) + 0.5) / 2**32


def normal(prompt: str) -> str:
    """The prompt in lower case with single spaces: differences that don't matter."""
    return " ".join(prompt.casefold().split())

"""OpenAI's API as the stub implements it: one class per route that OpenAI bills."""

from .chat import Chat
from .completions import Completion
from .embeddings import Embedding
from .parameters import PARAMETERS
from .requests import Call, read
from .responses import Response

ENDPOINTS: dict[str, type[Call]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/embeddings": Embedding,
}


def read_call(path: str, raw: bytes) -> Call:
    """Read a request to one of ENDPOINTS; raises ApiError 400 if it's invalid."""
    return read(ENDPOINTS[path], raw, PARAMETERS[path])

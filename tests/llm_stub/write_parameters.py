"""Write src/llm_stub/api/parameters.py from the types of the installed openai SDK.

Run it after you update the SDK: python tests/llm_stub/write_parameters.py

The stub can't read these types itself: importing the SDK takes half a second.
"""

import json
import textwrap
from importlib import import_module
from pathlib import Path
from typing import get_args

import openai

FILE = Path(__file__).parents[2] / "src/llm_stub/api/parameters.py"
TYPES = {
    "/v1/chat/completions": "chat.completion_create_params.CompletionCreateParams",
    "/v1/completions": "completion_create_params.CompletionCreateParams",
    "/v1/responses": "responses.response_create_params.ResponseCreateParams",
    "/v1/embeddings": "embedding_create_params.EmbeddingCreateParams",
    "/v1/files": "file_create_params.FileCreateParams",
    "/v1/batches": "batch_create_params.BatchCreateParams",
}


def parameters(name: str) -> list[str]:
    """The names of all parameters that the SDK can send to a route."""
    module, _, attribute = f"openai.types.{name}".rpartition(".")
    kind = getattr(import_module(module), attribute)
    variants = get_args(kind) or [kind]  # with and without a stream
    found = {name for one in variants for name in one.__annotations__}
    for one in variants:
        found |= one.__required_keys__ | one.__optional_keys__
    return sorted(found)


def module_text() -> str:
    """The text of parameters.py."""
    lines = [
        '"""The parameters of each route, from the types of the openai SDK.',
        "",
        "Written by tests/llm_stub/write_parameters.py; don't edit it by hand.",
        '"""',
        "",
        f'SDK_VERSION = "{openai.__version__}"',
        "PARAMETERS: dict[str, frozenset[str]] = {",
    ]
    for path, name in TYPES.items():
        words = textwrap.wrap(" ".join(parameters(name)), 76)
        lines += [
            f"    {json.dumps(path)}: frozenset(",
            '        """',
            *(f"        {line}" for line in words),
            '        """.split()',
            "    ),",
        ]
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    FILE.write_text(module_text(), encoding="utf-8")

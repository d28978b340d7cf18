"""The errors of OpenAI's API: a status and an error object.

Source: OpenAI's API reference and its guide *Error codes*.
"""

import math
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..limits import Rejection

Json = dict[str, Any]


class ApiError(Exception):
    """An error that the API documents: a status and an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: Json = {"error": error}


def model_not_found(model: str) -> ApiError:
    """404 for a model that doesn't exist."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def route_not_found(method: str, path: str, routes: Iterable[str]) -> ApiError:
    """404 for an unknown path; `routes` are those that the stub has."""
    message = f"Invalid URL ({method} {path}). "
    if f"/v1{path}" in routes:
        message += f"Did you mean /v1{path}? The base URL must end with /v1."
    else:
        message += f"The stub answers only {', '.join(routes)}."
    return ApiError(404, message)


def method_not_allowed(method: str, path: str, allowed: Iterable[str]) -> ApiError:
    """405 for a method that the path doesn't accept."""
    message = f"Not allowed to {method} on {path}."
    headers = {"allow": ", ".join(sorted(allowed))}
    return ApiError(405, message, code="method_not_supported", headers=headers)


def key_rejected(given: bool) -> ApiError:
    """401 for an API key that is missing or wrong; the message omits the key."""
    if given:
        return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
    message = (
        "You didn't provide an API key. You need to provide your API key in an "
        "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
    )
    return ApiError(401, message)


def missing_parameter(param: str | None) -> ApiError:
    """400 for a required parameter that is missing."""
    message = f"Missing required parameter: '{param}'."
    return ApiError(400, message, param, "missing_required_parameter")


def context_length_exceeded(
    limit: int, prompt_tokens: int, answer_tokens: int = 0
) -> ApiError:
    """400 for a prompt that is too long, as worded for completions and embeddings."""
    message = (
        f"This model's maximum context length is {limit} tokens, however you requested "
        f"{prompt_tokens + answer_tokens} tokens ({prompt_tokens} in your prompt; "
        f"{answer_tokens} for the completion). Please reduce your prompt; or "
        "completion length."
    )
    return ApiError(400, message, code="context_length_exceeded")


def insufficient_quota() -> ApiError:
    """429 for an account that is out of credit.

    Unlike with a rate limit, waiting doesn't help.
    """
    message = (
        "You exceeded your current quota, please check your plan and billing details."
    )
    return ApiError(429, message, code="insufficient_quota", kind="insufficient_quota")


def rate_limit_exceeded(rejection: Rejection) -> ApiError:
    """429 for a call over a rate limit, with the time to wait in its headers."""
    name, bucket, wait = rejection.bucket.name, rejection.bucket, rejection.retry_after
    unit = {"requests": "RPM", "tokens": "TPM"}[name]
    code = "rate_limit_exceeded"
    if math.isinf(wait):
        message = (
            f"Request too large on {name} per min ({unit}): at most "
            f"{bucket.size:.0f} at once, Requested {rejection.requested:.0f}."
        )
        return ApiError(429, message, code=code, kind=name)
    message = (
        f"Rate limit reached on {name} per min ({unit}): Limit "
        f"{bucket.per_minute:.0f}, Requested {rejection.requested:.0f}. "
        f"Please try again in {wait:.3f}s."
    )
    headers = {
        "retry-after": str(math.ceil(wait)),
        "retry-after-ms": str(math.ceil(wait * 1000)),
    }
    return ApiError(429, message, code=code, kind=name, headers=headers)


def internal_error(error: Exception) -> ApiError:
    """500 for a bug in the stub, with the details that a bug report needs."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = (
        f"The stub failed with an internal error: {type(error).__name__}: {error} "
        f"({Path(frame.filename).name}, line {frame.lineno}). Please report this "
        "bug, and include the request."
    )
    return ApiError(500, message, kind="server_error")


def server_error(status: int) -> ApiError:
    """500 or 503 for a failure on the API's side."""
    if status == 503:
        message = "The engine is currently overloaded, please try again later."
    else:
        message = "The server had an error while processing your request. Sorry!"
    return ApiError(status, message, kind="server_error")

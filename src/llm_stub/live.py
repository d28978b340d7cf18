"""Live mode: forward calls to a real endpoint, the upstream, up to a cap.

Keys pass through in the client's own header. They are never stored, logged or
shown.
"""

import json
import re
from typing import Any

from aiohttp import (
    BasicAuth,
    ClientConnectorError,
    ClientError,
    ClientPayloadError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    InvalidURL,
    NonHttpUrlClientError,
    web,
)
from multidict import CIMultiDict
from yarl import URL

from .answers import tokens
from .api import ENDPOINTS
from .api.errors import ApiError, Json
from .api.requests import Generation
from .faults import ConnectionBrokenError
from .journal import Attempt
from .state import State

OPENAI = "https://api.openai.com/v1"
TIMEOUT = ClientTimeout(total=None, sock_connect=10, sock_read=600)  # seconds
DEFAULT_RESERVE = 500  # answer tokens reserved for a call that sets no limit
TAIL_BYTES = 4096  # at the end of an answer, where its usage is
DONE = b"data: [DONE]\n\n"  # the last event of a completion's stream
# Headers of one connection rather than of the message (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    """
    connection content-length host keep-alive proxy-authenticate
    proxy-authorization te trailer transfer-encoding upgrade
    """.split()
)


class UnreachedError(ApiError):
    """Nothing was sent, because there is no connection to the upstream."""


class RelayedResponse(web.StreamResponse):
    """A response of the upstream, passed on with its own headers."""


class Live:
    """Forwards calls, counts what they use, and refuses calls over a cap."""

    def __init__(self, upstream: str, model: str | None, state: State) -> None:
        url = URL(upstream.rstrip("/"))
        self._login = BasicAuth.from_url(url, encoding="utf-8")
        self.upstream = url.with_user(None) if url.absolute else url
        self.model = model
        self.calls = self.tokens = 0
        self._state = state
        self._session: ClientSession | None = None

    @property
    def used(self) -> dict[str, int]:
        """Calls and tokens counted so far."""
        return {"calls": self.calls, "tokens": self.tokens}

    @property
    def where(self) -> str:
        """The upstream's host, for messages: never its user name or password."""
        return self.upstream.host or str(self.upstream).rpartition("@")[2]

    async def close(self, app: web.Application | None = None) -> None:
        """Close the connections."""
        if self._session:
            await self._session.close()

    def not_forwarded(self, request: web.Request) -> ApiError:
        """404 for a route that live mode doesn't forward."""
        message = (
            f"Live mode does not forward {request.method} {request.path}, because its "
            "caps can't limit the cost of it. It forwards only completions, chats, "
            "responses, embeddings and GET /v1/models."
        )
        return ApiError(404, message, code="not_forwarded")

    async def models(self, request: web.Request, entry: Attempt) -> web.StreamResponse:
        """Forward a request to list or look up models, which costs nothing.

        Raises ApiError 502 or 504 if the upstream doesn't answer.
        """
        if ".." in request.path.split("/"):  # it could reach any route
            raise self.not_forwarded(request)
        answer = await self.send(request, await request.read())
        return await self.relay(request, entry, answer)

    async def call(self, request: web.Request, entry: Attempt) -> web.StreamResponse:
        """Forward a call, and count what it uses.

        Raises ApiError 403 at the cap, before anything is sent, and 502 or 504
        if the upstream doesn't answer.
        """
        raw, body = self.with_model(await request.read())
        entry.describe(
            str(body.get("model", "")), last_prompt(body), bool(body.get("stream"))
        )
        generates = issubclass(ENDPOINTS[request.path], Generation)
        reserved_prompt, reserved_answer = reserve(body, generates=generates)
        reserved = reserved_prompt + reserved_answer
        self.check_cap(reserved)
        self.calls += 1
        self.tokens += reserved
        try:
            answer = await self.send(request, raw)
        except UnreachedError:
            self.calls -= 1
            self.tokens -= reserved
            raise
        response = await self.relay(request, entry, answer)
        # A broken answer stays counted in full, because it may be charged.
        if answer.status >= 400:
            used = 0
        elif entry.prompt_tokens:
            used = entry.prompt_tokens + entry.completion_tokens
        elif entry.stream:  # no usage given: count the events of the stream
            entry.prompt_tokens = reserved_prompt
            used = reserved_prompt + entry.completion_tokens
        else:  # no usage given: keep the estimate
            used = reserved
        self.tokens += used - reserved
        return response

    async def relay(
        self, request: web.Request, entry: Attempt, answer: ClientResponse
    ) -> web.StreamResponse:
        """Pass the answer on, chunk by chunk, and record its usage."""
        response = RelayedResponse(status=answer.status, reason=answer.reason)
        response.headers.extend(_passed(answer.headers))
        response.content_length = answer.content_length
        tail, events = b"", 0
        try:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                tail, events = (
                    (tail + chunk)[-TAIL_BYTES:],
                    events + chunk.count(b"data: "),
                )
                await response.write(chunk)
                if tail.endswith(DONE):  # the SDK hangs up here, so this is the end
                    break
        except (ClientPayloadError, TimeoutError):
            entry.fault = "upstream"
            if request.transport:  # half an answer must not look like a whole one
                request.transport.abort()
            raise ConnectionBrokenError("the upstream broke the connection") from None
        finally:
            answer.close()
        entry.prompt_tokens, entry.completion_tokens = usage(tail)
        if not entry.prompt_tokens:
            entry.completion_tokens = events
        return response

    def check_cap(self, reserved: int) -> None:
        """Raise ApiError 403 if another call would exceed a cap."""
        settings = self._state.settings
        for name, cap, used, more in (
            ("max_calls", settings.max_calls, self.calls, 1),
            ("max_tokens", settings.max_tokens, self.tokens, reserved),
        ):
            if used + more > cap:
                message = (
                    f"Not sent: this call could exceed live mode's cap {name}={cap} "
                    f"({used} used so far, and up to {more} for this call). To raise "
                    f"the cap, run connect(live=True, {name}=…)."
                )
                raise ApiError(403, message, name, "live_cap", kind="live_cap")

    def with_model(self, raw: bytes) -> tuple[bytes, Json]:
        """The body, with the model from LLM_MODEL if that is set.

        Raises ApiError 400 if the body isn't a JSON object.
        """
        try:
            body = json.loads(raw)
            if not isinstance(body, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise ApiError(
                400, "The body could not be parsed: it isn't a JSON object."
            ) from None
        if not self.model:
            return raw, body
        body["model"] = self.model
        return json.dumps(body).encode(), body

    async def send(self, request: web.Request, raw: bytes) -> ClientResponse:
        """Send the request to the upstream; raises ApiError 502 or 504 on failure."""
        if self._session is None:
            self._session = ClientSession(
                timeout=TIMEOUT, trust_env=True, auto_decompress=False
            )
        headers = _passed(request.headers)
        headers["accept-encoding"] = "identity"  # otherwise we can't read its usage
        if self._login:
            headers["authorization"] = self._login.encode()
        path = request.rel_url.raw_path.removeprefix("/v1/")
        url = self.upstream.joinpath(path, encoded=True).with_query(request.query)
        body, session = raw or None, self._session
        try:
            answer = await session.request(
                request.method, url, data=body, headers=headers, allow_redirects=False
            )
        except ConnectionTimeoutError:
            raise self._unreached(504, "connection timed out", UnreachedError) from None
        except (InvalidURL, NonHttpUrlClientError):
            raise self._unreached(502, "not a valid address", UnreachedError) from None
        except TimeoutError:
            raise self._unreached(504, "did not answer in time") from None
        except ClientConnectorError as error:
            raise self._unreached(502, str(error.os_error), UnreachedError) from None
        except ClientError as error:
            raise self._unreached(502, type(error).__name__) from None
        if "location" in answer.headers:  # a client would follow it and bypass the cap
            answer.close()
            message = (
                f"The upstream {self.where} redirects with status {answer.status}. "
                "Live mode doesn't follow redirects: set OPENAI_BASE_URL to the final "
                "address."
            )
            raise ApiError(502, message, code="upstream", kind="server_error")
        return answer

    def _unreached(
        self, status: int, why: str, kind: type[ApiError] = ApiError
    ) -> ApiError:
        message = (
            f"The upstream {self.where} can't be reached or didn't answer ({why}). "
            "Is it running, and is OPENAI_BASE_URL right?"
        )
        return kind(status, message, code="upstream", kind="server_error")


def last_prompt(body: Json) -> str:
    """The last prompt in a body, for the journal."""
    text: Any = body.get("prompt", body.get("input", body.get("messages", "")))
    while isinstance(text, list) and text:
        text = text[-1]
        if isinstance(text, dict):
            text = text.get("content", text.get("text", ""))
    return text if isinstance(text, str) else ""


def reserve(body: Json, *, generates: bool) -> tuple[int, int]:
    """Estimate a call's prompt tokens and the most tokens its answer can have."""
    names = ("prompt", "input", "messages", "instructions")
    prompt_tokens = _size([body.get(name) for name in names])
    if not generates:
        return prompt_tokens, 0
    limits = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    limit = next(
        (body[name] for name in limits if _is_count(body.get(name))), DEFAULT_RESERVE
    )
    counts = [body[name] for name in ("n", "best_of") if _is_count(body.get(name))]
    times = max(counts, default=1)
    prompts = body.get("prompt")
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        times *= len(prompts)
    return prompt_tokens, int(limit) * int(times)


def usage(tail: bytes) -> tuple[int, int]:
    """Prompt and answer tokens, read from the end of an answer; (0, 0) if absent."""
    text = tail.decode(errors="replace")

    def last(*names: str) -> int:
        found = re.findall(rf'"(?:{"|".join(names)})":\s*(\d+)', text)
        return int(found[-1]) if found else 0

    prompt_tokens = last("prompt_tokens", "input_tokens")
    return prompt_tokens, max(0, last("total_tokens") - prompt_tokens)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(tokens(value))
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_size, value))
    return int(isinstance(value, int))  # a prompt may consist of token ids


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _passed(headers: Any) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in HOP_BY_HOP.intersection(name.lower() for name in headers):
        kept.popall(name)
    return kept

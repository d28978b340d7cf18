"""Live mode: forward calls to a real endpoint, the upstream, up to a cap.

A call without a token limit gets one (see `caps`), which the response shows in the
header `x-live-max-tokens`. Keys pass through in the client's own header.
They are never stored, logged or shown.
"""

import asyncio
from types import SimpleNamespace
from typing import Any
from urllib.request import getproxies, proxy_bypass

from aiohttp import (
    BasicAuth,
    ClientConnectorError,
    ClientPayloadError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    InvalidUrlClientError,
    NonHttpUrlClientError,
    TCPConnector,
    TraceConfig,
    TraceRequestChunkSentParams,
    web,
)
from multidict import CIMultiDict
from pydantic_core import from_json
from yarl import URL

from .api import ENDPOINTS
from .api.errors import ApiError, Json
from .api.requests import Generation
from .caps import Caps, Reservation, usage
from .faults import ConnectionBrokenError
from .journal import Attempt
from .ledger import Ledger
from .settings import CAPS
from .state import State

OPENAI = "https://api.openai.com/v1"
TIMEOUT = ClientTimeout(total=None, sock_connect=10, sock_read=600)  # seconds
TAIL_BYTES = 4096  # at the end of an answer, where its usage is
DONE = b"data: [DONE]\n\n"  # the last event of a completion's stream
# Headers that belong to one connection, not to the message (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    """
    connection content-length expect host keep-alive proxy-authenticate
    proxy-authorization te trailer transfer-encoding upgrade
    """.split()
)

# Prefixes of headers that aren't passed on. The upstream's could let a web page read
# the answer, or make a browser store cookies and rules for this machine.
FROM_BROWSER = ("cookie", "origin", "referer", "sec-")
FOR_BROWSER = (
    "access-control-",
    "alt-svc",
    "clear-site-data",
    "nel",
    "report-to",
    "set-cookie",
    "strict-transport-security",
)


class RelayedResponse(web.StreamResponse):
    """The upstream's response, passed on with its own headers."""


class Live:
    """Forwards calls, counts what they use, and refuses calls over a cap."""

    def __init__(
        self, upstream: str, model: str | None, ledger: Ledger, state: State
    ) -> None:
        try:
            url = URL(upstream.rstrip("/"))
        except ValueError:  # each call then fails with the reason
            url = URL()
        self._address = upstream
        self._login = BasicAuth.from_url(url, encoding="utf-8")
        self.upstream = url.with_user(None) if url.absolute else url
        self.model = model
        self._ledger = ledger
        self._caps = Caps(self.where, ledger)
        self._state = state
        state.change(ledger.caps)
        self._session: ClientSession | None = None

    @property
    def used(self) -> dict[str, int]:
        """Calls and tokens counted so far."""
        calls, tokens = self._ledger.used
        return {"calls": calls, "tokens": tokens}

    def remember_caps(self) -> None:
        """Store the caps for stubs that share the ledger and start later."""
        self._ledger.caps = self._state.settings.model_dump(include={*CAPS})

    @property
    def where(self) -> str:
        """The upstream's host, for messages: never its user name or password."""
        return self.upstream.host or self._address.rpartition("@")[2]

    async def close(self, app: web.Application | None = None) -> None:
        """Close the connections and the ledger."""
        if self._session:
            await self._session.close()
        self._ledger.close()

    def not_forwarded(self, request: web.Request) -> ApiError:
        """404 for a route that live mode doesn't forward."""
        message = (
            f"Live mode does not forward {request.method} {request.path}, because its "
            "caps can't limit what it costs. It forwards only completions, chats, "
            "responses, embeddings and GET /v1/models."
        )
        return ApiError(404, message, code="not_forwarded")

    async def models(self, request: web.Request, entry: Attempt) -> web.StreamResponse:
        """Forward a request to list or look up models, which costs nothing.

        Raises ApiError 502 or 504 if the upstream doesn't answer.
        """
        if ".." in request.path.split("/"):  # it could reach any route
            raise self.not_forwarded(request)
        free = Reservation(body=await request.read())
        answer = await self.send(request, free)
        return await self.relay(request, entry, answer, free)

    async def call(self, request: web.Request, entry: Attempt) -> web.StreamResponse:
        """Forward a call, and count what it uses.

        Before anything is sent, raises ApiError 400 if the body is invalid, and 403
        at the cap or if the call's tokens can't be bounded. Raises ApiError 502 or
        504 if the upstream doesn't answer.
        """
        body = read_object(await request.read())
        if self.model and issubclass(ENDPOINTS[request.path], Generation):
            body["model"] = self.model
        model, streams = str(body.get("model", "")), bool(body.get("stream"))
        self._state.journal.describe(entry, model, last_prompt(body), streams)
        settings = self._state.settings
        reserved = self._caps.reserve(request.path, body, settings)
        self._caps.take(reserved, settings)
        try:
            answer = await self.send(request, reserved)
        except BaseException:
            if not reserved.sent:
                self._caps.give_back(reserved)
            raise
        response = await self.relay(request, entry, answer, reserved)
        self._caps.settle(reserved, entry, answer.status)
        return response

    async def relay(
        self,
        request: web.Request,
        entry: Attempt,
        answer: ClientResponse,
        reserved: Reservation,
    ) -> web.StreamResponse:
        """Pass the answer on, chunk by chunk, and record its usage."""
        response = RelayedResponse(status=answer.status, reason=answer.reason)
        response.headers.extend(_passed(answer.headers, *FOR_BROWSER))
        if reserved.limit_set:
            response.headers["x-live-max-tokens"] = str(reserved.limit_set)
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
                if tail.endswith(DONE):  # the SDK disconnects here, so we stop too
                    break
        except (ClientPayloadError, TimeoutError):
            entry.fault = "upstream"
            if request.transport:  # half an answer must not look complete
                request.transport.abort()
            raise ConnectionBrokenError("the upstream broke the connection") from None
        finally:
            answer.close()
        entry.prompt_tokens, entry.completion_tokens = usage(tail)
        if not entry.prompt_tokens:
            entry.completion_tokens = events
        return response

    async def send(self, request: web.Request, reserved: Reservation) -> ClientResponse:
        """Send the request to the upstream, and record in `reserved` that it was sent.

        Raises ApiError 502 or 504 if the upstream doesn't answer.
        """
        if self._session is None:
            trace = TraceConfig()
            trace.on_request_chunk_sent.append(_record_sent)
            self._session = ClientSession(
                connector=TCPConnector(limit=0),  # the client decides how many
                timeout=TIMEOUT,
                auto_decompress=False,
                trace_configs=[trace],
            )
        headers = _passed(request.headers, *FROM_BROWSER)
        headers["accept-encoding"] = "identity"  # otherwise we can't read its usage
        headers.popall("content-encoding", None)  # the body is decompressed by now
        if self._login:
            headers["authorization"] = self._login.encode()
        path = request.rel_url.raw_path.removeprefix("/v1/")
        url = self.upstream.joinpath(path, encoded=True).with_query(request.query)
        proxy = await asyncio.to_thread(proxy_for, url)
        if proxy and not proxy.lower().startswith(("http://", "https://")):
            raise self._unreached(502, "its proxy isn't an http:// address")
        try:
            answer = await self._session.request(
                request.method,
                url,
                data=reserved.body or None,
                headers=headers,
                allow_redirects=False,
                proxy=proxy,
                trace_request_ctx=reserved,
            )
        except ConnectionTimeoutError:
            raise self._unreached(504, "connection timed out") from None
        except (InvalidUrlClientError, NonHttpUrlClientError):
            raise self._unreached(502, "not a valid address") from None
        except TimeoutError:
            raise self._unreached(504, "did not answer in time") from None
        except ClientConnectorError as error:
            raise self._unreached(502, str(error.os_error)) from None
        except Exception as error:  # its text could contain the key
            raise self._unreached(502, type(error).__name__) from None
        # A client would follow it and bypass the cap.
        if 300 <= answer.status < 400 and "location" in answer.headers:
            answer.close()
            message = (
                f"The upstream {self.where} redirects with status {answer.status}. "
                "Live mode doesn't follow redirects: set OPENAI_BASE_URL to the final "
                "address."
            )
            raise ApiError(502, message, code="upstream", kind="server_error")
        return answer

    def _unreached(self, status: int, why: str) -> ApiError:
        message = (
            f"The upstream {self.where} can't be reached or didn't answer ({why}). "
            "Is it running, and is OPENAI_BASE_URL right?"
        )
        return ApiError(status, message, code="upstream", kind="server_error")


def proxy_for(url: URL) -> str | None:
    """The proxy for an address, from HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

    aiohttp's own `trust_env` would also read .netrc, and a login from there can't be
    combined with the client's key.
    """
    if url.host is None or proxy_bypass(url.host):
        return None
    proxy = getproxies().get(url.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


async def _record_sent(
    session: ClientSession, context: SimpleNamespace, part: TraceRequestChunkSentParams
) -> None:
    """Record that the first part of a body is about to be sent, with its headers.

    `on_request_headers_sent` would be too early, because aiohttp calls it before it
    checks the headers.
    """
    context.trace_request_ctx.sent = True


def read_object(raw: bytes) -> Json:
    """Read a JSON object; raises ApiError 400 if it isn't one."""
    try:
        body = from_json(raw)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        message = "The body could not be parsed: it isn't a JSON object."
        raise ApiError(400, message)
    return body


def last_prompt(body: Json) -> str:
    """The last prompt in a body, for the journal."""
    text: Any = body.get("prompt", body.get("input", body.get("messages", "")))
    while isinstance(text, list) and text:
        text = text[-1]
        if isinstance(text, dict):
            text = text.get("content", text.get("text", ""))
    return text if isinstance(text, str) else ""


def _passed(headers: Any, *without: str) -> CIMultiDict[str]:
    """The headers to pass on: none that are hop-by-hop or begin with these prefixes."""
    return CIMultiDict(
        (name, text)
        for name, text in headers.items()
        if name.lower() not in HOP_BY_HOP and not name.lower().startswith(without)
    )

"""A web page in your browser can't use the stub or change its settings."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pytest

from helpers.connection import Provider
from llm_stub.server import Server
from llm_stub.settings import Settings
from tests.llm_stub.conftest import Json

Route = tuple[str, str]
Headers = dict[str, str]

MESSAGES = [{"role": "user", "content": "Hello how are you?"}]
# What each route needs to have an effect.
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"model": "m", "messages": MESSAGES},
    "/v1/completions": {"model": "m", "prompt": "a", "max_tokens": 1},
    "/v1/responses": {"model": "m", "input": "a"},
    "/v1/embeddings": {"model": "m", "input": "a", "dimensions": 1},
    "/_provider/config": {"max_calls": 10**6, "seed": 7},
}
UNKNOWN_ROUTES = [
    ("GET", "/"),
    ("POST", "/v1/nothing"),
    ("DELETE", "/v1/completions"),
    ("OPTIONS", "/v1/chat/completions"),  # a browser's preflight
    ("OPTIONS", "/_provider/config"),
    ("GET", "/_provider/nothing"),
]
DEAD_UPSTREAM = "http://127.0.0.1:9/v1"

LOCAL = "127.0.0.1 127.0.0.2 localhost LOCALHOST [::1]".split()
LOCAL_HOSTS = [*LOCAL, *(f"{name}:8000" for name in LOCAL)]
FOREIGN_HOSTS = ["", "127.0.0.1, evil.example"] + (
    "evil.example evil.example:8000 127.0.0.1.evil.example localhost.evil.example "
    "evil-localhost user@127.0.0.1 127.0.0.1@evil.example 127.0.0.1:8000@evil.example "
    "0.0.0.0 192.168.0.1 [::]"
).split()
FOREIGN_ORIGINS = ["", "null", "file://", "chrome-extension://abcdefghijklmnop"] + (
    "https://evil.example http://localhost.evil.example http://192.168.0.1:8000 "
    "http://127.0.0.1@evil.example"
).split()
CROSS_SITE = {"Sec-Fetch-Site": "cross-site"}
TRUSTED: list[Headers] = [
    *({"Host": host} for host in LOCAL_HOSTS),
    {"Origin": "http://localhost:3000"},
    {"Origin": "https://127.0.0.1"},
    {"Origin": "http://[::1]:3000"},
    {"Origin": "http://localhost:3000", **CROSS_SITE},  # from localhost to 127.0.0.1
    *({"Sec-Fetch-Site": site} for site in ("none", "same-origin", "same-site")),
]
UNTRUSTED: list[Headers] = [
    *({"Host": host} for host in FOREIGN_HOSTS),
    *({"Origin": origin} for origin in FOREIGN_ORIGINS),
    {"Host": "evil.example", "Origin": "http://localhost:3000"},
    {"Host": "evil.example", "Sec-Fetch-Site": "same-origin"},  # DNS rebinding
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "same-site"},
    CROSS_SITE,
]


@contextlib.contextmanager
def started_stub(
    *options: str,
    command: tuple[str, ...] = (),
    errors: IO[str] | None = None,
    **environment: str,
) -> Iterator[Provider]:
    """A stub in its own process, started directly or through a command."""
    process = subprocess.Popen(
        [*command, sys.executable, "-m", "llm_stub", "--port", "0", *options],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["url"]
        yield Provider(url, process)
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True)
class Target:
    """The stub under test comes first, then its upstream, if it has one."""

    stubs: list[Provider]
    routes: list[Route]
    connection: http.client.HTTPConnection

    def send(self, route: Route, headers: Headers) -> tuple[int, bytes, Any]:
        """Send what a page can send without a preflight: a body of plain text."""
        method, path = route
        connection, body = self.connection, json.dumps(BODIES.get(path, {})).encode()
        connection.putrequest(method, path, skip_host=True)
        own = {"Content-Type": "text/plain", "Content-Length": str(len(body))}
        for name, value in ({"Host": "127.0.0.1"} | headers | own).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    def state(self) -> list[Json]:
        """Everything that a request can change, here and at the upstream."""
        found = []
        for stub in self.stubs:
            for path in ("config", "journal?settle=10", "stats"):
                found.append(stub.ask(f"/_provider/{path}"))
                found[-1].pop("now", None)
        return found


def routes(upstream: str | None) -> list[Route]:
    """All routes of a stub, and some that it doesn't have."""
    known = {
        (route.method, route.resource.canonical.replace("{id}", "x"))
        for route in Server(upstream).app().router.routes()
        if route.resource
    }
    return [*sorted(known), *UNKNOWN_ROUTES]


@pytest.fixture(scope="module")
def live_and_upstream() -> Iterator[list[Provider]]:
    with started_stub() as upstream:
        address = upstream.url.replace("//", "//user:password@")
        variables: Json = {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_BASE": ""}
        with started_stub("--live", LLM_MODEL="", **variables) as live:
            yield [live, upstream]


@pytest.fixture(params=["stub", "live"])
def target(request: pytest.FixtureRequest, provider: Provider) -> Iterator[Target]:
    """The stub under test, without latency, after it has answered one call."""
    live = request.param == "live"
    stubs = request.getfixturevalue("live_and_upstream") if live else [provider]
    settings = Settings(first_token=0, per_token=0, max_calls=10**5, max_tokens=10**7)
    for stub in stubs:
        stub.configure(**settings.model_dump())
    address = stubs[0].url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as one:
        target = Target(stubs, routes(DEAD_UPSTREAM if live else None), one)
        status, _, _ = target.send(("POST", "/v1/chat/completions"), {})
        assert status == 200
        yield target


def describe(headers: Headers) -> str:
    return ", ".join(f"{name}: {value}" for name, value in headers.items())


@pytest.mark.parametrize("headers", TRUSTED, ids=describe)
def test_request_from_this_machine_is_answered_on_every_route(
    target: Target, headers: Headers
) -> None:
    for route in target.routes:
        status, _, _ = target.send(route, headers)
        assert status != 403, route


@pytest.mark.parametrize("headers", UNTRUSTED, ids=describe)
def test_request_from_a_web_page_is_refused_on_every_route_and_changes_nothing(
    target: Target, headers: Headers
) -> None:
    before = target.state()
    for route in target.routes:
        status, body, received = target.send(route, headers)
        assert status == 403, route
        assert "access-control-allow-origin" not in received
        if route[0] == "HEAD":
            continue
        error = json.loads(body)["error"]
        if not route[1].startswith("/_provider/"):
            assert error.keys() == {"message", "type", "param", "code"}
            error = error["message"]
        assert error.startswith("The stub")
        name = next(iter(headers))
        assert (name if name != "Sec-Fetch-Site" else "another site's page") in error
    assert target.state() == before

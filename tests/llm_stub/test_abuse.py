import contextlib
import copy
import gzip
import http.client
import json
import math
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_stub.api.requests import NO_EFFECT, REFUSED
from llm_stub.server import MAX_BODY_BYTES
from llm_stub.settings import Settings

QUICK = 2.0  # seconds in which a call is answered whatever others do
SOON = 5.0  # seconds in which a call is answered that asks for much
PATIENCE = 10.0  # seconds for anything else
GROWTH = 256 * 2**20  # bytes that the allocator may hold on to
SPARE = 3  # descriptors and threads more than before
STATUSES = {400, 404, 405, 409, 413, 417}
DEFAULTS = Settings(first_token=0, per_token=0).model_dump()

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        def refuse(constant: str) -> NoReturn:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.body, parse_constant=refuse)


def message(method: str, path: str, body: bytes | None = None, *lines: str) -> bytes:
    """An HTTP request as it goes over the wire."""
    head = [f"{method} {path} HTTP/1.1", "Host: provider", *lines]
    if body is not None:
        head.append(f"Content-Length: {len(body)}")
    text = "\r\n".join([*head, "", ""])
    return text.encode("utf-8", "surrogateescape") + (body or b"")


def read_answer(connection: socket.socket, method: str = "POST") -> Answer | None:
    """The answer, or None where the connection was closed in its place."""
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        return Answer(response.status, response.headers, response.read())
    except ConnectionError:
        return None


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**20), b""))


def abort(connection: socket.socket) -> None:
    pair = "hh" if sys.platform == "win32" else "ii"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(pair, 1, 0))
    connection.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"it took more than {PATIENCE} s"
        time.sleep(0.01)


def assert_well_formed(answer: Answer, sent: object = "", method: str = "POST") -> None:
    """What a client sends is answered or refused, and never an error of ours."""
    if method != "HEAD" and (
        answer.status >= 400 or answer.headers.get_content_type() == "application/json"
    ):
        found = answer.json()
    if answer.status < 400:
        return
    assert answer.status in STATUSES, (answer, str(sent)[:500])
    if method == "HEAD":
        return
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert all(isinstance(error[name], str | None) for name in ("param", "code"))


class Abused:
    """A provider process of this file's own."""

    def __init__(self, folder: Path) -> None:
        self.errors = folder / "stderr"
        self.start()

    def start(self) -> None:
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "llm_stub", "--port", "0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.popen.stdout is not None
        ready = json.loads(self.popen.stdout.readline())
        host, _, port = ready["url"].removeprefix("http://").partition(":")
        self.address = host, int(port)
        self.process = psutil.Process(ready["pid"])
        self.configure(**DEFAULTS)
        self.assert_answers()
        self.memory = self.process.memory_info().rss
        self.threads = self.process.num_threads()
        self.descriptors = self.count_descriptors()

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        return socket.create_connection(self.address, timeout)

    def exchange(
        self, sent: bytes, method: str = "POST", timeout: float = PATIENCE
    ) -> Answer | None:
        with self.connect(timeout) as connection:
            with contextlib.suppress(ConnectionError):  # it need not take all
                connection.sendall(sent)
            return read_answer(connection, method)

    def post(
        self, path: str, body: bytes, *lines: str, timeout: float = PATIENCE
    ) -> Answer:
        answer = self.exchange(message("POST", path, body, *lines), timeout=timeout)
        assert answer is not None, (path, body[:500])
        return answer

    def control(self, path: str, method: str = "GET", body: Json | None = None) -> Any:
        raw = None if body is None else json.dumps(body).encode()
        answer = self.exchange(message(method, f"/_provider/{path}", raw), method)
        assert answer is not None
        assert answer.status == 200, answer
        return answer.json()

    def configure(self, **changes: Any) -> None:
        self.control("config", "PATCH", changes)

    def journal(self, settle: int = 0) -> list[Json]:
        found: list[Json] = self.control(f"journal?settle={settle}")["attempts"]
        return found

    def in_flight(self) -> int:
        found: int = self.control("stats")["in_flight"]
        return found

    def begin(self, sent: bytes) -> socket.socket:
        """Send a request of which only the head need be whole."""
        before = self.in_flight()
        connection = self.connect()
        connection.sendall(sent)
        wait_until(lambda: self.in_flight() == before + 1)
        return connection

    def count_descriptors(self) -> int:
        if sys.platform == "win32":
            return int(self.process.num_handles())
        return int(self.process.num_fds())

    def assert_answers(self) -> None:
        answer = self.post("/v1/completions", COMPLETION, timeout=QUICK)
        assert answer.status == 200
        assert answer.json()["choices"]

    def assert_silent(self, sent: object = "") -> None:
        if self.errors.stat().st_size:
            raise AssertionError(f"{self.errors.read_text()}\nafter {str(sent)[:500]}")

    def assert_unharmed(self) -> None:
        self.configure(**DEFAULTS)
        self.assert_answers()
        wait_until(lambda: self.in_flight() == 0)
        wait_until(lambda: self.count_descriptors() <= self.descriptors + SPARE)
        assert self.process.num_threads() <= self.threads + SPARE
        assert self.process.memory_info().rss <= self.memory + GROWTH
        self.assert_silent()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Abused]:
    process = Abused(tmp_path_factory.mktemp("abused"))
    yield process
    process.end()


@pytest.fixture
def abused(process: Abused) -> Iterator[Abused]:
    """The process, which a test must leave as it was; if not, the next has another."""
    process.control("reset", "POST")
    yield process
    try:
        process.assert_unharmed()
    except BaseException:
        process.end()
        process.start()
        raise


# Bodies

ASK = [{"role": "user", "content": "What is 'json' times 3?"}]
TOOL: Json = {
    "name": "times",
    "strict": True,
    "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
SCHEMA: Json = {"name": "s", "schema": {"properties": {"b": {"enum": ["x"]}}}}
BODIES: dict[str, Json] = {
    "/v1/completions": {
        "model": "m",
        "prompt": ["a", "b"],
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "stop": ["x"],
        "temperature": 0.5,
        "logit_bias": {"1": 1},
        "echo": False,
    },
    "/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "t"}]},
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "c"},
            *ASK,
        ],
        "n": 2,
        "max_completion_tokens": 50,
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": {"type": "function", "function": {"name": "times"}},
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        "modalities": ["text"],
        "metadata": {"a": "b"},
    },
    "/v1/responses": {
        "model": "m",
        "input": [
            *ASK,
            {"type": "function_call_output", "call_id": "1", "output": "o"},
        ],
        "instructions": "i",
        "max_output_tokens": 16,
        "tools": [{"type": "function", **TOOL}],
        "tool_choice": "auto",
        "text": {"format": {"type": "json_schema", **SCHEMA}},
        "temperature": 0.5,
        "metadata": {"a": "b"},
    },
    "/v1/embeddings": {
        "model": "m",
        "input": [[1], [2]],
        "dimensions": 3,
        "encoding_format": "base64",
    },
    "/v1/batches": {
        "input_file_id": "file-1",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "metadata": {"a": "b"},
    },
}
COMPLETION = b'{"model": "m", "prompt": "Hello how are you?"}'
NASTY = [
    *(b"null true 0 -1 0.5 1e400 NaN -Infinity [] {} [null] [{}] [1]".split()),
    *(b'{"":null} {"a":{"a":1}} "" "a" ["\\u0000"] "\\udfff\\ud800"'.split()),
    *(b'{"\\ud800":1} "\xff" nonsense'.split()),
    b"9" * 4300,
    b"-" + b"9" * 5000,
    b'"%b"' % (b"a" * 50_000),
    b"[" * 150 + b"]" * 150,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
]
HERE = "\N{WHITE STAR}"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the fields and members of a body stand."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    )
    for step, one in inner:
        yield (*path, step)
        yield from places(one, (*path, step))


def with_another(body: Json, path: tuple[Any, ...], raw: bytes) -> bytes:
    """The body with another value in one place."""
    target: Any = (body := copy.deepcopy(body))
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = HERE
    return json.dumps(body).encode().replace(json.dumps(HERE).encode(), raw)


def form(*parts: bytes, end: bytes = b"--X--\r\n") -> bytes:
    return b"".join(b"--X\r\n%b\r\n" % part for part in parts) + end


FORM = "Content-Type: multipart/form-data; boundary=X"
PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n%b\r\nbatch'
FILE = b'Content-Disposition: form-data; name="file"; filename="f"\r\n%b\r\n'
GOOD_FORM = form(PURPOSE % b"", FILE % b"" + b'{"custom_id": "1"}')


def file_id(abused: Abused, content: bytes) -> str:
    answer = abused.post("/v1/files", form(PURPOSE % b"", FILE % b"" + content), FORM)
    id_: str = answer.json()["id"]
    return id_


def body_for(abused: Abused, route: str) -> Json:
    """A good body, of which the fields stand for those that a client may send."""
    body = copy.deepcopy(BODIES[route])
    if route == "/v1/batches":
        body["input_file_id"] = file_id(abused, b"{}")
    assert abused.post(route, json.dumps(body).encode()).status == 200
    return body


@pytest.mark.parametrize("route", BODIES)
def test_any_value_in_any_field_is_taken_or_refused(abused: Abused, route: str) -> None:
    body = body_for(abused, route)
    for path in places(body):
        for raw in NASTY:
            sent = with_another(body, path, raw)
            assert_well_formed(abused.post(route, sent), (path, raw[:50]))


FUZZ = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # and surrogates
FIELDS = sorted(
    {str(step) for body in BODIES.values() for path in places(body) for step in path}
    | NO_EFFECT
    | set(REFUSED)
)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats()
    | TEXT
    | st.sampled_from(["m", "user", "function", "text", "message", "json_object"])
)
JSON = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | TEXT, inner, max_size=6)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("route", BODIES)
@FUZZ
@given(data=st.data())
def test_any_json_is_taken_or_refused(
    abused: Abused, route: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([(), *places(BODIES[route])]))
    raw = json.dumps(data.draw(JSON)).encode()
    sent = with_another(BODIES[route], path, raw) if path else raw
    assert_well_formed(abused.post(route, sent), sent)
    abused.assert_silent(sent)


@pytest.mark.parametrize("route", [*BODIES, "/v1/files"])
@FUZZ
@given(body=st.binary(max_size=200), start=st.sampled_from([b"", b"--X\r\n", b'{"']))
def test_any_bytes_as_a_body_are_refused(
    abused: Abused, route: str, body: bytes, start: bytes
) -> None:
    lines = [FORM] if route == "/v1/files" else []
    answer = abused.post(route, start + body, *lines)
    assert_well_formed(answer, start + body)
    assert answer.status == 400
    abused.assert_silent(body)


@FUZZ
@given(
    method=st.sampled_from(
        "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT get FOO".split()
    ),
    start=st.sampled_from(
        "/v1/models/ /v1/files/ /v1/batches/ /v1/files? /v1/batches?limit= / // * "
        "/v1/completions http://other/ http://[:: http://a:99999999/ ../".split()
    )
    | st.just(""),
    path=st.text(
        st.characters(exclude_categories=(), exclude_characters=" \r\n"), max_size=20
    )
    | st.text("./%?&=#;:@[]0fF٣\x00", max_size=20)
    | st.just("a" * 20_000),
)
def test_any_method_path_and_query_are_answered_or_refused(
    abused: Abused, method: str, start: str, path: str
) -> None:
    target = (
        (start + path)
        .encode("utf-8", "surrogatepass")
        .decode("utf-8", "surrogateescape")
    )
    answer = abused.exchange(message(method, target, b"{}"), method)
    if answer is not None:
        assert_well_formed(answer, (method, target), method)
    abused.assert_silent((method, target))


HEADERS = """
    accept accept-encoding authorization connection content-encoding content-type
    cookie expect host if-match keep-alive openai-organization range te trailer
    upgrade x-stainless-retry-count
""".split()
VALUES = """
    100-continue 0 -1 ٣ ² nan 1e9 Bearer gzip deflate br zstd identity chunked close
    keep-alive upgrade websocket h2c multipart/form-data application/json;charset=x
    multipart/form-data;boundary= multipart/form-data;boundary=" text/ / ; bytes=0-
""".split()


@FUZZ
@given(
    route=st.sampled_from([*BODIES, "/v1/files"]),
    headers=st.dictionaries(
        st.sampled_from(HEADERS),
        st.sampled_from(VALUES)
        | st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=20)
        | st.sampled_from(["a" * 8000, "a" * 9000, "9" * 5000, "\udcff\udcfe"]),
        min_size=1,
        max_size=4,
    ),
)
def test_any_header_is_taken_or_refused(
    abused: Abused, route: str, headers: dict[str, str]
) -> None:
    lines = [f"{name}: {value}" for name, value in headers.items()]
    body = GOOD_FORM if route == "/v1/files" else json.dumps(BODIES[route]).encode()
    answer = abused.exchange(message("POST", route, body, *lines))
    if answer is not None:
        assert_well_formed(answer, lines)
    abused.assert_silent(lines)


BAD_PARTS = {
    "an unknown encoding": b"Content-Transfer-Encoding: other\r\n",
    "base64 that is none": b"Content-Transfer-Encoding: base64\r\n",
    "a header without a colon": b"nonsense\r\n",
    "a header with a null": b"X\x00: a\r\n",
    "a header that is too long": b"X: " + b"a" * 10_000 + b"\r\n",
    "too many headers": b"".join(b"X%d: a\r\n" % i for i in range(300)),
    "an unknown charset": b"Content-Type: text/plain; charset=other\r\n",
    "no text's charset": b"Content-Type: text/plain; charset=base64\r\n",
    "a form within": b"Content-Type: multipart/mixed; boundary=Y\r\n",
    "a form without a boundary": b"Content-Type: multipart/mixed\r\n",
}


@pytest.mark.parametrize("header", BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_bad_part_of_a_form_is_refused(abused: Abused, header: bytes) -> None:
    answer = abused.post("/v1/files", form(PURPOSE % header, FILE % b""), FORM)
    assert_well_formed(answer)
    assert answer.status == 400


@pytest.mark.parametrize("field", [b"filename", b"filename*", b"filename*0", b"name"])
def test_any_name_in_a_form_is_taken_or_refused(abused: Abused, field: bytes) -> None:
    disposition = b'Content-Disposition: form-data; name="file"; %b=%b\r\n\r\n'
    for name in (b'"\xff\xfe"', b'"', b"\x01", b"''%ff", b"utf-8''%ff", b'"../../a"'):
        part = disposition % (field, name)
        answer = abused.post("/v1/files", form(PURPOSE % b"", part), FORM)
        assert_well_formed(answer)
        abused.assert_silent(part)


# Schemas

BAD_SCHEMAS: list[Json] = [
    *({"type": kind} for kind in (5, {}, [["string"]], ["string", []], "other", [])),
    *({"properties": value} for value in (5, [], "a", {"a": 5})),
    *({"required": value, "type": "object"} for value in (5, "a", [1, "a"], [{}])),
    *({"enum": value} for value in (5, "abc", {}, [])),
    *({key: value} for key in ("anyOf", "allOf") for value in (5, [], {"a": 1}, [5])),
    *({"$ref": value} for value in (5, "", "#/$defs/a", "#/enum/0", "other.json")),
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/a", "$defs": 5},
    *({"type": "array", "items": value} for value in (5, "a", [])),
    *({"type": "array", "prefixItems": value} for value in (5, "a", {"a": {}}, [5])),
    *({"type": "array", "minItems": value} for value in ("1", 1.5, None, [1])),
    *({"type": "array", "maxItems": value} for value in ("1", -1)),
    *({"type": "object", "minProperties": value} for value in ("1", [])),
    *({"type": "string", "minLength": value} for value in ("1", 1.5, None)),
    *({"type": "string", "maxLength": value} for value in ("1", -1)),
    *({"type": "string", "format": value} for value in (5, ["date"], {}, "other")),
    *({"type": "number", "multipleOf": value} for value in ("1", 0, -1, math.nan)),
    *({"type": "integer", "multipleOf": value} for value in (0, math.inf)),
    *({"type": "number", "minimum": value} for value in ("1", None, math.inf)),
    *({"type": "integer", "minimum": value} for value in (math.inf, math.nan)),
    *({"type": "integer", "maximum": value} for value in (-math.inf, [])),
    {"const": math.nan},
    {"default": math.nan, "const": math.inf},
    {"not": {}},
    {"patternProperties": {"(a+)+$": {}}},
]


def with_schema(place: str, schema: Any, question: str = "Why?") -> tuple[str, bytes]:
    """The route and a body with a schema for the answer or for a tool."""
    function = {"name": "f", "parameters": schema}
    named = {"name": "s", "schema": schema}
    route, body = {
        "response_format": (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": named}},
        ),
        "text.format": (
            "/v1/responses",
            {"text": {"format": {"type": "json_schema", **named}}},
        ),
        "a chat's tool": (
            "/v1/chat/completions",
            {
                "tools": [{"type": "function", "function": function}],
                "tool_choice": "required",
            },
        ),
        "a response's tool": (
            "/v1/responses",
            {"tools": [{"type": "function", **function}], "tool_choice": "required"},
        ),
    }[place]
    field = "input" if route == "/v1/responses" else "messages"
    asked = {"model": "m", field: [{"role": "user", "content": question}]}
    return route, json.dumps(asked | body).encode()


SCHEMA_PLACES = ["response_format", "text.format", "a chat's tool", "a response's tool"]


@pytest.mark.parametrize("place", SCHEMA_PLACES)
def test_a_bad_schema_is_refused(abused: Abused, place: str) -> None:
    taken = []
    for schema in BAD_SCHEMAS:
        answer = abused.post(*with_schema(place, schema))
        assert_well_formed(answer, schema)
        if answer.status != 400:
            taken.append(schema)
    assert taken == []


@pytest.mark.parametrize("place", SCHEMA_PLACES)
@pytest.mark.parametrize("depth", [60, 1000])
def test_a_deep_schema_is_answered_or_refused(
    abused: Abused, place: str, depth: int
) -> None:
    route, sent = with_schema(place, {"properties": {HERE: 0}})
    deep = b'{"properties": {"a": ' * depth + b"{}" + b"}}" * depth
    raw = sent.replace(b'{"properties": {%b: 0}}' % json.dumps(HERE).encode(), deep)
    assert_well_formed(abused.post(route, raw))


KEYWORDS = """
    type properties required items prefixItems enum const anyOf allOf $ref $defs
    minItems maxItems minLength maxLength minimum maximum exclusiveMinimum
    exclusiveMaximum multipleOf minProperties maxProperties format title
""".split()
SCHEMAS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.sampled_from([0.5, 1e308, math.nan, math.inf])
    | st.sampled_from("string integer number boolean array object null".split())
    | st.sampled_from(["#", "#/$defs/a", "#/properties/a", "date", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=4)
    ),
    max_leaves=15,
)


@pytest.mark.parametrize("place", SCHEMA_PLACES)
@FUZZ
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS), SCHEMAS, max_size=4))
def test_any_schema_is_answered_or_refused(
    abused: Abused, place: str, schema: Json
) -> None:
    assert_well_formed(abused.post(*with_schema(place, schema)), schema)
    abused.assert_silent(schema)


def test_a_bad_schema_in_a_batch_is_that_lines_error(abused: Abused) -> None:
    route, body = with_schema("response_format", {"properties": 5})
    line = {"custom_id": "1", "method": "POST", "url": route, "body": json.loads(body)}
    batch = {
        "input_file_id": file_id(abused, json.dumps(line).encode()),
        "endpoint": route,
        "completion_window": "24h",
    }
    made = abused.post("/v1/batches", json.dumps(batch).encode()).json()

    def now() -> Any:
        answer = abused.exchange(message("GET", f"/v1/batches/{made['id']}"))
        assert answer is not None
        return answer.json()

    wait_until(lambda: now()["status"] == "completed")
    assert now()["request_counts"] == {"total": 1, "completed": 0, "failed": 1}


# Much work

LADDER = {
    f"d{step}": {
        "properties": {name: {"$ref": f"#/$defs/d{step + 1}"} for name in "ab"}
    }
    for step in range(40)
} | {"d40": {"type": "null"}}
CHAIN = {
    f"d{step}": {"items": {"$ref": f"#/$defs/d{step + 1}"}} for step in range(2000)
} | {"d2000": {"type": "null"}}


def asking(route: str, **fields: Any) -> tuple[str, bytes]:
    return route, json.dumps({"model": "m"} | fields).encode()


MUCH_WORK: dict[str, Callable[[], tuple[str, bytes]]] = {
    "a prompt of 30 MiB": lambda: asking("/v1/completions", prompt="a " * (15 * 2**20)),
    "many prompts, many times": lambda: asking(
        "/v1/completions", prompt=["a"] * 100_000, n=128
    ),
    "many vectors": lambda: asking("/v1/embeddings", input=[[1]] * 100_000),
    "a long array": lambda: with_schema(
        "response_format", {"type": "array", "minItems": 10**9}
    ),
    "a long text": lambda: with_schema(
        "response_format", {"type": "string", "minLength": 10**15}
    ),
    "definitions that double": lambda: with_schema(
        "response_format", {"$ref": "#/$defs/d0", "$defs": LADDER}
    ),
    "definitions in a long chain": lambda: with_schema(
        "response_format", {"$ref": "#/$defs/d0", "$defs": CHAIN}
    ),
    "a definition that holds itself often": lambda: with_schema(
        "response_format", {"properties": {f"p{i}": {"$ref": "#"} for i in range(99)}}
    ),
    "a large enum and a long question": lambda: with_schema(
        "response_format", {"enum": [f"e{i}" for i in range(50_000)]}, "a " * 100_000
    ),
    "a large schema and a long question": lambda: with_schema(
        "response_format", {"type": "array", "minItems": 9000}, "a " * 400_000
    ),
    "quotes that are never closed": lambda: with_schema(
        "response_format", {"type": "string"}, " 'a" * 30_000
    ),
}


@pytest.mark.parametrize("ask", MUCH_WORK.values(), ids=MUCH_WORK)
def test_what_asks_for_much_work_is_soon_answered_or_refused(
    abused: Abused, ask: Callable[[], tuple[str, bytes]]
) -> None:
    answer = abused.post(*ask(), timeout=SOON)
    assert_well_formed(answer)
    assert answer.status in {200, 400}


def test_what_was_sent_is_not_kept_whole(abused: Abused) -> None:
    sent = [
        b'{"model": "%b", "prompt": "a"}' % (b"%x" % number * 2**24)
        for number in range(12)
    ]
    before = abused.process.memory_info().rss
    for body in sent:
        assert_well_formed(abused.post("/v1/completions", body))
    assert abused.process.memory_info().rss - before < sum(map(len, sent)) / 2


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("route", BODIES)
def test_a_body_that_is_too_large_is_refused_before_its_end(
    abused: Abused, route: str, chunked: bool
) -> None:
    line = "Transfer-Encoding: chunked" if chunked else "Content-Length: 99999999999"
    piece = b" " * 2**20
    with abused.connect() as connection:
        connection.sendall(message("POST", route, None, line))
        for _ in range(MAX_BODY_BYTES // len(piece) + 1):
            connection.sendall(b"100000\r\n%b\r\n" % piece if chunked else piece)
        answer = read_answer(connection)
    assert answer is not None
    assert_well_formed(answer)
    assert answer.status == 413


@pytest.mark.parametrize("route", ["/v1/completions", "/_provider/config"])
def test_a_body_that_unpacks_to_too_much_is_refused(abused: Abused, route: str) -> None:
    packed = gzip.compress(bytes(4 * MAX_BODY_BYTES), 1)
    method = "PATCH" if route == "/_provider/config" else "POST"
    lines = "Content-Encoding: gzip"
    answer = abused.exchange(message(method, route, packed, lines), method)
    assert answer is None or answer.status == 413


# HTTP

POST = "POST /v1/completions HTTP/1.1\r\nHost: provider\r\n"
NO_HTTP = {
    "a handshake of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "nulls": b"\x00" * 100,
    "a word": b"hello\r\n\r\n",
    "a word in UTF-8": "grüß\r\n\r\n".encode(),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown version": b"GET /v1/models HTTP/3.7\r\n\r\n",
    "an unknown method": b"FOO /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "invalid UTF-8 in the path": b"GET /v1/\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "a path that is too long": b"GET /%b HTTP/1.1\r\n\r\n" % (b"a" * 100_000),
    "a header that is too long": f"{POST}X: {'a' * 100_000}\r\n\r\n".encode(),
    "too many headers": (POST + "X: a\r\n" * 5000 + "\r\n").encode(),
    "a null in a header's name": f"{POST}X\x00: a\r\n\r\n".encode(),
    "a return in a header": f"{POST}X: a\rb\r\n\r\n".encode(),
    "a folded header": f"{POST}X: a\r\n b\r\n\r\n".encode(),
    "a length that is a word": f"{POST}Content-Length: a\r\n\r\n".encode(),
    "a negative length": f"{POST}Content-Length: -1\r\n\r\n".encode(),
    "a huge length": f"{POST}Content-Length: {10**30}\r\n\r\n".encode(),
    "a length that is too short": f"{POST}Content-Length: 5\r\n\r\n".encode()
    + COMPLETION,
    "two lengths": f"{POST}Content-Length: 1\r\nContent-Length: 2\r\n\r\n".encode(),
    "a length and chunks": (
        f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ).encode(),
    "an unknown coding": f"{POST}Transfer-Encoding: other\r\n\r\n".encode(),
    "a chunk's size that is a word": (
        f"{POST}Transfer-Encoding: chunked\r\n\r\nsize\r\n"
    ).encode(),
    "a chunk's size that is huge": (
        f"{POST}Transfer-Encoding: chunked\r\n\r\n{'F' * 30}\r\n"
    ).encode(),
    "a body that is not gzip": message(
        "POST", "/v1/completions", COMPLETION, "Content-Encoding: gzip"
    ),
    "an expectation": message("POST", "/v1/completions", COMPLETION, "Expect: all"),
}


@pytest.mark.parametrize("sent", NO_HTTP.values(), ids=NO_HTTP)
def test_what_is_no_http_is_refused(abused: Abused, sent: bytes) -> None:
    answer = abused.exchange(sent)
    if answer is not None:
        assert_well_formed(answer)
        assert answer.status in {400, 417}


@FUZZ
@given(
    sent=st.lists(
        st.binary(max_size=20)
        | st.sampled_from([b"GET ", b"POST ", b"/v1/completions", b" HTTP/1.1"])
        | st.sampled_from([b"\r\n", b"\n", b"\r\n\r\n", b"Host: a\r\n", b"0\r\n\r\n"])
        | st.sampled_from([b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
    ).map(b"".join)
)
def test_any_bytes_in_the_place_of_http_are_survived(
    abused: Abused, sent: bytes
) -> None:
    with abused.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(http.client.BadStatusLine):  # HTTP/0.9
            answer = read_answer(connection)
            if answer is not None:
                assert_well_formed(answer, sent)
    abused.assert_silent(sent)


def test_invalid_utf8_in_headers_is_taken(abused: Abused) -> None:
    lines = [
        f"{name}: \udcff\udcfe" for name in ("Authorization", "X-Stainless-Retry-Count")
    ]
    assert abused.post("/v1/completions", COMPLETION, *lines).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_is_answered_and_closed(abused: Abused, stream: bool) -> None:
    body = json.dumps({"model": "m", "prompt": "Why?", "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    with abused.connect() as connection:
        connection.sendall(head + body)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert b" 200 OK\r\n" in head
    assert b"chunked" not in head
    assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)


def test_pipelined_requests_are_answered_in_their_order(abused: Abused) -> None:
    requests = [
        message("GET", "/v1/models/first"),
        message("POST", "/v1/completions", b"second"),
        message("GET", "/v1/third"),
        message("GET", "/v1/models/fourth", None, "Connection: close"),
    ]
    with abused.connect() as connection:
        connection.sendall(b"".join(requests))
        said = read_all(connection).decode()
    heads = [said.index(text) for text in ("first", "parsed", "third", "fourth")]
    assert heads == sorted(heads)
    assert said.count("HTTP/1.1 ") == 4


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"nonsense", 400),
        ("POST", "/v1/completions", b"[" * 1_000_000, 400),
        ("POST", "/v1/nothing", b" " * 1_000_000, 404),
        ("PUT", "/v1/models", b"", 405),
        ("POST", "/v1/files", b"nonsense", 400),
    ],
)
def test_a_connection_serves_on_after_an_error(
    abused: Abused, method: str, path: str, body: bytes, status: int
) -> None:
    connection = http.client.HTTPConnection(*abused.address, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.connect()
        used = connection.sock
        for sent, expected in (((method, path, body), status),) * 2 + (
            (("POST", "/v1/completions", COMPLETION), 200),
        ):
            connection.request(*sent)
            response = connection.getresponse()
            response.read()
            assert response.status == expected
            assert connection.sock is used


# Slow senders and readers


def test_slow_senders_hold_nobody_up(abused: Abused) -> None:
    sent = message("POST", "/v1/completions", COMPLETION)
    with contextlib.ExitStack() as opened:
        slow = [opened.enter_context(abused.connect()) for _ in range(50)]
        for connection in slow:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(sent)):
            for number, connection in enumerate(slow):
                if number % 2 or at < len(sent) // 2 + number:
                    connection.sendall(sent[at : at + 1])
            if at % 10 == 0:
                abused.assert_answers()
        for connection in slow[1::2]:
            answer = read_answer(connection)
            assert answer is not None
            assert answer.status == 200


# Far more than the buffers between the two processes hold.
MUCH = json.dumps({"model": "m", "prompt": ["a"] * 15, "n": 128, "stream": True})


def test_slow_readers_hold_nobody_up_and_get_all_in_the_end(abused: Abused) -> None:
    sent = message("POST", "/v1/completions", MUCH.encode(), "Connection: close")
    with contextlib.ExitStack() as opened:
        slow = [opened.enter_context(abused.begin(sent)) for _ in range(3)]
        wait_until(lambda: all(entry["first_byte"] for entry in abused.journal()))
        for _ in range(20):
            abused.assert_answers()
        assert abused.in_flight() == 3
        for connection in slow:
            assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# Disconnects


def completion(**options: Any) -> bytes:
    return message(
        "POST",
        "/v1/completions",
        json.dumps({**json.loads(COMPLETION), **options}).encode(),
    )


HEAD = f"{POST}Content-Length: 99\r\n\r\n".encode()
UPLOAD = message("POST", "/v1/files", None, FORM, "Content-Length: 9999")
STAGES: dict[str, tuple[bytes, Json, str]] = {
    "after the head": (HEAD, {}, "route"),
    "in the middle of the body": (HEAD + b'{"model"', {}, "route"),
    "in the middle of a file": (UPLOAD + form(FILE % b"" + b"{", end=b""), {}, "route"),
    "in the queue": (completion(), {"capacity": 1, "first_token": 600}, "model"),
    "before the first token": (completion(), {"first_token": 600}, "model"),
    "in the middle of a stream": (
        completion(stream=True),
        {"per_token": 600},
        "first_byte",
    ),
    "before an answer was read": (
        message("POST", "/v1/completions", MUCH.encode()),
        {},
        "first_byte",
    ),
}


@pytest.mark.parametrize(
    "hang_up", [socket.socket.close, abort], ids=["close", "abort"]
)
@pytest.mark.parametrize(("sent", "settings", "mark"), STAGES.values(), ids=STAGES)
def test_hanging_up_ends_the_call_at_any_stage(
    abused: Abused,
    sent: bytes,
    settings: Json,
    mark: str,
    hang_up: Callable[[socket.socket], None],
) -> None:
    abused.configure(**settings)
    connections = [abused.begin(sent), abused.begin(sent)]
    wait_until(lambda: all(entry[mark] for entry in abused.journal()))
    for connection in connections:
        hang_up(connection)
    assert [entry["state"] for entry in abused.journal(settle=5)] == ["cancelled"] * 2
    assert abused.in_flight() == 0
    abused.configure(**DEFAULTS | {"capacity": 1})
    abused.assert_answers()


COMPLETE = {
    "a call": completion(),
    "a stream": completion(stream=True),
    "much work": message("POST", *asking("/v1/embeddings", input=["a"] * 20)),
    "a bad call": message("POST", "/v1/completions", b"nonsense"),
    "models": message("GET", "/v1/models"),
    "no route": message("GET", "/v1/nothing"),
    "a file": message("POST", "/v1/files", GOOD_FORM, FORM),
    "control": message("GET", "/_provider/config"),
}


@pytest.mark.parametrize(
    "hang_up", [socket.socket.close, abort], ids=["close", "abort"]
)
@pytest.mark.parametrize("sent", COMPLETE.values(), ids=COMPLETE)
def test_hanging_up_at_once_after_the_request_is_no_error(
    abused: Abused, sent: bytes, hang_up: Callable[[socket.socket], None]
) -> None:
    for _ in range(20):
        connection = abused.connect()
        connection.sendall(sent)
        hang_up(connection)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["reset", "reset_midway", "truncated", "malformed"])
def test_a_fault_that_was_asked_for_is_no_error_of_the_providers(
    abused: Abused, fault: str, stream: bool
) -> None:
    abused.configure(faults={fault: 1.0})
    with (
        abused.connect() as connection,
        contextlib.suppress(http.client.IncompleteRead),
    ):
        connection.sendall(completion(stream=stream))
        read_answer(connection)


def test_ten_thousand_dropped_connections_leave_nothing_behind(abused: Abused) -> None:
    for _ in range(25):
        wave = [abused.connect() for _ in range(400)]
        for number, connection in enumerate(wave):
            (abort if number % 2 else socket.socket.close)(connection)
        abused.assert_answers()


# Loopback only


def test_it_listens_on_loopback_alone(abused: Abused) -> None:
    listening = [
        one.laddr
        for one in abused.process.net_connections("all")
        if one.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", abused.address[1])]


def other_addresses() -> list[str]:
    return sorted(
        {
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family in (socket.AF_INET, socket.AF_INET6)
            and not address.address.startswith("fe80")  # they need a scope
        }
        - {"127.0.0.1"}
    )


def test_every_other_address_of_the_machine_refuses(abused: Abused) -> None:
    for host in other_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, abused.address[1]), PATIENCE)


# Control

BAD_CONFIGS = [
    *(b'|{|nonsense|\xff|null|5|"ab"|["ab"]|[]|[[1, 2]]|[["seed", 3]]'.split(b"|")),
    *(b'{"other": 1}|{"": 1}|{"\\ud800": 1}|{"seed": "1"}|{"seed": null}'.split(b"|")),
    *(b'{"seed": 1.5}|{"first_token": -1}|{"first_token": 1e9}'.split(b"|")),
    *(b'{"first_token": NaN}|{"jitter": NaN}|{"slow": Infinity}'.split(b"|")),
    *(b'{"faults": []}|{"faults": {"other": 1}}|{"faults": {"hang": 2}}'.split(b"|")),
    *(b'{"faults_by_prompt": {"a": [1]}}|{"models": []}|{"keys": [1]}'.split(b"|")),
    *(b'{"capacity": 0}|{"burst": 0}|{"batch_speed": 0}|{"max_calls": -1}'.split(b"|")),
    b'{"seed": %b}' % (b"9" * 5000),
    b"[" * 100_000,
    b'{"seed": ' * 100_000,
]


@pytest.mark.parametrize("body", BAD_CONFIGS, ids=lambda body: repr(body[:40]))
def test_a_bad_change_of_settings_is_refused_and_changes_nothing(
    abused: Abused, body: bytes
) -> None:
    before = abused.control("config")
    answer = abused.exchange(message("PATCH", "/_provider/config", body))
    assert answer is not None
    assert answer.status == 400
    assert isinstance(answer.json()["error"], str)
    assert answer.json()["error"]
    assert abused.control("config") == before


@pytest.mark.parametrize(
    "line",
    [
        "Content-Type: application/json; charset=other",
        "Content-Type: application/json; charset=base64",
        "Content-Encoding: gzip",
    ],
)
def test_settings_that_cannot_be_decoded_are_survived(
    abused: Abused, line: str
) -> None:
    answer = abused.exchange(message("PATCH", "/_provider/config", b"{}", line))
    assert answer is None or answer.status in {200, 400}


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(sorted(DEFAULTS)) | TEXT, JSON) | JSON)
def test_any_json_as_settings_is_taken_or_refused(abused: Abused, changes: Any) -> None:
    before = abused.control("config")
    body = json.dumps(changes).encode()
    answer = abused.exchange(message("PATCH", "/_provider/config", body))
    assert answer is not None
    assert answer.status in {200, 400}, body
    assert (answer.status == 200) == (set(answer.json()) == set(DEFAULTS))
    if answer.status == 400:
        assert abused.control("config") == before
    abused.configure(**DEFAULTS)
    abused.assert_silent(body)


@pytest.mark.parametrize(
    "query",
    "since= since=a since=nan since=1e3 since=-1 since=%ff settle= settle=a settle=nan "
    "settle=inf settle=-inf settle=-1 settle=1e308".split()
    + [f"since={sign}{'9' * digits}" for sign, digits in (("", 5000), ("-", 4300))],
    ids=lambda query: query[:20],
)
def test_a_bad_query_of_the_journal_is_refused(abused: Abused, query: str) -> None:
    answer = abused.exchange(message("GET", f"/_provider/journal?{query}"))
    assert answer is not None
    assert answer.status == 400
    assert isinstance(answer.json()["error"], str)


def test_a_huge_mark_in_the_journal_is_after_all_attempts(abused: Abused) -> None:
    abused.assert_answers()
    assert abused.control(f"journal?since={10**400}")["attempts"] == []


def test_a_reset_takes_no_notice_of_its_body(abused: Abused) -> None:
    answer = abused.post("/_provider/reset", b"\xff" * 1000)
    assert answer.status == 200

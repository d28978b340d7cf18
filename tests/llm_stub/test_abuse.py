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
from typing import Any, NoReturn, get_args

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_stub.api.parameters import PARAMETERS
from llm_stub.api.requests import CHARACTERS_PER_TOKEN, MAX_PROMPT_TOKENS
from llm_stub.server import MAX_BODY_BYTES
from llm_stub.settings import Fault, Settings

ORDINARY_TIMEOUT = 2.0  # seconds for a small call, whatever else the stub is doing
EXPENSIVE_TIMEOUT = 5.0  # seconds for a call that asks for a lot of work
TIMEOUT = 10.0  # seconds for anything else
MAX_MEMORY_GROWTH = 256 * 2**20  # bytes that the allocator may keep
MAX_EXTRA = 3  # descriptors or threads above the baseline
CLIENT_ERRORS = {400, 404, 413, 417}
DEFAULTS = Settings(first_token=0, per_token=0).model_dump()

Json = dict[str, Any]


@dataclass(frozen=True)
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        def reject_constant(constant: str) -> NoReturn:
            raise AssertionError(f"{constant} isn't valid JSON")

        return json.loads(self.body, parse_constant=reject_constant)


def http_request(
    method: str, path: str, body: bytes | None = None, *headers: str
) -> bytes:
    """A raw HTTP request."""
    head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if body is not None:
        head.append(f"Content-Length: {len(body)}")
    text = "\r\n".join([*head, "", ""])
    return text.encode("utf-8", "surrogateescape") + (body or b"")


def read_response(connection: socket.socket) -> Response | None:
    """The response, or None if the stub closed the connection instead."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return Response(response.status, response.headers, response.read())
    except ConnectionError:
        return None


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**20), b""))


def reset_connection(connection: socket.socket) -> None:
    pair = "hh" if sys.platform == "win32" else "ii"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(pair, 1, 0))
    connection.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"still false after {TIMEOUT} s"
        time.sleep(0.01)


def assert_ok_or_api_error(response: Response, sent: object = "") -> None:
    """The request succeeded, or failed with a 4xx and the API's error object."""
    if response.status < 400:
        if response.headers.get_content_type() == "application/json":
            response.json()
        return
    assert response.status in CLIENT_ERRORS, (response, str(sent)[:500])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert all(isinstance(error[name], str | None) for name in ("param", "code"))


class StubProcess:
    """The stub in a process that only this file uses."""

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
        self.assert_responsive()
        self.memory = self.process.memory_info().rss
        self.threads = self.process.num_threads()
        self.descriptors = self.count_descriptors()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def connect(self, timeout: float = TIMEOUT) -> socket.socket:
        return socket.create_connection(self.address, timeout)

    def send(self, raw: bytes, timeout: float = TIMEOUT) -> Response | None:
        with self.connect(timeout) as connection:
            with contextlib.suppress(ConnectionError):  # it may reply and close early
                connection.sendall(raw)
            return read_response(connection)

    def post(
        self, path: str, body: bytes, *headers: str, timeout: float = TIMEOUT
    ) -> Response:
        response = self.send(http_request("POST", path, body, *headers), timeout)
        assert response is not None, (path, body[:500])
        return response

    def control(self, path: str, method: str = "GET", body: Json | None = None) -> Any:
        raw = None if body is None else json.dumps(body).encode()
        response = self.send(http_request(method, f"/_provider/{path}", raw))
        assert response is not None
        assert response.status == 200, response
        return response.json()

    def configure(self, **changes: Any) -> None:
        self.control("config", "PATCH", changes)

    def journal(self, settle: int = 0) -> list[Json]:
        attempts: list[Json] = self.control(f"journal?settle={settle}")["attempts"]
        return attempts

    def in_flight(self) -> int:
        in_flight: int = self.control("stats")["in_flight"]
        return in_flight

    def start_request(self, raw: bytes) -> socket.socket:
        """Send a request, complete or not, and wait until the stub has its headers."""
        before = self.in_flight()
        connection = self.connect()
        connection.sendall(raw)
        wait_until(lambda: self.in_flight() == before + 1)
        return connection

    def count_descriptors(self) -> int:
        if sys.platform == "win32":
            return int(self.process.num_handles())
        return int(self.process.num_fds())

    def assert_responsive(self) -> None:
        response = self.post("/v1/completions", COMPLETION, timeout=ORDINARY_TIMEOUT)
        assert response.status == 200
        assert response.json()["choices"]

    def assert_nothing_logged(self, sent: object = "") -> None:
        if self.errors.stat().st_size:
            raise AssertionError(
                f"{self.errors.read_text()}\nlogged after {str(sent)[:500]}"
            )

    def assert_healthy(self) -> None:
        self.configure(**DEFAULTS)
        self.assert_responsive()
        wait_until(lambda: self.in_flight() == 0)
        wait_until(lambda: self.count_descriptors() <= self.descriptors + MAX_EXTRA)
        assert self.process.num_threads() <= self.threads + MAX_EXTRA
        assert self.process.memory_info().rss <= self.memory + MAX_MEMORY_GROWTH
        self.assert_nothing_logged()


@pytest.fixture(scope="module")
def stub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubProcess]:
    process = StubProcess(tmp_path_factory.mktemp("stub"))
    yield process
    process.kill()


@pytest.fixture
def stub(stub_process: StubProcess) -> Iterator[StubProcess]:
    """The stub, which must be healthy after the test; if not, it is restarted."""
    stub_process.control("reset", "POST")
    yield stub_process
    try:
        stub_process.assert_healthy()
    except BaseException:
        stub_process.kill()
        stub_process.start()
        raise


# Bodies

MESSAGES = [{"role": "user", "content": "What is 'json' times 3?"}]


def object_with(**properties: Any) -> Json:
    """The schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


TOOL: Json = {
    "name": "times",
    "strict": True,
    "parameters": object_with(a={"type": "integer"}),
}
SCHEMA: Json = {"name": "s", "schema": object_with(b={"enum": ["x"]})}
FUNCTION_CALL: Json = {"name": "times", "arguments": "{}"}
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
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": FUNCTION_CALL}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "c"},
            *MESSAGES,
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
            *MESSAGES,
            {"type": "function_call", "call_id": "1", **FUNCTION_CALL},
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
AWKWARD_VALUES = [
    *(b"null true 0 -1 0.5 1e400 NaN -Infinity [] {} [null] [{}] [1]".split()),
    *(b'{"":null} {"a":{"a":1}} "" "a" ["\\u0000"] "\\udfff\\ud800"'.split()),
    *(b'{"\\ud800":1} "\xff" nonsense'.split()),
    b"9" * 4300,
    b"-" + b"9" * 5000,
    b'"%b"' % (b"a" * 50_000),
    b"[" * 150 + b"]" * 150,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
]
PLACEHOLDER = "\N{WHITE STAR}"


def field_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each field and list item in a body, at any depth."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    )
    for step, child in children:
        yield (*path, step)
        yield from field_paths(child, (*path, step))


def replace_value(body: Json, path: tuple[Any, ...], raw: bytes) -> bytes:
    """The body as JSON, with raw bytes as the value at one path."""
    target: Any = (body := copy.deepcopy(body))
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = PLACEHOLDER
    return json.dumps(body).encode().replace(json.dumps(PLACEHOLDER).encode(), raw)


def multipart_form(*parts: bytes, end: bytes = b"--X--\r\n") -> bytes:
    return b"".join(b"--X\r\n%b\r\n" % part for part in parts) + end


MULTIPART = "Content-Type: multipart/form-data; boundary=X"
PURPOSE_PART = b'Content-Disposition: form-data; name="purpose"\r\n%b\r\nbatch'
FILE_PART = b'Content-Disposition: form-data; name="file"; filename="f"\r\n%b\r\n'
VALID_FORM = multipart_form(PURPOSE_PART % b"", FILE_PART % b"" + b'{"custom_id": "1"}')


def upload_file(stub: StubProcess, content: bytes) -> str:
    response = stub.post(
        "/v1/files",
        multipart_form(PURPOSE_PART % b"", FILE_PART % b"" + content),
        MULTIPART,
    )
    id_: str = response.json()["id"]
    return id_


def valid_body(stub: StubProcess, route: str) -> Json:
    """A valid body with many of the fields that a client can send."""
    body = copy.deepcopy(BODIES[route])
    if route == "/v1/batches":
        body["input_file_id"] = upload_file(stub, b"{}")
    assert stub.post(route, json.dumps(body).encode()).status == 200
    return body


@pytest.mark.parametrize("route", BODIES)
def test_awkward_field_values_never_cause_a_server_error(
    stub: StubProcess, route: str
) -> None:
    body = valid_body(stub, route)
    for path in field_paths(body):
        for raw in AWKWARD_VALUES:
            sent = replace_value(body, path, raw)
            assert_ok_or_api_error(stub.post(route, sent), (path, raw[:50]))


FUZZ = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # incl. surrogates
FIELDS = sorted(
    {
        str(step)
        for body in BODIES.values()
        for path in field_paths(body)
        for step in path
    }
    | set.union(*map(set, PARAMETERS.values()))
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
def test_arbitrary_json_never_causes_a_server_error(
    stub: StubProcess, route: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([(), *field_paths(BODIES[route])]))
    raw = json.dumps(data.draw(JSON)).encode()
    sent = replace_value(BODIES[route], path, raw) if path else raw
    assert_ok_or_api_error(stub.post(route, sent), sent)
    stub.assert_nothing_logged(sent)


@pytest.mark.parametrize("route", [*BODIES, "/v1/files"])
@FUZZ
@given(body=st.binary(max_size=200), start=st.sampled_from([b"", b"--X\r\n", b'{"']))
def test_arbitrary_bytes_as_the_body_get_a_400(
    stub: StubProcess, route: str, body: bytes, start: bytes
) -> None:
    headers = [MULTIPART] if route == "/v1/files" else []
    response = stub.post(route, start + body, *headers)
    assert_ok_or_api_error(response, start + body)
    assert response.status == 400
    stub.assert_nothing_logged(body)


INVALID_PART_HEADERS = {
    "unknown encoding": b"Content-Transfer-Encoding: other\r\n",
    "invalid base64": b"Content-Transfer-Encoding: base64\r\n",
    "header without a colon": b"nonsense\r\n",
    "null byte in a header": b"X\x00: a\r\n",
    "header too long": b"X: " + b"a" * 10_000 + b"\r\n",
    "too many headers": b"".join(b"X%d: a\r\n" % i for i in range(300)),
    "unknown charset": b"Content-Type: text/plain; charset=other\r\n",
    "charset that isn't text": b"Content-Type: text/plain; charset=base64\r\n",
    "nested form": b"Content-Type: multipart/mixed; boundary=Y\r\n",
    "nested form without a boundary": b"Content-Type: multipart/mixed\r\n",
}


@pytest.mark.parametrize(
    "header", INVALID_PART_HEADERS.values(), ids=INVALID_PART_HEADERS
)
def test_invalid_multipart_headers_get_a_400(stub: StubProcess, header: bytes) -> None:
    response = stub.post(
        "/v1/files", multipart_form(PURPOSE_PART % header, FILE_PART % b""), MULTIPART
    )
    assert_ok_or_api_error(response)
    assert response.status == 400


@pytest.mark.parametrize(
    "parameter",
    ["", "; boundary=", '; boundary="', "; boundary=Y", f"; boundary={'X' * 1000}"],
    ids=["missing", "empty", "unclosed quote", "not in the body", "too long"],
)
def test_upload_with_an_invalid_boundary_gets_a_400(
    stub: StubProcess, parameter: str
) -> None:
    header = f"Content-Type: multipart/form-data{parameter}"
    response = stub.post("/v1/files", VALID_FORM, header)
    assert_ok_or_api_error(response)
    assert response.status == 400


@pytest.mark.parametrize("field", [b"filename", b"filename*", b"filename*0", b"name"])
def test_odd_names_in_an_upload_never_cause_a_server_error(
    stub: StubProcess, field: bytes
) -> None:
    disposition = b'Content-Disposition: form-data; name="file"; %b=%b\r\n\r\n'
    for name in (b'"\xff\xfe"', b'"', b"\x01", b"''%ff", b"utf-8''%ff", b'"../../a"'):
        part = disposition % (field, name)
        response = stub.post(
            "/v1/files", multipart_form(PURPOSE_PART % b"", part), MULTIPART
        )
        assert_ok_or_api_error(response)
        stub.assert_nothing_logged(part)


# Schemas


def each(field: str, *values: Any, **others: Any) -> list[Json]:
    """Schemas that differ in the value of one field."""
    return [others | {field: value} for value in values]


INVALID_SCHEMAS: list[Json] = [
    *each("type", 5, {}, [["string"]], ["string", []], "other", []),
    *each("properties", 5, "a", {"a": 5}),
    *each("required", 5, "a", [{}], type="object"),
    *each("enum", 5, "abc", {}, []),
    *each("anyOf", 5, [], {"a": 1}, [5]),
    *each("allOf", 5, {"a": 1}, [5]),
    *each("$ref", 5, "", "#/$defs/a", "#/enum/0", "other.json"),
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/a", "$defs": 5},
    *each("items", 5, "a", [], type="array"),
    *each("prefixItems", 5, "a", {"a": {}}, [5], type="array"),
    *each("minItems", "1", 1.5, None, [1], type="array"),
    *each("maxItems", "1", -1, type="array"),
    *each("minProperties", "1", [], type="object"),
    *each("minLength", "1", 1.5, None, type="string"),
    *each("maxLength", "1", -1, type="string"),
    *each("format", ["date"], {}, type="string"),
    *each("multipleOf", "1", 0, -1, math.nan, type="number"),
    *each("multipleOf", 0, math.inf, type="integer"),
    *each("minimum", "1", None, math.inf, type="number"),
    *each("minimum", math.inf, math.nan, type="integer"),
    *each("maximum", -math.inf, [], type="integer"),
    {"const": math.nan},
    {"default": math.nan, "const": math.inf},
]
INVALID_IF_STRICT: list[Json] = [
    {"not": {}},
    {"patternProperties": {"(a+)+$": {}}},
    {"allOf": []},
    {"type": "string", "format": "other"},
    {"type": "string", "uniqueItems": True},
    {"type": "object", "properties": {"a": {"type": "string"}}},
]
NOT_OBJECTS: list[Json] = [
    {"type": "string"},
    {"type": ["object", "null"]},
    {"enum": ["a"]},
    {"properties": {"a": {"type": "string"}}},
]


def schema_request(
    place: str, schema: Any, prompt: str = "Why?", *, strict: bool = False
) -> tuple[str, bytes]:
    """The route and body of a call with a schema for its answer or for a tool."""
    function = {"name": "f", "parameters": schema, "strict": strict}
    named = {"name": "s", "schema": schema, "strict": strict}
    requests: dict[str, tuple[str, Json]] = {
        "response_format": (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": named}},
        ),
        "text.format": (
            "/v1/responses",
            {"text": {"format": {"type": "json_schema", **named}}},
        ),
        "chat tool": (
            "/v1/chat/completions",
            {
                "tools": [{"type": "function", "function": function}],
                "tool_choice": "required",
            },
        ),
        "responses tool": (
            "/v1/responses",
            {"tools": [{"type": "function", **function}], "tool_choice": "required"},
        ),
    }
    route, body = requests[place]
    field = "input" if route == "/v1/responses" else "messages"
    call = {"model": "m", field: [{"role": "user", "content": prompt}]}
    return route, json.dumps(call | body).encode()


SCHEMA_PLACES = ["response_format", "text.format", "chat tool", "responses tool"]


def inside_object(schema: Json) -> Json:
    """Wrap a schema in that of an object; its definitions move to the root."""
    definitions = {name: schema[name] for name in ("$defs",) if name in schema}
    return object_with(a=schema) | definitions


@pytest.mark.parametrize("place", SCHEMA_PLACES)
@pytest.mark.parametrize(
    ("schemas", "strict", "status"),
    [
        (NOT_OBJECTS, False, 400),
        (NOT_OBJECTS, True, 400),
        ([*map(inside_object, INVALID_SCHEMAS)], False, 400),
        ([*map(inside_object, INVALID_SCHEMAS)], True, 400),
        ([*map(inside_object, INVALID_IF_STRICT)], False, 200),
        ([*map(inside_object, INVALID_IF_STRICT)], True, 400),
    ],
    ids=[
        "not an object",
        "not an object, strict",
        "invalid",
        "invalid, strict",
        "lenient",
        "strict",
    ],
)
def test_invalid_schemas_get_a_400(
    stub: StubProcess, place: str, schemas: list[Json], strict: bool, status: int
) -> None:
    wrong = []
    for schema in schemas:
        response = stub.post(*schema_request(place, schema, strict=strict))
        assert_ok_or_api_error(response, schema)
        if response.status != status:
            wrong.append((schema, response.status))
    assert wrong == []


@pytest.mark.parametrize("place", SCHEMA_PLACES)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("depth", [60, 1000])
def test_deeply_nested_schemas_never_cause_a_server_error(
    stub: StubProcess, place: str, strict: bool, depth: int
) -> None:
    inner = json.dumps(PLACEHOLDER).encode()
    before, after = json.dumps(object_with(a=PLACEHOLDER)).encode().split(inner)
    deep = before * depth + b'{"type": "null"}' + after * depth
    route, sent = schema_request(place, PLACEHOLDER, strict=strict)
    assert_ok_or_api_error(stub.post(route, sent.replace(inner, deep)))


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
@given(
    schema=st.dictionaries(st.sampled_from(KEYWORDS), SCHEMAS, max_size=4),
    wrap=st.sampled_from([inside_object, lambda schema: schema | {"type": "object"}]),
    strict=st.booleans(),
)
def test_arbitrary_schemas_never_cause_a_server_error(
    stub: StubProcess,
    place: str,
    schema: Json,
    wrap: Callable[[Json], Json],
    strict: bool,
) -> None:
    sent = schema_request(place, wrap(schema), strict=strict)
    assert_ok_or_api_error(stub.post(*sent), sent)
    stub.assert_nothing_logged(sent)


def test_invalid_schema_fails_its_batch_line_and_not_the_batch(
    stub: StubProcess,
) -> None:
    schema = inside_object({"properties": 5})
    route, body = schema_request("response_format", schema)
    line = {"custom_id": "1", "method": "POST", "url": route, "body": json.loads(body)}
    batch = {
        "input_file_id": upload_file(stub, json.dumps(line).encode()),
        "endpoint": route,
        "completion_window": "24h",
    }
    created = stub.post("/v1/batches", json.dumps(batch).encode()).json()

    def get_batch() -> Any:
        response = stub.send(http_request("GET", f"/v1/batches/{created['id']}"))
        assert response is not None
        return response.json()

    wait_until(lambda: get_batch()["status"] == "completed")
    assert get_batch()["request_counts"] == {"total": 1, "completed": 0, "failed": 1}


# Ids and query parameters


@pytest.mark.parametrize("route", ["files", "batches"])
@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/%ff", 404),
        ("/%00", 404),
        ("/%ed%a0%80", 404),
        (f"/{'a' * 5000}", 404),
        ("?after=%ff", 404),
        ("?limit=", 400),
        ("?limit=-1", 400),
        (f"?limit={'9' * 5000}", 400),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unknown_ids_and_invalid_list_parameters_get_an_api_error(
    stub: StubProcess, route: str, target: str, status: int
) -> None:
    response = stub.send(http_request("GET", f"/v1/{route}{target}"))
    assert response is not None
    assert_ok_or_api_error(response)
    assert response.status == status


# Expensive requests

DOUBLING_DEFINITIONS = {
    f"d{step}": {
        "properties": {name: {"$ref": f"#/$defs/d{step + 1}"} for name in "ab"}
    }
    for step in range(40)
} | {"d40": {"type": "null"}}
CHAINED_DEFINITIONS = {
    f"d{step}": {"items": {"$ref": f"#/$defs/d{step + 1}"}} for step in range(2000)
} | {"d2000": {"type": "null"}}


def api_call(route: str, **fields: Any) -> tuple[str, bytes]:
    return route, json.dumps({"model": "m"} | fields).encode()


EXPENSIVE_REQUESTS: dict[str, Callable[[], tuple[str, bytes]]] = {
    "30 MiB prompt": lambda: api_call("/v1/completions", prompt="a " * (15 * 2**20)),
    "longest prompt": lambda: api_call(
        "/v1/completions", prompt="a " * (MAX_PROMPT_TOKENS * CHARACTERS_PER_TOKEN // 2)
    ),
    "many prompts with many choices": lambda: api_call(
        "/v1/completions", prompt=["a"] * 100_000, n=128
    ),
    "many embeddings": lambda: api_call("/v1/embeddings", input=[[1]] * 100_000),
    "long array": lambda: schema_request(
        "response_format", object_with(a={"type": "array", "minItems": 10**9})
    ),
    "long string": lambda: schema_request(
        "response_format", object_with(a={"type": "string", "minLength": 10**15})
    ),
    "doubling definitions": lambda: schema_request(
        "response_format", {"$ref": "#/$defs/d0", "$defs": DOUBLING_DEFINITIONS}
    ),
    "long chain of definitions": lambda: schema_request(
        "response_format", {"$ref": "#/$defs/d0", "$defs": CHAINED_DEFINITIONS}
    ),
    "many references to itself": lambda: schema_request(
        "response_format", object_with(**{f"p{i}": {"$ref": "#"} for i in range(99)})
    ),
    "large enum and long prompt": lambda: schema_request(
        "response_format",
        object_with(a={"enum": [f"e{i}" for i in range(50_000)]}),
        "a " * 100_000,
    ),
    "large array and long prompt": lambda: schema_request(
        "response_format",
        object_with(a={"type": "array", "minItems": 9000}),
        "a " * 400_000,
    ),
    "unclosed quotes": lambda: schema_request(
        "response_format", object_with(a={"type": "string"}), " 'a" * 30_000
    ),
}


@pytest.mark.parametrize(
    "make_request", EXPENSIVE_REQUESTS.values(), ids=EXPENSIVE_REQUESTS
)
def test_expensive_requests_get_a_response_within_five_seconds(
    stub: StubProcess, make_request: Callable[[], tuple[str, bytes]]
) -> None:
    response = stub.post(*make_request(), timeout=EXPENSIVE_TIMEOUT)
    assert_ok_or_api_error(response)
    assert response.status in {200, 400}


def test_request_bodies_are_not_kept_in_memory(stub: StubProcess) -> None:
    sent = [
        b'{"model": "%b", "prompt": "a"}' % (b"%x" % number * 2**24)
        for number in range(12)
    ]
    before = stub.process.memory_info().rss
    for body in sent:
        assert_ok_or_api_error(stub.post("/v1/completions", body))
    assert stub.process.memory_info().rss - before < sum(map(len, sent)) / 2


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("route", BODIES)
def test_oversized_body_gets_a_413_before_it_is_complete(
    stub: StubProcess, route: str, chunked: bool
) -> None:
    header = "Transfer-Encoding: chunked" if chunked else "Content-Length: 99999999999"
    chunk = b" " * 2**20
    with stub.connect() as connection:
        connection.sendall(http_request("POST", route, None, header))
        for _ in range(MAX_BODY_BYTES // len(chunk) + 1):
            connection.sendall(b"100000\r\n%b\r\n" % chunk if chunked else chunk)
        response = read_response(connection)
    assert response is not None
    assert_ok_or_api_error(response)
    assert response.status == 413


@pytest.mark.parametrize("route", ["/v1/completions", "/_provider/config"])
def test_gzip_bomb_gets_a_413_or_a_closed_connection(
    stub: StubProcess, route: str
) -> None:
    packed = gzip.compress(bytes(4 * MAX_BODY_BYTES), 1)
    method = "PATCH" if route == "/_provider/config" else "POST"
    header = "Content-Encoding: gzip"
    response = stub.send(http_request(method, route, packed, header))
    assert response is None or response.status == 413


# HTTP

INVALID_HTTP = {
    "HTTPS to the HTTP port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "unknown expectation": http_request(
        "POST", "/v1/completions", COMPLETION, "Expect: all"
    ),
    "body that isn't gzip": http_request(
        "POST", "/v1/completions", COMPLETION, "Content-Encoding: gzip"
    ),
}


@pytest.mark.parametrize("raw", INVALID_HTTP.values(), ids=INVALID_HTTP)
def test_invalid_http_gets_an_api_error(stub: StubProcess, raw: bytes) -> None:
    response = stub.send(raw)
    assert response is not None
    assert_ok_or_api_error(response)
    assert response.status in {400, 417}


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: \udcff\udcfe",
        "X-Stainless-Retry-Count: \udcff\udcfe",
        "X-Stainless-Retry-Count: ٣",
        "X-Stainless-Retry-Count: ²",
    ],
    ids=ascii,
)
def test_odd_key_and_retry_count_headers_are_accepted(
    stub: StubProcess, header: str
) -> None:
    assert stub.post("/v1/completions", COMPLETION, header).status == 200


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
def test_connection_can_be_reused_after_an_error(
    stub: StubProcess, method: str, path: str, body: bytes, status: int
) -> None:
    connection = http.client.HTTPConnection(*stub.address, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.connect()
        sock = connection.sock
        failing = (method, path, body), status
        succeeding = ("POST", "/v1/completions", COMPLETION), 200
        for request, expected in (failing, failing, succeeding):
            connection.request(*request)
            response = connection.getresponse()
            response.read()
            assert response.status == expected
            assert connection.sock is sock


# Slow senders and readers


def test_slow_senders_do_not_delay_other_calls(stub: StubProcess) -> None:
    sent = http_request("POST", "/v1/completions", COMPLETION)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(stub.connect()) for _ in range(50)]
        for connection in slow:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(len(sent)):
            for number, connection in enumerate(slow):
                if number % 2 or position < len(sent) // 2 + number:
                    connection.sendall(sent[position : position + 1])
            if position % 10 == 0:
                stub.assert_responsive()
        for connection in slow[1::2]:
            response = read_response(connection)
            assert response is not None
            assert response.status == 200


# The response is far larger than the socket buffers on both sides.
LARGE_STREAM = json.dumps(
    {"model": "m", "prompt": ["a"] * 15, "n": 128, "max_tokens": 99, "stream": True}
)


def test_slow_readers_do_not_delay_other_calls_and_get_the_whole_stream(
    stub: StubProcess,
) -> None:
    sent = http_request(
        "POST", "/v1/completions", LARGE_STREAM.encode(), "Connection: close"
    )
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(stub.start_request(sent)) for _ in range(3)]
        wait_until(lambda: all(entry["first_byte"] for entry in stub.journal()))
        for _ in range(20):
            stub.assert_responsive()
        assert stub.in_flight() == 3
        for connection in slow:
            assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# Clients that hang up


def completion_request(**options: Any) -> bytes:
    return http_request(
        "POST",
        "/v1/completions",
        json.dumps({**json.loads(COMPLETION), **options}).encode(),
    )


HEADERS_ONLY = http_request("POST", "/v1/completions", None, "Content-Length: 99")
UPLOAD_START = http_request(
    "POST", "/v1/files", None, MULTIPART, "Content-Length: 9999"
)
CALL_STAGES: dict[str, tuple[bytes, Json, str]] = {
    "after the headers": (HEADERS_ONLY, {}, "route"),
    "in the middle of the request body": (HEADERS_ONLY + b'{"model"', {}, "route"),
    "in the middle of an upload": (
        UPLOAD_START + multipart_form(FILE_PART % b"" + b"{", end=b""),
        {},
        "route",
    ),
    "in the queue": (
        completion_request(),
        {"capacity": 1, "first_token": 600},
        "model",
    ),
    "before the first token": (completion_request(), {"first_token": 600}, "model"),
    "in the middle of a stream": (
        completion_request(stream=True),
        {"per_token": 600},
        "first_byte",
    ),
    "before reading the response": (
        http_request("POST", "/v1/completions", LARGE_STREAM.encode()),
        {},
        "first_byte",
    ),
}


@pytest.mark.parametrize(
    "hang_up", [socket.socket.close, reset_connection], ids=["close", "reset"]
)
@pytest.mark.parametrize(
    ("sent", "settings", "stage_reached"), CALL_STAGES.values(), ids=CALL_STAGES
)
def test_hanging_up_at_any_stage_cancels_the_call(
    stub: StubProcess,
    sent: bytes,
    settings: Json,
    stage_reached: str,
    hang_up: Callable[[socket.socket], None],
) -> None:
    stub.configure(**settings)
    connections = [stub.start_request(sent), stub.start_request(sent)]
    wait_until(lambda: all(entry[stage_reached] for entry in stub.journal()))
    for connection in connections:
        hang_up(connection)
    assert [entry["state"] for entry in stub.journal(settle=5)] == ["cancelled"] * 2
    assert stub.in_flight() == 0
    stub.configure(**DEFAULTS | {"capacity": 1})
    stub.assert_responsive()


COMPLETE_REQUESTS = {
    "completion": completion_request(),
    "stream": completion_request(stream=True),
    "many embeddings": http_request(
        "POST", *api_call("/v1/embeddings", input=["a"] * 20)
    ),
    "invalid JSON": http_request("POST", "/v1/completions", b"nonsense"),
    "models": http_request("GET", "/v1/models"),
    "unknown route": http_request("GET", "/v1/nothing"),
    "upload": http_request("POST", "/v1/files", VALID_FORM, MULTIPART),
    "control": http_request("GET", "/_provider/config"),
}


@pytest.mark.parametrize(
    "hang_up", [socket.socket.close, reset_connection], ids=["close", "reset"]
)
@pytest.mark.parametrize("sent", COMPLETE_REQUESTS.values(), ids=COMPLETE_REQUESTS)
def test_hanging_up_right_after_the_request_is_not_logged_as_an_error(
    stub: StubProcess, sent: bytes, hang_up: Callable[[socket.socket], None]
) -> None:
    for _ in range(20):
        connection = stub.connect()
        connection.sendall(sent)
        hang_up(connection)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [name for name in get_args(Fault) if name != "hang"])
def test_injected_faults_are_not_logged_as_errors(
    stub: StubProcess, fault: str, stream: bool
) -> None:
    stub.configure(faults={fault: 1.0}, slow=0)
    with (
        stub.connect() as connection,
        contextlib.suppress(http.client.IncompleteRead),
    ):
        connection.sendall(completion_request(stream=stream))
        read_response(connection)


def test_ten_thousand_dropped_connections_leak_nothing(stub: StubProcess) -> None:
    for _ in range(25):
        wave = [stub.connect() for _ in range(400)]
        for number, connection in enumerate(wave):
            (reset_connection if number % 2 else socket.socket.close)(connection)
        stub.assert_responsive()


# Loopback only


def test_stub_listens_on_loopback_only(stub: StubProcess) -> None:
    listening = [
        socket_.laddr
        for socket_ in stub.process.net_connections("all")
        if socket_.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", stub.address[1])]


def other_addresses() -> list[str]:
    return sorted(
        {
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family in (socket.AF_INET, socket.AF_INET6)
            and not address.address.startswith("fe80")  # these need a scope
        }
        - {"127.0.0.1"}
    )


def test_other_addresses_of_the_machine_refuse_connections(stub: StubProcess) -> None:
    for host in other_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, stub.address[1]), TIMEOUT)


# Control

INVALID_SETTINGS = [
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


@pytest.mark.parametrize("body", INVALID_SETTINGS, ids=lambda body: repr(body[:40]))
def test_invalid_settings_get_a_400_and_change_nothing(
    stub: StubProcess, body: bytes
) -> None:
    before = stub.control("config")
    response = stub.send(http_request("PATCH", "/_provider/config", body))
    assert response is not None
    assert response.status == 400
    assert isinstance(response.json()["error"], str)
    assert response.json()["error"]
    assert stub.control("config") == before


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: application/json; charset=other",
        "Content-Type: application/json; charset=base64",
        "Content-Encoding: gzip",
    ],
)
def test_undecodable_settings_never_cause_a_server_error(
    stub: StubProcess, header: str
) -> None:
    response = stub.send(http_request("PATCH", "/_provider/config", b"{}", header))
    assert response is None or response.status in {200, 400}


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(sorted(DEFAULTS)) | TEXT, JSON) | JSON)
def test_arbitrary_json_as_settings_never_causes_a_server_error(
    stub: StubProcess, changes: Any
) -> None:
    before = stub.control("config")
    body = json.dumps(changes).encode()
    response = stub.send(http_request("PATCH", "/_provider/config", body))
    assert response is not None
    assert response.status in {200, 400}, body
    assert (response.status == 200) == (set(response.json()) == set(DEFAULTS))
    if response.status == 400:
        assert stub.control("config") == before
    stub.configure(**DEFAULTS)
    stub.assert_nothing_logged(body)


@pytest.mark.parametrize(
    "query",
    "since= since=a since=nan since=1e3 since=-1 since=%ff settle= settle=a settle=nan "
    "settle=inf settle=-inf settle=-1 settle=1e308 changed= changed=a changed=-1 "
    "changed=1e3".split()
    + [f"since={sign}{'9' * digits}" for sign, digits in (("", 5000), ("-", 4300))],
    ids=lambda query: query[:20],
)
def test_invalid_journal_query_gets_a_400(stub: StubProcess, query: str) -> None:
    response = stub.send(http_request("GET", f"/_provider/journal?{query}"))
    assert response is not None
    assert response.status == 400
    assert isinstance(response.json()["error"], str)


def test_journal_since_a_huge_number_is_empty(stub: StubProcess) -> None:
    stub.assert_responsive()
    assert stub.control(f"journal?since={10**400}")["attempts"] == []


def test_reset_ignores_its_body(stub: StubProcess) -> None:
    response = stub.post("/_provider/reset", b"\xff" * 1000)
    assert response.status == 200


def test_key_is_not_repeated_in_the_message_for_a_malformed_header(
    stub: StubProcess,
) -> None:
    for rest in "x" * 9000, "\x01":
        with socket.create_connection(stub.address, timeout=10) as to_stub:
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            head += f"Authorization: Bearer sk-SECRET{rest}\r\n\r\n"
            to_stub.sendall(head.encode())
            answer = to_stub.makefile("rb").read()
        assert b" 400 " in answer
        assert b"SECRET" not in answer


LARGE = {
    "minProperties": object_with(a={"type": "object", "minProperties": 10**9}),
    "uniqueItems": object_with(
        a={
            "type": "array",
            "minItems": 9000,
            "uniqueItems": True,
            "items": {"type": "integer"},
        }
    ),
}


@pytest.mark.parametrize("schema", LARGE.values(), ids=LARGE)
def test_large_schema_holds_up_no_other_call(stub: StubProcess, schema: Json) -> None:
    begun = time.monotonic()
    answer = stub.post(*schema_request("response_format", schema))
    assert answer.status in (200, 400)
    assert time.monotonic() - begun < 3

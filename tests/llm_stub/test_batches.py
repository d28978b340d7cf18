import asyncio
import json
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Final
from unittest import mock

import openai
import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer
from openai import DefaultHttpxClient, OpenAI
from openai.types import Batch, BatchError, FileDeleted, FileObject
from pydantic import BaseModel

from helpers.connection import Provider
from llm_stub import batches, files, server
from tests.llm_stub.test_wire import undocumented

Json = dict[str, Any]

CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"
INPUTS: dict[str, Callable[[str], Json]] = {
    CHAT: lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/responses": lambda text: {"input": text},
    EMBEDDINGS: lambda text: {"input": text, "dimensions": 2},
}
ENDED = {"failed", "completed", "expired", "cancelled"}
BARELY = 0.001  # a second: the first request is answered, and then none for long


def body(text: str, endpoint: str = CHAT, **options: Any) -> Json:
    return {"model": "some-model"} | INPUTS[endpoint](text) | options


def line(custom_id: str, body: Json, endpoint: str = CHAT) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}


def lines(count: int, endpoint: str = CHAT, **options: Any) -> list[Json]:
    return [
        line(f"{number}", body(f"Hello {number}", endpoint, **options), endpoint)
        for number in range(count)
    ]


def jsonl(requests: list[Json]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def upload(client: OpenAI, content: bytes, purpose: Any = "batch") -> FileObject:
    return client.files.create(file=("requests.jsonl", content), purpose=purpose)


def start(
    client: OpenAI,
    requests: list[Json] | bytes,
    endpoint: Any = CHAT,
    **options: Any,
) -> Batch:
    content = requests if isinstance(requests, bytes) else jsonl(requests)
    return client.batches.create(
        input_file_id=upload(client, content).id,
        endpoint=endpoint,
        completion_window="24h",
        **options,
    )


def counts(batch: Batch) -> tuple[int, int, int]:
    """How many requests there are, were answered, and failed."""
    assert batch.request_counts
    told = batch.request_counts
    return told.total, told.completed, told.failed


def done(batch: Batch) -> int:
    return counts(batch)[1]


def errors(batch: Batch) -> list[BatchError]:
    assert batch.errors
    return batch.errors.data or []


def until(client: OpenAI, batch: Batch, status: str, least_done: int = 0) -> Batch:
    deadline = time.monotonic() + 60
    while batch.status != status or done(batch) < least_done:
        assert batch.status not in ENDED, batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.01)
        batch = client.batches.retrieve(batch.id)
    return batch


def completed(client: OpenAI, requests: list[Json], endpoint: str = CHAT) -> Batch:
    return until(client, start(client, requests, endpoint), "completed")


def results(client: OpenAI, file_id: str | None) -> dict[str, Json]:
    """The lines of an output or error file, by their custom_id."""
    if file_id is None:
        return {}
    read = [json.loads(one) for one in client.files.content(file_id).iter_lines()]
    by_id = {one["custom_id"]: one for one in read}
    assert len(by_id) == len(read)
    return by_id


def answers(client: OpenAI, batch: Batch) -> dict[str, Json]:
    found = results(client, batch.output_file_id)
    return {custom_id: one["response"]["body"] for custom_id, one in found.items()}


def live(client: OpenAI, request: Json) -> tuple[int, Any]:
    """What the route itself answers: the status and the body."""
    try:
        path = request["url"].removeprefix("/v1")
        return 200, client.post(path, body=request["body"], cast_to=object)
    except openai.APIStatusError as error:
        return error.status_code, error.response.json()


def assert_is_strictly(kind: type[BaseModel], raw: Any) -> None:
    assert undocumented(kind.model_validate_json(raw.text, strict=True)) == []


@pytest.fixture
def client(provider: Provider, client: OpenAI) -> OpenAI:
    provider.configure(first_token=0, per_token=0, batch_speed=1e6)
    return client


@pytest.fixture
def post(
    client: OpenAI, provider: Provider, connections: DefaultHttpxClient
) -> Any:  # of the HTTP client, as no SDK sends a wrong form
    def post(**options: Any) -> tuple[int, Json]:
        response = connections.post(f"{provider.url}/v1/files", **options)
        return response.status_code, response.json()["error"]

    return post


# Files


@pytest.mark.parametrize(
    "content",
    [b"", bytes(range(256)) * 999, b"\r\n--\r\n\r\n--", "日本語\n".encode()],
    ids=["empty", "all bytes", "like a form", "text"],
)
def test_a_files_content_is_what_was_uploaded_byte_by_byte(
    client: OpenAI, content: bytes
) -> None:
    file = client.files.create(file=("ünï.bin", content), purpose="user_data")
    assert (file.filename, file.bytes) == ("ünï.bin", len(content))
    assert client.files.content(file.id).content == content
    assert client.files.retrieve(file.id) == file


def test_a_file_object_is_strictly_of_the_sdks_type(client: OpenAI) -> None:
    files = client.files.with_raw_response
    assert_is_strictly(FileObject, files.create(file=b"some", purpose="batch"))
    file = upload(client, b"some")
    assert_is_strictly(FileObject, files.retrieve(file.id))
    assert_is_strictly(FileDeleted, files.delete(file.id))


def test_a_deleted_file_is_no_longer_there(client: OpenAI) -> None:
    file, other = upload(client, b"1"), upload(client, b"2")
    assert client.files.delete(file.id).deleted
    for use in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            use(file.id)
    assert file.id not in [one.id for one in client.files.list()]
    assert client.files.retrieve(other.id) == other


def test_files_are_listed_page_by_page_the_newest_first(client: OpenAI) -> None:
    files = [upload(client, b"1", "vision") for _ in range(5)]
    upload(client, b"1", "assistants")
    page = client.files.list(purpose="vision", limit=2)
    assert page.data == [files[4], files[3]]
    assert page.has_next_page()
    assert list(islice(page, 5)) == files[::-1]
    after = client.files.list(purpose="vision", after=files[3].id, limit=3)
    assert after.data == files[2::-1]


def test_files_are_listed_the_oldest_first_where_that_is_asked_for(
    client: OpenAI,
) -> None:
    files = [upload(client, b"1", "vision") for _ in range(5)]
    listed = list(client.files.list(purpose="vision", order="asc", limit=2))
    assert listed[-5:] == files


def test_a_list_without_a_purpose_has_files_of_all_purposes(client: OpenAI) -> None:
    files = [upload(client, b"1", purpose) for purpose in ("batch", "fine-tune")]
    assert client.files.list().data[:2] == files[::-1]


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
@pytest.mark.parametrize("kind", ["files", "batches"])
def test_a_wrong_limit_of_a_list_is_refused(
    client: OpenAI, kind: str, limit: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        getattr(client, kind).list(extra_query={"limit": limit})
    assert error.value.param == "limit"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": (None, "batch")}, "file"),
        ({"file": ("a", b"1")}, "purpose"),
        ({"file": ("a", b"1"), "purpose": (None, "")}, "purpose"),
        ({"file": ("a", b"1"), "purpose": (None, "fun")}, "purpose"),
        ({"file": ("a", b"1"), "purpose": (None, "batch_output")}, "purpose"),
    ],
    ids=["no file", "no purpose", "empty purpose", "bad purpose", "not for users"],
)
def test_a_form_without_a_file_or_a_good_purpose_is_refused(
    post: Any, form: Json, param: str
) -> None:
    status, error = post(files=form)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param


@pytest.mark.parametrize("sent", [{"json": {}}, {"data": {"purpose": "batch"}}, {}])
def test_a_body_that_is_no_multipart_form_is_refused(post: Any, sent: Json) -> None:
    status, error = post(**sent)
    assert status == 400
    assert "multipart/form-data" in error["message"]


FILE = b'--B\r\nContent-Disposition: form-data; name="file"'


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"no form",
        FILE,
        FILE + b"\r\n\r\nnever ends",
        FILE.replace(b":", b"") + b"\r\n\r\n1\r\n--B--\r\n",
        FILE + b"\r\nx: " + b"x" * 99_999 + b"\r\n\r\n1\r\n--B--\r\n",
        FILE.replace(b"file", b"purpose")
        + b"\r\nContent-Transfer-Encoding: none\r\n\r\nbatch\r\n--B--\r\n",
    ],
    ids=["empty", "text", "cut", "endless", "header", "long header", "encoding"],
)
def test_a_broken_form_is_the_clients_fault(post: Any, broken: bytes) -> None:
    form = "multipart/form-data; boundary=B"
    status, error = post(content=broken, headers={"content-type": form})
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_a_file_may_be_larger_than_the_body_of_a_call(client: OpenAI) -> None:
    file = upload(client, bytes(server.MAX_BODY_BYTES + 1), "user_data")
    assert client.files.retrieve(file.id).bytes == server.MAX_BODY_BYTES + 1
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("limit", "most"), [("MAX_FILE_BYTES", 10), ("MAX_TOTAL_BYTES", 20)]
)
def test_a_file_past_a_limit_is_refused_and_not_kept(limit: str, most: int) -> None:
    async def upload_two() -> tuple[list[int], int]:
        async with TestClient(TestServer(server.Server().app())) as http:
            statuses = []
            for size in (10, 11):
                form = FormData({"purpose": "batch"})
                form.add_field("file", bytes(size), filename="a")
                response = await http.post("/v1/files", data=form)
                statuses.append(response.status)
            listed = await (await http.get("/v1/files")).json()
            return statuses, len(listed["data"])

    with mock.patch.object(files, limit, most):
        assert asyncio.run(upload_two()) == ([200, 413], 1)


# The life of a batch


def test_a_batch_is_validated_worked_off_and_completed(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=BARELY)
    batch = start(client, lines(10), metadata={"for": "a test"})
    assert batch.status == "validating"
    assert (batch.endpoint, batch.completion_window) == (CHAT, "24h")
    assert batch.metadata == {"for": "a test"}
    assert batch.expires_at == batch.created_at + 24 * 60 * 60

    halfway = until(client, batch, "in_progress", least_done=1)
    assert counts(halfway) == (10, 1, 0)
    assert not halfway.output_file_id

    provider.configure(batch_speed=1e6)
    batch = until(client, batch, "completed")
    assert counts(batch) == (10, 10, 0)
    moments = [batch.created_at, batch.in_progress_at, batch.finalizing_at]
    moments.append(batch.completed_at)
    assert moments == sorted(moment for moment in moments if moment)
    assert not any([batch.failed_at, batch.expired_at, batch.cancelled_at])
    assert not any([batch.error_file_id, batch.errors])
    assert client.batches.retrieve(batch.id) == batch


@pytest.mark.parametrize("requests", [lines(2), []], ids=["completed", "failed"])
def test_a_batch_object_is_strictly_of_the_sdks_type(
    client: OpenAI, requests: list[Json]
) -> None:
    raw = client.batches.with_raw_response
    created = raw.create(
        input_file_id=upload(client, jsonl(requests)).id,
        endpoint=CHAT,
        completion_window="24h",
    )
    assert_is_strictly(Batch, created)
    batch = created.parse()
    until(client, batch, "completed" if requests else "failed")
    assert_is_strictly(Batch, raw.retrieve(batch.id))


@pytest.mark.parametrize("endpoint", INPUTS)
def test_a_batch_answers_as_the_route_does(client: OpenAI, endpoint: str) -> None:
    requests = lines(3, endpoint)
    batch = completed(client, requests, endpoint)
    assert batch.error_file_id is None
    found = results(client, batch.output_file_id)
    assert found.keys() == {request["custom_id"] for request in requests}
    for request in requests:
        one = found[request["custom_id"]]
        assert one["error"] is None
        response = one["response"]
        assert (response["status_code"], response["body"]) == live(client, request)
        assert response["request_id"]
    assert len({one["id"] for one in found.values()}) == len(found)


def test_a_batchs_files_are_ordinary_files(client: OpenAI) -> None:
    requests = [*lines(2), line("bad", body("Hi", max_tokens=0))]
    batch = completed(client, requests)
    for file_id, count in ((batch.output_file_id, 2), (batch.error_file_id, 1)):
        file = client.files.retrieve(str(file_id))
        assert file.purpose == "batch_output"
        assert file.filename.endswith(".jsonl")
        assert client.files.content(file.id).text.count("\n") == count
        client.files.delete(file.id)


def test_a_batchs_usage_is_the_sum_of_its_answers(client: OpenAI) -> None:
    batch = completed(client, lines(3))
    usages = [answer["usage"] for answer in answers(client, batch).values()]
    assert batch.usage
    assert batch.usage.input_tokens == sum(one["prompt_tokens"] for one in usages)
    assert batch.usage.output_tokens == sum(one["completion_tokens"] for one in usages)
    assert batch.usage.total_tokens == sum(one["total_tokens"] for one in usages)


FAILING = {
    "no messages": {"model": "some-model"},
    "bad value": body("Hi", n=0),
    "unknown parameter": body("Hi", colour="blue"),
    "refused parameter": body("Hi", logprobs=True),
}


def test_a_failed_request_is_in_the_error_file_with_the_routes_error(
    client: OpenAI,
) -> None:
    bad = [line(custom_id, one) for custom_id, one in FAILING.items()]
    good = lines(2)
    batch = completed(client, [good[0], *bad, good[1]])
    assert counts(batch) == (2 + len(bad), 2, len(bad))
    assert answers(client, batch).keys() == {one["custom_id"] for one in good}
    found = results(client, batch.error_file_id)
    assert found.keys() == FAILING.keys()
    for request in bad:
        one = found[request["custom_id"]]
        assert one["error"] is None
        response = one["response"]
        assert (response["status_code"], response["body"]) == live(client, request)
        assert response["status_code"] == 400


def test_a_request_for_a_model_that_does_not_exist_fails_with_404(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(models=["other"])
    batch = completed(client, lines(1))
    [one] = results(client, batch.error_file_id).values()
    assert one["response"]["status_code"] == 404
    assert one["response"]["body"]["error"]["code"] == "model_not_found"


def test_where_all_requests_fail_there_is_no_output_file(client: OpenAI) -> None:
    batch = completed(client, lines(2, n=0))
    assert counts(batch) == (2, 0, 2)
    assert not batch.output_file_id
    assert len(results(client, batch.error_file_id)) == 2


def test_a_request_with_a_malformed_schema_fails_alone(client: OpenAI) -> None:
    schema = {"type": "string", "minLength": "x"}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    bad = line("bad", body("Hi", response_format=wanted))
    batch = completed(client, [bad, *lines(2)])
    assert done(batch) == 2
    response = results(client, batch.error_file_id)["bad"]["response"]
    assert response["status_code"] == 400


def test_the_same_input_gives_the_same_answers(client: OpenAI) -> None:
    first, second = (completed(client, lines(5)) for _ in range(2))
    assert first.id != second.id
    assert answers(client, first) == answers(client, second)


# Validation

GOOD = lines(1)[0]
LEFT_OUT = [
    {name: value for name, value in GOOD.items() if name != missing} for missing in GOOD
]


@pytest.mark.parametrize(
    ("second", "code", "param"),
    [
        (b'{"custom_id": "a"', "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        *(
            (jsonl([one]), "missing_required_parameter", name)
            for name, one in zip(GOOD, LEFT_OUT, strict=True)
        ),
        (jsonl([GOOD]), "duplicate_custom_id", "custom_id"),
        (
            jsonl([line("a", body("Hi"), "/v1/completions")]),
            "url_mismatch",
            "url",
        ),
        (jsonl([line("a", body("Hi", model="b"))]), "model_mismatch", "body.model"),
    ],
)
def test_a_batch_with_a_wrong_line_fails_and_names_line_and_field(
    client: OpenAI, second: bytes, code: str, param: str | None
) -> None:
    batch = until(client, start(client, jsonl([GOOD]) + second), "failed")
    [error] = errors(batch)
    assert (error.code, error.line, error.param) == (code, 2, param)
    assert error.message
    assert batch.failed_at
    assert not any([batch.in_progress_at, batch.output_file_id, batch.error_file_id])
    assert counts(batch) == (0, 0, 0)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n \n", "empty_file"),
        (b"{}\n" * (batches.MAX_LINES + 1), "too_many_tasks"),
    ],
    ids=["empty", "blank", "too many"],
)
def test_a_file_without_a_line_or_with_too_many_fails_as_a_whole(
    client: OpenAI, content: bytes, code: str
) -> None:
    [error] = errors(until(client, start(client, content), "failed"))
    assert (error.code, error.line, error.param) == (code, None, None)


def test_every_wrong_line_is_told_by_its_number_in_the_file(client: OpenAI) -> None:
    content = b"\n" + jsonl([GOOD]) + b"\r\n" + b"[\n" + jsonl([GOOD]) + b"]"
    batch = until(client, start(client, content), "failed")
    assert [(error.code, error.line) for error in errors(batch)] == [
        ("invalid_json_line", 4),
        ("duplicate_custom_id", 5),
        ("invalid_json_line", 6),
    ]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
    ],
)
def test_a_wrong_field_of_a_new_batch_is_refused(
    client: OpenAI, changed: Json, param: str
) -> None:
    fields: Any = {"endpoint": CHAT, "completion_window": "24h"} | changed
    fields.setdefault("input_file_id", upload(client, jsonl([GOOD])).id)
    with pytest.raises(openai.BadRequestError) as error:
        client.batches.create(**fields)
    assert error.value.param == param


def test_a_batch_takes_only_a_file_that_was_uploaded_for_one(client: OpenAI) -> None:
    file = upload(client, jsonl([GOOD]), "user_data")
    with pytest.raises(openai.BadRequestError) as error:
        client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
    assert error.value.param == "input_file_id"


def test_an_unknown_batch_is_not_found(client: OpenAI) -> None:
    for use in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="batch_none"):
            use("batch_none")


# Cancelled, expired


def test_a_cancelled_batch_keeps_what_was_done_and_names_what_was_not(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=BARELY)
    requests = lines(5)
    batch = until(client, start(client, requests), "in_progress", least_done=1)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at
    assert not cancelling.cancelled_at

    batch = until(client, batch, "cancelled")
    assert batch.cancelled_at
    assert not batch.completed_at
    assert counts(batch) == (5, 1, 4)
    [first, *others] = requests
    assert answers(client, batch) == {first["custom_id"]: live(client, first)[1]}
    undone = results(client, batch.error_file_id)
    assert [*undone] == [request["custom_id"] for request in others]
    assert {one["error"]["code"] for one in undone.values()} == {"batch_cancelled"}
    assert not any(one["response"] for one in undone.values())


def test_a_batch_may_be_cancelled_before_it_has_begun(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=BARELY)
    batch = start(client, lines(100))
    client.batches.cancel(batch.id)
    assert done(until(client, batch, "cancelled")) < 100


def test_a_batch_that_is_cancelled_while_it_is_checked_names_no_lines(
    client: OpenAI, provider: Provider
) -> None:
    # Its lines may be no requests at all.
    requests = jsonl(lines(batches.MAX_LINES - 1, EMBEDDINGS)) + b"{\n"
    batch = start(client, requests, EMBEDDINGS)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = until(client, batch, "cancelled")
    assert not batch.in_progress_at
    assert not batch.error_file_id


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_batch_that_has_ended_cannot_be_cancelled(
    client: OpenAI, provider: Provider, status: str
) -> None:
    if status == "cancelled":
        provider.configure(batch_speed=BARELY)
    batch = start(client, b"{" if status == "failed" else jsonl(lines(2)))
    if status == "cancelled":
        client.batches.cancel(batch.id)
    batch = until(client, batch, status)
    with pytest.raises(openai.ConflictError, match=status):
        client.batches.cancel(batch.id)
    assert client.batches.retrieve(batch.id) == batch


def test_what_an_expired_batch_did_not_come_to_is_in_its_error_file(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=BARELY, batch_window=1)
    requests = lines(5)
    batch = until(client, start(client, requests), "expired")
    assert batch.expired_at
    assert not batch.completed_at
    answered = answers(client, batch)
    undone = results(client, batch.error_file_id)
    assert answered
    assert undone
    assert [*answered, *undone] == [request["custom_id"] for request in requests]
    for one in undone.values():
        assert one["response"] is None
        assert one["error"].keys() == {"code", "message"}
        assert one["error"]["code"] == "batch_expired"
    assert done(batch) == len(answered)


# Speed, and several at once


def test_a_batch_takes_as_long_as_its_speed_says(
    client: OpenAI, provider: Provider
) -> None:
    def seconds(speed: float) -> float:
        provider.configure(batch_speed=speed)
        begun = time.monotonic()
        completed(client, lines(30))
        return time.monotonic() - begun

    slow, fast = seconds(20), seconds(1e6)
    assert slow >= 29 / 20
    assert slow > 2 * fast


def test_two_batches_at_once_do_not_disturb_each_other(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=BARELY)
    requests = {CHAT: lines(10), EMBEDDINGS: lines(15, EMBEDDINGS)}
    pair = [start(client, each, endpoint) for endpoint, each in requests.items()]
    for batch in pair:
        until(client, batch, "in_progress", least_done=1)
    provider.configure(batch_speed=1e6)
    for batch, each in zip(pair, requests.values(), strict=True):
        ended = until(client, batch, "completed")
        assert answers(client, ended) == {
            request["custom_id"]: live(client, request)[1] for request in each
        }


def test_batches_are_listed_page_by_page_the_newest_first(client: OpenAI) -> None:
    made = [completed(client, lines(1)) for _ in range(5)]
    page = client.batches.list(limit=2)
    assert page.data == made[:2:-1]
    assert page.has_next_page()
    assert list(islice(page, 5)) == made[::-1]
    assert client.batches.list(after=made[4].id, limit=4).data == made[3::-1]


def test_a_batch_of_the_largest_size_leaves_the_server_free_for_calls(
    client: OpenAI,
) -> None:
    requests = lines(batches.MAX_LINES, EMBEDDINGS, dimensions=1)
    # The client loads what a chat call needs at the first: not the server's doing.
    client.chat.completions.create(**body("Hello"))
    batch = until(client, start(client, requests, EMBEDDINGS), "in_progress")
    begun, waits = time.monotonic(), []
    while batch.status == "in_progress":
        asked = time.monotonic()
        client.chat.completions.create(**body("Hello"))
        waits.append(time.monotonic() - asked)
        batch = client.batches.retrieve(batch.id)
    batch = until(client, batch, "completed")
    assert done(batch) == batches.MAX_LINES
    assert len(waits) > 10
    assert max(waits) < (time.monotonic() - begun) / 4
    output = client.files.content(str(batch.output_file_id)).content
    assert output.count(b"\n") == batches.MAX_LINES

import json
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

import openai
import pytest
from openai import OpenAI
from openai.types import Batch, BatchError

from helpers.connection import Provider
from llm_stub import batches
from tests.llm_stub.conftest import (
    Json,
    assert_matches_exactly,
    upload,
    without_ids,
)

CHAT: Final = "/v1/chat/completions"
EMBEDDINGS: Final = "/v1/embeddings"
INPUTS: dict[str, Callable[[str], Json]] = {
    CHAT: lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/responses": lambda text: {"input": text},
    EMBEDDINGS: lambda text: {"input": text, "dimensions": 2},
}
FINAL = {"failed", "completed", "expired", "cancelled"}
ALMOST_STOPPED = 0.001  # requests per second: answers the first one, then waits


def body(text: str, endpoint: str = CHAT, **options: Any) -> Json:
    return {"model": "some-model"} | INPUTS[endpoint](text) | options


def line(custom_id: str, body: Json, endpoint: str = CHAT) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}


def make_lines(count: int, endpoint: str = CHAT, **options: Any) -> list[Json]:
    return [
        line(f"{number}", body(f"Hello {number}", endpoint, **options), endpoint)
        for number in range(count)
    ]


def jsonl(requests: list[Json]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


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
    """How many requests there are, how many succeeded and how many failed."""
    assert batch.request_counts
    numbers = batch.request_counts
    return numbers.total, numbers.completed, numbers.failed


def count_completed(batch: Batch) -> int:
    return counts(batch)[1]


def errors(batch: Batch) -> list[BatchError]:
    assert batch.errors
    return batch.errors.data or []


def wait_for(
    client: OpenAI, batch: Batch, status: str, min_completed: int = 0
) -> Batch:
    deadline = time.monotonic() + 60
    while batch.status != status or count_completed(batch) < min_completed:
        assert batch.status not in FINAL, batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.01)
        batch = client.batches.retrieve(batch.id)
    return batch


def run(client: OpenAI, requests: list[Json], endpoint: str = CHAT) -> Batch:
    """Start a batch and wait until it is completed."""
    return wait_for(client, start(client, requests, endpoint), "completed")


def results(client: OpenAI, file_id: str | None) -> dict[str, Json]:
    """The lines of an output or error file, by their custom_id."""
    if file_id is None:
        return {}
    lines = [json.loads(raw) for raw in client.files.content(file_id).iter_lines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def answers(client: OpenAI, batch: Batch) -> dict[str, Json]:
    output = results(client, batch.output_file_id)
    return {name: result["response"]["body"] for name, result in output.items()}


def ask_directly(client: OpenAI, request: Json) -> tuple[int, Any]:
    """Status and body of the same request sent outside a batch."""
    try:
        path = request["url"].removeprefix("/v1")
        return 200, client.post(path, body=request["body"], cast_to=object)
    except openai.APIStatusError as error:
        return error.status_code, error.response.json()


@pytest.fixture
def client(provider: Provider, client: OpenAI) -> OpenAI:
    provider.configure(first_token=0, per_token=0, batch_speed=1e6)
    return client


# Life cycle and results


def test_batch_is_validated_processed_and_completed(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=ALMOST_STOPPED)
    batch = start(client, make_lines(10), metadata={"for": "a test"})
    assert batch.status == "validating"
    assert (batch.endpoint, batch.completion_window) == (CHAT, "24h")
    assert batch.metadata == {"for": "a test"}
    assert batch.expires_at == batch.created_at + 24 * 60 * 60

    halfway = wait_for(client, batch, "in_progress", min_completed=1)
    assert counts(halfway) == (10, 1, 0)
    assert not halfway.output_file_id

    provider.configure(batch_speed=1e6)
    batch = wait_for(client, batch, "completed")
    assert counts(batch) == (10, 10, 0)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at]
    times.append(batch.completed_at)
    assert times == sorted(time for time in times if time)
    assert not any([batch.failed_at, batch.expired_at, batch.cancelled_at])
    assert not any([batch.error_file_id, batch.errors])
    assert client.batches.retrieve(batch.id) == batch


@pytest.mark.parametrize("requests", [make_lines(2), []], ids=["completed", "failed"])
def test_batch_object_matches_the_sdks_type_exactly(
    client: OpenAI, requests: list[Json]
) -> None:
    raw = client.batches.with_raw_response
    created = raw.create(
        input_file_id=upload(client, jsonl(requests)).id,
        endpoint=CHAT,
        completion_window="24h",
    )
    assert_matches_exactly(Batch, created)
    batch = created.parse()
    wait_for(client, batch, "completed" if requests else "failed")
    assert_matches_exactly(Batch, raw.retrieve(batch.id))


@pytest.mark.parametrize("endpoint", INPUTS)
def test_batch_gives_the_same_answers_as_direct_requests(
    client: OpenAI, endpoint: str
) -> None:
    requests = make_lines(3, endpoint)
    batch = run(client, requests, endpoint)
    assert batch.error_file_id is None
    output = results(client, batch.output_file_id)
    assert output.keys() == {request["custom_id"] for request in requests}
    for request in requests:
        result = output[request["custom_id"]]
        assert result["error"] is None
        response = result["response"]
        status, direct = ask_directly(client, request)
        assert response["status_code"] == status == 200
        assert without_ids(response["body"]) == without_ids(direct)
    lines = output.values()
    assert len({result["id"] for result in lines}) == len(output)
    assert len({result["response"]["request_id"] for result in lines}) == len(output)


def test_output_and_error_file_are_ordinary_files(client: OpenAI) -> None:
    requests = [*make_lines(2), line("bad", body("Hi", max_tokens=0))]
    batch = run(client, requests)
    for file_id, count in ((batch.output_file_id, 2), (batch.error_file_id, 1)):
        file = client.files.retrieve(str(file_id))
        assert file.purpose == "batch_output"
        assert file.filename.endswith(".jsonl")
        assert client.files.content(file.id).text.count("\n") == count
        client.files.delete(file.id)


def test_usage_of_a_batch_is_the_sum_of_its_answers(client: OpenAI) -> None:
    batch = run(client, make_lines(3))
    usages = [answer["usage"] for answer in answers(client, batch).values()]
    assert batch.usage
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert batch.usage.output_tokens == sum(
        usage["completion_tokens"] for usage in usages
    )
    assert batch.usage.total_tokens == sum(usage["total_tokens"] for usage in usages)


FAILING = {
    "no messages": {"model": "some-model"},
    "bad value": body("Hi", n=0),
    "unknown parameter": body("Hi", colour="blue"),
    "unsupported parameter": body("Hi", logprobs=True),
}


def test_failed_request_is_in_the_error_file_with_the_error_of_a_direct_request(
    client: OpenAI,
) -> None:
    bad = [line(custom_id, request) for custom_id, request in FAILING.items()]
    good = make_lines(2)
    batch = run(client, [good[0], *bad, good[1]])
    assert counts(batch) == (2 + len(bad), 2, len(bad))
    assert answers(client, batch).keys() == {request["custom_id"] for request in good}
    failed = results(client, batch.error_file_id)
    assert failed.keys() == FAILING.keys()
    for request in bad:
        result = failed[request["custom_id"]]
        assert result["error"] is None
        response = result["response"]
        assert (response["status_code"], response["body"]) == ask_directly(
            client, request
        )
        assert response["status_code"] == 400


def test_request_for_an_unknown_model_fails_with_404(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(models=["other"])
    batch = run(client, make_lines(1))
    [result] = results(client, batch.error_file_id).values()
    assert result["response"]["status_code"] == 404
    assert result["response"]["body"]["error"]["code"] == "model_not_found"


def test_batch_whose_requests_all_fail_has_no_output_file(client: OpenAI) -> None:
    batch = run(client, make_lines(2, n=0))
    assert counts(batch) == (2, 0, 2)
    assert not batch.output_file_id
    assert len(results(client, batch.error_file_id)) == 2


def test_request_with_a_malformed_schema_does_not_fail_the_batch(
    client: OpenAI,
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": "x"}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    bad = line("bad", body("Hi", response_format=wanted))
    batch = run(client, [bad, *make_lines(2)])
    assert count_completed(batch) == 2
    response = results(client, batch.error_file_id)["bad"]["response"]
    assert response["status_code"] == 400


def test_same_input_gives_the_same_answers_with_new_ids(client: OpenAI) -> None:
    first, second = (run(client, make_lines(5)) for _ in range(2))
    assert first.id != second.id
    both = [answers(client, batch) for batch in (first, second)]
    assert without_ids(both[0]) == without_ids(both[1])
    assert len({answer["id"] for batch in both for answer in batch.values()}) == 10


# Validation

GOOD = make_lines(1)[0]
WITHOUT_ONE_FIELD = [
    {name: value for name, value in GOOD.items() if name != missing} for missing in GOOD
]


@pytest.mark.parametrize(
    ("second", "code", "param"),
    [
        (b'{"custom_id": "a"', "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        *(
            (jsonl([request]), "missing_required_parameter", name)
            for name, request in zip(GOOD, WITHOUT_ONE_FIELD, strict=True)
        ),
        (jsonl([GOOD]), "duplicate_custom_id", "custom_id"),
        (
            jsonl([line("a", body("Hi"), "/v1/completions")]),
            "url_mismatch",
            "url",
        ),
        (jsonl([line("a", body("Hi", model="b"))]), "model_mismatch", "body.model"),
        (
            jsonl([line("a", body("Hi", stream=True))]),
            "invalid_request",
            "body.stream",
        ),
    ],
)
def test_batch_with_an_invalid_line_fails_and_names_line_and_field(
    client: OpenAI, second: bytes, code: str, param: str | None
) -> None:
    batch = wait_for(client, start(client, jsonl([GOOD]) + second), "failed")
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
def test_batch_with_no_lines_or_too_many_fails(
    client: OpenAI, content: bytes, code: str
) -> None:
    [error] = errors(wait_for(client, start(client, content), "failed"))
    assert (error.code, error.line, error.param) == (code, None, None)


def test_every_invalid_line_is_reported_with_its_line_number(client: OpenAI) -> None:
    content = b"\n" + jsonl([GOOD]) + b"\r\n" + b"[\n" + jsonl([GOOD]) + b"]"
    batch = wait_for(client, start(client, content), "failed")
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
def test_invalid_field_of_a_new_batch_gets_a_400_that_names_it(
    client: OpenAI, changed: Json, param: str
) -> None:
    fields: Any = {"endpoint": CHAT, "completion_window": "24h"} | changed
    fields.setdefault("input_file_id", upload(client, jsonl([GOOD])).id)
    with pytest.raises(openai.BadRequestError) as error:
        client.batches.create(**fields)
    assert error.value.param == param


def test_input_file_with_another_purpose_gets_a_400(client: OpenAI) -> None:
    file = upload(client, jsonl([GOOD]), "user_data")
    with pytest.raises(openai.BadRequestError) as error:
        client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
    assert error.value.param == "input_file_id"


def test_unknown_batch_is_not_found(client: OpenAI) -> None:
    for method in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="batch_none"):
            method("batch_none")


# Cancelling and expiry


def test_cancelled_batch_keeps_its_answers_and_lists_unfinished_requests(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=ALMOST_STOPPED)
    requests = make_lines(5)
    batch = wait_for(client, start(client, requests), "in_progress", min_completed=1)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at
    assert not cancelling.cancelled_at

    batch = wait_for(client, batch, "cancelled")
    assert batch.cancelled_at
    assert not batch.completed_at
    assert counts(batch) == (5, 1, 4)
    [first, *others] = requests
    assert without_ids(answers(client, batch)) == {
        first["custom_id"]: without_ids(ask_directly(client, first)[1])
    }
    unfinished = results(client, batch.error_file_id)
    assert [*unfinished] == [request["custom_id"] for request in others]
    codes = {result["error"]["code"] for result in unfinished.values()}
    assert codes == {"batch_cancelled"}
    assert not any(result["response"] for result in unfinished.values())


def test_batch_can_be_cancelled_before_it_starts(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=ALMOST_STOPPED)
    batch = start(client, make_lines(100))
    client.batches.cancel(batch.id)
    assert count_completed(wait_for(client, batch, "cancelled")) < 100


def test_batch_cancelled_during_validation_has_no_error_file(
    client: OpenAI, provider: Provider
) -> None:
    # An error file would list the lines, but they may not be requests at all.
    requests = jsonl(make_lines(batches.MAX_LINES - 1, EMBEDDINGS)) + b"{\n"
    batch = start(client, requests, EMBEDDINGS)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait_for(client, batch, "cancelled")
    assert not batch.in_progress_at
    assert not batch.error_file_id


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_batch_in_a_final_status_cannot_be_cancelled(
    client: OpenAI, provider: Provider, status: str
) -> None:
    if status == "cancelled":
        provider.configure(batch_speed=ALMOST_STOPPED)
    batch = start(client, b"{" if status == "failed" else jsonl(make_lines(2)))
    if status == "cancelled":
        client.batches.cancel(batch.id)
    batch = wait_for(client, batch, status)
    with pytest.raises(openai.ConflictError, match=status):
        client.batches.cancel(batch.id)
    assert client.batches.retrieve(batch.id) == batch


def test_expired_batch_lists_unfinished_requests_in_its_error_file(
    client: OpenAI, provider: Provider
) -> None:
    provider.configure(batch_speed=ALMOST_STOPPED, batch_window=1)
    requests = make_lines(5)
    batch = wait_for(client, start(client, requests), "expired")
    assert batch.expired_at
    assert not batch.completed_at
    answered = answers(client, batch)
    unfinished = results(client, batch.error_file_id)
    assert answered
    assert unfinished
    assert [*answered, *unfinished] == [request["custom_id"] for request in requests]
    for result in unfinished.values():
        assert result["response"] is None
        assert result["error"].keys() == {"code", "message"}
        assert result["error"]["code"] == "batch_expired"
    assert count_completed(batch) == len(answered)


# Speed and concurrency


def test_batch_speed_sets_how_long_a_batch_takes(
    client: OpenAI, provider: Provider
) -> None:
    def seconds(speed: float) -> float:
        provider.configure(batch_speed=speed)
        start = time.monotonic()
        run(client, make_lines(30))
        return time.monotonic() - start

    slow, fast = seconds(20), seconds(1e6)
    assert slow >= 29 / 20
    assert slow > 2 * fast


def test_concurrent_batches_are_independent(client: OpenAI, provider: Provider) -> None:
    provider.configure(batch_speed=ALMOST_STOPPED)
    requests = {CHAT: make_lines(10), EMBEDDINGS: make_lines(15, EMBEDDINGS)}
    pair = [start(client, lines, endpoint) for endpoint, lines in requests.items()]
    for batch in pair:
        wait_for(client, batch, "in_progress", min_completed=1)
    provider.configure(batch_speed=1e6)
    for batch, lines in zip(pair, requests.values(), strict=True):
        ended = wait_for(client, batch, "completed")
        assert without_ids(answers(client, ended)) == {
            request["custom_id"]: without_ids(ask_directly(client, request)[1])
            for request in lines
        }


def test_batches_are_listed_in_pages_newest_first(client: OpenAI) -> None:
    created = [run(client, make_lines(1)) for _ in range(5)]
    page = client.batches.list(limit=2)
    assert page.data == created[:2:-1]
    assert page.has_next_page()
    assert list(islice(page, 5)) == created[::-1]
    assert client.batches.list(after=created[4].id, limit=4).data == created[3::-1]


def test_batch_of_the_maximum_size_does_not_block_other_calls(
    client: OpenAI,
) -> None:
    requests = make_lines(batches.MAX_LINES, EMBEDDINGS, dimensions=1)
    # The client's first chat call is slow because it imports modules.
    client.chat.completions.create(**body("Hello"))
    batch = wait_for(client, start(client, requests, EMBEDDINGS), "in_progress")
    start_time, waits = time.monotonic(), []
    while batch.status == "in_progress":
        sent = time.monotonic()
        client.chat.completions.create(**body("Hello"))
        waits.append(time.monotonic() - sent)
        batch = client.batches.retrieve(batch.id)
    batch = wait_for(client, batch, "completed")
    assert count_completed(batch) == batches.MAX_LINES
    assert len(waits) > 10
    assert max(waits) < (time.monotonic() - start_time) / 4
    output = client.files.content(str(batch.output_file_id)).content
    assert output.count(b"\n") == batches.MAX_LINES

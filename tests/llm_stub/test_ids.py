"""Ids are unique and times are real; text, latency and faults stay repeatable."""

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from openai import DefaultHttpxClient, OpenAI
from openai.types import Batch

from helpers.connection import Provider
from llm_stub.plan import choose_pace
from llm_stub.settings import Settings
from tests.llm_stub.conftest import Json, finished_attempts, upload
from tests.llm_stub.test_abuse import wait_until
from tests.llm_stub.test_trusted_host import started_stub

ROUTES = {
    "completion": "/v1/completions",
    "chat": "/v1/chat/completions",
    "response": "/v1/responses",
    "embedding": "/v1/embeddings",
}
QUESTION = "What are the weather in Rome and the traffic in Oslo?"
PROMPTS: dict[str, Json] = {
    "completion": {"prompt": QUESTION},
    "chat": {"messages": [{"role": "user", "content": QUESTION}]},
    "response": {"input": QUESTION},
    "embedding": {"input": QUESTION, "dimensions": 2},
}
FUNCTIONS: list[Json] = [{"name": "get_weather"}, {"name": "get_traffic"}]
TOOLS = {"tools": [{"type": "function", "function": one} for one in FUNCTIONS]}
FLAT_TOOLS = {"tools": [{"type": "function", **one} for one in FUNCTIONS]}
# The options of a call, and how many different ids its answer has: the request's,
# the answer's, and those of its messages and function calls.
CALLS: list[tuple[str, Json, int]] = [
    ("completion", {}, 2),
    ("completion", {"n": 3}, 2),
    ("chat", {}, 2),
    ("chat", {"n": 3}, 2),
    ("chat", TOOLS, 2 + 2),
    ("chat", {"n": 3, **TOOLS}, 2 + 6),
    ("response", {}, 2 + 1),
    ("response", FLAT_TOOLS, 2 + 4),
    ("embedding", {}, 1),
]
CALLS += [
    (kind, {**options, "stream": True}, ids)
    for kind, options, ids in CALLS
    if kind != "embedding"
]
every_call = pytest.mark.parametrize(
    ("kind", "options", "ids"),
    CALLS,
    ids=["-".join([kind, *options]) for kind, options, _ in CALLS],
)

Answer = tuple[set[str], Any]


def split_ids(value: Any) -> Answer:
    """All ids at any depth, and the rest without them."""
    if isinstance(value, list):
        parts = [split_ids(one) for one in value]
        return set().union(*(ids for ids, _ in parts)), [rest for _, rest in parts]
    if not isinstance(value, dict):
        return set(), value
    ids, rest = set(), {}
    for name, field in value.items():
        if name in ("id", "call_id", "item_id"):
            ids.add(field)
        else:
            inner, rest[name] = split_ids(field)
            ids |= inner
    return ids, rest


@pytest.fixture
def ask(connections: DefaultHttpxClient) -> Callable[..., Answer]:
    """Make a call; returns the ids in its answer, and the rest of the answer."""

    def ask(stub: Provider, kind: str, options: Json) -> Answer:
        body = {"model": "m", **PROMPTS[kind], **options}
        response = connections.post(stub.url + ROUTES[kind], json=body)
        assert response.status_code == 200, response.text
        data = [
            line.removeprefix("data: ")
            for line in response.text.splitlines()
            if line.startswith("data: {")
        ]
        parts = [json.loads(part) for part in data or [response.text]]
        ids, rest = split_ids(parts)
        return ids | {response.headers["x-request-id"]}, rest

    return ask


@pytest.fixture(autouse=True)
def no_latency(provider: Provider) -> None:
    provider.configure(first_token=0, per_token=0)


@every_call
def test_identical_calls_get_identical_answers_with_different_ids(
    ask: Callable[..., Answer],
    provider: Provider,
    kind: str,
    options: Json,
    ids: int,
) -> None:
    answers = [ask(provider, kind, options) for _ in range(25)]
    with ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(ask, provider, kind, options) for _ in range(25)]
        answers += [future.result() for future in futures]
    assert {len(found) for found, _ in answers} == {ids}
    assert len(set.union(*(found for found, _ in answers))) == 50 * ids
    assert all(rest == answers[0][1] for _, rest in answers)


def test_restarted_stub_gives_the_same_answers_with_different_ids(
    ask: Callable[..., Answer],
) -> None:
    runs = []
    for _ in range(2):
        with started_stub() as stub:
            stub.configure(first_token=0, per_token=0)
            runs.append([ask(stub, kind, options) for kind, options, _ in CALLS])
    for (ids, rest), (other_ids, other_rest) in zip(*runs, strict=True):
        assert ids.isdisjoint(other_ids)
        assert rest == other_rest


def test_failed_requests_have_different_ids(
    provider: Provider, connections: DefaultHttpxClient
) -> None:
    responses = [
        connections.post(f"{provider.url}{path}", content=b"nonsense")
        for path in ("/v1/completions", "/v1/nothing")
        for _ in range(5)
    ]
    assert len({one.headers["x-request-id"] for one in responses}) == 10


@pytest.mark.parametrize(
    ("options", "id_of"),
    [
        ({"use_responses_api": True}, lambda vote: vote.id),
        ({}, lambda vote: vote.response_metadata["id"]),
        ({}, lambda vote: vote.tool_calls[0]["id"]),
        ({"use_responses_api": True}, lambda vote: vote.tool_calls[0]["id"]),
    ],
    ids=["response", "chat", "chat with tools", "response with tools"],
)
def test_five_answers_to_one_prompt_are_still_five_when_merged_by_id(
    options: Json, id_of: Callable[[Any], str], request: pytest.FixtureRequest
) -> None:
    llm: Any = ChatOpenAI(model="m", timeout=30, **options)
    if "tools" in request.node.name:
        llm = llm.bind_tools(TOOLS["tools"])
    votes = llm.batch([QUESTION] * 5)
    assert len({id_of(vote): vote for vote in votes}) == 5


# Files and batches


DAY = 86_400
LINE = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
LINES = json.dumps({**LINE, "body": {"model": "m", **PROMPTS["chat"]}}).encode()


@pytest.fixture
def finished_batch(client: OpenAI, provider: Provider) -> Callable[[], Batch]:
    """Run a batch with the same lines each time; returns the completed batch."""
    provider.configure(batch_speed=1e6)

    def make() -> Batch:
        file = upload(client, LINES)
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
        wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
        return client.batches.retrieve(batch.id)

    return make


def test_identical_files_and_batches_have_different_ids(
    client: OpenAI, finished_batch: Callable[[], Batch]
) -> None:
    ids: list[str] = []
    for batch in (finished_batch(), finished_batch()):
        assert batch.output_file_id
        [line] = client.files.content(batch.output_file_id).text.splitlines()
        found, _ = split_ids(json.loads(line))
        ids += [batch.id, batch.input_file_id, batch.output_file_id, *found]
        ids.append(json.loads(line)["response"]["request_id"])
    assert len(set(ids)) == len(ids) == 2 * 6


def test_files_and_batches_have_real_timestamps(
    client: OpenAI, finished_batch: Callable[[], Batch]
) -> None:
    before: Any = int(time.time())
    batch = finished_batch()
    file = client.files.retrieve(batch.input_file_id)
    after = time.time()
    assert file.expires_at == file.created_at + 30 * DAY
    assert batch.expires_at == batch.created_at + DAY
    moments = [before, file.created_at, batch.created_at, batch.in_progress_at]
    moments += [batch.finalizing_at, batch.completed_at, after]
    assert moments == sorted(moments)
    assert upload(client, LINES, "user_data").expires_at is None


def test_newest_files_and_batches_come_first(
    client: OpenAI, finished_batch: Callable[[], Batch]
) -> None:
    batches = [finished_batch() for _ in range(3)]
    cases: list[tuple[Iterable[Any], list[str]]] = [
        (client.batches.list(), [batch.id for batch in batches]),
        (client.files.list(purpose="batch"), [one.input_file_id for one in batches]),
    ]
    for listed, expected in cases:
        newest = list(listed)[:3]
        assert [one.id for one in newest] == expected[::-1]
        times = [one.created_at for one in newest]
        assert times == sorted(times, reverse=True)
        assert times[-1] > time.time() - 60


# What stays repeatable


def test_latency_of_a_prompt_does_not_depend_on_earlier_calls(
    client: OpenAI, provider: Provider
) -> None:
    changes: Json = {"first_token": 0.2, "jitter": 1, "per_token": 0, "seed": 3}
    provider.configure(**changes)
    settings, prompts = Settings(**changes), [f"Prompt {i}" for i in range(8)]

    def call(prompt: str) -> None:
        client.completions.create(model="m", prompt=prompt)

    for _ in range(3):
        with ThreadPoolExecutor(8) as executor:
            list(executor.map(call, prompts))
        call("Another prompt")
    attempts = finished_attempts(provider)
    assert len({entry["request_id"] for entry in attempts}) == len(attempts)
    for prompt in prompts:
        planned = choose_pace(settings, prompt, attempt=1).first_token
        waits = [
            entry["first_byte"] - entry["arrival"]
            for entry in attempts
            if entry["prompt"] == prompt
        ]
        assert len(waits) == 3
        assert min(waits) == pytest.approx(planned, abs=0.1)
        assert min(waits) >= planned - 0.002


def test_faults_of_a_prompt_depend_on_its_try_and_not_on_other_prompts(
    client: OpenAI, provider: Provider, connections: DefaultHttpxClient
) -> None:
    settings: Json = {"faults": {"error_500": 0.3, "error_503": 0.3}}

    def statuses(prompts: list[str]) -> dict[str, list[int]]:
        """The status of the first, second and third try of each prompt."""
        provider.configure(**settings)
        url = f"{provider.url}/v1/completions"
        found: dict[str, list[int]] = {prompt: [] for prompt in prompts}
        for prompt in prompts * 3:
            body = {"model": "m", "prompt": prompt, "max_tokens": 1}
            found[prompt].append(connections.post(url, json=body).status_code)
        return found

    prompts = [f"Prompt {i}" for i in range(10)]
    first = statuses(prompts)
    assert {status for tries in first.values() for status in tries} == {200, 500, 503}
    again = statuses(["Another prompt", *prompts[::-1]])
    assert {prompt: again[prompt] for prompt in prompts} == first

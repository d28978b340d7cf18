"""The batch job of lesson 12: killed, disconnected, cancelled, expired, very large.

These tests run the lesson's own code: its cells with the tags `batch`,
`request`, `missing` and `split`.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import openai
import pytest
from langchain_openai import ChatOpenAI
from openai.types import Batch

from helpers import Timeline
from helpers.connection import Provider

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "12_let_the_provider_do_it.ipynb"
TIMEOUT = 120.0  # seconds for any one step, even on a busy machine
FAST_POLLING = {"delay": 0.02, "longest": 0.2}
STALLED = 0.001  # lines per second: the first is answered, the second much later
MAX_LINES, MAX_BYTES = 50_000, 200_000_000  # per file, as documented by OpenAI
UPLOAD, CREATE = "POST /v1/files", "POST /v1/batches"

Lesson = dict[str, Any]

linux_only = pytest.mark.skipif(
    sys.platform != "linux",
    reason="reads peak memory from /proc, as on Linux",
)


def lesson_source(*tags: str) -> str:
    """The source of all cells of the lesson with any of these tags."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    tagged = [
        cell.source
        for cell in cells
        if set(tags).intersection(cell.metadata.get("tags", []))
    ]
    assert tagged
    return "\n\n\n".join(tagged)


@pytest.fixture
async def lesson(provider: Provider) -> AsyncIterator[Lesson]:
    """The names that the cells define, with a client for this test's event loop."""
    provider.configure(first_token=0, per_token=0, batch_speed=1e6)
    names: Lesson = {"llm": ChatOpenAI()}
    exec(lesson_source("batch", "request", "missing", "split"), names)
    yield names
    await names["client"].close()


Write = Callable[..., Path]


@pytest.fixture
def write(lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write an input file. The ids contain its name, so each test has its own job."""
    monkeypatch.chdir(tmp_path)

    def write(count: int = 10, name: str = tmp_path.name, **options: Any) -> Path:
        path = tmp_path / f"{name}.jsonl"
        with path.open("wb") as file:
            for n in range(count):
                line = lesson["request"](f"{name}-{n}", f"Question {n}", **options)
                file.write(line)
        return path

    return write


def ids(path: Path) -> set[str]:
    return {json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()}


async def wait_for_end(lesson: Lesson, batch: Batch) -> Batch:
    async with asyncio.timeout(TIMEOUT):
        ended: Batch = await lesson["finished"](batch.id, **FAST_POLLING)
        return ended


async def run_job(lesson: Lesson, path: Path) -> tuple[Batch, Any, Any]:
    """Submit, wait and collect, like the lesson's own `run`."""
    batch = await wait_for_end(lesson, await lesson["submit"](path))
    return batch, *await lesson["collect"](batch)


async def wait_for_first_answer(lesson: Lesson, batch: Batch) -> None:
    async with asyncio.timeout(TIMEOUT):
        while batch.request_counts and not batch.request_counts.completed:
            batch = await lesson["client"].batches.retrieve(batch.id)


async def run_until(
    status: str, lesson: Lesson, provider: Provider, path: Path
) -> Batch:
    """Submit a batch that is cancelled or expires after its first answer."""
    window = 1 if status == "expired" else 60
    with provider.behaving(batch_speed=STALLED, batch_window=window):
        batch = await lesson["submit"](path)
        if status == "cancelled":
            await wait_for_first_answer(lesson, batch)
            await lesson["client"].batches.cancel(batch.id)
        batch = await wait_for_end(lesson, batch)
    assert batch.status == status
    return batch


async def batches_for(lesson: Lesson, path: Path) -> list[Batch]:
    """All batches that the stub has for this file, newest first."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = [batch async for batch in lesson["client"].batches.list()]
    return [batch for batch in listed if batch.metadata == {"job": digest}]


def posts(run: Timeline) -> list[str]:
    """The POST requests to files and batches; polling uses GET."""
    return [one.prompt for one in run.journal if one.prompt.startswith("POST")]


# Request lines


async def test_body_of_a_request_line_is_what_chatopenai_sends(lesson: Lesson) -> None:
    sent: list[Any] = []

    def record(request: Any) -> None:
        sent.append(json.loads(request.read()))

    with openai.DefaultHttpxClient(event_hooks={"request": [record]}) as connections:
        llm = ChatOpenAI(http_client=connections, temperature=0.5)
        llm.invoke("Who wrote Hamlet?")

    line = json.loads(lesson["request"]("a", "Who wrote Hamlet?", temperature=0.5))
    assert line["body"] | {"stream": False} == sent[0]
    assert line["url"] == "/v1/chat/completions"


async def test_batch_answers_equal_live_answers(lesson: Lesson, write: Write) -> None:
    path = write(5)

    _, answers, errors = await run_job(lesson, path)

    # Not abatch: LangChain would keep connections that belong to this event loop.
    live = lesson["llm"].batch([f"Question {n}" for n in range(5)])
    expected = {f"{path.stem}-{n}": live[n].content for n in range(5)}
    assert (answers, errors) == (expected, {})


# Polling


async def test_polling_slows_down_up_to_a_maximum_interval(lesson: Lesson) -> None:
    states = ["validating"] + ["in_progress"] * 14 + ["finalizing", "completed"]
    waits: list[float] = []

    async def retrieve(batch_id: str) -> Any:
        return SimpleNamespace(id=batch_id, status=states.pop(0))

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    lesson["client"] = SimpleNamespace(
        batches=SimpleNamespace(retrieve=retrieve), close=lesson["client"].close
    )
    lesson["asyncio"] = SimpleNamespace(sleep=sleep)

    batch = await lesson["finished"]("batch_1")

    assert (batch.status, states) == ("completed", [])
    assert waits[:3] == [10, 15, 22.5]
    assert waits == sorted(waits)
    assert waits[-1] == 600


# Killed and resumed

MAIN = """
async def main(path):
    batch = await submit(path)
    print(batch.id, flush=True)
    batch = await finished(batch.id, delay=0.02, longest=0.2)
    print(batch.status, flush=True)
    answers, errors = await collect(batch)
    print(len(answers), len(errors), flush=True)

asyncio.run(main(sys.argv[1]))
"""
STOP_AFTER_UPLOAD = """
upload = client.files.create

async def upload_and_wait(**options):
    await upload(**options)
    print("uploaded", flush=True)
    await asyncio.Event().wait()  # until the test kills this process

client.files.create = upload_and_wait
"""
STOP_BEFORE_RENAME = """
import threading

def replace(path, target):
    print("downloaded", flush=True)
    threading.Event().wait()  # until the test kills this process

Path.replace = replace
"""


def start(path: Path, patch: str = "") -> subprocess.Popen[str]:
    program = path.with_name("batch.py")
    program.write_text(lesson_source("batch") + patch + MAIN)
    return subprocess.Popen(
        [sys.executable, str(program), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=path.parent,
    )


def read_output(child: subprocess.Popen[str], kill_at: str | None = None) -> list[str]:
    """Return the lines that it prints.

    Kills it at the first line that starts with `kill_at`.
    """
    watchdog = threading.Timer(TIMEOUT, child.kill)
    watchdog.start()
    printed = []
    with child:
        assert child.stdout is not None
        for line in child.stdout:
            printed.append(line.strip())
            if kill_at is not None and printed[-1].startswith(kill_at):
                child.kill()
    watchdog.cancel()
    if os.name != "nt":
        assert child.returncode == (0 if kill_at is None else -signal.SIGKILL)
    return printed


async def test_job_killed_after_creating_its_batch_resumes_that_batch(
    lesson: Lesson, write: Write, provider: Provider
) -> None:
    path = write()
    provider.configure(batch_speed=STALLED)

    with Timeline("killed") as killed:
        printed = read_output(start(path), kill_at="batch_")
    provider.configure(batch_speed=1e6)
    with Timeline("resumed") as resumed:
        printed_again = read_output(start(path))

    assert posts(killed) == [UPLOAD, CREATE]
    assert posts(resumed) == []
    assert printed_again == [*printed, "completed", "10 0"]
    assert len(await batches_for(lesson, path)) == 1


async def test_job_killed_between_upload_and_create_repeats_only_the_upload(
    lesson: Lesson, write: Write
) -> None:
    path = write()

    with Timeline("killed") as killed:
        read_output(start(path, STOP_AFTER_UPLOAD), kill_at="uploaded")
    assert await batches_for(lesson, path) == []
    with Timeline("resumed") as resumed:
        printed_again = read_output(start(path))

    assert posts(killed) == [UPLOAD]
    assert posts(resumed) == [UPLOAD, CREATE]
    assert printed_again[1:] == ["completed", "10 0"]
    assert len(await batches_for(lesson, path)) == 1


async def test_job_killed_during_download_leaves_no_partial_file_and_resumes(
    lesson: Lesson, write: Write
) -> None:
    path = write()

    read_output(start(path, STOP_BEFORE_RENAME), kill_at="downloaded")
    [batch] = await batches_for(lesson, path)
    assert not path.with_name(f"{batch.output_file_id}.jsonl").exists()
    with Timeline("resumed") as resumed:
        printed_again = read_output(start(path))

    assert posts(resumed) == []
    assert printed_again == [batch.id, "completed", "10 0"]


class LoseFirstCreateResponse(openai.DefaultAsyncHttpxClient):
    """Drops the response to the first create request, after the stub has handled it."""

    lost = False

    async def send(self, request: Any, **options: Any) -> Any:
        response = await super().send(request, **options)
        if not self.lost and f"{request.method} {request.url.path}" == CREATE:
            self.lost = True
            await response.aclose()
            # The SDK retries only errors of the HTTP library that it uses: httpx, or
            # httpx2 since openai 3.
            http = import_module(type(request).__module__.partition(".")[0])
            raise http.ReadError("response lost", request=request)
        return response


async def test_lost_create_response_does_not_lead_to_a_second_batch(
    lesson: Lesson, write: Write
) -> None:
    path = write()
    await lesson["client"].close()
    lesson["client"] = openai.AsyncOpenAI(http_client=LoseFirstCreateResponse())

    with pytest.raises(openai.APIConnectionError):
        await lesson["submit"](path)
    batch, answers, _ = await run_job(lesson, path)

    assert len(answers) == 10
    assert await batches_for(lesson, path) == [batch]


async def test_sdk_retries_alone_would_create_the_batch_twice(
    lesson: Lesson, write: Write
) -> None:
    path = write()
    async with openai.AsyncOpenAI(http_client=LoseFirstCreateResponse()) as client:
        file = await client.files.create(file=path, purpose="batch")
        with Timeline("created twice") as run:
            await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )

    assert posts(run) == [CREATE, CREATE]


async def test_job_is_identified_by_the_files_content_and_not_its_name(
    lesson: Lesson, write: Write
) -> None:
    path = write()
    first, *_ = await run_job(lesson, path)

    same = await lesson["submit"](path.rename(path.with_name("moved.jsonl")))
    other = await lesson["submit"](write(temperature=0.5))

    assert same.id == first.id
    assert other.id != first.id


# Every line ends as an answer or an error


async def test_every_line_of_a_completed_batch_is_an_answer_or_an_error(
    lesson: Lesson, write: Write
) -> None:
    path, bad = write(30), {3, 4, 17, 29}
    lines = path.read_bytes().splitlines(keepends=True)
    for n in bad:
        lines[n] = lesson["request"](f"{path.stem}-{n}", "Who?", max_tokens=0)
    path.write_bytes(b"".join(lines))

    batch, answers, errors = await run_job(lesson, path)

    assert batch.status == "completed"
    assert errors.keys() == {f"{path.stem}-{n}" for n in bad}
    assert {error["status_code"] for error in errors.values()} == {400}
    assert answers.keys() == ids(path) - errors.keys()


@pytest.mark.parametrize("status", ["cancelled", "expired"])
async def test_unfinished_lines_of_a_cancelled_or_expired_batch_are_errors(
    lesson: Lesson, write: Write, provider: Provider, status: str
) -> None:
    path = write()

    batch = await run_until(status, lesson, provider, path)
    answers, errors = await lesson["collect"](batch)

    assert {error["code"] for error in errors.values()} == {f"batch_{status}"}
    assert 0 < len(answers) < 10
    assert not answers.keys() & errors.keys()
    assert answers.keys() | errors.keys() == ids(path)


@pytest.mark.parametrize("status", ["cancelled", "expired"])
async def test_only_the_missing_lines_of_an_unfinished_batch_are_rerun(
    lesson: Lesson, write: Write, provider: Provider, status: str
) -> None:
    path = write()
    batch = await run_until(status, lesson, provider, path)
    answers, _ = await lesson["collect"](batch)
    rest = path.with_name("rest.jsonl")
    rest.write_bytes(b"".join(lesson["missing"](path, answers)))

    _, more, _ = await run_job(lesson, rest)

    assert ids(rest) == ids(path) - answers.keys()
    assert more.keys() == ids(rest)
    assert len(answers | more) == 10


async def test_missing_is_empty_when_every_line_has_an_answer(
    lesson: Lesson, write: Write
) -> None:
    path = write(3)
    _, answers, _ = await run_job(lesson, path)
    assert list(lesson["missing"](path, answers)) == []


async def test_cancelled_batch_with_answers_is_reused(
    lesson: Lesson, write: Write, provider: Provider
) -> None:
    path = write()
    with provider.behaving(batch_speed=STALLED):
        batch = await lesson["submit"](path)
        await wait_for_first_answer(lesson, batch)
        await lesson["client"].batches.cancel(batch.id)
        await wait_for_end(lesson, batch)

    assert (await lesson["submit"](path)).id == batch.id


async def test_completed_batch_without_any_answer_is_replaced_by_a_new_one(
    lesson: Lesson, write: Write
) -> None:
    path = write(2, max_tokens=0)
    first, answers, errors = await run_job(lesson, path)
    assert (answers, errors.keys()) == ({}, ids(path))

    second = await lesson["submit"](path)

    assert second.id != first.id


async def test_file_that_fails_validation_yields_no_answers_and_no_errors(
    lesson: Lesson, write: Write
) -> None:
    path = write(2)
    path.write_bytes(path.read_bytes() * 2)

    batch, answers, errors = await run_job(lesson, path)

    assert batch.status == "failed"
    assert batch.errors
    reported = [(error.line, error.code) for error in batch.errors.data or []]
    assert reported == [(3, "duplicate_custom_id"), (4, "duplicate_custom_id")]
    assert (answers, errors) == ({}, {})


@pytest.mark.parametrize(
    ("response", "error", "expected"),
    [
        ({"status_code": 500, "body": {}}, None, {"status_code": 500, "body": {}}),
        ({"status_code": 0, "body": None}, None, {"status_code": 0, "body": None}),
        (None, {"code": "batch_expired"}, {"code": "batch_expired"}),
        (None, None, {}),
    ],
)
async def test_any_result_without_status_200_is_an_error(
    lesson: Lesson, tmp_path: Path, response: Any, error: Any, expected: Any
) -> None:
    path = tmp_path / "output.jsonl"
    line = {"custom_id": "a", "response": response, "error": error}
    path.write_text(json.dumps(line) + "\n")

    assert list(lesson["read"](path)) == [("a", None, expected)]


# Splitting a large file


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    names: Lesson = {"Path": Path}
    exec(lesson_source("split"), names)
    return names["split"]


def random_lines(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [b"x" * rng.randint(0, 20) + b"\n" for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_full_within_both_limits_and_add_up_to_the_input(
    split: Any, seed: int
) -> None:
    rng, whole = random.Random(seed), random_lines(100, seed)
    max_lines, max_bytes = rng.randint(1, 20), rng.randint(21, 150)

    parts = [path.read_bytes() for path in split(whole, "part", max_lines, max_bytes)]

    assert b"".join(parts) == b"".join(whole)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert 0 < len(part) <= max_bytes
        assert part.count(b"\n") <= max_lines
        if following is not None:  # the next line would not have fit
            larger = part + following[: following.index(b"\n") + 1]
            assert len(larger) > max_bytes or larger.count(b"\n") > max_lines


def test_lines_that_just_fit_stay_in_one_part(split: Any) -> None:
    whole = [b"12345678\n"] * 4
    assert len(list(split(whole, "lines", most_lines=4))) == 1
    assert len(list(split(whole, "bytes", most_bytes=36))) == 1
    assert len(list(split(whole, "more", most_bytes=35))) == 2


def test_empty_input_has_no_parts(split: Any) -> None:
    assert list(split([], "part")) == []


def test_last_line_without_a_newline_is_kept(split: Any) -> None:
    paths = list(split([b"a\n", b"b\n", b"c"], "part", most_lines=2))
    assert [path.read_bytes() for path in paths] == [b"a\nb\n", b"c"]


def test_line_above_the_size_limit_raises_an_error_that_quotes_it(split: Any) -> None:
    whole = [b"1\n", b'{"custom_id": "long"' + b"x" * 100]

    with pytest.raises(
        ValueError, match=r'^120 bytes .*"custom_id": "long"x+'
    ) as error:
        list(split(whole, "part", most_bytes=100))

    assert len(str(error.value)) < 120


def test_default_limits_are_the_ones_openai_documents(split: Any) -> None:
    assert split.__defaults__ == (MAX_LINES, MAX_BYTES)


# Not getrusage(): a child process starts with the peak of its parent.
PEAK = """
import re

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""
BUILD = (
    PEAK
    + """
class llm:
    model_name = "some-model"

list(split((request(str(n), "warm up") for n in range(9)), "warm"))
before = peak()
count = int(sys.argv[1])
whole = Path("whole.jsonl")
with whole.open("wb") as file:
    file.writelines(request(f"n-{n}", f"Question {n}") for n in range(count))
with whole.open("rb") as file:
    paths = [str(path) for path in split(file, "part")]
print(json.dumps([peak() - before, paths]))
"""
)


@linux_only
def test_building_and_splitting_120_000_requests_uses_little_memory(
    tmp_path: Path,
) -> None:
    program = tmp_path / "build.py"
    # `split` needs the imports of the first cell, which also builds a client.
    program.write_text(lesson_source("batch", "request", "split") + BUILD)
    environ = {**os.environ, "OPENAI_API_KEY": "none"}

    result = subprocess.run(
        [sys.executable, str(program), "120000"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environ,
    )

    assert result.stderr == ""
    growth, paths = json.loads(result.stdout)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    parts = [(tmp_path / path).read_bytes() for path in paths]
    assert len(whole) > 20_000_000
    assert growth < 2_000_000
    assert [part.count(b"\n") for part in parts] == [MAX_LINES, MAX_LINES, 20_000]
    assert b"".join(parts) == whole


RUN = (
    PEAK
    + """
async def work(path):
    batch = await submit(path)
    batch = await finished(batch.id, delay=0.1, longest=1)
    await download(batch.output_file_id, f"{path}.answers")
    last = None
    for number, (id, body, error) in enumerate(read(f"{path}.answers")):
        assert body and not error and id != last
        last = id
    return number + 1

async def main(small, *paths):
    await work(small)
    before = peak()
    counts = [await work(path) for path in paths]
    print(json.dumps([peak() - before, counts]))

asyncio.run(main(*sys.argv[1:]))
"""
)


@linux_only
async def test_running_a_job_of_50_001_lines_does_not_load_it_into_memory(
    lesson: Lesson, write: Write, split: Any, tmp_path: Path
) -> None:
    small, large = write(10, "small"), write(MAX_LINES + 1, "large")
    with large.open("rb") as file:
        paths = list(split(file, "part"))
    program = tmp_path / "run.py"
    program.write_text(lesson_source("batch") + RUN)

    child = await asyncio.create_subprocess_exec(
        *(sys.executable, program, small, *paths),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    out, errors = await asyncio.wait_for(child.communicate(), TIMEOUT)

    assert errors == b""
    growth, counts = json.loads(out)
    downloads: Iterator[Path] = tmp_path.glob("part-*.answers")
    assert counts == [MAX_LINES, 1]
    assert sum(path.stat().st_size for path in downloads) > 40_000_000
    assert growth < 15_000_000
    answered = set()
    for path in tmp_path.glob("part-*.answers"):
        answered |= {id for id, _, _ in lesson["read"](path)}
    assert answered == ids(large)

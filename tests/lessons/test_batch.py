"""The batches of lesson 12: killed, cut off, cancelled, expired, and 50,001 lines.

What runs is the lesson's own code: its cells with the tags `batch`, `request`,
`missing` and `split`.
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
PATIENCE = 120.0  # seconds that anything may take on a busy machine
QUICK = {"delay": 0.02, "longest": 0.2}
BARELY = 0.001  # lines a second: the first is answered, and then none for long
MOST_LINES, MOST_BYTES = 50_000, 200_000_000  # of one file, as OpenAI documents it

Lesson = dict[str, Any]

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process its own peak"
)


def source(*tags: str) -> str:
    """The lesson's cells with one of these tags, one below another."""
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
    """What the cells define, with a client of this test's own loop."""
    provider.configure(first_token=0, per_token=0, batch_speed=1e6)
    names: Lesson = {"llm": ChatOpenAI()}
    exec(source("batch", "request", "missing", "split"), names)
    yield names
    await names["client"].close()


Write = Callable[..., Path]


@pytest.fixture
def write(lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a job's file; its name keeps the ids and so the digest its own."""
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


async def finished(lesson: Lesson, batch: Batch) -> Batch:
    async with asyncio.timeout(PATIENCE):
        ended: Batch = await lesson["finished"](batch.id, **QUICK)
        return ended


async def ran(lesson: Lesson, path: Path) -> tuple[Batch, Any, Any]:
    """Submit, wait and collect, as the lesson's own `run` does."""
    batch = await finished(lesson, await lesson["submit"](path))
    return batch, *await lesson["collect"](batch)


async def begun(lesson: Lesson, batch: Batch) -> None:
    async with asyncio.timeout(PATIENCE):
        while batch.request_counts and not batch.request_counts.completed:
            batch = await lesson["client"].batches.retrieve(batch.id)


async def ended_early(
    lesson: Lesson, provider: Provider, path: Path, end: str
) -> Batch:
    """Submit a batch that is cancelled, or expires, after its first answer."""
    window = 1 if end == "expired" else 60
    with provider.behaving(batch_speed=BARELY, batch_window=window):
        batch = await lesson["submit"](path)
        if end == "cancelled":
            await begun(lesson, batch)
            await lesson["client"].batches.cancel(batch.id)
        batch = await finished(lesson, batch)
    assert batch.status == end
    return batch


async def orders(lesson: Lesson, path: Path) -> list[Batch]:
    """All batches for this file that the provider knows, the newest first."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = [batch async for batch in lesson["client"].batches.list()]
    return [batch for batch in listed if batch.metadata == {"job": digest}]


def posts(run: Timeline) -> list[str]:
    """What was sent to files and batches that is more than a question."""
    return [one.prompt for one in run.journal if one.prompt.startswith("POST")]


UPLOAD, ORDER = "POST /v1/files", "POST /v1/batches"


# What a line holds


async def test_a_lines_body_is_what_langchains_client_sends(lesson: Lesson) -> None:
    sent: list[Any] = []

    def keep(request: Any) -> None:
        sent.append(json.loads(request.read()))

    with openai.DefaultHttpxClient(event_hooks={"request": [keep]}) as connections:
        llm = ChatOpenAI(http_client=connections, temperature=0.5)
        llm.invoke("Who wrote Hamlet?")

    line = json.loads(lesson["request"]("a", "Who wrote Hamlet?", temperature=0.5))
    assert line["body"] | {"stream": False} == sent[0]
    assert line["url"] == "/v1/chat/completions"


async def test_the_answers_are_the_live_ones(lesson: Lesson, write: Write) -> None:
    path = write(5)

    _, answers, errors = await ran(lesson, path)

    # Not abatch: LangChain would keep its connections, which belong to this loop.
    live = lesson["llm"].batch([f"Question {n}" for n in range(5)])
    expected = {f"{path.stem}-{n}": live[n].content for n in range(5)}
    assert (answers, errors) == (expected, {})


# Polling


async def test_it_asks_less_and_less_often_up_to_a_bound(lesson: Lesson) -> None:
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


# Killed

LAST_LINES = """
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
    await asyncio.Event().wait()

client.files.create = upload_and_wait
"""
STOP_IN_DOWNLOAD = """
real_replace = Path.replace

def replace(path, target):
    print("downloaded", flush=True)
    import threading
    threading.Event().wait()

Path.replace = replace
"""


def start(path: Path, change: str = "") -> subprocess.Popen[str]:
    program = path.with_name("batch.py")
    program.write_text(source("batch") + change + LAST_LINES)
    return subprocess.Popen(
        [sys.executable, str(program), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=path.parent,
    )


def lines_of(child: subprocess.Popen[str], last: str | None = None) -> list[str]:
    """What it prints, to its end or until it is killed at the line `last`."""
    too_late = threading.Timer(PATIENCE, child.kill)
    too_late.start()
    printed = []
    with child:
        assert child.stdout is not None
        for line in child.stdout:
            printed.append(line.strip())
            if last is not None and printed[-1].startswith(last):
                child.kill()
    too_late.cancel()
    if os.name != "nt":
        assert child.returncode == (0 if last is None else -signal.SIGKILL)
    return printed


async def test_who_is_killed_after_the_order_is_followed_by_one_who_finds_it(
    lesson: Lesson, write: Write, provider: Provider
) -> None:
    path = write()
    provider.configure(batch_speed=BARELY)

    with Timeline("killed") as killed:
        printed = lines_of(start(path), last="batch_")
    provider.configure(batch_speed=1e6)
    with Timeline("gone on") as gone_on:
        again = lines_of(start(path))

    assert posts(killed) == [UPLOAD, ORDER]
    assert posts(gone_on) == []
    assert again == [*printed, "completed", "10 0"]
    assert len(await orders(lesson, path)) == 1


async def test_a_kill_between_upload_and_order_costs_a_second_upload_and_no_more(
    lesson: Lesson, write: Write
) -> None:
    path = write()

    with Timeline("killed") as killed:
        lines_of(start(path, STOP_AFTER_UPLOAD), last="uploaded")
    assert await orders(lesson, path) == []
    with Timeline("gone on") as gone_on:
        again = lines_of(start(path))

    assert posts(killed) == [UPLOAD]
    assert posts(gone_on) == [UPLOAD, ORDER]
    assert again[1:] == ["completed", "10 0"]
    assert len(await orders(lesson, path)) == 1


async def test_a_kill_in_the_download_leaves_no_half_file_and_orders_nothing_again(
    lesson: Lesson, write: Write
) -> None:
    path = write()

    lines_of(start(path, STOP_IN_DOWNLOAD), last="downloaded")
    [batch] = await orders(lesson, path)
    assert not path.with_name(f"{batch.output_file_id}.jsonl").exists()
    with Timeline("gone on") as gone_on:
        again = lines_of(start(path))

    assert posts(gone_on) == []
    assert again == [batch.id, "completed", "10 0"]


class Lossy(openai.DefaultAsyncHttpxClient):
    """Loses the answer to the first order: the provider has it, we do not know."""

    lost = False

    async def send(self, request: Any, **options: Any) -> Any:
        response = await super().send(request, **options)
        if not self.lost and f"{request.method} {request.url.path}" == ORDER:
            self.lost = True
            await response.aclose()
            # httpx or, from openai 3 on, httpx2: the SDK retries its own errors only.
            http = import_module(type(request).__module__.partition(".")[0])
            raise http.ReadError("lost", request=request)
        return response


async def test_an_order_whose_answer_is_lost_is_found_and_not_placed_again(
    lesson: Lesson, write: Write
) -> None:
    path = write()
    await lesson["client"].close()
    lesson["client"] = openai.AsyncOpenAI(http_client=Lossy())

    with pytest.raises(openai.APIConnectionError):
        await lesson["submit"](path)
    batch, answers, _ = await ran(lesson, path)

    assert len(answers) == 10
    assert await orders(lesson, path) == [batch]


async def test_with_the_sdks_own_retries_it_would_be_placed_twice(
    lesson: Lesson, write: Write
) -> None:
    path = write()
    async with openai.AsyncOpenAI(http_client=Lossy()) as client:
        file = await client.files.create(file=path, purpose="batch")
        with Timeline("orders") as run:
            await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )

    assert posts(run) == [ORDER, ORDER]


async def test_another_content_is_another_job_and_another_name_is_not(
    lesson: Lesson, write: Write
) -> None:
    path = write()
    first, *_ = await ran(lesson, path)

    same = await lesson["submit"](path.rename(path.with_name("moved.jsonl")))
    other = await lesson["submit"](write(temperature=0.5))

    assert same.id == first.id
    assert other.id != first.id


# Every line is accounted for


async def test_of_a_completed_batch_each_line_is_an_answer_or_an_error(
    lesson: Lesson, write: Write
) -> None:
    path, bad = write(30), {3, 4, 17, 29}
    lines = path.read_bytes().splitlines(keepends=True)
    for n in bad:
        lines[n] = lesson["request"](f"{path.stem}-{n}", "Who?", max_tokens=0)
    path.write_bytes(b"".join(lines))

    batch, answers, errors = await ran(lesson, path)

    assert batch.status == "completed"
    assert errors.keys() == {f"{path.stem}-{n}" for n in bad}
    assert {error["status_code"] for error in errors.values()} == {400}
    assert answers.keys() == ids(path) - errors.keys()


@pytest.mark.parametrize("end", ["cancelled", "expired"])
async def test_at_a_bad_end_the_unfinished_lines_are_named(
    lesson: Lesson, write: Write, provider: Provider, end: str
) -> None:
    path = write()

    batch = await ended_early(lesson, provider, path, end)
    answers, errors = await lesson["collect"](batch)

    assert {error["code"] for error in errors.values()} == {f"batch_{end}"}
    assert 0 < len(answers) < 10
    assert not answers.keys() & errors.keys()
    assert answers.keys() | errors.keys() == ids(path)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
async def test_what_is_missing_at_a_bad_end_is_run_again_and_nothing_else(
    lesson: Lesson, write: Write, provider: Provider, end: str
) -> None:
    path = write()
    batch = await ended_early(lesson, provider, path, end)
    answers, _ = await lesson["collect"](batch)
    rest = path.with_name("rest.jsonl")
    rest.write_bytes(b"".join(lesson["missing"](path, answers)))

    _, more, _ = await ran(lesson, rest)

    assert ids(rest) == ids(path) - answers.keys()
    assert more.keys() == ids(rest)
    assert len(answers | more) == 10


async def test_nothing_is_missing_where_all_is_answered(
    lesson: Lesson, write: Write
) -> None:
    path = write(3)
    _, answers, _ = await ran(lesson, path)
    assert list(lesson["missing"](path, answers)) == []


async def test_a_batch_that_ended_with_answers_is_not_ordered_again(
    lesson: Lesson, write: Write, provider: Provider
) -> None:
    path = write()
    with provider.behaving(batch_speed=BARELY):
        batch = await lesson["submit"](path)
        await begun(lesson, batch)
        await lesson["client"].batches.cancel(batch.id)
        await finished(lesson, batch)

    assert (await lesson["submit"](path)).id == batch.id


async def test_a_batch_that_ended_without_an_answer_is_ordered_again(
    lesson: Lesson, write: Write
) -> None:
    path = write(2, max_tokens=0)
    first, answers, errors = await ran(lesson, path)
    assert (answers, errors.keys()) == ({}, ids(path))

    second = await lesson["submit"](path)

    assert second.id != first.id


async def test_a_file_that_is_not_in_order_gives_no_answer_and_no_error(
    lesson: Lesson, write: Write
) -> None:
    path = write(2)
    path.write_bytes(path.read_bytes() * 2)

    batch, answers, errors = await ran(lesson, path)

    assert batch.status == "failed"
    assert batch.errors
    told = [(one.line, one.code) for one in batch.errors.data or []]
    assert told == [(3, "duplicate_custom_id"), (4, "duplicate_custom_id")]
    assert (answers, errors) == ({}, {})


@pytest.mark.parametrize(
    ("response", "error", "told"),
    [
        ({"status_code": 500, "body": {}}, None, {"status_code": 500, "body": {}}),
        ({"status_code": 0, "body": None}, None, {"status_code": 0, "body": None}),
        (None, {"code": "batch_expired"}, {"code": "batch_expired"}),
        (None, None, {}),
    ],
)
async def test_a_line_without_status_200_is_an_error_whatever_it_holds(
    lesson: Lesson, tmp_path: Path, response: Any, error: Any, told: Any
) -> None:
    path = tmp_path / "output.jsonl"
    line = {"custom_id": "a", "response": response, "error": error}
    path.write_text(json.dumps(line) + "\n")

    assert list(lesson["read"](path)) == [("a", None, told)]


# Cut into parts


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    names: Lesson = {"Path": Path}
    exec(source("split"), names)
    return names["split"]


def lines(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [b"x" * rng.randint(0, 20) + b"\n" for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_every_part_keeps_both_limits_and_the_parts_are_the_whole(
    split: Any, seed: int
) -> None:
    rng, whole = random.Random(seed), lines(100, seed)
    most_lines, most_bytes = rng.randint(1, 20), rng.randint(21, 150)

    parts = [path.read_bytes() for path in split(whole, "part", most_lines, most_bytes)]

    assert b"".join(parts) == b"".join(whole)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert 0 < len(part) <= most_bytes
        assert part.count(b"\n") <= most_lines
        if following is not None:  # there was no room for one more line
            more = part + following[: following.index(b"\n") + 1]
            assert len(more) > most_bytes or more.count(b"\n") > most_lines


def test_what_just_fits_stays_together(split: Any) -> None:
    whole = [b"12345678\n"] * 4
    assert len(list(split(whole, "lines", most_lines=4))) == 1
    assert len(list(split(whole, "bytes", most_bytes=36))) == 1
    assert len(list(split(whole, "more", most_bytes=35))) == 2


def test_no_lines_no_parts(split: Any) -> None:
    assert list(split([], "part")) == []


def test_a_last_line_without_a_line_break_is_kept(split: Any) -> None:
    paths = list(split([b"a\n", b"b\n", b"c"], "part", most_lines=2))
    assert [path.read_bytes() for path in paths] == [b"a\nb\n", b"c"]


def test_a_line_larger_than_a_file_may_be_is_an_error_that_shows_it(split: Any) -> None:
    whole = [b"1\n", b'{"custom_id": "long"' + b"x" * 100]

    with pytest.raises(
        ValueError, match=r'^120 bytes .*"custom_id": "long"x+'
    ) as error:
        list(split(whole, "part", most_bytes=100))

    assert len(str(error.value)) < 120


def test_the_limits_are_the_documented_ones(split: Any) -> None:
    assert split.__defaults__ == (MOST_LINES, MOST_BYTES)


# Not getrusage(): its peak begins with that of the process that started this one.
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
def test_120_000_requests_are_built_and_split_in_little_memory(tmp_path: Path) -> None:
    program = tmp_path / "build.py"
    # `split` needs what the first cell imports; the client is not for here.
    program.write_text(source("batch", "request", "split") + BUILD)
    environ = {**os.environ, "OPENAI_API_KEY": "none"}

    done = subprocess.run(
        [sys.executable, str(program), "120000"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environ,
    )

    assert done.stderr == ""
    grown, paths = json.loads(done.stdout)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    parts = [(tmp_path / path).read_bytes() for path in paths]
    assert len(whole) > 20_000_000
    assert grown < 2_000_000
    assert [part.count(b"\n") for part in parts] == [MOST_LINES, MOST_LINES, 20_000]
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
async def test_a_job_of_50_001_lines_is_answered_without_being_held_in_memory(
    lesson: Lesson, write: Write, split: Any, tmp_path: Path
) -> None:
    small, large = write(10, "small"), write(MOST_LINES + 1, "large")
    with large.open("rb") as file:
        paths = list(split(file, "part"))
    program = tmp_path / "run.py"
    program.write_text(source("batch") + RUN)

    child = await asyncio.create_subprocess_exec(
        *(sys.executable, program, small, *paths),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    out, errors = await asyncio.wait_for(child.communicate(), PATIENCE)

    assert errors == b""
    grown, counts = json.loads(out)
    answered: Iterator[Path] = tmp_path.glob("part-*.answers")
    assert counts == [MOST_LINES, 1]
    assert sum(path.stat().st_size for path in answered) > 40_000_000
    assert grown < 15_000_000
    told = set()
    for path in tmp_path.glob("part-*.answers"):
        told |= {id for id, _, _ in lesson["read"](path)}
    assert told == ids(large)

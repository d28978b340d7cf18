"""The job of lesson 10: killed twenty times, and stopped by every error it handles.

These tests run the lesson's own code: its cells with the tag `job`, written to
a file and started as a process, and its cells with the tag `cache`.
"""

import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import nbformat
import openai
import pytest
from langchain_openai import ChatOpenAI

from helpers import Timeline
from helpers.connection import Provider

LESSON = Path(__file__).parents[2] / "notebooks" / "10_finish_the_job_tomorrow.ipynb"
MAX_CONCURRENCY = 8  # calls that the job keeps in flight
FEW, SOME, MANY = 16, 60, 130  # letters
TIMEOUT = 180.0  # seconds for any one step, even on a busy machine
POLL_INTERVAL = 0.05  # seconds

posix_only = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no SIGKILL and no resource limits"
)


def lesson_source(tag: str) -> str:
    """The source of all cells of the lesson with this tag."""
    cells = nbformat.read(LESSON, as_version=4).cells
    tagged = [cell.source for cell in cells if tag in cell.metadata.get("tags", [])]
    assert tagged
    return "\n\n\n".join(tagged)


class Job:
    """A folder with the lesson's program, its letters and its table."""

    def __init__(self, folder: Path, name: str = "anybody", letters: int = FEW) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.name = folder, name
        self.letters = folder / "letters.jsonl"
        self.table = folder / "answers.sqlite"
        self.orders = folder / "orders.jsonl"
        self.program = folder / "job.py"
        self.program.write_text(lesson_source("job") + "\n\n\nmain(*sys.argv[1:])\n")
        self.letters.write_text(self.lines(range(letters)))

    def text(self, n: int) -> str:
        """The text of a letter. Its name tells the jobs apart in the journal."""
        return f"Send me {n + 1} of your 'lamp' at {n + 5} euros. Yours, {self.name}"

    def lines(self, numbers: Iterable[int]) -> str:
        """These letters as lines of the input file."""
        letters = ({"id": f"{n:03}", "text": self.text(n)} for n in numbers)
        return "".join(json.dumps(letter) + "\n" for letter in letters)

    def order(self, n: int) -> dict[str, Any]:
        """The order that letter n must become."""
        return {"item": "lamp", "pieces": n + 1, "euros": n + 5.0}

    def start(self, **options: Any) -> subprocess.Popen[str]:
        files = map(str, (self.letters, self.table, self.orders))
        return subprocess.Popen(
            [sys.executable, str(self.program), *files],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, **options: Any) -> subprocess.CompletedProcess[str]:
        return wait_for_exit(self.start(**options))

    def rows(self, sql: str = "SELECT id, state FROM answers") -> list[Any]:
        with closing(sqlite3.connect(self.table)) as db:
            return db.execute(sql).fetchall()

    def answered(self) -> set[str]:
        """The ids of the letters with an answer; empty before the table exists."""
        try:
            return {id for id, state in self.rows() if state == "answered"}
        except sqlite3.OperationalError:
            return set()

    def unanswered(self, letters: int) -> set[str]:
        """The texts of the letters that have no answer yet."""
        answered = self.answered()
        return {self.text(n) for n in range(letters) if f"{n:03}" not in answered}

    def exported(self) -> list[Any]:
        return [json.loads(line) for line in self.orders.read_text().splitlines()]


def wait_for_exit(child: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process; return its remaining output and its exit code."""
    # Not communicate(): it misses what read_lines() left in Python's buffer.
    assert child.stdout is not None
    assert child.stderr is not None
    watchdog = threading.Timer(TIMEOUT, child.kill)
    watchdog.start()
    with child.stdout, child.stderr:
        printed, errors = child.stdout.read(), child.stderr.read()
    child.wait()
    watchdog.cancel()
    return subprocess.CompletedProcess(child.args, child.returncode, printed, errors)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll another process's table or journal, which can't notify this one."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {TIMEOUT} s"
        time.sleep(POLL_INTERVAL)


def read_lines(child: subprocess.Popen[str], count: int) -> list[str]:
    assert child.stdout is not None
    return [child.stdout.readline() for _ in range(count)]


@pytest.fixture
def fast_stub(provider: Provider) -> Provider:
    provider.configure(first_token=0.1, per_token=0, jitter=0.5)
    return provider


@pytest.fixture
def lesson(fast_stub: Provider) -> dict[str, Any]:
    """The names that the cells of the job define, in this process."""
    names: dict[str, Any] = {}
    exec(lesson_source("job"), names)
    return names


# From letters to orders


def test_every_letter_becomes_an_order_with_one_call(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)

    with Timeline("all") as run:
        result = job.run()

    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(result.stdout.split()[1::2]) == [f"{n:03}" for n in range(FEW)]
    assert run.attempts == FEW
    assert job.exported() == [
        {"id": f"{n:03}", "order": job.order(n), "error": None} for n in range(FEW)
    ]


def test_calls_in_flight_reach_but_never_exceed_the_concurrency_limit(
    fast_stub: Provider, tmp_path: Path
) -> None:
    with Timeline("all") as run:
        Job(tmp_path).run()

    assert run.peak_in_flight == MAX_CONCURRENCY


def test_token_counts_in_the_table_add_up_to_the_stubs(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)

    job.run()

    stats = fast_stub.ask("/_provider/stats")
    sums = "SELECT sum(input_tokens), sum(output_tokens) FROM answers"
    assert job.rows(sums) == [(stats["prompt_tokens"], stats["completion_tokens"])]


# Killed and resumed


class KillTrigger:
    """Waits for a number of events while a job runs, before the test kills it."""

    def __init__(self, provider: Provider, job: Job, since: int) -> None:
        self.provider, self.job, self.since = provider, job, since

    def requests(self) -> list[dict[str, Any]]:
        """The job's requests since the start of this run, in order of arrival."""
        journal = self.provider.ask(f"/_provider/journal?since={self.since}")
        name = f"Yours, {self.job.name}"
        return [entry for entry in journal["attempts"] if name in entry["prompt"]]

    def lines_printed(self, child: subprocess.Popen[str], count: int) -> None:
        read_lines(child, count)

    def calls_made(self, child: subprocess.Popen[str], count: int) -> None:
        wait_until(lambda: len(self.requests()) >= count)

    def answers_stored(self, child: subprocess.Popen[str], count: int) -> None:
        wanted = len(self.job.answered()) + count
        wait_until(lambda: len(self.job.answered()) >= wanted)


def killed_five_times(provider: Provider, job: Job, seed: int) -> tuple[int, int]:
    """Run a job, killing it five times, and check its table after each run.

    Returns the number of calls, and of those whose answer was lost.
    """
    rng, calls, lost = random.Random(seed), 0, 0
    for number in range(6):
        killed = number < 5
        before = job.unanswered(MANY)
        since = provider.ask(f"/_provider/journal?since={10**12}")["next"]
        trigger = KillTrigger(provider, job, since)
        child = job.start()
        if killed:
            wait = rng.choice(
                [trigger.lines_printed, trigger.calls_made, trigger.answers_stored]
            )
            wait(child, rng.randint(1, 10))
            child.kill()
        result = wait_for_exit(child)
        wait_until(lambda: all(entry["end"] for entry in trigger.requests()))  # noqa: B023
        assert result.returncode == (-signal.SIGKILL if killed else 0), result.stderr

        sent = [entry["prompt"] for entry in trigger.requests()]
        after = job.unanswered(MANY)
        printed = set(result.stdout.split()[1::2])
        assert after <= before, "a stored answer was lost"
        assert printed <= job.answered(), "it printed an answer that it did not store"
        assert set(sent) <= before, "it sent a letter that already had an answer"
        assert len(sent) == len(set(sent)), "it sent a letter twice in one run"
        assert before - after <= set(sent), "it stored an answer to an unsent letter"
        assert 0 <= len(sent) - len(before - after) <= MAX_CONCURRENCY
        calls += len(sent)
        lost += len(sent) - len(before - after)
    assert len(sent) == len(before), "the last run, not killed, lost an answer"
    return calls, lost


@posix_only
def test_twenty_kills_lose_at_most_the_calls_in_flight_and_no_stored_answer(
    fast_stub: Provider, tmp_path: Path
) -> None:
    fast_stub.configure(first_token=0.25)
    names = ["Ada", "Bob", "Cleo", "Dan"]
    jobs = [Job(tmp_path / name, name, letters=MANY) for name in names]

    with ThreadPoolExecutor(len(jobs)) as executor:
        figures = executor.map(killed_five_times, [fast_stub] * 4, jobs, range(4))

    for job, (calls, lost) in zip(jobs, figures, strict=True):
        assert calls == MANY + lost
        assert 0 <= lost <= 5 * MAX_CONCURRENCY
        assert job.rows("PRAGMA integrity_check") == [("ok",)]
        count = "SELECT state, count(*), count(DISTINCT id) FROM answers"
        assert job.rows(count) == [("answered", MANY, MANY)]
        assert [line["order"] for line in job.exported()] == [
            job.order(n) for n in range(MANY)
        ]


@posix_only
def test_kill_while_loading_letters_leaves_an_empty_table(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=150_000)
    wal = job.table.with_name("answers.sqlite-wal")

    child = job.start()
    wait_until(lambda: wal.exists() and wal.stat().st_size > 1_000_000)
    child.kill()

    assert wait_for_exit(child).returncode == -signal.SIGKILL
    assert job.rows() == []


# Run again


def test_second_run_sends_only_new_letters_and_the_third_sends_nothing(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    job.run()
    with job.letters.open("a") as file:
        file.write(job.lines(range(FEW, FEW + 5)))

    with Timeline("second") as second:
        job.run()
    with Timeline("third") as third:
        result = job.run()

    new = set(map(job.text, range(FEW, FEW + 5)))
    assert {attempt.prompt for attempt in second.journal} == new
    assert second.attempts == 5
    assert third.attempts == 0
    assert (result.returncode, result.stdout) == (0, "")
    assert len(job.exported()) == FEW + 5


def test_failed_letter_does_not_stop_the_others_and_is_retried_by_the_next_run(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    fast_stub.configure(faults_by_prompt={job.text(7): ["malformed", "wrong_type"]})

    for error in ("JSONDecodeError: ", "ValueError: "):
        assert job.run().returncode == 0
        [(id, recorded)] = job.rows("SELECT id, error FROM answers WHERE error <> ''")
        assert (id, recorded[: len(error)]) == ("007", error)
        assert len(job.answered()) == FEW - 1
        assert job.exported()[7] == {"id": "007", "order": None, "error": recorded}
    with Timeline("third") as third:
        job.run()

    assert [attempt.prompt for attempt in third.journal] == [job.text(7)]
    assert job.rows("SELECT id FROM answers WHERE error <> ''") == []
    assert job.exported()[7] == {"id": "007", "order": job.order(7), "error": None}


def test_tokens_of_an_invalid_answer_are_counted(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=1)
    program = job.program.read_text()
    job.program.write_text(
        "from typing import Annotated\nfrom pydantic import AfterValidator\n"
        + "def refuse(euros):\n    raise ValueError('too dear')\n\n"
        + program.replace(
            "euros: float", "euros: Annotated[float, AfterValidator(refuse)]"
        )
    )
    find = "SELECT state, error, input_tokens, output_tokens FROM answers"

    job.run()
    [(state, error, tokens_in, tokens_out)] = job.rows(find)
    assert state == "failed"
    assert "too dear" in error
    assert tokens_in > 0 < tokens_out

    job.run()
    [(*_, tokens_in_2, tokens_out_2)] = job.rows(find)
    assert (tokens_in_2, tokens_out_2) == (2 * tokens_in, 2 * tokens_out)


def test_two_simultaneous_runs_store_each_answer_once(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=1)
    job.run()
    job.letters.write_text(job.lines(range(FEW)))

    with Timeline("both") as both:
        results = [wait_for_exit(child) for child in [job.start(), job.start()]]

    assert [(run.returncode, run.stderr) for run in results] == [(0, ""), (0, "")]
    assert FEW - 1 <= both.attempts <= 2 * (FEW - 1)
    count = "SELECT count(*), count(DISTINCT id) FROM answers"
    assert job.rows(count) == [(FEW, FEW)]
    assert len(job.answered()) == FEW
    per_call = {
        tokens for (tokens,) in job.rows("SELECT DISTINCT input_tokens FROM answers")
    }
    assert max(per_call) - min(per_call) <= 2, "the tokens of a call were counted twice"


# Stopped by an error


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "100", "text": "Send me 3 of', "Invalid JSON"),
        (b'{"id": "100"}', "Field required"),
        (b'{"id": 100, "text": "Send me 3"}', "valid string"),
        (b"", "Invalid JSON"),
        (b'{"id": "100", "text": "\xff"}', "Invalid JSON"),
        (b'{"id": "000", "text": "A different letter"}', "another text"),
    ],
    ids=["truncated", "no text", "id not a string", "empty", "not UTF-8", "id reused"],
)
def test_invalid_line_stops_the_job_before_any_call_and_changes_nothing(
    line: bytes, reason: str, lesson: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=3)
    job.run()
    before = job.rows("SELECT * FROM answers"), job.orders.read_bytes()
    good, rest = job.lines(range(5)).encode(), job.lines([6]).encode()
    job.letters.write_bytes(good + line + b"\n" + rest)

    with Timeline("invalid line") as run, pytest.raises(SystemExit) as exited:
        lesson["main"](str(job.letters), str(job.table), str(job.orders))

    message = str(exited.value)
    assert message.startswith("stopped: ")
    assert reason in message
    where = "000 is known" if reason == "another text" else f"{job.letters}, line 6: "
    assert where in message
    assert run.attempts == 0
    assert (job.rows("SELECT * FROM answers"), job.orders.read_bytes()) == before


def test_missing_file_is_named_in_the_error(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=SOME)
    job.letters.unlink()

    result = job.run()

    assert result.returncode == 1
    assert re.fullmatch(r"stopped: .*No such file.*letters.*\n", result.stderr)


def test_locked_table_stops_the_job_before_any_call(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    with closing(sqlite3.connect(job.table)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with Timeline("locked") as locked:
            result = job.run()

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "stopped: database is locked\n"
    assert locked.attempts == 0


def assert_next_run_resumes(
    job: Job, first: Timeline, stored: list[str], letters: int = SOME
) -> None:
    """All answers that were stored are still there; the next run sends the rest."""
    assert job.answered() == set(stored)
    assert 0 <= first.attempts - len(stored) <= MAX_CONCURRENCY
    with Timeline("resumed") as resumed:
        result = job.run()
    assert (result.returncode, result.stderr) == (0, "")
    assert resumed.attempts == letters - len(stored)
    assert [line["order"] for line in job.exported()] == [
        job.order(n) for n in range(letters)
    ]


def test_lock_during_the_run_stops_the_job_and_the_next_run_resumes(
    fast_stub: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=SOME)

    with Timeline("locked") as locked:
        child = job.start()
        first_lines = read_lines(child, 5)
        with closing(sqlite3.connect(job.table, timeout=TIMEOUT)) as other:
            other.execute("BEGIN IMMEDIATE")
            result = wait_for_exit(child)

    assert (result.returncode, result.stderr) == (1, "stopped: database is locked\n")
    printed = "".join(first_lines) + result.stdout
    assert_next_run_resumes(job, locked, printed.split()[1::2])


def test_full_table_stops_the_job_and_the_next_run_resumes(
    lesson: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=MANY)
    with closing(lesson["open_store"](job.table)) as db:
        lesson["load"](db, lesson["read"](job.letters))
    program = job.program.read_text()
    limit = "PRAGMA max_page_count = 1;\nPRAGMA"
    job.program.write_text(program.replace("PRAGMA", limit, 1))

    with Timeline("full") as full:
        result = job.run()

    assert result.returncode == 1
    assert result.stdout
    assert result.stderr == "stopped: database or disk is full\n"
    job.program.write_text(program)
    assert_next_run_resumes(job, full, result.stdout.split()[1::2], MANY)


@posix_only
def test_file_size_limit_stops_the_job_and_the_next_run_resumes(
    fast_stub: Provider, tmp_path: Path
) -> None:
    import resource

    job = Job(tmp_path, letters=SOME)
    size = 120_000  # bytes; the write-ahead log grows by a page or two per answer

    with Timeline("full") as full:
        result = job.run(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        )

    assert result.returncode == 1
    assert result.stderr == "stopped: disk I/O error\n"
    assert result.stdout
    assert_next_run_resumes(job, full, result.stdout.split()[1::2])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 kB. Skips the test on machines that can't mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine doesn't allow mounting a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_stops_the_job_and_the_next_run_resumes(
    fast_stub: Provider, tmp_path: Path, tiny_disk: Path
) -> None:
    job = Job(tmp_path / "job", letters=SOME)
    job.table = tiny_disk / "answers.sqlite"

    with Timeline("full") as full:
        result = job.run()

    assert result.returncode == 1
    assert result.stderr == "stopped: database or disk is full\n"
    assert result.stdout
    larger = ["mount", "-o", "remount,size=16m", str(tiny_disk)]
    subprocess.run(larger, check=True)
    assert_next_run_resumes(job, full, result.stdout.split()[1::2])


def test_failed_export_leaves_the_previous_file_intact(
    lesson: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=3)
    job.run()
    before = job.orders.read_bytes()
    with closing(sqlite3.connect(job.table)) as db, db:
        db.execute("UPDATE answers SET answer = 'not JSON' WHERE id = '002'")

    with pytest.raises(SystemExit, match="stopped: "):
        lesson["main"](str(job.letters), str(job.table), str(job.orders))

    assert job.orders.read_bytes() == before


# The cache


@pytest.fixture
def cache_at(fast_stub: Provider) -> Iterator[Callable[[Path], Any]]:
    names: dict[str, Any] = {}
    exec(lesson_source("cache"), names)
    opened = []

    def make(path: Path) -> Any:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        opened.append(db)
        return names["SQLiteCache"](db)

    yield make
    for db in opened:
        db.close()


def test_cached_answers_survive_reopening_the_database(
    cache_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "cache.sqlite"

    with Timeline("first") as first:
        answer = ChatOpenAI(cache=cache_at(path)).invoke("Who wrote Hamlet?")
    with Timeline("second") as second:
        found = ChatOpenAI(cache=cache_at(path)).invoke("Who wrote Hamlet?")

    assert (first.attempts, second.attempts) == (1, 0)
    assert found.content == answer.content
    assert found.usage_metadata is not None
    assert found.usage_metadata == {**(answer.usage_metadata or {}), "total_cost": 0}


def test_cache_serves_concurrent_calls_until_it_is_cleared(
    cache_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    cache = cache_at(tmp_path / "cache.sqlite")
    prompts = [f"Question {n}" for n in range(20)]

    async def run_three_times() -> list[int]:
        attempts = []
        # LangChain would share its own client with later tests, after this event loop
        # has closed.
        async with openai.DefaultAioHttpClient() as connections:
            llm = ChatOpenAI(cache=cache, http_async_client=connections)
            for clear in (False, True, False):
                with Timeline("20 prompts") as run:
                    await asyncio.gather(*map(llm.ainvoke, prompts))
                attempts.append(run.attempts)
                if clear:
                    cache.clear()
        return attempts

    assert asyncio.run(run_three_times()) == [20, 0, 20]


def test_cache_key_includes_base_url_and_timeout_but_not_the_api_key(
    fast_stub: Provider, cache_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    cache = cache_at(tmp_path / "cache.sqlite")
    localhost = f"{fast_stub.url}/v1".replace("127.0.0.1", "localhost")
    attempts = []

    for options in ({}, {"base_url": localhost}, {"timeout": 30}, {"api_key": "x"}):
        with Timeline("one prompt") as run:
            ChatOpenAI(cache=cache, **options).invoke("Who wrote Hamlet?")
        attempts.append(run.attempts)

    assert attempts == [1, 1, 1, 0]

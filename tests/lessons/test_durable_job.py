"""The job of lesson 10: killed twenty times, and led into every wall it names.

What runs is the lesson's own code: its cells with the tag `job`, written to a
file and started as a process, and its cells with the tag `cache`.
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
from collections.abc import Callable, Iterator
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
AT_ONCE = 8  # calls that the job has in flight
FEW, SOME, MANY = 16, 60, 130  # letters
PATIENCE = 60.0  # seconds that anything may take on a busy machine
POLL = 0.05

posix_only = pytest.mark.skipif(
    os.name == "nt", reason="Windows has neither signals nor limits of a process"
)


def source(tag: str) -> str:
    """The lesson's cells with this tag, one below another."""
    cells = nbformat.read(LESSON, as_version=4).cells
    tagged = [cell.source for cell in cells if tag in cell.metadata.get("tags", [])]
    assert tagged
    return "\n\n\n".join(tagged)


class Job:
    """A folder with the lesson's job, its letters and its table."""

    def __init__(self, folder: Path, name: str = "anybody", letters: int = FEW) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.name = folder, name
        self.letters = folder / "letters.jsonl"
        self.table = folder / "answers.sqlite"
        self.orders = folder / "orders.jsonl"
        self.program = folder / "job.py"
        self.program.write_text(source("job") + "\n\n\nmain(*sys.argv[1:])\n")
        self.letters.write_text("".join(map(self.line, range(letters))))

    def text(self, n: int) -> str:
        """A letter; the journal tells the jobs apart by the name in it."""
        return f"Send me {n + 1} of your 'lamp' at {n + 5} euros. Yours, {self.name}"

    def line(self, n: int) -> str:
        return json.dumps({"id": f"{n:03}", "text": self.text(n)}) + "\n"

    def order(self, n: int) -> dict[str, Any]:
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
        return ended(self.start(**options))

    def rows(self, sql: str = "SELECT id, state FROM answers") -> list[Any]:
        with closing(sqlite3.connect(self.table)) as db:
            return db.execute(sql).fetchall()

    def answered(self) -> set[str]:
        """The ids of the letters that have an answer; none where no table is."""
        try:
            return {id for id, state in self.rows() if state == "answered"}
        except sqlite3.OperationalError:
            return set()

    def unfinished(self, letters: int) -> set[str]:
        done = self.answered()
        return {self.text(n) for n in range(letters) if f"{n:03}" not in done}

    def exported(self) -> list[Any]:
        return [json.loads(line) for line in self.orders.read_text().splitlines()]


def ended(child: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process; what else it printed, and how it ended."""
    # Not communicate(): it does not see what printed_lines() has read ahead.
    assert child.stdout is not None
    assert child.stderr is not None
    too_late = threading.Timer(PATIENCE, child.kill)
    too_late.start()
    with child.stdout, child.stderr:
        printed, errors = child.stdout.read(), child.stderr.read()
    child.wait()
    too_late.cancel()
    return subprocess.CompletedProcess(child.args, child.returncode, printed, errors)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"it took more than {PATIENCE} s"
        time.sleep(POLL)


def printed_lines(child: subprocess.Popen[str], number: int) -> list[str]:
    assert child.stdout is not None
    return [child.stdout.readline() for _ in range(number)]


@pytest.fixture
def quick(provider: Provider) -> Provider:
    provider.configure(first_token=0.1, per_token=0, jitter=0.5)
    return provider


@pytest.fixture
def lesson(quick: Provider) -> dict[str, Any]:
    """What the cells of the job define, here in this process."""
    names: dict[str, Any] = {}
    exec(source("job"), names)
    return names


# From letters to orders


def test_every_letter_becomes_an_order_by_one_call(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)

    with Timeline("all") as run:
        done = job.run()

    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()[1::2]) == [f"{n:03}" for n in range(FEW)]
    assert run.attempts == FEW
    assert job.exported() == [
        {"id": f"{n:03}", "order": job.order(n), "error": None} for n in range(FEW)
    ]


def test_never_more_calls_than_the_bound_are_in_flight(
    quick: Provider, tmp_path: Path
) -> None:
    with Timeline("all") as run:
        Job(tmp_path).run()

    assert run.peak_in_flight == AT_ONCE


def test_the_table_counts_the_tokens_that_the_provider_counted(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)

    job.run()

    stats = quick.ask("/_provider/stats")
    sums = "SELECT sum(input_tokens), sum(output_tokens) FROM answers"
    assert job.rows(sums) == [(stats["prompt_tokens"], stats["completion_tokens"])]


# Killed


class Moment:
    """Something random to wait for while a job runs."""

    def __init__(self, provider: Provider, job: Job, since: int) -> None:
        self.provider, self.job, self.since = provider, job, since

    def asked(self) -> list[dict[str, Any]]:
        """What was asked since the start, in the order of arrival."""
        journal = self.provider.ask(f"/_provider/journal?since={self.since}")
        name = f"Yours, {self.job.name}"
        return [entry for entry in journal["attempts"] if name in entry["prompt"]]

    def lines_printed(self, child: subprocess.Popen[str], number: int) -> None:
        printed_lines(child, number)

    def calls_made(self, child: subprocess.Popen[str], number: int) -> None:
        wait_until(lambda: len(self.asked()) >= number)

    def answers_stored(self, child: subprocess.Popen[str], number: int) -> None:
        wanted = len(self.job.answered()) + number
        wait_until(lambda: len(self.job.answered()) >= wanted)


def killed_five_times(provider: Provider, job: Job, seed: int) -> tuple[int, int]:
    """Kill, look at what is left, go on; returns the calls and those lost."""
    rng, calls, lost = random.Random(seed), 0, 0
    for kill in range(6):
        before = job.unfinished(MANY)
        since = provider.ask(f"/_provider/journal?since={10**12}")["next"]
        moment = Moment(provider, job, since)
        child = job.start()
        if kill < 5:
            wait = rng.choice(
                [moment.lines_printed, moment.calls_made, moment.answers_stored]
            )
            wait(child, rng.randint(1, 10))
            child.kill()
        done = ended(child)
        wait_until(lambda: all(one["end"] for one in moment.asked()))  # noqa: B023
        assert done.returncode == (-signal.SIGKILL if kill < 5 else 0), done.stderr

        asked = [entry["prompt"] for entry in moment.asked()]
        after = job.unfinished(MANY)
        assert after <= before, "no answer was lost"
        assert set(done.stdout.split()[1::2]) <= job.answered(), "what it says holds"
        assert set(asked) <= before, "only the unfinished were asked"
        assert len(asked) == len(set(asked)), "none was asked twice in one run"
        assert before - after <= set(asked), "no answer without a question"
        assert 0 <= len(asked) - len(before - after) <= AT_ONCE
        calls += len(asked)
        lost += len(asked) - len(before - after)
    assert len(asked) == len(before), "the last run lost nothing"
    return calls, lost


@posix_only
def test_twenty_kills_cost_no_answer_and_no_more_than_the_calls_in_flight(
    quick: Provider, tmp_path: Path
) -> None:
    quick.configure(first_token=0.25)
    names = ["Ada", "Bob", "Cleo", "Dan"]
    jobs = [Job(tmp_path / name, name, letters=MANY) for name in names]

    with ThreadPoolExecutor(len(jobs)) as executor:
        figures = executor.map(killed_five_times, [quick] * 4, jobs, range(4))

    for job, (calls, lost) in zip(jobs, figures, strict=True):
        assert calls == MANY + lost
        assert 0 <= lost <= 5 * AT_ONCE
        assert job.rows("PRAGMA integrity_check") == [("ok",)]
        count = "SELECT state, count(*), count(DISTINCT id) FROM answers"
        assert job.rows(count) == [("answered", MANY, MANY)]
        assert [line["order"] for line in job.exported()] == [
            job.order(n) for n in range(MANY)
        ]


@posix_only
def test_a_kill_while_the_letters_are_taken_in_leaves_none_of_them(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=150_000)
    log = job.table.with_name("answers.sqlite-wal")

    child = job.start()
    wait_until(lambda: log.exists() and log.stat().st_size > 1_000_000)
    child.kill()

    assert ended(child).returncode == -signal.SIGKILL
    assert job.rows() == []


# Run again


def test_a_second_run_asks_for_what_is_new_and_a_third_for_nothing(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    job.run()
    with job.letters.open("a") as file:
        file.writelines(map(job.line, range(FEW, FEW + 5)))

    with Timeline("second") as second:
        job.run()
    with Timeline("third") as third:
        done = job.run()

    new = set(map(job.text, range(FEW, FEW + 5)))
    assert {one.prompt for one in second.journal} == new
    assert second.attempts == 5
    assert third.attempts == 0
    assert (done.returncode, done.stdout) == (0, "")
    assert len(job.exported()) == FEW + 5


def test_a_failure_is_noted_the_others_go_on_and_the_next_run_tries_it_again(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    quick.configure(faults_by_prompt={job.text(7): ["malformed", "wrong_type"]})

    for error in ("JSONDecodeError: ", "ValueError: "):
        done = job.run()
        assert done.returncode == 0
        [(id, noted)] = job.rows("SELECT id, error FROM answers WHERE error <> ''")
        assert (id, noted[: len(error)]) == ("007", error)
        assert len(job.answered()) == FEW - 1
        assert job.exported()[7] == {"id": "007", "order": None, "error": noted}
    with Timeline("third") as third:
        job.run()

    assert [one.prompt for one in third.journal] == [job.text(7)]
    assert job.rows("SELECT id FROM answers WHERE error <> ''") == []
    assert job.exported()[7] == {"id": "007", "order": job.order(7), "error": None}


def test_an_answer_that_is_no_record_is_a_failure_whose_tokens_count(
    quick: Provider, tmp_path: Path
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


def test_two_runs_at_the_same_time_store_each_answer_once(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=1)
    job.run()
    job.letters.write_text("".join(map(job.line, range(FEW))))

    with Timeline("both") as both:
        done = [ended(child) for child in [job.start(), job.start()]]

    assert [(one.returncode, one.stderr) for one in done] == [(0, ""), (0, "")]
    assert FEW - 1 <= both.attempts <= 2 * (FEW - 1)
    count = "SELECT count(*), count(DISTINCT id) FROM answers"
    assert job.rows(count) == [(FEW, FEW)]
    assert len(job.answered()) == FEW
    per_call = {
        tokens for (tokens,) in job.rows("SELECT DISTINCT input_tokens FROM answers")
    }
    assert max(per_call) - min(per_call) <= 2, "tokens were counted twice"


# The walls


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "100", "text": "Send me 3 of', "Invalid JSON"),
        (b'{"id": "100"}', "Field required"),
        (b'{"id": 100, "text": "Send me 3"}', "valid string"),
        (b"", "Invalid JSON"),
        (b'{"id": "100", "text": "\xff"}', "Invalid JSON"),
        (b'{"id": "000", "text": "Another letter"}', "another text"),
    ],
    ids=["cut off", "no text", "no string", "empty", "no UTF-8", "known id"],
)
def test_a_bad_line_ends_the_job_before_a_call_and_changes_nothing(
    line: bytes, reason: str, lesson: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=3)
    job.run()
    before = job.rows("SELECT * FROM answers"), job.orders.read_bytes()
    good = "".join(map(job.line, range(5))).encode()
    job.letters.write_bytes(good + line + b"\n" + job.line(6).encode())

    with Timeline("a bad line") as run, pytest.raises(SystemExit) as ending:
        lesson["main"](str(job.letters), str(job.table), str(job.orders))

    message = str(ending.value)
    assert message.startswith("stopped: ")
    assert reason in message
    where = "000 is known" if reason == "another text" else f"{job.letters}, line 6: "
    assert where in message
    assert run.attempts == 0
    assert (job.rows("SELECT * FROM answers"), job.orders.read_bytes()) == before


def test_a_file_that_is_not_there_is_named(quick: Provider, tmp_path: Path) -> None:
    job = Job(tmp_path, letters=SOME)
    job.letters.unlink()

    done = job.run()

    assert done.returncode == 1
    assert re.fullmatch(r"stopped: .*No such file.*letters.*\n", done.stderr)


def test_a_locked_table_ends_the_job_before_a_call(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    with closing(sqlite3.connect(job.table)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with Timeline("locked") as locked:
            done = job.run()

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "stopped: database is locked\n"
    assert locked.attempts == 0


def assert_it_goes_on(
    job: Job, first: Timeline, stored: list[str], letters: int = SOME
) -> None:
    """After a bad end: what was stored is there, and only the rest is asked."""
    assert job.answered() == set(stored)
    assert 0 <= first.attempts - len(stored) <= AT_ONCE
    with Timeline("again") as again:
        done = job.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert again.attempts == letters - len(stored)
    assert [line["order"] for line in job.exported()] == [
        job.order(n) for n in range(letters)
    ]


def test_a_lock_in_the_middle_ends_the_job_and_the_next_run_goes_on(
    quick: Provider, tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=SOME)

    with Timeline("locked") as locked:
        child = job.start()
        seen = printed_lines(child, 5)
        with closing(sqlite3.connect(job.table, timeout=PATIENCE)) as other:
            other.execute("BEGIN IMMEDIATE")
            done = ended(child)

    assert (done.returncode, done.stderr) == (1, "stopped: database is locked\n")
    printed = "".join(seen) + done.stdout
    assert_it_goes_on(job, locked, printed.split()[1::2])


def test_a_table_that_may_not_grow_ends_the_job_and_the_next_run_goes_on(
    lesson: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=MANY)
    with closing(lesson["open_store"](job.table)) as db:
        lesson["load"](db, lesson["read"](job.letters))
    program = job.program.read_text()
    limit = "PRAGMA max_page_count = 1;\nPRAGMA"
    job.program.write_text(program.replace("PRAGMA", limit, 1))

    with Timeline("full") as full:
        done = job.run()

    assert done.returncode == 1
    assert done.stdout
    assert done.stderr == "stopped: database or disk is full\n"
    job.program.write_text(program)
    assert_it_goes_on(job, full, done.stdout.split()[1::2], MANY)


@posix_only
def test_a_file_that_may_not_grow_ends_the_job_and_the_next_run_goes_on(
    quick: Provider, tmp_path: Path
) -> None:
    import resource

    job = Job(tmp_path, letters=SOME)
    size = 120_000  # bytes: the log takes a page or two for each answer

    with Timeline("full") as full:
        done = job.run(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        )

    assert done.returncode == 1
    assert done.stderr == "stopped: disk I/O error\n"
    assert done.stdout
    assert_it_goes_on(job, full, done.stdout.split()[1::2])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 kB, where this machine lets us make one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_job_and_the_next_run_goes_on(
    quick: Provider, tmp_path: Path, tiny_disk: Path
) -> None:
    job = Job(tmp_path / "job", letters=SOME)
    job.table = tiny_disk / "answers.sqlite"

    with Timeline("full") as full:
        done = job.run()

    assert done.returncode == 1
    assert done.stderr == "stopped: database or disk is full\n"
    assert done.stdout
    larger = ["mount", "-o", "remount,size=16m", str(tiny_disk)]
    subprocess.run(larger, check=True)
    assert_it_goes_on(job, full, done.stdout.split()[1::2])


def test_the_exported_file_is_whole_or_the_old_one(
    lesson: dict[str, Any], tmp_path: Path
) -> None:
    job = Job(tmp_path, letters=3)
    job.run()
    before = job.orders.read_bytes()
    with closing(sqlite3.connect(job.table)) as db, db:
        db.execute("UPDATE answers SET answer = 'no JSON' WHERE id = '002'")

    with pytest.raises(SystemExit, match="stopped: "):
        lesson["main"](str(job.letters), str(job.table), str(job.orders))

    assert job.orders.read_bytes() == before


# The cache


@pytest.fixture
def cache_at(quick: Provider) -> Iterator[Callable[[Path], Any]]:
    names: dict[str, Any] = {}
    exec(source("cache"), names)
    opened = []

    def make(path: Path) -> Any:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        opened.append(db)
        return names["SQLiteCache"](db)

    yield make
    for db in opened:
        db.close()


def test_the_cache_keeps_answers_for_another_process_to_find(
    cache_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "cache.sqlite"

    with Timeline("first") as first:
        answer = ChatOpenAI(cache=cache_at(path)).invoke("Who wrote Hamlet?")
    with Timeline("again") as again:
        found = ChatOpenAI(cache=cache_at(path)).invoke("Who wrote Hamlet?")

    assert (first.attempts, again.attempts) == (1, 0)
    assert found.content == answer.content
    assert found.usage_metadata is not None
    assert found.usage_metadata == {**(answer.usage_metadata or {}), "total_cost": 0}


def test_the_cache_works_for_calls_at_once_and_forgets_when_cleared(
    cache_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    cache = cache_at(tmp_path / "cache.sqlite")
    prompts = [f"Question {n}" for n in range(20)]

    async def three_times() -> list[int]:
        attempts = []
        # Of its own: LangChain's would be left to the next test, with a closed loop.
        async with openai.DefaultAioHttpClient() as connections:
            llm = ChatOpenAI(cache=cache, http_async_client=connections)
            for clear in (False, True, False):
                with Timeline("20 prompts") as run:
                    await asyncio.gather(*map(llm.ainvoke, prompts))
                attempts.append(run.attempts)
                if clear:
                    cache.clear()
        return attempts

    assert asyncio.run(three_times()) == [20, 0, 20]


def test_the_caches_key_holds_the_address_and_the_time_out_and_not_the_key(
    quick: Provider, cache_at: Callable[[Path], Any], tmp_path: Path
) -> None:
    cache = cache_at(tmp_path / "cache.sqlite")
    localhost = f"{quick.url}/v1".replace("127.0.0.1", "localhost")
    attempts = []

    for options in ({}, {"base_url": localhost}, {"timeout": 30}, {"api_key": "x"}):
        with Timeline("one prompt") as run:
            ChatOpenAI(cache=cache, **options).invoke("Who wrote Hamlet?")
        attempts.append(run.attempts)

    assert attempts == [1, 1, 1, 0]

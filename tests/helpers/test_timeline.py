import asyncio
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any
from unittest import mock

import aiohttp
import IPython.display
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from helpers import Timeline, connect, connection
from helpers.connection import Provider, ProviderError
from helpers.timeline import COLUMNS, REDRAW, REST, ROWS, Attempt

PROMPTS = ["Who wrote Hamlet?", "Why is the sky blue?", "How are you?", "Who am I?"]
BAR = re.compile(r"\|(.*)\| +(\d+\.\d\d) s$")


@pytest.fixture
def llm(provider: Provider) -> OpenAI:
    """A client that has already made its first call, which is slow."""
    llm = OpenAI(max_retries=0)
    with provider.behaving(first_token=0, per_token=0):
        llm.invoke("Hello how are you?")
    provider.configure(per_token=0, jitter=0)
    return llm


def bars(shown: object) -> list[str]:
    """The text between the two `|` of each line."""
    found = [BAR.search(line) for line in repr(shown).splitlines()]
    return [match[1] for match in found if match]


def picture(shown: Any) -> Image.Image:
    """The picture, after checking that it's a complete PNG."""
    data = shown._repr_png_()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    Image.open(io.BytesIO(data)).verify()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert len(image.getcolors(2**24) or []) > 2
    return image


def texts(shown: Any) -> list[str]:
    """All texts in the picture."""
    with mock.patch.object(Figure, "savefig", autospec=True) as save:
        shown._repr_png_()
    figure: Figure = save.call_args.args[0]
    found = [text.get_text() for text in figure.findobj(Text)]
    return [text for text in found if text.strip()]


def attempt(number: int, **fields: Any) -> Attempt:
    start = number * 0.01
    times = start, start + 0.5, start + 0.6
    return replace(Attempt(f"Prompt {number}", 1, "answered", *times), **fields)


def timeline_of(*attempts: Attempt, name: str = "run") -> Timeline:
    run = Timeline(name)
    run.journal = list(attempts)
    run.wall = max((attempt.end for attempt in attempts), default=0) + 0.01
    return run


# The figures of a run


def test_sequential_calls_never_overlap(provider: Provider, llm: OpenAI) -> None:
    provider.configure(first_token=0.15)
    with Timeline("one by one") as run:
        for prompt in PROMPTS:
            llm.invoke(prompt)
    assert (run.calls, run.attempts, run.peak_in_flight) == (4, 4, 1)
    assert (run.failed, run.cancelled, run.retried) == (0, 0, 0)
    assert 4 * 0.15 <= run.waits <= run.wall
    assert run.overlap <= 1
    assert [attempt.prompt for attempt in run.journal] == PROMPTS


def in_threads(llm: OpenAI) -> None:
    with ThreadPoolExecutor(max_workers=4) as executor:
        list(executor.map(llm.invoke, PROMPTS))


def in_coroutines(llm: OpenAI) -> None:
    async def main() -> None:
        await asyncio.gather(*[llm.ainvoke(prompt) for prompt in PROMPTS])

    asyncio.run(main())


@pytest.mark.parametrize("invoke_all", [in_threads, in_coroutines])
def test_concurrent_calls_overlap(
    provider: Provider, llm: OpenAI, invoke_all: Callable[[OpenAI], None]
) -> None:
    provider.configure(first_token=0.7)
    with Timeline("at once") as run:
        invoke_all(llm)
    assert (run.calls, run.attempts, run.peak_in_flight) == (4, 4, 4)
    assert run.waits >= 4 * 0.7
    assert 0.7 <= run.wall < run.waits / 2
    assert run.overlap == run.waits / run.wall
    assert sorted(attempt.prompt for attempt in run.journal) == sorted(PROMPTS)


def test_calls_from_another_process_are_recorded(provider: Provider) -> None:
    request = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1]).read()"
    with Timeline("elsewhere") as run:
        subprocess.run(
            [sys.executable, "-c", request, f"{provider.url}/v1/models"], check=True
        )
    assert [attempt.prompt for attempt in run.journal] == ["GET /v1/models"]


def test_calls_before_and_after_the_block_are_not_recorded(
    provider: Provider, llm: OpenAI
) -> None:
    provider.configure(first_token=0)
    llm.invoke("before")
    with Timeline("none") as run:
        pass
    llm.invoke("after")
    assert (run.calls, run.peak_in_flight, run.waits) == (0, 0, 0)
    assert run.wall > 0
    assert "0 calls" in run.sentence
    assert bars(run) == []


def test_failed_call_is_counted_and_marked(provider: Provider, llm: OpenAI) -> None:
    provider.configure(first_token=0)
    provider.configure(models=["other"])
    with Timeline("404") as run, pytest.raises(openai.NotFoundError):
        llm.invoke(PROMPTS[0])
    assert (run.calls, run.failed) == (1, 1)
    assert "1 failed" in run.sentence
    assert [bar.strip()[-1] for bar in bars(run)] == ["×"]


def test_timeout_and_retry_are_counted_and_marked(
    provider: Provider, llm: OpenAI
) -> None:
    provider.configure(first_token=30)
    impatient = OpenAI(timeout=0.3, max_retries=1)
    with Timeline("timeout") as run, pytest.raises(openai.APITimeoutError):
        impatient.invoke(PROMPTS[0])
    assert (run.attempts, run.calls, run.retried, run.cancelled) == (2, 1, 1, 0)
    assert (run.timed_out, run.failed, run.peak_in_flight) == (2, 0, 1)
    assert "1 call, 1 retry, 2 timed out" in run.sentence
    [bar] = bars(run)  # the retry is in the same row
    assert re.fullmatch(r"░+T +░+T", bar.strip())


def test_cancelled_coroutine_is_counted_and_marked(
    provider: Provider, llm: OpenAI, until_in_flight: Callable[[int], None]
) -> None:
    provider.configure(first_token=30)

    async def main() -> None:
        call = asyncio.create_task(llm.ainvoke(PROMPTS[0]))
        await asyncio.to_thread(until_in_flight, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    with Timeline("cancelled") as run:
        asyncio.run(main())
    assert (run.calls, run.cancelled, run.failed) == (1, 1, 0)
    assert [bar.strip()[-1] for bar in bars(run)] == ["/"]


def test_bar_of_a_stream_shows_waiting_and_receiving(
    provider: Provider, llm: OpenAI
) -> None:
    provider.configure(first_token=0.3, per_token=0.03)
    with Timeline("stream") as run:
        list(ChatOpenAI().stream(PROMPTS[0]))
    [attempt] = run.journal
    assert attempt.first_byte - attempt.arrival >= 0.3
    assert attempt.end - attempt.first_byte >= 0.2
    [bar] = bars(run)
    assert re.fullmatch(r" *░{5,}█{5,} *", bar)


def test_journal_is_assigned_once_and_complete(provider: Provider, llm: OpenAI) -> None:
    assigned: list[list[Attempt]] = []

    class Watched(Timeline):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "journal":
                assigned.append(list(value))
            super().__setattr__(name, value)

    provider.configure(first_token=0)
    with Watched("watched") as run:
        in_threads(llm)
    assert [len(journal) for journal in assigned] == [0, 4]
    assert run.journal == assigned[-1]


def test_timeline_can_be_used_again(provider: Provider, llm: OpenAI) -> None:
    provider.configure(first_token=0)
    run = Timeline("again")
    for prompt in PROMPTS[:2]:
        with run:
            llm.invoke(prompt)
        assert [attempt.prompt for attempt in run.journal] == [prompt]


# Calls that outlast the run


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Run a function in a thread; the test waits for it at its end."""
    with ThreadPoolExecutor() as executor:
        yield lambda call: (executor.submit(call), None)[1]


def test_call_still_in_flight_at_the_end_is_shown_up_to_the_end(
    provider: Provider,
    llm: OpenAI,
    in_background: Callable[[Callable[[], Any]], None],
    until_in_flight: Callable[[int], None],
) -> None:
    provider.configure(first_token=2)
    with Timeline("left behind") as run:
        in_background(lambda: llm.invoke(PROMPTS[0]))
        until_in_flight(1)
    [attempt] = run.journal
    assert attempt.state == "in flight"
    assert attempt.arrival <= attempt.first_byte <= attempt.end == run.wall
    assert (run.calls, run.peak_in_flight, run.failed, run.cancelled) == (1, 1, 0, 0)
    [bar] = bars(run)
    assert bar.endswith(">")


def test_bar_of_a_call_in_flight_fills_the_last_column(
    provider: Provider,
) -> None:
    run = Timeline("any length")
    for milliseconds in range(1, 3000):
        run.wall = milliseconds / 1000
        run.journal = [Attempt("a", 1, "in flight", 0, run.wall, run.wall)]
        [bar] = bars(run)
        assert bar.endswith(">"), run.wall


@pytest.mark.parametrize("per_token", [0, 0.2], ids=["ends", "still streaming"])
def test_bytes_that_arrive_after_the_end_do_not_extend_the_run(
    provider: Provider,
    llm: OpenAI,
    in_background: Callable[[Callable[[], Any]], None],
    until_in_flight: Callable[[int], None],
    per_token: float,
) -> None:
    provider.configure(first_token=0.15, per_token=per_token)
    chat = ChatOpenAI(max_completion_tokens=2)
    with Timeline("a moment early") as run:
        in_background(lambda: list(chat.stream(PROMPTS[0])))
        until_in_flight(1)
    [attempt] = run.journal
    assert attempt.arrival <= attempt.first_byte <= attempt.end <= run.wall
    assert run.overlap <= 1
    assert [len(bar) for bar in bars(run)] == [COLUMNS]


# Errors


def test_error_before_connect_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_current", None)
    with pytest.raises(ProviderError, match=r"connect\(\)"):
        Timeline("too early").__enter__()


def test_reset_of_the_journal_during_the_run_is_an_error(
    provider: Provider, llm: OpenAI
) -> None:
    provider.configure(first_token=0)

    def run() -> None:
        with Timeline("lost"):
            llm.invoke("one")
            llm.invoke("two")
            provider.ask("/_provider/reset", "POST")

    with pytest.raises(ProviderError, match=r"2 attempts of 'lost'.*reset"):
        run()


def test_stub_that_stops_during_the_run_is_an_error(provider: Provider) -> None:
    message = r"has stopped.*connect\(\)"
    with pytest.raises(ProviderError, match=message), Timeline("stopped"):
        provider.stop()


def test_stub_that_is_restarted_during_the_run_is_an_error(provider: Provider) -> None:
    def run() -> None:
        with Timeline("another"):
            provider.stop()
            connect()

    with pytest.raises(ProviderError):
        run()


@pytest.mark.parametrize("live", [False, True])
def test_error_in_the_block_is_not_masked(
    provider: Provider, llm: OpenAI, live: bool, recorder: "Recorder"
) -> None:
    provider.configure(first_token=0)

    def run() -> None:
        with Timeline("lost", live=live):
            llm.invoke("one")
            provider.ask("/_provider/reset", "POST")
            raise KeyError

    with pytest.raises(KeyError):
        run()


def test_figures_are_available_after_an_error_in_the_block(
    provider: Provider, llm: OpenAI
) -> None:
    provider.configure(first_token=0)

    def fail(run: Timeline) -> None:
        with run:
            llm.invoke("one")
            raise KeyError

    run = Timeline("half")
    with pytest.raises(KeyError):
        fail(run)
    assert run.calls == 1


# Text and pictures


def test_sentence_has_the_figures_of_the_run() -> None:
    run = timeline_of(
        attempt(0),
        attempt(1, state="failed"),
        attempt(2, state="cancelled", attempt=2),
        name="mixed",
    )
    assert run.sentence == (
        "mixed: 2 calls, 1 retry, 1 failed, 1 cancelled, at most 3 in flight, "
        "0.63 s; the waits add up to 1.80 s."
    )
    assert repr(run).startswith(run.sentence)
    assert timeline_of(attempt(0)).sentence.startswith(
        "run: 1 call, at most 1 in flight"
    )


def test_bar_shows_times_and_state_of_a_call() -> None:
    marks = {"answered": "█", "failed": "×", "cancelled": "/", "timed out": "T"}
    for state, mark in {**marks, "in flight": ">"}.items():
        run = timeline_of(attempt(0), attempt(50, state=state, prompt="a\n  b"))
        first, second = bars(run)
        assert len(first) == len(second) == COLUMNS
        assert re.fullmatch(r"░+█+ *", first)
        assert re.fullmatch(rf" +░+█*{mark} *", second)
        assert "\n   2 a b   " in repr(run)


def test_retry_is_in_the_row_of_its_call() -> None:
    first = attempt(0, prompt="a", state="timed out", end=0.3)
    twin = attempt(1, prompt="a", state="timed out", end=0.9)
    other = attempt(2, prompt="b")
    retry = attempt(40, prompt="a", attempt=2, state="failed")
    twin_retry = attempt(95, prompt="a", attempt=2)
    second_retry = attempt(120, prompt="a", attempt=3)
    unknown = attempt(130, prompt="c", attempt=2)  # its call is not in this run

    run = timeline_of(first, twin, other, retry, twin_retry, second_retry, unknown)

    assert run.rows == [
        [first, retry, second_retry],
        [twin, twin_retry],
        [other],
        [unknown],
    ]
    assert len(bars(run)) == 4


def test_retry_is_not_in_the_row_of_an_answered_call() -> None:
    answered = attempt(0, prompt="a")
    failed = attempt(1, prompt="a", state="failed")
    retry = attempt(90, prompt="a", attempt=2)

    assert timeline_of(answered, failed, retry).rows == [[answered], [failed, retry]]


def test_run_of_5000_failed_calls_and_their_retries_is_drawn_quickly() -> None:
    first = [attempt(n, prompt="a", state="failed") for n in range(5000)]
    retries = [attempt(n, prompt="a", attempt=2) for n in range(6000, 11000)]
    start = time.process_time()

    run = timeline_of(*first, *retries)
    repr(run)
    picture(run)

    assert time.process_time() - start < 5


def test_marked_moment_is_shown_in_text_and_picture(provider: Provider) -> None:
    with Timeline("marked") as run:
        run.mark("you gave up here")
    [(moment, _)] = run.marks
    assert 0 <= moment <= run.wall
    [bar] = bars(run)
    assert bar.strip() == "^"
    assert "you gave up here" in repr(run)
    assert " you gave up here " in texts(run)
    with run:
        run.mark("two\nlines")
    assert [text for _, text in run.marks] == ["two lines"]


def test_picture_has_numbered_rows_with_prompts_and_seconds() -> None:
    run = timeline_of(
        attempt(0, prompt="Why?"), attempt(1, state="timed out", prompt="Who?")
    )
    shown = texts(run)
    assert [text for text in shown if text in ("1", "2", "Why?", "Who?")] == [
        "1",
        "Why?",
        "2",
        "Who?",
    ]
    assert [text.strip() for text in shown if text.endswith(" s")] == [
        "0.60 s",
        "0.60 s",
    ]
    assert "timed out" in shown
    assert "cancelled" not in shown  # the legend has only what is drawn


def test_comparison_has_numbered_bars_and_the_time_of_each_run() -> None:
    slow = timeline_of(attempt(0), attempt(300), name="slow")
    fast = timeline_of(attempt(0), attempt(1, prompt="b"), name="fast")
    shown = texts(Timeline.compare(slow, fast))
    numbers = [text for text in shown if text.isdecimal()]
    assert numbers[:4] == ["1", "2", "1", "3"]  # of the prompts, in all runs
    assert [text.strip() for text in shown if text.endswith(" s")] == ["3.6 s", "0.6 s"]


def test_only_the_first_bars_of_a_long_run_are_shown() -> None:
    run = timeline_of(*map(attempt, range(ROWS + 5)))
    assert len(bars(run)) == ROWS
    assert repr(run).endswith("… and 5 more")


def test_back_to_back_calls_share_a_lane() -> None:
    first = attempt(0, arrival=0.0, first_byte=1.0, end=1.0)
    next_call = attempt(1, arrival=1.0, first_byte=2.0, end=2.0)
    overlapping = attempt(2, arrival=1.5, first_byte=2.5, end=2.5)
    run = timeline_of(first, next_call, overlapping)
    assert run.peak_in_flight == 2
    assert run.lanes == [[first, next_call], [overlapping]]


@pytest.mark.parametrize("calls", [0, 12, 200])
def test_picture_is_a_png_that_fits_a_page(calls: int) -> None:
    states = ["answered", "failed", "cancelled", "in flight"]
    run = timeline_of(*[attempt(i, state=states[i % 4]) for i in range(calls)])
    width, height = picture(run).size
    assert 600 <= width <= 1200
    assert 50 <= height <= 700


def test_run_of_200_real_calls_can_be_drawn(provider: Provider) -> None:
    provider.configure(first_token=0.01, per_token=0)

    async def main() -> None:
        async def call(number: int) -> None:
            body = {"model": "m", "prompt": str(number)}
            async with session.post(f"{provider.url}/v1/completions", json=body):
                pass

        connector = aiohttp.TCPConnector(limit=20)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*map(call, range(200)))

    with Timeline("200") as run:
        asyncio.run(main())
    assert run.calls == 200
    assert run.peak_in_flight <= 20
    picture(run)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "text",
    [r"Solve $\frac{$.", "Is $4 < $5? \\alpha_ %d {} <b>&amp;", "日本語で", ""],
    ids=["formula", "special characters", "Japanese", "empty"],
)
def test_any_prompt_and_any_name_can_be_drawn_without_warnings(text: str) -> None:
    run = timeline_of(attempt(0, prompt=text), name=text)
    picture(run)
    picture(Timeline.compare(run, run))
    assert text in repr(run)


def test_comparison_has_a_row_for_each_run() -> None:
    slow = timeline_of(*[attempt(i * 60) for i in range(3)], name="one by one")
    fast = timeline_of(*map(attempt, range(3)), name="at once")
    head, *rows = repr(Timeline.compare(slow, fast)).splitlines()
    assert head.split() == ["wall", "calls", "in", "flight", "waits", "overlap"]
    assert [re.split(r"  +", row) for row in rows] == [
        ["one by one", "1.81 s", "3", "1", "1.80 s", "1.0 ×"],
        ["at once", "0.63 s", "3", "3", "1.80 s", "2.9 ×"],
    ]
    assert len({len(row) for row in [head, *rows]}) == 1


def test_comparison_has_one_time_axis_for_all_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = timeline_of(attempt(0), attempt(180), name="slow")
    fast = timeline_of(attempt(0), name="fast")
    drawn: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    picture(Timeline.compare(slow, fast))
    [figure] = drawn
    limits = [axes.get_xlim() for axes in figure.axes]
    assert limits == [(0, slow.wall)] * 2


# Live timelines


class Recorder:
    """Replaces IPython's display function and the handle that it returns."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.redrawn = threading.Event()

    def __call__(self, frame: Any, **options: Any) -> "Recorder":
        assert options["display_id"]
        self.shown.append(frame)
        return self

    def update(self, frame: Any, **options: Any) -> None:
        assert options.get("raw", False) == isinstance(frame, dict)
        self.shown.append(frame)
        self.redrawn.set()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(IPython.display, "display", recorder)
    return recorder


def test_live_timeline_redraws_during_the_run_and_ends_with_the_picture(
    provider: Provider,
    llm: OpenAI,
    recorder: Recorder,
    in_background: Callable[[Callable[[], Any]], None],
    until_in_flight: Callable[[int], None],
) -> None:
    provider.configure(first_token=0.5)
    with Timeline("<live>", live=True) as run:
        in_background(lambda: llm.invoke("a < b?"))
        until_in_flight(1)
        for _ in range(2):
            recorder.redrawn.clear()
            assert recorder.redrawn.wait(10)
        until_in_flight(0)
    *frames, last = recorder.shown
    assert last is run
    assert [attempt.state for attempt in run.journal] == ["answered"]
    assert "0 calls" in frames[0]["text/plain"]
    assert any(">|" in frame["text/plain"] for frame in frames)
    for frame in frames:
        assert set(frame) == {"text/plain", "text/html"}
        assert frame["text/html"].startswith("<pre>&lt;live&gt;: ")
    assert not any("matplotlib" in str(frame) for frame in frames)


def redraws(recorder: Recorder, count: int) -> None:
    """Wait until the timeline has been redrawn this many times."""
    for _ in range(count):
        recorder.redrawn.clear()
        assert recorder.redrawn.wait(10)


@pytest.fixture
def long_call(
    provider: Provider, until_in_flight: Callable[[int], None]
) -> Iterator[Callable[[], HTTPConnection]]:
    """Start a call that stays in flight until its connection is closed."""

    def start() -> HTTPConnection:
        body = json.dumps({"model": "m", "prompt": "long"})
        with provider.behaving(first_token=600):
            call.request("POST", "/v1/completions", body)
            until_in_flight(1)
        return call

    call = HTTPConnection(provider.url.removeprefix("http://"))
    yield start
    call.close()
    until_in_flight(0)


def test_live_timeline_reads_only_what_has_changed(
    provider: Provider,
    llm: OpenAI,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    long_call: Callable[[], HTTPConnection],
    until_in_flight: Callable[[int], None],
) -> None:
    ask, read = provider.ask, list[list[str]]()

    def recording(path: str, *rest: Any) -> Any:
        page = ask(path, *rest)
        if "/journal" in path:
            read.append([entry["prompt"] for entry in page["attempts"]])
        return page

    monkeypatch.setattr(provider, "ask", recording)
    provider.configure(first_token=0)
    with Timeline("long", live=True) as run:
        connection = long_call()
        in_threads(llm)
        redraws(recorder, 2)
        assert [attempt.state for attempt in run.journal][:2] == [
            "in flight",
            "answered",
        ]
        assert run.attempts == 5
        read.clear()
        redraws(recorder, 3)
        assert read[:3] == [[], [], []]
        connection.close()
        until_in_flight(0)
        redraws(recorder, 2)
        assert [prompts for prompts in read if prompts] == [["long"]]
    long, *others = run.journal
    assert (long.prompt, long.state) == ("long", "cancelled")
    assert long.end == max(attempt.end for attempt in run.journal)
    assert [attempt.state for attempt in others] == ["answered"] * 4


def test_bar_of_a_call_in_flight_grows_with_every_redraw(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    long_call: Callable[[], HTTPConnection],
) -> None:
    update, ends = recorder.update, list[float]()

    def record(frame: Any, **options: Any) -> None:
        if isinstance(frame, dict) and run.journal:
            assert run.journal[0].end == run.wall
            ends.append(run.wall)
        update(frame, **options)

    monkeypatch.setattr(recorder, "update", record)
    with Timeline("grows", live=True) as run:
        connection = long_call()
        redraws(recorder, 4)
        connection.close()
    assert len(set(ends)) >= 3
    assert ends == sorted(ends)


def test_slow_redraws_happen_less_often(
    provider: Provider, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, starts, busy = recorder.update, list[float](), 0.02

    def slow_update(frame: Any, **options: Any) -> None:
        if isinstance(frame, dict):
            starts.append(time.monotonic())
            end = time.thread_time() + busy
            while time.thread_time() < end:
                pass
        update(frame, **options)

    monkeypatch.setattr(recorder, "update", slow_update)
    with Timeline("slow", live=True):
        redraws(recorder, 2)
    assert starts[1] - starts[0] >= REST * busy > 2 * REDRAW


def test_late_redraw_does_not_change_the_result(
    provider: Provider,
    llm: OpenAI,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider.configure(first_token=0)
    redraw_has_asked, never, ask = threading.Event(), threading.Event(), provider.ask

    def slow_for_the_redraw(*args: Any) -> Any:
        response = ask(*args)
        if threading.current_thread() is not threading.main_thread():
            redraw_has_asked.set()
            never.wait(0.5)
        return response

    monkeypatch.setattr(provider, "ask", slow_for_the_redraw)
    with Timeline("race", live=True) as run:
        assert redraw_has_asked.wait(10)
        llm.invoke("one")
    assert run.calls == 1
    assert recorder.shown[-1] is run


def test_redraw_thread_ends_with_the_block_even_after_an_error(
    provider: Provider, recorder: Recorder
) -> None:
    before = threading.active_count()
    with pytest.raises(ProviderError), Timeline("stopped", live=True):
        provider.stop()
    assert threading.active_count() == before


def test_live_timeline_in_a_plain_script_has_the_figures(
    provider: Provider, llm: OpenAI
) -> None:
    provider.configure(first_token=0)
    with Timeline("script", live=True) as run:
        llm.invoke("one")
    assert run.calls == 1

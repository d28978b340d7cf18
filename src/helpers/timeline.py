"""What the stub saw while a block of code ran, as figures, a picture and text.

with Timeline("two threads") as run:
    ...
run
"""

import contextlib
import html
import textwrap
import threading
import time
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Self

from .connection import ProviderError, current

SETTLE = 0.25  # seconds that the stub may take to notice the end of a call
REDRAW = 0.1  # seconds between two redraws of a live timeline
REST = 20  # after a slow redraw, pause for this many times its CPU time
COLUMNS = 48  # characters per row of bars in the text
ROWS = 20  # rows in the text; the rest are left out


@dataclass(frozen=True)
class Attempt:
    """One HTTP attempt; times are in seconds since the run started."""

    prompt: str
    attempt: int  # 1; higher for a client's own retries
    state: str  # answered, failed, in flight; cancelled or timed out if it hung up
    arrival: float
    first_byte: float  # the end if there was none, or if the answer isn't a stream
    end: float  # the end of the run if it is still in flight

    def label(self, room: int) -> str:
        """The prompt on one line, in at most this many characters."""
        words = " ".join(self.prompt.split())
        short = textwrap.shorten(words, room, placeholder="…")
        return short if len(short) > room / 2 or short == words else words[:room]


class Timeline:
    """A `with` block around calls. Afterwards it shows what the stub saw of them.

    It draws itself as the last expression of a cell and, with `live=True`, up to
    ten times a second while the block runs. Raises ProviderError if there is no stub
    or if its journal doesn't contain the whole run.
    """

    def __init__(self, name: str, *, live: bool = False) -> None:
        self.name = name
        self.journal: list[Attempt] = []  # in order of arrival
        self.wall = 0.0  # seconds that the block took
        self.marks: list[tuple[float, str]] = []  # seconds since the start, and text
        self._live = live
        self._entered = time.monotonic()

    @property
    def attempts(self) -> int:
        """HTTP attempts, including a client's own retries."""
        return len(self.journal)

    @property
    def calls(self) -> int:
        """Attempts that weren't retries."""
        return sum(attempt.attempt == 1 for attempt in self.journal)

    @property
    def retried(self) -> int:
        """Attempts that were a client's own retries."""
        return self.attempts - self.calls

    @property
    def failed(self) -> int:
        """Attempts that got an error or a broken response."""
        return sum(attempt.state == "failed" for attempt in self.journal)

    @property
    def cancelled(self) -> int:
        """Attempts whose client hung up early for another reason than its timeout."""
        return sum(attempt.state == "cancelled" for attempt in self.journal)

    @property
    def timed_out(self) -> int:
        """Attempts whose client hung up when its timeout was over, or nearly (80%)."""
        return sum(attempt.state == "timed out" for attempt in self.journal)

    @property
    def waits(self) -> float:
        """The total time of all attempts, in seconds."""
        return sum(attempt.end - attempt.arrival for attempt in self.journal)

    @property
    def overlap(self) -> float:
        """The total of the waits, divided by the wall time: 1 if they don't overlap."""
        return self.waits / self.wall if self.wall else 0.0

    @property
    def peak_in_flight(self) -> int:
        """The highest number of attempts in flight at the same moment."""
        return len(self.lanes)

    @property
    def lanes(self) -> list[list[Attempt]]:
        """The attempts, packed into as few lanes as possible without overlaps."""
        lanes: list[list[Attempt]] = []
        ends: list[tuple[float, int]] = []  # a heap: when each lane becomes free
        for attempt in self.journal:
            if ends and ends[0][0] <= attempt.arrival:
                _, lane = heappop(ends)
                lanes[lane].append(attempt)
            else:
                lane = len(lanes)
                lanes.append([attempt])
            heappush(ends, (attempt.end, lane))
        return lanes

    @property
    def rows(self) -> list[list[Attempt]]:
        """One row for each call, in order of arrival. A row lists the call's attempts.

        A retry joins the row with the same prompt that failed first. The journal
        doesn't say which one it belongs to, so among equal prompts this is a guess.
        """
        rows: list[list[Attempt]] = []
        # For each retry that may follow: the rows it may join, by when they ended.
        waiting: dict[tuple[str, int], list[tuple[float, int]]] = {}
        for attempt in self.journal:
            ended = waiting.get((attempt.prompt, attempt.attempt), [])
            if ended and ended[0][0] <= attempt.arrival:
                _, number = heappop(ended)
                rows[number].append(attempt)
            else:
                number = len(rows)
                rows.append([attempt])
            if attempt.state != "answered":
                key = attempt.prompt, attempt.attempt + 1
                heappush(waiting.setdefault(key, []), (attempt.end, number))
        return rows

    @property
    def sentence(self) -> str:
        """What the picture shows, in one sentence."""
        counts = "1 call" if self.calls == 1 else f"{self.calls} calls"
        for number, word in (
            (self.retried, "retry" if self.retried == 1 else "retries"),
            (self.failed, "failed"),
            (self.cancelled, "cancelled"),
            (self.timed_out, "timed out"),
        ):
            counts += f", {number} {word}" if number else ""
        return (
            f"{self.name}: {counts}, at most {self.peak_in_flight} in flight, "
            f"{self.wall:.2f} s; the waits add up to {self.waits:.2f} s."
        )

    def mark(self, text: str) -> None:
        """Mark this moment of the run in the picture."""
        line = " ".join(text.split())
        self.marks.append((time.monotonic() - self._entered, line))

    @staticmethod
    def compare(*runs: "Timeline") -> "Comparison":
        """Several runs on a shared time axis, and a table of their figures."""
        return Comparison(runs)

    def __enter__(self) -> Self:
        self._provider = current()
        mark = self._provider.ask(f"/_provider/journal?since={10**12}")
        self._since, self._start = mark["next"], mark["now"]
        self._entered = time.monotonic()
        self.marks = []
        self._changed = 0  # number of the last change that we read
        self._known: dict[int, Attempt] = {}  # by number in the stub's journal
        self._open: dict[int, Any] = {}  # entries that have not ended
        if self._live:
            self._show()
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if self._live:
            self._ended.set()
            self._thread.join()
        try:
            self._read(settle=SETTLE)
        except ProviderError:
            if error is None:  # the block's own error is more helpful
                raise
        if self._live:
            self._handle.update(self)

    def _show(self) -> None:
        """Draw while the block runs, as text: a picture would take too long."""
        from IPython.display import display

        def frame() -> dict[str, str]:
            text = repr(self)
            return {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}

        def redraw() -> None:
            busy = 0.0  # this thread's CPU time for the last redraw
            with contextlib.suppress(ProviderError):  # reported when the block ends
                while not self._ended.wait(max(REDRAW, REST * busy)):
                    start = time.thread_time()
                    self._read()
                    self._handle.update(frame(), raw=True)
                    busy = time.thread_time() - start

        self._handle: Any = display(frame(), raw=True, display_id=True)
        if self._handle is None:  # a plain script
            self._live = False
            return
        self._ended = threading.Event()
        self._thread = threading.Thread(target=redraw, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return "\n".join([self.sentence, *_bars(self)])

    def _repr_png_(self) -> bytes:
        from .drawing import png  # imported late, because matplotlib loads slowly

        return png([self])

    def _read(self, settle: float = 0) -> None:
        """Read from the journal what has changed in this run's attempts."""
        query = f"since={self._since}&settle={settle}&changed={self._changed}"
        page = self._provider.ask(f"/_provider/journal?{query}")
        if self._provider.exit_code is not None:  # another stub has its address now
            raise ProviderError(self._provider.explain_no_answer())
        if page["dropped"]:
            raise ProviderError(
                f"The journal no longer contains {page['dropped']} attempts of "
                f"{self.name!r}: it was reset, or the run has more attempts than the "
                "journal keeps. Put fewer calls into one Timeline."
            )
        now, self._changed = page["now"], page["changed"]
        self._open |= {entry["number"]: entry for entry in page["attempts"]}
        for number, entry in list(self._open.items()):
            end = min(entry["end"] or now, now)
            first_byte = entry["first_byte"] if entry["stream"] else end
            moments = entry["arrival"], min(first_byte or end, end), end
            prompt = entry["prompt"] or entry["route"]
            since_start = (moment - self._start for moment in moments)
            attempt = Attempt(prompt, entry["attempt"], entry["state"], *since_start)
            self._known[number] = attempt
            if end == entry["end"]:
                del self._open[number]
        self.wall = now - self._start
        # Assigned in one step, because the block may read it at any time.
        self.journal = [self._known[number] for number in sorted(self._known)]


@dataclass(frozen=True)
class Comparison:
    """Several runs on a shared time axis, below a table of their figures."""

    runs: tuple[Timeline, ...]

    def __repr__(self) -> str:
        width = max(len(run.name) for run in self.runs)
        rows = [f"{'':{width}}  {'wall':>8}  calls  in flight  {'waits':>8}  overlap"]
        rows += [
            f"{run.name:{width}}  {run.wall:6.2f} s  {run.calls:5}  "
            f"{run.peak_in_flight:9}  {run.waits:6.2f} s  {run.overlap:5.1f} ×"
            for run in self.runs
        ]
        return "\n".join(rows)

    def _repr_png_(self) -> bytes:
        from .drawing import png

        return png(self.runs, table=repr(self))


def _bars(run: Timeline) -> list[str]:
    """One line per call: its number and prompt, its attempts as bars, its seconds.

    In a bar, ░ means waiting for the first byte and █ receiving. The last character
    is × for an error, / if the call was cancelled, T if it timed out, and > if it is
    still in flight. A line with ^ is for a moment that the block marked.
    """
    wall = max(run.wall, 1e-9)
    states = {"answered": "█", "failed": "×", "cancelled": "/", "timed out": "T"}
    lines = []

    def column(moment: float) -> int:
        return min(int(moment / wall * (COLUMNS - 1)), COLUMNS - 1)

    def line(label: str, bar: str, seconds: float) -> None:
        lines.append(f"  {label[:28]:28} |{bar:{COLUMNS}}| {seconds:.2f} s")

    rows = run.rows
    for number, row in enumerate(rows[:ROWS], 1):
        bar = ""
        for attempt in row:
            start, first = column(attempt.arrival), column(attempt.first_byte)
            end = column(attempt.end)
            bar = bar[:start].ljust(start) + "░" * (first - start) + "█" * (end - first)
            bar += states.get(attempt.state, ">")
        line(f"{number:2} {row[0].label(25)}", bar, row[-1].end - row[0].arrival)
    for moment, text in run.marks:
        line(text, " " * column(moment) + "^", moment)
    if len(rows) > ROWS:
        lines.append(f"  … and {len(rows) - ROWS} more")
    return lines

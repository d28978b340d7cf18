"""Self-checking exercises: run a reader's function, and report what happened.

    @judge
    def one_by_one(trial: Trial) -> str:
        \"\"\"Ask the questions one after another, and return the answers.\"\"\"
        answers = trial.call(["Who wrote Hamlet?", "Why is the sky blue?"])
        trial.expect(trial.run.calls == 2, "Send one call for each question.")
        return trial.figures

The reader runs `one_by_one(my_function)`. This call prints what the judge returned, or
"not yet" with the hint for the first expectation that isn't met. An error in the
reader's function isn't raised. It is shown as a hint, too.
"""

import asyncio
import copy
import functools
import inspect
import linecache
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from IPython.display import display

from .connection import ProviderError, current
from .timeline import Timeline

QUIET = 0.2  # seconds without a new call after which an earlier try has ended


class NotYet(Exception):  # noqa: N818 - not an error
    """The solution doesn't do what the task asks for; the message is a hint."""


class Trial:
    """One check of a solution: calls the solution, and records what the stub saw."""

    def __init__(self, solution: Any, task: str) -> None:
        self.solution = solution
        self.name = getattr(solution, "__name__", "your function")
        self.task = task
        self.run = Timeline(self.name)  # what the stub saw of the latest call
        self.tokens = {"in": 0, "out": 0}  # used by the latest call of the solution
        self.raised = False  # whether its result is an exception that it raised
        self.seconds = 0.0  # how long the latest call of the solution took
        self.blocked = 0.0  # longest time the event loop was blocked, in seconds

    @property
    def figures(self) -> str:
        """The number of calls, how many were in flight at once, and the seconds."""
        run = self.run
        calls = "1 call" if run.calls == 1 else f"{run.calls} calls"
        return f"{calls}, {run.peak_in_flight} at a time, {self.seconds:.1f} s"

    def expect(self, holds: bool, hint: str) -> None:
        """Raise NotYet with this hint if the expectation isn't met."""
        if not holds:
            raise NotYet(hint)

    def call(
        self,
        *args: Any,
        until_quiet: bool = False,
        may_raise: bool = False,
        advice: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """Call the solution with these arguments; return its result.

        With `until_quiet`, the run also includes what happens after the solution has
        returned. With `may_raise`, an exception is returned as the result. Otherwise,
        an exception leads to NotYet. `advice` maps parts of the exception's name or
        message to sentences that are added to the hint. A solution that did nothing
        leads to NotYet, too.
        """
        self._start()
        with self.run:
            try:
                result = snapshot(self.solution(*map(snapshot, args)))
            except (Exception, SystemExit) as error:
                result = self._caught(error, may_raise, advice)
            finally:
                self._stop(until_quiet)
            if until_quiet:
                wait_until_quiet()
        if inspect.iscoroutine(result):
            result.close()
            raise NotYet(
                f"{self.name} returned a coroutine. Write it with `def`, not `async "
                "def`."
            )
        return self._done(result)

    async def call_async(
        self,
        *args: Any,
        until_quiet: bool = False,
        may_raise: bool = False,
        advice: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """Like `call`, for a solution that is a coroutine function.

        Also measures how long the solution blocked the event loop.
        """
        await asyncio.to_thread(self._start)  # calls of an earlier try need the loop
        watch = asyncio.create_task(self._watch_loop())
        await asyncio.sleep(0)  # let the watcher start
        try:
            with self.run:
                try:
                    result = self.solution(*map(snapshot, args))
                    if inspect.isawaitable(result):
                        result = snapshot(await result)
                    elif result is not None and result is not ...:
                        raise NotYet(f"Write {self.name} with `async def`, not `def`.")
                except NotYet:
                    raise
                except (Exception, SystemExit, asyncio.CancelledError) as error:
                    task = asyncio.current_task()
                    cancelled = isinstance(error, asyncio.CancelledError)
                    if cancelled and task and task.cancelling():  # by the reader
                        raise
                    result = self._caught(error, may_raise, advice)
                finally:
                    self._stop(until_quiet)
                if until_quiet:
                    await asyncio.to_thread(wait_until_quiet)
            await asyncio.sleep(0.1)  # to notice a solution that blocks at its end
        finally:
            watch.cancel()
        if inspect.isawaitable(result):
            raise NotYet(
                f"{self.name} returned something that was never awaited: "
                f"{type(result).__name__}. Write `return await …`."
            )
        return self._done(result)

    async def _watch_loop(self) -> None:
        interval = 0.05  # seconds
        while True:
            start = time.perf_counter()
            await asyncio.sleep(interval)
            pause = time.perf_counter() - start - interval
            self.blocked = max(self.blocked, pause)

    def _start(self) -> None:
        if not callable(self.solution):
            raise NotYet(
                f"The check needs the function itself, without parentheses, but got "
                f"{self.solution!r:.80}."
            )
        if current().live:
            raise NotYet("Exercises use the stub. Unset LLM_LIVE, and run connect().")
        if not wait_until_quiet():
            raise NotYet(
                "An earlier try is still sending calls. Wait until it has ended, or "
                "restart the kernel."
            )
        self.run = Timeline(self.name)
        self.blocked, self.raised = 0.0, False
        self._used = current().ask("/_provider/stats")
        self._started = time.perf_counter()

    def _stop(self, mark: bool) -> None:
        self.seconds = time.perf_counter() - self._started
        if mark:
            self.run.mark(f"{self.name} returned")

    def _done(self, result: Any) -> Any:
        now, before = current().ask("/_provider/stats"), self._used
        names = {"in": "prompt_tokens", "out": "completion_tokens"}
        self.tokens = {key: now[n] - before[n] for key, n in names.items()}
        if self.run.calls == 0 and (result is None or result is ...):
            returned = f" ({self.name} returned None.)" if result is None else ""
            raise NotYet(self.task + returned)
        return result

    def _caught(
        self, error: BaseException, may_raise: bool, advice: Mapping[str, str]
    ) -> BaseException:
        """Return the error if the solution may raise it. If not, raise NotYet."""
        if may_raise:
            self.raised = True
            return error
        file = getattr(getattr(self.solution, "__code__", None), "co_filename", "")
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == file and frame.lineno:
                line = linecache.getline(file, frame.lineno).strip()
                where = f"\n  on line {frame.lineno} of the cell: {line}"
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        hints = [text for part, text in advice.items() if part in what]
        raise NotYet("\n".join([f"{self.name} raised {what}{where}", *hints])) from None


def snapshot(value: Any) -> Any:
    """A copy of a list or dictionary, so that later changes don't reach it."""
    return copy.copy(value) if isinstance(value, list | dict) else value


def wait_until_quiet() -> bool:
    """Wait until no call is in flight or being sent; False if that takes too long."""
    deadline, seen = time.monotonic() + 10, -1
    while time.monotonic() < deadline:
        stats = current().ask("/_provider/stats")
        if stats["in_flight"] == 0 and stats["requests"] == seen:
            return True
        seen = stats["requests"]
        time.sleep(QUIET)
    return False


Judge = Callable[[Trial], str] | Callable[[Trial], Awaitable[str]]


def judge(function: Judge) -> Callable[[Any], Any]:
    """Turn a judge into a check for notebooks. Its docstring states the task."""
    task = " ".join((function.__doc__ or "").split())

    @functools.wraps(function)
    def check(solution: Any) -> None:
        trial = Trial(solution, task)
        with _reported(trial):
            _report(trial, function(trial))

    @functools.wraps(function)
    async def check_async(solution: Any) -> None:
        trial = Trial(solution, task)
        with _reported(trial):
            _report(trial, await function(trial))  # type: ignore[misc]

    return check_async if inspect.iscoroutinefunction(function) else check


@contextmanager
def _reported(trial: Trial) -> Iterator[None]:
    """Print the hint if the solution isn't right, or if its result can't be judged."""
    try:
        yield
    except NotYet as hint:
        _report(trial, None, str(hint))
    except ProviderError:
        raise
    except Exception as error:
        _report(trial, None, f"The check doesn't understand the result: {error}")


def _report(trial: Trial, seen: Any, hint: str = "") -> None:
    print(f"not yet: {hint}" if hint else f"✓ {seen}: done")
    if trial.run.calls:
        display(trial.run)

"""Exercises that check themselves: try a reader's function, and say what was seen.

    @judge
    def one_by_one(trial: Trial) -> str:
        \"\"\"Ask the questions one after another, and return the answers.\"\"\"
        answers = trial.call(["Who wrote Hamlet?", "Why is the sky blue?"])
        trial.expect(trial.run.calls == 2, "Send one call for each question.")
        return trial.figures

The reader writes `one_by_one(my_function)`. It prints what the judge returned, or
"not yet" with the hint for the first expectation that isn't met. It raises nothing:
an error in the reader's function is shown as a hint, too.
"""

import asyncio
import functools
import inspect
import linecache
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from IPython.display import display

from .connection import current
from .timeline import Timeline

QUIET = "/_provider/journal?settle=9"  # seconds that calls in flight get to end


class NotYet(Exception):  # noqa: N818 - not an error
    """The solution doesn't do what the task asks for; the message is a hint."""


class Trial:
    """One check of a solution: calls it, and keeps what it returned and did."""

    def __init__(self, solution: Any, task: str) -> None:
        self.solution = solution
        self.name = getattr(solution, "__name__", "your function")
        self.task = task
        self.run = Timeline(self.name)  # what the stub saw of the latest call
        self.seconds = 0.0  # that the latest call took
        self.blocked = 0.0  # the longest time that it blocked the event loop, seconds

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
        if_raises: str = "",
    ) -> Any:
        """Call the solution with these arguments; return its result.

        With `until_quiet`, the run also has what happens after the solution has
        returned. With `may_raise`, an exception is a result. Otherwise it raises
        NotYet, with `if_raises` added to the hint. Also raises NotYet if the solution
        did nothing.
        """
        self._start()
        with self.run:
            try:
                result = self.solution(*args)
            except Exception as error:
                result = self._caught(error, may_raise, if_raises)
            finally:
                self._stop(until_quiet)
            if until_quiet:
                current().ask(QUIET)
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
        if_raises: str = "",
    ) -> Any:
        """Like `call`, for a solution that is a coroutine function.

        Also measures for how long it blocked the event loop.
        """
        self._start()
        watch = asyncio.create_task(self._watch_loop())
        await asyncio.sleep(0)  # so that it starts
        try:
            with self.run:
                try:
                    result = self.solution(*args)
                    if inspect.isawaitable(result):
                        result = await result
                    elif result is not None and result is not ...:
                        raise NotYet(f"Write {self.name} with `async def`, not `def`.")
                except NotYet:
                    raise
                except Exception as error:
                    result = self._caught(error, may_raise, if_raises)
                finally:
                    self._stop(until_quiet)
                if until_quiet:
                    await asyncio.to_thread(current().ask, QUIET)
            await asyncio.sleep(0.1)  # to notice a block at its end
        finally:
            watch.cancel()
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
                f"The check needs the function itself, without parentheses, and got "
                f"{self.solution!r:.80}."
            )
        current().ask(QUIET)  # an earlier try may have left calls in flight
        self.run = Timeline(self.name)
        self.blocked = 0.0
        self._started = time.perf_counter()

    def _stop(self, mark: bool) -> None:
        self.seconds = time.perf_counter() - self._started
        if mark:
            self.run.mark(f"{self.name} returned")

    def _done(self, result: Any) -> Any:
        if self.run.calls == 0 and (result is None or result is ...):
            raise NotYet(self.task)
        return result

    def _caught(self, error: Exception, may_raise: bool, advice: str) -> Exception:
        """The error if it may be raised. If not, NotYet: what it was, and where."""
        if may_raise:
            return error
        file = getattr(getattr(self.solution, "__code__", None), "co_filename", "")
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == file and frame.lineno:
                line = linecache.getline(file, frame.lineno).strip()
                where = f" in line {frame.lineno} of the cell: {line}"
        raised = f"{self.name} raised {type(error).__name__}{where}\n  {error}"
        raise NotYet(f"{raised}\n{advice}".rstrip()) from None


Judge = Callable[[Trial], str] | Callable[[Trial], Awaitable[str]]


def judge(function: Judge) -> Callable[[Any], Any]:
    """Turn a judge into a check for notebooks. Its docstring says what is to do."""
    task = " ".join((function.__doc__ or "").split())

    @functools.wraps(function)
    def check(solution: Any) -> None:
        trial = Trial(solution, task)
        try:
            _report(trial, function(trial))
        except NotYet as hint:
            _report(trial, None, hint)

    @functools.wraps(function)
    async def check_async(solution: Any) -> None:
        trial = Trial(solution, task)
        try:
            _report(trial, await function(trial))  # type: ignore[misc]
        except NotYet as hint:
            _report(trial, None, hint)

    return check_async if inspect.iscoroutinefunction(function) else check


def _report(trial: Trial, seen: Any, hint: NotYet | None = None) -> None:
    print(f"not yet: {hint}" if hint else f"✓ {seen}: done")
    if trial.run.calls:
        display(trial.run)

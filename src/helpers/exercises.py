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
import functools
import inspect
import linecache
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from IPython.display import display

from .connection import current
from .timeline import Timeline

QUIET = "/_provider/journal?settle=9"  # seconds to wait for calls in flight to end


class NotYet(Exception):  # noqa: N818 - not an error
    """The solution doesn't do what the task asks for; the message is a hint."""


class Trial:
    """One check of a solution: calls the solution, and records what the stub saw."""

    def __init__(self, solution: Any, task: str) -> None:
        self.solution = solution
        self.name = getattr(solution, "__name__", "your function")
        self.task = task
        self.run = Timeline(self.name)  # what the stub saw of the latest call
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
        an exception leads to NotYet. `advice` has sentences to add to the hint, each
        for a part of the exception's name or message. A solution that did nothing
        leads to NotYet, too.
        """
        self._start()
        with self.run:
            try:
                result = self.solution(*args)
            except Exception as error:
                result = self._caught(error, may_raise, advice)
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
        advice: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        """Like `call`, for a solution that is a coroutine function.

        Also measures for how long it blocked the event loop.
        """
        self._start()
        watch = asyncio.create_task(self._watch_loop())
        await asyncio.sleep(0)  # let the watcher start
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
                except (Exception, asyncio.CancelledError) as error:
                    task = asyncio.current_task()
                    if task and task.cancelling():  # not the solution, but the reader
                        raise
                    result = self._caught(error, may_raise, advice)
                finally:
                    self._stop(until_quiet)
                if until_quiet:
                    await asyncio.to_thread(current().ask, QUIET)
            await asyncio.sleep(0.1)  # to notice if the solution blocked at its end
        finally:
            watch.cancel()
        if inspect.isawaitable(result):
            raise NotYet(
                f"{self.name} returned something that nobody has awaited: "
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
            returned = f" ({self.name} returned None.)" if result is None else ""
            raise NotYet(self.task + returned)
        return result

    def _caught(
        self, error: BaseException, may_raise: bool, advice: Mapping[str, str]
    ) -> BaseException:
        """Return the error if the solution may raise it. If not, raise NotYet."""
        if may_raise:
            return error
        file = getattr(getattr(self.solution, "__code__", None), "co_filename", "")
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == file and frame.lineno:
                line = linecache.getline(file, frame.lineno).strip()
                where = f"\n  in line {frame.lineno} of the cell: {line}"
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        hints = [text for part, text in advice.items() if part in what]
        raise NotYet("\n".join([f"{self.name} raised {what}{where}", *hints])) from None


Judge = Callable[[Trial], str] | Callable[[Trial], Awaitable[str]]


def judge(function: Judge) -> Callable[[Any], Any]:
    """Turn a judge into a check for notebooks. Its docstring states the task."""
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

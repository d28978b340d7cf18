"""The judges for all exercises: what they try, what they expect, and their hints."""

import asyncio
from collections.abc import Sequence
from typing import Any

import openai
from langchain_openai import ChatOpenAI

from helpers import Timeline
from helpers.connection import current
from helpers.exercises import Trial, judge
from helpers.timeline import Attempt

# The lessons' prompts, each with a word that only its answer contains.
KEYWORDS = {
    "What is the capital of France?": "Paris",
    "Explain the theory of relativity.": "Einstein",
    "How many planets orbit the Sun?": "planets",
    "Who wrote Hamlet?": "Shakespeare",
    "What is the chemical symbol for gold?": "Au",
    "Why is the sky blue?": "scatters",
    "What does HTTP stand for?": "Hypertext",
    "Name three primary colours of light.": "green",
    "What is the square root of 144?": "12",
    "How does a vaccine work?": "immune",
    "Which ocean is the largest?": "Pacific",
    "Hello how are you?": "doing well",
}
PROMPTS = list(KEYWORDS)


def text_of(answer: Any) -> str:
    """The text of a message or a plain string; the representation of anything else."""
    text = getattr(answer, "content", answer)
    return text if isinstance(text, str) else repr(text)


def answers(prompt: str, answer: Any) -> bool:
    """Whether this is the answer to the prompt."""
    is_text = isinstance(answer, str) or hasattr(answer, "content")
    return is_text and KEYWORDS[prompt] in text_of(answer)


def expect_list(trial: Trial, result: Any, prompts: Sequence[str]) -> list[Any]:
    """The result as a list with one item for each prompt."""
    trial.expect(
        isinstance(result, list | tuple),
        f"{trial.name} returned {type(result).__name__}. Return a list with one item "
        "for each prompt.",
    )
    trial.expect(
        len(result) == len(prompts),
        f"{trial.name} got {len(prompts)} prompts and returned {len(result)} items.",
    )
    return list(result)


def expect_answers_in_order(
    trial: Trial, result: Any, prompts: Sequence[str] = PROMPTS
) -> None:
    """Expect the answers to all prompts, in prompt order."""
    given = expect_list(trial, result, prompts)
    for prompt, answer in zip(prompts, given, strict=True):
        trial.expect(
            "Future" not in type(answer).__name__,
            "The list contains futures. Call result() on each one.",
        )
        trial.expect(
            any(answers(other, answer) for other in prompts),
            f"This isn't an answer: {text_of(answer)!r:.60}",
        )
        trial.expect(
            any(answers(prompt, other) for other in given),
            f"The list doesn't contain the answer to {prompt!r}.",
        )
        trial.expect(
            answers(prompt, answer),
            f"The answers aren't in prompt order: {prompt!r} has the answer "
            f"{text_of(answer)!r:.50}. If you collect answers as they complete, they "
            "are in order of arrival.",
        )


def expect_one_call_each(trial: Trial, prompts: Sequence[str] = PROMPTS) -> None:
    """Expect as many calls as there are prompts."""
    trial.expect(
        trial.run.calls > 0,
        f"{trial.name} sent no calls. A coroutine does nothing until it is awaited, "
        "and a function does nothing until it is called.",
    )
    trial.expect(
        trial.run.calls == len(prompts),
        f"{len(prompts)} prompts, but {trial.run.calls} calls. Send each prompt once.",
    )


def expect_results(trial: Trial, result: Any, fails: Sequence[str], hint: str) -> None:
    """Expect the answer or the exception for each prompt, in prompt order."""
    given = expect_list(trial, result, PROMPTS)
    for prompt, answer in zip(PROMPTS, given, strict=True):
        if prompt in fails:
            trial.expect(
                not isinstance(answer, Exception)
                or isinstance(answer, openai.OpenAIError),
                f"The list has {answer!r:.60}. Put in the exception that the call "
                "raised, not a new one.",
            )
            trial.expect(
                isinstance(answer, Exception),
                f"The call for {prompt!r} failed. Its place in the list should "
                f"contain the exception, not {text_of(answer)!r:.40}. {hint}",
            )
        else:
            trial.expect(
                answers(prompt, answer)
                or not any(answers(other, answer) for other in PROMPTS),
                f"The results aren't in prompt order: {prompt!r} has "
                f"{text_of(answer)!r:.50}.",
            )
            trial.expect(
                answers(prompt, answer),
                f"The call for {prompt!r} was answered, but its place in the list "
                f"contains {text_of(answer)!r:.60}.",
            )


def expect_pair(trial: Trial, result: Any, names: str) -> tuple[Any, Any]:
    """The result as a tuple of two."""
    kind = type(result).__name__
    kind += f" of {len(result)}" if isinstance(result, tuple) else ""
    trial.expect(
        isinstance(result, tuple) and len(result) == 2,
        f"{trial.name} returned {kind}. Return two things: `return {names}`.",
    )
    first, second = result
    return first, second


def expect_free_loop(trial: Trial) -> None:
    """Expect that the solution didn't block the event loop."""
    trial.expect(
        trial.blocked < 0.7,
        f"Something blocked the event loop for {trial.blocked:.1f} s. Meanwhile, no "
        "other coroutine could run. `invoke` and `time.sleep` block; `ainvoke` and "
        "`asyncio.sleep` don't.",
    )


# 01 Make one call


@judge
def count_tokens(trial: Trial) -> str:
    """Fill in the function: send the prompts one after another.

    Return two things: the list of the answers, and the number of tokens that the
    provider charges for, in and out.
    """
    result = trial.call(PROMPTS)
    expect_one_call_each(trial)
    given, tokens = expect_pair(trial, result, "answers, tokens")
    expect_answers_in_order(trial, given)
    trial.expect(
        isinstance(tokens, int),
        f"Return the tokens as one number, not {tokens!r:.50}.",
    )
    used = [trial.tokens["in"], trial.tokens["out"]]
    for wrong, what in zip(used, ("output", "input"), strict=True):
        trial.expect(
            tokens != wrong,
            f"{tokens} doesn't include the {what} tokens. Add up both.",
        )
    trial.expect(
        tokens == sum(used),
        f"You counted {tokens} tokens, but the provider charges for {sum(used)}. Each "
        "answer has its own usage_metadata.",
    )
    trial.expect(
        trial.run.peak_in_flight == 1,
        f"{trial.run.peak_in_flight} calls were in flight at once. Send each prompt "
        "only after the previous answer has arrived.",
    )
    return f"{tokens} tokens, {trial.figures}"


@judge
def give_up_in_time(trial: Trial) -> str:
    """Fix the function: it should send one request and wait for at most a second."""
    too_short = {"Timeout": "It gave up too early: this provider takes 0.3 s."}
    with current().behaving(first_token=0.3, per_token=0, jitter=0):
        answer = trial.call(PROMPTS[3], advice=too_short)
    trial.expect(
        answers(PROMPTS[3], answer),
        f"With a fast provider, it should return the answer, not {answer!r:.60}.",
    )
    with current().behaving(first_token=3, per_token=0, jitter=0):
        result = trial.call(PROMPTS[3], may_raise=True)
    run = trial.run
    trial.expect(run.attempts > 0, f"The second time, {trial.name} sent no request.")
    trial.expect(
        run.attempts == 1,
        f"{run.attempts} requests were sent in {trial.seconds:.1f} s. After a timeout, "
        "the client retries, unless you set max_retries=0.",
    )
    trial.expect(
        trial.seconds < 1.4,
        f"{trial.name} waited for {trial.seconds:.1f} s. Set the client's timeout to a "
        "second or less.",
    )
    trial.expect(
        trial.seconds > 0.75,
        f"It gave up after {trial.seconds:.1f} s. Give the provider up to a second.",
    )
    did = "raised" if trial.raised else "returned"
    trial.expect(
        trial.raised and isinstance(result, openai.APITimeoutError),
        f"After the timeout, it {did} {result!r:.60}. Let the client's own "
        "exception through, so "
        "that the caller knows that there is no answer.",
    )
    return f"1 request, timed out after {trial.seconds:.1f} s"


@judge
def slowest_prompt(trial: Trial) -> str:
    """Write the function: return the prompt of the call that took the longest.

    It takes a finished Timeline.
    """
    runs = {
        "B": ((0.0, 0.9, 1.0), (1.0, 1.2, 4.0), (4.0, 4.5, 6.0)),
        "A": ((0.0, 0.5, 2.8), (0.2, 2.5, 2.9), (1.5, 2.0, 3.0)),
    }
    for slowest, times in runs.items():
        run = Timeline("test run")
        run.journal = [
            Attempt(prompt, 1, "answered", arrival, first_byte, end)
            for prompt, (arrival, first_byte, end) in zip("ABC", times, strict=True)
        ]
        run.wall = 6
        found = trial.call(run)
        trial.expect(
            not isinstance(found, Attempt),
            "You returned the journal entry. Return its prompt.",
        )
        trial.expect(
            found != "C",
            "In a test run with the calls A, B and C, C ended last, but another call "
            "took longer. A call's time runs from its arrival to its end.",
        )
        trial.expect(
            found == slowest,
            f"In a test run with the calls A, B and C, the slowest is {slowest}, but "
            f"{trial.name} returned {found!r:.60}.",
        )
    return "the slowest call of 2 runs"


# 02 Use a thread pool


@judge
def three_at_a_time(trial: Trial) -> str:
    """Fill in the function: send all prompts, with at most three calls in flight.

    Return the answers in prompt order.
    """
    separate = "Pass the function and its argument separately: submit(f, prompt)."
    result = trial.call(PROMPTS, advice={"is not callable": separate})
    run = trial.run
    expect_one_call_each(trial)
    trial.expect(
        run.peak_in_flight > 1,
        "Only one call was in flight at a time. Something waits for an answer before "
        "the next prompt is submitted. Submit all prompts first, then ask for results.",
    )
    trial.expect(
        run.peak_in_flight <= 3,
        f"{run.peak_in_flight} calls were in flight. Limit the workers with "
        "max_workers.",
    )
    trial.expect(
        run.peak_in_flight == 3,
        "At most two calls were in flight, but three are allowed.",
    )
    expect_answers_in_order(trial, result)
    return trial.figures


@judge
def keep_every_answer(trial: Trial) -> str:
    """Fix the function: return the answer or the exception for each prompt."""
    fails = PROMPTS[2], PROMPTS[8]
    faults = {prompt: ["error_500"] * 9 for prompt in fails}
    lost = "One failed call raises an exception here, and the other answers are lost."
    with current().behaving(first_token=0.2, faults_by_prompt=faults):
        result = trial.call(PROMPTS, advice={"Error code": lost})
    expect_one_call_each(trial)
    expect_results(
        trial,
        result,
        fails,
        "future.exception() returns it, and future.result() returns an answer.",
    )
    trial.expect(
        trial.run.peak_in_flight > 1,
        "Every prompt has its answer or its exception. But the calls were made one at "
        "a time: something waits before the next prompt is submitted.",
    )
    return f"{len(PROMPTS) - 2} answers and 2 exceptions, {trial.figures}"


@judge
def stop_waiting(trial: Trial) -> str:
    """Write the function: after `seconds`, return the answers that have arrived.

    Return a dictionary with the answer for each prompt that has one. Don't start any
    more calls.
    """
    expired = {
        "TimeoutError": "A timeout expired. Catch the error, and keep what you have."
    }
    slow_first = {PROMPTS[0]: ["slow"]}
    cases = (
        (0.5, {"first_token": 0.3}),
        (1.0, {"first_token": 0.8, "faults_by_prompt": slow_first, "slow": 2}),
    )
    for seconds, settings in cases:
        with current().behaving(per_token=0, jitter=0, **settings):
            result = trial.call(PROMPTS, seconds, until_quiet=True, advice=expired)
        trial.expect(
            isinstance(result, dict),
            f"{trial.name} returned {type(result).__name__}. Return a dictionary from "
            "prompt to answer.",
        )
        trial.expect(
            trial.run.peak_in_flight == 4,
            f"At most {trial.run.peak_in_flight} calls in flight. Use four workers.",
        )
        trial.expect(
            trial.seconds < seconds + 0.4,
            f"With seconds={seconds:g}, {trial.name} took {trial.seconds:.1f} s. "
            "Something waits for longer: the end of a `with` block, a shutdown without "
            "wait=False, several timeouts one after another, or all of them.",
        )
        trial.expect(
            trial.seconds > seconds - 0.25,
            f"With seconds={seconds:g}, {trial.name} returned after "
            f"{trial.seconds:.1f} s, before all the prompts had been sent.",
        )
    run = trial.run
    trial.expect(
        bool(result),
        "The dictionary is empty, but some answers had arrived by then.",
    )
    for prompt, answer in result.items():
        trial.expect(
            prompt in KEYWORDS and answers(prompt, answer),
            f"The dictionary has {text_of(answer)!r:.50} for {prompt!r:.50}, "
            "which isn't its answer.",
        )
    late = [a for a in run.journal if a.arrival > run.marks[0][0] + 0.1]
    trial.expect(
        not late,
        f"After {trial.name} had returned, calls were still sent ({len(late)}), and "
        "you would pay for them. Drop the prompts that no worker has started: "
        "shutdown(wait=False, cancel_futures=True).",
    )
    done = sum(a.end <= run.marks[0][0] - 0.1 for a in run.journal)
    trial.expect(
        len(result) >= done,
        f"{done} calls had been answered after a second, but the dictionary has only "
        f"{len(result)}.",
    )
    return f"{len(result)} answers after {trial.seconds:.1f} s, {run.calls} calls sent"


# 03 Gather coroutines


@judge
async def all_at_once(trial: Trial) -> str:
    """Fill in the function: send all the prompts at once.

    Return a list with the answer or the exception for each prompt, in prompt order.
    """
    fails = PROMPTS[2], PROMPTS[8]
    faults = {prompt: ["error_500"] * 9 for prompt in fails}
    lost = "If gather raised this error: it can return the exceptions instead."
    star = "gather takes coroutines, not a list of them. Unpack the list with `*`."
    advice = {"Error code": lost, "unhashable type: 'list'": star}
    with current().behaving(first_token=1, faults_by_prompt=faults):
        result = await trial.call_async(PROMPTS, advice=advice)
    expect_one_call_each(trial)
    expect_results(trial, result, fails, "gather can return the exceptions.")
    expect_free_loop(trial)
    trial.expect(
        trial.run.peak_in_flight > 1,
        "The results are right, but the calls were made one at a time. Create all the "
        "coroutines first, then await them together.",
    )
    trial.expect(
        trial.run.peak_in_flight == len(PROMPTS),
        f"Only {trial.run.peak_in_flight} calls were in flight together.",
    )
    return f"{len(PROMPTS) - 2} answers and 2 exceptions, {trial.figures}"


@judge
async def four_at_once(trial: Trial) -> str:
    """Fix the functions: all the calls should be in flight together."""
    prompts = PROMPTS[:4]
    result = await trial.call_async(prompts)
    expect_one_call_each(trial, prompts)
    expect_answers_in_order(trial, result, prompts)
    expect_free_loop(trial)
    trial.expect(
        trial.run.peak_in_flight > 1,
        "Nothing blocks the event loop any more. But each call is awaited before the "
        "next one starts. Start them together, with gather.",
    )
    trial.expect(
        trial.run.peak_in_flight == len(prompts),
        f"Only {trial.run.peak_in_flight} calls were in flight together.",
    )
    return trial.figures


@judge
async def until_time_is_up(trial: Trial) -> str:
    """Write the function: after `seconds`, return the answers that have arrived.

    Return a dictionary with the answer for each prompt that has one. Cancel the other
    calls.
    """
    only = "Use only the tasks that are done."
    unfinished = {"InvalidStateError": f"A pending task has no result. {only}"}
    with current().behaving(first_token=0.2, per_token=0):
        result = await trial.call_async(PROMPTS[:2], 1.0, advice=unfinished)
    trial.expect(
        trial.seconds < 2,
        f"With seconds=1, {trial.name} took {trial.seconds:.1f} s.",
    )
    expect_free_loop(trial)
    trial.expect(
        not isinstance(result, dict) or len(result) == 2,
        "Two prompts were both answered in time. It should return both answers.",
    )
    with current().behaving(first_token=0.8, per_token=0.1):
        result = await trial.call_async(PROMPTS, 3.0, until_quiet=True, may_raise=True)
    run = trial.run
    trial.expect(
        not isinstance(result, TimeoutError),
        f"{trial.name} raised TimeoutError, so all the answers that had arrived are "
        "lost. asyncio.wait has a timeout and raises nothing.",
    )
    trial.expect(
        not isinstance(result, asyncio.CancelledError),
        f"{trial.name} raised CancelledError: the result() of a cancelled task raises "
        "it. Use only the tasks that are done.",
    )
    trial.expect(
        not isinstance(result, asyncio.InvalidStateError),
        f"{trial.name} raised InvalidStateError. {unfinished['InvalidStateError']}",
    )
    trial.expect(
        not isinstance(result, Exception),
        f"{trial.name} raised {type(result).__name__}: {result!s:.80}",
    )
    trial.expect(
        isinstance(result, dict),
        f"{trial.name} returned {type(result).__name__}. Return a dictionary "
        "that maps each prompt to its answer.",
    )
    expect_one_call_each(trial)
    trial.expect(
        trial.seconds < 3.8,
        f"{trial.name} took {trial.seconds:.1f} s instead of 3 s. It waits for all the "
        "calls.",
    )
    trial.expect(
        trial.seconds > 2.8,
        f"{trial.name} returned after {trial.seconds:.1f} s. Wait for the full 3 s.",
    )
    trial.expect(
        bool(result), "The dictionary is empty, but some answers had arrived by then."
    )
    for prompt, answer in result.items():
        trial.expect(
            answer is not None,
            "The dictionary has a None. Leave out prompts without an answer.",
        )
        trial.expect(
            prompt in KEYWORDS and answers(prompt, answer),
            f"The dictionary has {text_of(answer)!r:.50} for {prompt!r:.50}, "
            "which isn't its answer. The sets that asyncio.wait returns have no order.",
        )
    hung_up = run.cancelled + run.timed_out
    in_time = [a for a in run.journal if a.end < run.marks[0][0] - 0.1]
    trial.expect(
        len(result) >= len(in_time),
        f"{len(in_time)} answers had arrived by then, but the dictionary has only "
        f"{len(result)}.",
    )
    trial.expect(
        hung_up == len(PROMPTS) - len(result),
        f"{len(PROMPTS) - len(result)} calls have no answer in the dictionary, but the "
        f"provider saw {hung_up} cancelled. The others kept running "
        f"after {trial.name} had returned. Cancel the tasks that are pending.",
    )
    return f"{len(result)} answers, {hung_up} cancelled, {trial.seconds:.1f} s"


# 04 Choose threads or asyncio


@judge
def share_of_the_ideal(trial: Trial) -> str:
    """Fill in the function: return the efficiency of a run, from 0 to 1.

    It takes a finished Timeline, the number of calls allowed in flight, and the time
    that each call takes, in seconds.
    """
    for calls, size, latency, wall in ((16, 8, 1.0, 2.5), (12, 4, 0.5, 1.6)):
        run = Timeline(f"{calls} calls, {size} at a time")
        for number in range(calls):
            start = number // (size - 1) * latency
            times = start, start + latency, start + 1.1 * latency
            run.journal.append(Attempt(f"Q{number}", 1, "answered", *times))
        run.wall = wall
        found = trial.call(run, size, latency)
        case = f"{run.name}, {latency} s each, {wall} s in total"
        ideal = calls / size * latency
        right = ideal / wall
        trial.expect(
            hasattr(found, "__float__"),
            f"{case}: it returned {found!r:.40}. Return a number.",
        )
        found = float(found)
        trial.expect(
            abs(found - 1 / right) > 0.01,
            f"{case}: {found:.2f} is the measured time divided by the ideal. It "
            "should be the other way round.",
        )
        trial.expect(
            abs(found - 100 * right) > 1,
            f"{case}: {found:.0f} is the efficiency in percent. Return a number from 0 "
            "to 1.",
        )
        trial.expect(
            abs(found - right) < 0.01,
            f"{case}: it returned {found:.2f}. The ideal time is {ideal:g} s: "
            f"{calls // size} rounds of {latency} s.",
        )
    return "the efficiency of 2 runs"


class BlockingClient:
    """A client with no asynchronous version."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self._llm = ChatOpenAI(timeout=30, max_retries=0)

    def ask(self, prompt: str) -> str:
        """Send the prompt, and block until the answer arrives."""
        answer = text_of(self._llm.invoke(prompt))
        self.answers[prompt] = answer
        return answer


@judge
async def forty_at_once(trial: Trial) -> str:
    """Fix the function: all 40 blocking calls should be in flight together."""
    prompts = [f"Question {number}" for number in range(40)]
    client = BlockingClient()
    with current().behaving(first_token=0.6, per_token=0, jitter=0):
        await trial.call_async(client.ask, prompts[:2])
    expect_one_call_each(trial, prompts[:2])
    trial.expect(
        trial.blocked < 0.4,
        f"The event loop was blocked for {trial.blocked:.1f} s, so nothing else in the "
        "program could run. A coroutine must not call a blocking function, or wait for "
        "a thread. Await the thread's result, for example with loop.run_in_executor.",
    )
    client.answers.clear()
    with current().behaving(first_token=1.5, per_token=0, jitter=0):
        result = await trial.call_async(client.ask, prompts)
    expect_one_call_each(trial, prompts)
    trial.expect(
        len(client.answers) == len(prompts),
        f"{trial.name} didn't make every call with `ask`. Use it: the client has no "
        "asynchronous version.",
    )
    given = expect_list(trial, result, prompts)
    trial.expect(
        all(answer in client.answers.values() for answer in given),
        f"Return what `ask` returns. This isn't an answer: {given[0]!r:.50}",
    )
    trial.expect(
        given == [client.answers[prompt] for prompt in prompts],
        "All calls were answered, but the answers aren't in prompt order.",
    )
    trial.expect(
        trial.run.peak_in_flight == len(prompts),
        f"At most {trial.run.peak_in_flight} calls were in flight together. "
        "asyncio.to_thread, for example, uses the default pool. Create your own with "
        "40 workers, and pass it to asyncio.get_running_loop().run_in_executor.",
    )
    return trial.figures


@judge
async def first_answer_wins(trial: Trial) -> str:
    """Write the function: return the prompt that is answered first, and its answer.

    Cancel the other calls.
    """
    prompts = [PROMPTS[1], PROMPTS[9], PROMPTS[8], PROMPTS[5]]
    with current().behaving(first_token=0.2, per_token=0.1):
        result = await trial.call_async(prompts, until_quiet=True)
    run = trial.run
    expect_one_call_each(trial, prompts)
    prompt, answer = expect_pair(trial, result, "prompt, answer")
    first = min(attempt.end for attempt in run.journal)
    trial.expect(
        trial.seconds < first + 0.5,
        f"The first answer arrived after {first:.1f} s, but {trial.name} took "
        f"{trial.seconds:.1f} s. It waits for something else.",
    )
    trial.expect(
        prompt == PROMPTS[8] and answers(prompt, answer),
        f"The first answer to arrive was the one to {PROMPTS[8]!r}, but you returned "
        f"{prompt!r:.40} with {text_of(answer)!r:.40}.",
    )
    trial.expect(
        run.cancelled == len(prompts) - 1,
        f"Only {run.cancelled} of the other {len(prompts) - 1} calls were "
        "cancelled. The rest kept running, and you pay for them. Cancel their tasks.",
    )
    return f"1 answer, {run.cancelled} cancelled, {trial.seconds:.1f} s"

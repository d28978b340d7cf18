"""The judges of all exercises: what they try, what they expect, and their hints."""

from collections.abc import Callable, Sequence
from functools import cache
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
    """The text of a message, or of a plain string."""
    return str(getattr(answer, "content", answer))


def answers(prompt: str, answer: Any) -> bool:
    """Whether this is the answer to the prompt."""
    return KEYWORDS[prompt] in text_of(answer) and not isinstance(answer, Exception)


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
    """Expect the answers of all prompts, in prompt order."""
    given = expect_list(trial, result, prompts)
    for prompt, answer in zip(prompts, given, strict=True):
        trial.expect(
            "Future" not in type(answer).__name__,
            "These are futures. Ask each one for its result().",
        )
        trial.expect(
            any(answers(other, answer) for other in prompts),
            f"This isn't an answer: {text_of(answer)!r:.60}",
        )
        trial.expect(
            answers(prompt, answer),
            f"All answers are there, but not in prompt order: {prompt!r} has the "
            f"answer {text_of(answer)!r:.50}. Answers that are collected as they "
            "complete are in the order in which they arrived.",
        )


def expect_one_call_each(trial: Trial, prompts: Sequence[str] = PROMPTS) -> None:
    """Expect as many calls as there are prompts."""
    trial.expect(
        trial.run.calls == len(prompts),
        f"{len(prompts)} prompts, but {trial.run.calls} calls. Send each prompt once.",
    )


def expect_results(trial: Trial, result: Any, fails: Sequence[str], hint: str) -> None:
    """Expect the answer or the exception of each prompt, in prompt order."""
    given = expect_list(trial, result, PROMPTS)
    for prompt, answer in zip(PROMPTS, given, strict=True):
        if prompt in fails:
            trial.expect(
                isinstance(answer, Exception),
                f"The call for {prompt!r} failed. Its place should have the exception, "
                f"not {text_of(answer)!r:.40}. {hint}",
            )
        else:
            trial.expect(
                answers(prompt, answer),
                f"The call for {prompt!r} was answered, but its place has "
                f"{text_of(answer)!r:.60}.",
            )


# 01 Make one call


@judge
def count_tokens(trial: Trial) -> str:
    """Fill in the function: ask the prompts one after another.

    Return two things: the list of the answers, and the number of tokens that the
    provider charges for, in and out.
    """
    before = current().ask("/_provider/stats")
    result = trial.call(PROMPTS)
    after = current().ask("/_provider/stats")
    expect_one_call_each(trial)
    trial.expect(
        isinstance(result, tuple) and len(result) == 2,
        f"{trial.name} returned {type(result).__name__}. Return two things: "
        "`return answers, tokens`.",
    )
    given, tokens = result
    expect_answers_in_order(trial, given)
    used = [after[n] - before[n] for n in ("prompt_tokens", "completion_tokens")]
    for wrong, what in zip(used, ("out", "in"), strict=True):
        trial.expect(
            tokens != wrong, f"{tokens} is without the tokens {what}. Add both up."
        )
    trial.expect(
        tokens == sum(used),
        f"You counted {tokens} tokens, but the provider charges for {sum(used)}. Each "
        "answer has its own usage_metadata.",
    )
    trial.expect(
        trial.run.peak_in_flight == 1,
        f"{trial.run.peak_in_flight} calls were in flight. Send each prompt after the "
        "previous answer has arrived.",
    )
    return f"{tokens} tokens, {trial.figures}"


@judge
def give_up_in_time(trial: Trial) -> str:
    """Repair the function: it sends one request and waits for at most a second."""
    with current().behaving(first_token=0.2, per_token=0):
        answer = trial.call(PROMPTS[3])
    trial.expect(
        answers(PROMPTS[3], answer),
        f"With a fast provider, it should return the answer, not {answer!r:.60}.",
    )
    with current().behaving(first_token=3, per_token=0, jitter=0):
        result = trial.call(PROMPTS[3], may_raise=True)
    run = trial.run
    trial.expect(
        run.attempts == 1,
        f"{run.attempts} requests were sent in {trial.seconds:.1f} s. After a timeout, "
        "the client retries, unless you tell it not to: max_retries.",
    )
    trial.expect(
        trial.seconds < 1.6,
        f"{trial.name} waited for {trial.seconds:.1f} s. Set a timeout on the client.",
    )
    trial.expect(
        trial.seconds > 0.4,
        f"It gave up after {trial.seconds:.1f} s. Give the provider up to a second.",
    )
    trial.expect(
        isinstance(result, openai.APITimeoutError),
        f"After the timeout, it returned {result!r:.60}. Let the exception through, so "
        "that the caller knows that there is no answer.",
    )
    return f"1 request, given up after {trial.seconds:.1f} s"


@judge
def slowest_prompt(trial: Trial) -> str:
    """Write the function: return the prompt of the call that took the longest.

    It gets a finished Timeline.
    """
    runs = {
        "one after another": ((0.0, 1.0), (1.0, 4.0), (4.0, 6.0)),
        "all at once": ((0.5, 2.9), (0.0, 2.8), (1.5, 3.0)),
    }
    for name, times in runs.items():
        run = Timeline(name)
        run.journal = [
            Attempt(prompt, 1, "answered", arrival, end, end)
            for prompt, (arrival, end) in zip("ABC", times, strict=True)
        ]
        run.wall = 6
        found = trial.call(run)
        trial.expect(
            not isinstance(found, Attempt),
            "That is the attempt. Return its prompt.",
        )
        trial.expect(
            found != "C",
            f"C is the call that ended last, but others took longer. ({name}: the "
            "calls A, B and C.) A call takes from its arrival to its end.",
        )
        trial.expect(
            found == "B",
            f"{name}: the slowest of the calls A, B and C is B, and {trial.name} "
            f"returned {found!r:.60}.",
        )
    return "2 runs, and the slowest prompt of each"


# 02 Use a thread pool


@judge
def three_at_a_time(trial: Trial) -> str:
    """Fill in the function: ask all prompts, with never more than three in flight.

    Return the answers in prompt order.
    """
    result = trial.call(PROMPTS)
    run = trial.run
    expect_one_call_each(trial)
    trial.expect(
        run.peak_in_flight > 1,
        "Only one call was in flight at a time. Something waits for an answer before "
        "the next prompt is submitted. Submit all prompts first, then ask for results.",
    )
    trial.expect(
        run.peak_in_flight <= 3,
        f"{run.peak_in_flight} calls were in flight. The number of workers is the "
        "limit: max_workers.",
    )
    trial.expect(
        run.peak_in_flight == 3,
        "At most two calls were in flight, but three are allowed.",
    )
    expect_answers_in_order(trial, result)
    return trial.figures


@judge
def keep_every_answer(trial: Trial) -> str:
    """Repair the function: return the answer or the exception of each prompt."""
    fails = PROMPTS[2], PROMPTS[8]
    faults = {prompt: ["error_500"] * 9 for prompt in fails}
    advice = "One failed call raises here, and the other answers are lost."
    with current().behaving(first_token=0.2, faults_by_prompt=faults):
        result = trial.call(PROMPTS, if_raises=advice)
    expect_one_call_each(trial)
    expect_results(trial, result, fails, "future.exception() returns it.")
    trial.expect(
        trial.run.peak_in_flight > 1,
        "Every prompt has its answer or its exception. But the calls were made one at "
        "a time: something waits before the next prompt is submitted.",
    )
    return f"{len(PROMPTS) - 2} answers and 2 exceptions, {trial.figures}"


@judge
def stop_waiting(trial: Trial) -> str:
    """Write the function: after one second, return what has been answered until then.

    Return a dictionary with the answer for each prompt that has one. Don't start any
    more calls.
    """
    with current().behaving(first_token=0.6, per_token=0, jitter=0):
        result = trial.call(PROMPTS, 1.0, until_quiet=True)
    run = trial.run
    trial.expect(
        isinstance(result, dict),
        f"{trial.name} returned {type(result).__name__}. Return a dictionary: prompt "
        "to answer.",
    )
    trial.expect(
        trial.seconds < 1.6,
        f"{trial.name} took {trial.seconds:.1f} s instead of about 1 s. Something "
        "waits for all calls. Remember what the end of a `with` block does, and what "
        "shutdown(wait=False) doesn't do.",
    )
    trial.expect(
        trial.seconds >= 0.9,
        f"{trial.name} returned after {trial.seconds:.1f} s, before the second was "
        "over.",
    )
    trial.expect(
        bool(result),
        "The dictionary is empty, but some answers had arrived by then.",
    )
    for prompt, answer in result.items():
        trial.expect(
            prompt in KEYWORDS and answers(prompt, answer),
            f"The dictionary has {text_of(answer)!r:.50} for {prompt!r:.50}.",
        )
    late = [a for a in run.journal if a.arrival > run.marks[0][0] + 0.1]
    trial.expect(
        not late,
        f"After {trial.name} had returned, {len(late)} more calls were sent, and would "
        "be charged. Drop what no worker has started: "
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
    """Fill in the coroutine: ask all the prompts at once.

    Return a list with the answer or the exception of each prompt, in prompt order.
    """
    fails = PROMPTS[2], PROMPTS[8]
    faults = {prompt: ["error_500"] * 9 for prompt in fails}
    advice = "One failed call raises here. gather can return the exceptions instead."
    with current().behaving(first_token=1, faults_by_prompt=faults):
        result = await trial.call_async(PROMPTS, if_raises=advice)
    expect_one_call_each(trial)
    expect_results(trial, result, fails, "gather can return the exceptions.")
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
    """Repair the coroutines: all the calls should be in flight together."""
    prompts = PROMPTS[:4]
    result = await trial.call_async(prompts)
    expect_one_call_each(trial, prompts)
    expect_answers_in_order(trial, result, prompts)
    trial.expect(
        trial.blocked < 0.4,
        f"Something blocked the event loop for {trial.blocked:.1f} s. Meanwhile no "
        "other coroutine could run. `invoke` blocks; `ainvoke` doesn't.",
    )
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
    """Write the coroutine: return what has been answered after `seconds`.

    Return a dictionary with the answer for each prompt that has one. Cancel the other
    calls.
    """
    with current().behaving(first_token=0.8, per_token=0.1):
        result = await trial.call_async(PROMPTS, 3.0, until_quiet=True, may_raise=True)
    run = trial.run
    trial.expect(
        not isinstance(result, TimeoutError),
        f"{trial.name} raised TimeoutError, and all the answers that had arrived are "
        "lost. asyncio.wait has a timeout and raises nothing.",
    )
    trial.expect(
        not isinstance(result, Exception),
        f"{trial.name} raised {type(result).__name__}: {result!s:.80}",
    )
    trial.expect(
        isinstance(result, dict),
        f"{trial.name} returned {type(result).__name__}. Return a dictionary: prompt "
        "to answer.",
    )
    expect_one_call_each(trial)
    trial.expect(
        trial.seconds < 3.8,
        f"{trial.name} took {trial.seconds:.1f} s instead of 3 s. It waits for all the "
        "calls.",
    )
    trial.expect(
        trial.seconds > 2.8,
        f"{trial.name} returned after {trial.seconds:.1f} s. Wait for the whole time.",
    )
    trial.expect(
        bool(result), "The dictionary is empty, but some answers had arrived by then."
    )
    for prompt, answer in result.items():
        trial.expect(
            prompt in KEYWORDS and answers(prompt, answer),
            f"The dictionary has {text_of(answer)!r:.50} for {prompt!r:.50}.",
        )
    trial.expect(
        run.cancelled == len(PROMPTS) - len(result),
        f"{len(PROMPTS) - len(result)} calls have no answer in the dictionary, but the "
        f"provider saw {run.cancelled} cancelled. The others went on after "
        f"{trial.name} had returned. Cancel the tasks that are pending.",
    )
    return f"{len(result)} answers, {run.cancelled} cancelled, {trial.seconds:.1f} s"


# 04 Choose threads or asyncio


@judge
def share_of_the_ideal(trial: Trial) -> str:
    """Fill in the function: return the efficiency of a run, from 0 to 1.

    It gets a finished Timeline, the number of calls that were allowed in flight, and
    the seconds that each call takes.
    """
    for calls, size, latency, wall in ((16, 8, 1.0, 2.5), (12, 4, 0.5, 1.6)):
        run = Timeline(f"{calls} calls, {size} at a time")
        for number in range(calls):
            start = number // size * latency
            times = start, start + latency, start + latency
            run.journal.append(Attempt(f"Q{number}", 1, "answered", *times))
        run.wall = wall
        found = trial.call(run, size, latency)
        case = f"{run.name}, {latency} s each, {wall} s in total"
        ideal = calls / size * latency
        right = ideal / wall
        trial.expect(
            isinstance(found, int | float),
            f"{case}: it returned {found!r:.40}. Return a number.",
        )
        trial.expect(
            abs(found - 1 / right) > 0.01,
            f"{case}: {found:.2f} is the measured time divided by the ideal. It's the "
            "other way round.",
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
    return "2 runs, and the efficiency of each"


@cache
def blocking_ask() -> Callable[[str], Any]:
    """A function that blocks, as of a client that has no asynchronous version."""
    llm = ChatOpenAI(timeout=30, max_retries=0)

    def ask(prompt: str) -> str:
        return text_of(llm.invoke(prompt))

    return ask


@judge
async def forty_at_once(trial: Trial) -> str:
    """Repair the coroutine: all 40 blocking calls should be in flight together."""
    prompts = [f"Question {number}" for number in range(40)]
    with current().behaving(first_token=1.5, per_token=0, jitter=0):
        result = await trial.call_async(blocking_ask(), prompts)
    expect_one_call_each(trial, prompts)
    given = expect_list(trial, result, prompts)
    trial.expect(
        all(isinstance(answer, str) for answer in given),
        f"Return the answers, not {type(given[0]).__name__} objects.",
    )
    trial.expect(
        trial.blocked < 1,
        f"The event loop was blocked for {trial.blocked:.1f} s, so nothing else in the "
        "program could run. Don't wait for a thread in a coroutine: await it, for "
        "example with loop.run_in_executor.",
    )
    trial.expect(
        trial.run.peak_in_flight == len(prompts),
        f"At most {trial.run.peak_in_flight} calls were in flight together. "
        "asyncio.to_thread uses the default pool. Create a pool of your own with 40 "
        "workers, and pass it to loop.run_in_executor.",
    )
    return trial.figures


@judge
async def first_answer_wins(trial: Trial) -> str:
    """Write the coroutine: return the answer that arrives first, and its prompt.

    Cancel the other calls.
    """
    prompts = [PROMPTS[1], PROMPTS[9], PROMPTS[8], PROMPTS[5]]
    with current().behaving(first_token=0.5, per_token=0.1):
        result = await trial.call_async(prompts, until_quiet=True)
    run = trial.run
    expect_one_call_each(trial, prompts)
    trial.expect(
        isinstance(result, tuple) and len(result) == 2,
        f"{trial.name} returned {type(result).__name__}. Return two things: "
        "`return prompt, answer`.",
    )
    prompt, answer = result
    trial.expect(
        trial.seconds < 2.5,
        f"{trial.name} took {trial.seconds:.1f} s. It waits for more than the first "
        "answer.",
    )
    trial.expect(
        prompt == PROMPTS[8] and answers(prompt, answer),
        f"The first answer is that of {PROMPTS[8]!r}, and you returned "
        f"{prompt!r:.40} with {text_of(answer)!r:.40}.",
    )
    trial.expect(
        run.cancelled == len(prompts) - 1,
        f"The provider saw {run.cancelled} of the other {len(prompts) - 1} calls "
        "cancelled. The rest went on, and you pay for them. Cancel their tasks.",
    )
    return f"1 answer, {run.cancelled} cancelled, {trial.seconds:.1f} s"

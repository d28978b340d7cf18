"""The judges of all exercises: what they try, what they expect, and their hints."""

from collections.abc import Sequence
from typing import Any

from helpers.connection import current
from helpers.exercises import Trial, judge

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


# 02 Use a thread pool


@judge
def three_at_a_time(trial: Trial) -> str:
    """Fill in the function: ask all prompts, with never more than three in flight.

    Return the answers in prompt order.
    """
    result = trial.call(PROMPTS)
    run, calls = trial.run, len(PROMPTS)
    trial.expect(
        run.calls == calls,
        f"{calls} prompts, but {run.calls} calls. Send each prompt once.",
    )
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
    given = expect_list(trial, result, PROMPTS)
    trial.expect(
        trial.run.calls == len(PROMPTS),
        f"{len(PROMPTS)} prompts, but {trial.run.calls} calls. Send each prompt once.",
    )
    for prompt, answer in zip(PROMPTS, given, strict=True):
        if prompt in fails:
            trial.expect(
                isinstance(answer, Exception),
                f"The call for {prompt!r} failed. Its place should have the exception, "
                f"not {answer!r:.40}. future.exception() returns it.",
            )
        else:
            trial.expect(
                answers(prompt, answer),
                f"The call for {prompt!r} was answered, but its place has "
                f"{answer!r:.60}.",
            )
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
            f"The dictionary has {answer!r:.50} for {prompt!r:.50}.",
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

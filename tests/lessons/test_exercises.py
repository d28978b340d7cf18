"""The exercises: what untouched, right and wrong answers are told.

The answers are in the folder `answers`, a file for each lesson. Those that are right
"by a reader" were written by somebody who had seen only the lesson and the task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient

if TYPE_CHECKING:
    from .conftest import KernelIn, RunCell

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
ANSWERS = Path(__file__).parent / "answers"
LESSONS_WITH_EXERCISES = ["01", "02", "03", "04"]
CHECK_LINE = re.compile(r"^(?:await )?(\w+)\(\w+\)$")


@dataclass
class Answer:
    """An answer to a task: its code, and what it should be told."""

    exercise: str
    check: str
    code: str
    verdict: str
    """`right` or `right: by a reader`, or `wrong: ` and a part of the hint."""

    def __str__(self) -> str:
        return f"{self.exercise[:2]} {self.check} {self.verdict}"


def read_answers(path: Path) -> list[Answer]:
    """The answers in a Markdown file: `## check`, `### verdict`, a block of code."""
    found = []
    for task in path.read_text("utf-8").split("\n## ")[1:]:
        check, *answers = task.split("\n### ")
        for answer in answers:
            verdict, _, rest = answer.partition("\n")
            code = rest.split("```python\n")[1].split("```")[0]
            found.append(Answer(path.stem, check.split()[0], code, verdict))
    return found


ALL_ANSWERS = [a for path in sorted(ANSWERS.glob("*.md")) for a in read_answers(path)]


def code_cells(path: Path) -> list[Any]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def checks(path: Path) -> dict[str, str]:
    """The check lines of a notebook, by the name of their check."""
    lines = [CHECK_LINE.match(cell.source) for cell in code_cells(path)]
    return {line[1]: line[0] for line in lines if line}


every_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def test_exercises_and_answers_exist_for_each_lesson() -> None:
    for found in (SOLUTIONS, (NOTEBOOKS / "exercises").glob("*.ipynb")):
        assert sorted(path.stem[:2] for path in found) == LESSONS_WITH_EXERCISES
    assert sorted(path.stem for path in ANSWERS.glob("*.md")) == [
        path.stem for path in SOLUTIONS
    ]


@every_solution
def test_exercise_is_the_solution_without_its_tagged_cells(path: Path) -> None:
    """If this fails, run `python run.py exercises`."""

    def without_outputs(cells: list[Any]) -> list[Any]:
        return [(c.id, c.cell_type, c.source, c.metadata) for c in cells]

    solution = nbformat.read(path, as_version=4)
    exercise = nbformat.read(NOTEBOOKS / "exercises" / path.name, as_version=4)
    tagged = [c for c in solution.cells if "solution" in c.metadata.get("tags", [])]

    assert exercise.metadata == solution.metadata
    assert without_outputs(exercise.cells) == without_outputs(
        [cell for cell in solution.cells if cell not in tagged]
    )
    assert len(tagged) >= 2 + len(checks(path))


@every_solution
def test_solution_is_done_and_untouched_exercise_is_not_yet(path: Path) -> None:
    """nbval runs both, and compares what they print with what is stored."""
    names = checks(path)
    assert len(names) in (2, 3)
    for file in (path, NOTEBOOKS / "exercises" / path.name):
        verdicts = [printed(c) for c in code_cells(file) if CHECK_LINE.match(c.source)]
        for verdict in verdicts:
            if file == path:
                assert re.fullmatch(r"✓ .*: done\n", verdict)
            else:
                assert verdict.startswith("not yet: ")


@every_solution
def test_each_task_has_right_and_wrong_answers(path: Path) -> None:
    answers = [answer for answer in ALL_ANSWERS if answer.exercise == path.stem]

    assert {answer.check for answer in answers} == set(checks(path))
    for check in checks(path):
        verdicts = [answer.verdict for answer in answers if answer.check == check]
        assert verdicts.count("right") >= 1
        assert verdicts.count("right: by a reader") >= 1
        assert sum(verdict.startswith("wrong: ") for verdict in verdicts) >= 2


@pytest.fixture(scope="module")
def kernels(kernel_in: KernelIn) -> Iterator[dict[str, BlockingKernelClient]]:
    """A kernel for each exercise, when it is first needed."""
    with ExitStack() as stack:

        class Kernels(dict[str, BlockingKernelClient]):
            def __missing__(self, exercise: str) -> BlockingKernelClient:
                folder = NOTEBOOKS / "exercises"
                self[exercise] = stack.enter_context(kernel_in(folder))
                return self[exercise]

        yield Kernels()


@pytest.mark.parametrize("answer", ALL_ANSWERS, ids=str)
def test_answer_gets_its_verdict(
    answer: Answer, kernels: dict[str, BlockingKernelClient], run_cell: RunCell
) -> None:
    exercise = NOTEBOOKS / "exercises" / f"{answer.exercise}.ipynb"
    kernel = kernels[answer.exercise]
    setup = code_cells(exercise)[0].source

    for source in (setup, answer.code):
        _, error = run_cell(kernel, source)
        assert error == ""
    verdict, error = run_cell(kernel, checks(exercise)[answer.check])

    assert error == ""
    if answer.verdict.startswith("right"):
        assert re.fullmatch(r"✓ .*: done\n", verdict)
    else:
        assert verdict.startswith("not yet: ")
        assert answer.verdict.removeprefix("wrong: ") in verdict

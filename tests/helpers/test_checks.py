import linecache
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from helpers import check


@dataclass
class Run:
    wall: float = 0.75
    peak_in_flight: int = 1


def failure_message(call: Callable[[], None]) -> str:
    with pytest.raises(AssertionError) as caught:
        call()
    return str(caught.value)


def test_true_claim_is_printed_with_a_tick(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("two and two are four", 2 + 2 == 4) is None  # type: ignore[func-returns-value]
    assert capsys.readouterr().out == "✓ two and two are four\n"


def test_false_claim_raises_and_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(AssertionError, match="✗ two and two are five"):
        check("two and two are five", 2 + 2 == 5)
    assert capsys.readouterr().out == ""


def test_message_shows_the_condition_and_its_values() -> None:
    run, limit = Run(), 0.5
    message = failure_message(
        lambda: check("it was quick", run.wall < limit and run.peak_in_flight == 2)
    )
    first, condition, *values = message.splitlines()
    assert first == "✗ it was quick"
    assert condition.endswith("run.wall < limit and run.peak_in_flight == 2")
    assert {value.strip() for value in values} == {
        "run.wall = 0.75",
        "limit = 0.5",
        "run.peak_in_flight = 1",
    }


def test_multiline_condition_is_shown_on_one_line() -> None:
    expected = 3

    def call() -> None:
        check(
            "there were three",
            (
                expected  # a comment
                == 4
            ),
        )

    assert "expected == 4" in failure_message(call)
    assert "expected = 3" in failure_message(call)


def test_value_of_a_name_is_shown_once() -> None:
    n = 1
    assert failure_message(lambda: check("n grows", n > n)).count("n = 1") == 1


def test_list_or_its_length_is_shown() -> None:
    answers = ["Paris.", "Au."]
    message = failure_message(lambda: check("three answers", len(answers) == 3))
    assert "len(answers) == 3" in message
    assert "len(answers) = 2" in message or repr(answers) in message


def test_value_of_an_item_is_shown() -> None:
    rows = {"paced": {"rejected": 0.04}}
    message = failure_message(lambda: check("few", rows["paced"]["rejected"] <= 0.02))
    _, _, *values = message.splitlines()
    assert values == ["  rows['paced']['rejected'] = 0.04"]


def test_condition_can_be_a_keyword_argument() -> None:
    n = 1
    message = failure_message(lambda: check("n is two", holds=n == 2))
    assert "n == 2" in message
    assert "n = 1" in message


def test_names_of_an_inner_scope_are_not_evaluated() -> None:
    waits = [0.1, 0.9]
    message = failure_message(
        lambda: check("all short", all(wait < 0.5 for wait in waits))
    )
    assert "all((wait < 0.5 for wait in waits))" in message


def test_inner_name_is_not_shown_with_the_value_of_an_outer_name() -> None:
    wait: Any = 3
    waits, limit = [{"s": 0.1}, {"s": 0.9}], 0.5
    message = failure_message(
        lambda: check("all short", all(wait["s"] < limit for wait in waits) and wait)
    )
    assert "wait = 3" not in message
    assert "limit = 0.5" in message


def test_nothing_in_the_condition_is_called_again() -> None:
    queue: SimpleQueue[Any] = SimpleQueue()
    for call in (
        lambda: check("item", queue.get()[0] == 7),
        lambda: check("attribute", queue.get().__doc__ == 7),
        lambda: check("index", [5, 6][queue.get()[0]] == 7),
        lambda: check("length", len(queue.get()) == 7),
        lambda: check("length of an item", len([queue.get()][0]) == 7),
    ):
        queue.put([1])
        queue.put([2, 3])  # what a second call would get
        message = failure_message(call)
        assert len(message.splitlines()) == 2, message
        assert queue.get() == [2, 3]
        assert queue.empty()


def test_nothing_in_the_condition_is_assigned_again() -> None:
    class Reads(dict[str, int]):
        count = 0

        def __getitem__(self, key: str) -> int:
            self.count += 1
            return super().__getitem__(key)

    reads = Reads(a=1)
    failure_message(
        lambda: check("assigned", reads[(name := "a")] == 7 and name == "a")
    )
    assert reads.count == 1


def test_value_that_cannot_be_evaluated_again_is_omitted() -> None:
    class Once:
        was_read = False

        @property
        def value(self) -> int:
            if self.was_read:
                raise RuntimeError
            self.was_read = True
            return 1

    once = Once()
    assert "once.value == 2" in failure_message(lambda: check("twice", once.value == 2))


CELL = "n = 1\ncheck('n is two', n == 2)"


def test_works_in_code_without_source() -> None:
    code = compile(CELL, "<nowhere>", "exec")
    assert failure_message(lambda: exec(code, {"check": check})) == "✗ n is two"


def test_works_in_code_whose_source_is_only_in_memory() -> None:
    name = "<a cell of test_checks>"
    linecache.cache[name] = len(CELL), None, CELL.splitlines(keepends=True), name
    code = compile(CELL, name, "exec")
    try:
        message = failure_message(lambda: exec(code, {"check": check}))
    finally:
        del linecache.cache[name]
    assert "n == 2" in message
    assert "n = 1" in message


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    config = Config()
    config.HistoryManager.enabled = False
    return InteractiveShell(config=config)


def test_works_in_a_cell(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("from helpers import check")
    shell.run_cell(CELL.replace("== 2", "== 1"))
    assert capsys.readouterr().out == "✓ n is two\n"
    error = shell.run_cell(CELL).error_in_exec
    assert isinstance(error, AssertionError)
    assert "n == 2" in str(error)
    assert "n = 1" in str(error)


def test_works_in_a_cell_that_awaits(shell: Any) -> None:
    shell.run_cell("from helpers import check\nimport asyncio")
    cell = f"await asyncio.sleep(0)\n{CELL}"
    error = shell.run_cell(cell).error_in_exec
    assert isinstance(error, AssertionError)
    assert "n == 2" in str(error)
    assert "n = 1" in str(error)

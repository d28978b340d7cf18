"""The contract that every notebook keeps, as far as a machine can check it."""

import json
import math
import platform
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if not path.stem.startswith("00")]
PART_1 = NOTEBOOKS[:5]
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
EXERCISES = sorted((ROOT / "notebooks" / "exercises").glob("*.ipynb"))
SETUP = (
    "from helpers import Timeline, check, connect\n\n"
    r"provider = connect\((\w+=[\w.]+(, )?)*\)"
)
SECRET = r"sk-[A-Za-z0-9_-]{16,}|api_key\s*=\s*[\"']"
ABSOLUTE_PATH = r"(?<![\w.:/])/(?:home|root|Users|tmp|usr|opt|work|var)/|[A-Z]:\\"

# The programs of the article that the collection grew from.
ARTICLE = {
    "01_make_one_call": """
from langchain_openai import OpenAI
llm = OpenAI()
response = llm.invoke("Hello how are you?")
print(response)
""",
    "02_use_a_thread_pool": """
from concurrent.futures import ThreadPoolExecutor
from langchain_openai import OpenAI
llm = OpenAI()
def invoke_llm(prompt):
    print(f"Prompt: {prompt}") #逐次実行されていないか確認
    return llm.invoke(prompt)
prompts = [
    "What is the capital of France?",
    "Explain the theory of relativity."
]
with ThreadPoolExecutor(max_workers=2) as executor:
    futures = [executor.submit(invoke_llm, prompt) for prompt in prompts]
    for future in futures:
        response = future.result()
        print(response)
""",
    "03_gather_coroutines": """
import asyncio
from langchain_openai import OpenAI
llm = OpenAI()
async def invoke_llm_async(prompt):
    print(f"Prompt: {prompt}") #逐次実行されていないか確認
    return await llm.ainvoke(prompt)
async def main():
    prompts = [
        "What is the capital of France?",
        "Explain the theory of relativity."
    ]
    tasks = [invoke_llm_async(prompt) for prompt in prompts]
    responses = await asyncio.gather(*tasks)
    for response in responses:
        print(response)
asyncio.run(main())
""",
}

# The cells whose output nbval doesn't compare: a part of each, and the reason.
# nbval.cfg has the patterns for what may differ in all other cells.
NOT_COMPARED = {
    "02_use_a_thread_pool": {
        "逐次": "two threads print at the same time",
        "in as_completed(futures)": "answers that arrive close together may swap",
        "answered = stopped.calls": "how many are sent before the failure is a race",
        "_max_workers": "the default size depends on the CPUs",
    },
    "03_gather_coroutines": {
        "as_completed(coroutines)": "answers that arrive close together may swap",
    },
    "exercises/04_choose_threads_or_asyncio": {
        "forty_at_once(": "before it is repaired, it uses the default pool",
    },
    "solutions/04_choose_threads_or_asyncio": {
        "forty_at_once(": "the exercise has the same cell",
    },
    "05_bound_what_is_in_flight": {
        'Timeline("all at once")': "how many are sent before the first answer arrives",
        'Timeline("8 at a time")': "the unbounded run is in the comparison",
        'Timeline("all at once, 1.5 s each")': "how many time out is a race",
        "collect(batches)": "the size of the default pool depends on the CPUs",
    },
    "06_stay_under_the_rate_limit": {
        'Timeline("36 calls, SDK retries")': "how many retries are in time is a race",
        'rows["headers"]["run"]': "the number in flight depends on measured seconds",
    },
    "07_survive_failures": {
        "stormy": "whether a timed-out call overlaps the next is a race",
    },
    "08_stream_and_show_progress": {
        "live=True": "nbval sees the first frame, the file contains the last",
    },
    "10_finish_the_job_tomorrow": {
        "Timeline.compare(*runs)": "how many are in flight at the kill is a race",
    },
    "12_let_the_provider_do_it": {
        "Timeline.compare(live, batched)": "the number of polls depends on seconds",
    },
    "15_choose": {
        'head = "way wall': "a table of measured figures in columns",
    },
}


STUB_ID = r"(chatcmpl|cmpl|resp|req|msg|call|fc|batch|file)[-_][0-9a-f]{20}"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    cells = read(path).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def headings(path: Path) -> list[tuple[int, str]]:
    found = re.findall(r"^(#+) (.*)$", prose(path), flags=re.MULTILINE)
    return [(len(marks), text) for marks, text in found]


def minutes(path: Path) -> int:
    """The minutes that the notebook promises at its top."""
    promised = re.search(r"^\*\*(\d+) minutes\*\* · ", prose(path), re.MULTILINE)
    assert promised
    return int(promised[1])


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


def name(path: Path) -> str:
    """The path below the folder `notebooks`, without its suffix."""
    return path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=name)
every_lesson_of_part_1 = pytest.mark.parametrize("path", PART_1, ids=name)
every_file = pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *SOLUTIONS, *EXERCISES], ids=name
)


def test_all_lessons_exist() -> None:
    landed = [*range(9), 10, 11, 12, 15]  # 09, 13 and 14 are still to come
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in landed]


@pytest.mark.parametrize("name", ARTICLE)
def test_article_programs_are_word_for_word(name: str) -> None:
    def unindented(source: str) -> list[str]:
        return [line.strip() for line in source.strip().splitlines()]

    cells = code_cells(ROOT / "notebooks" / f"{name}.ipynb")
    marked = [cell.source for cell in cells if "article" in tags(cell)]

    assert [unindented(source) for source in marked] == [unindented(ARTICLE[name])]


@every_file
def test_is_valid_and_contains_no_keys_paths_or_machine_names(path: Path) -> None:
    notebook = read(path)
    text = path.read_text("utf-8")

    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    assert not re.search(SECRET, text)
    assert "widget-state" not in text
    assert "widget-view" not in text  # it holds a random name
    assert len(platform.node()) < 5 or platform.node() not in text
    for cell in notebook.cells:
        without_pictures = re.sub(r'"image/png": "[^"]*"', "", json.dumps(cell))
        assert not re.search(ABSOLUTE_PATH, without_pictures), cell.source
        assert set(cell.metadata) <= {"tags"}


@every_file
def test_starts_with_the_only_h1_and_skips_no_heading_level(path: Path) -> None:
    levels = [level for level, _ in headings(path)]

    assert read(path).cells[0].source.startswith("# ")
    assert levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))


@every_file
def test_first_cell_has_question_minutes_needs_and_aim(path: Path) -> None:
    _, question, plan = read(path).cells[0].source.split("\n\n")

    assert question.endswith("?")
    assert re.match(r"\*\*\d+ minutes\*\* · needs .+ · afterwards you can ", plan)


@every_notebook
def test_setup_cell_is_the_same_everywhere(path: Path) -> None:
    first = 0 if path in LESSONS else 1  # 00 checks the packages first
    source = code_cells(path)[first].source.removesuffix("\nprovider")

    assert re.fullmatch(SETUP, source)


@every_lesson
def test_sections_are_questions_and_traps_then_the_closing_ones(path: Path) -> None:
    sections = [text for level, text in headings(path) if level == 2]
    questions = [text for text in sections if text.endswith("?")]
    traps = [text for text in sections if text.startswith("Trap: ")]

    closing = sections[len(questions) + len(traps) :]
    assert closing[-3:] == ["In practice", "What we learned", "Your turn"]
    assert closing[:-3] in ([], ["Take it with you"])
    assert questions
    assert traps


@every_lesson
def test_asks_for_predictions_explains_and_checks(path: Path) -> None:
    assert "**Predict.**" in prose(path)
    assert "**What just happened.**" in prose(path)
    assert sum(cell.source.count("check(") for cell in code_cells(path)) >= 5


@every_file
def test_code_cells_are_short(path: Path) -> None:
    lengths = []
    for cell in code_cells(path):
        # The first line of a file that a cell writes is its name.
        lines = re.sub(r"^%%writefile .*\n", "", cell.source).splitlines()
        lengths.append(len(lines))
        if "article" not in tags(cell):
            assert len(lines) <= 15, cell.source
        assert max(map(len, lines)) <= 79, cell.source
    assert median(lengths) <= 8


def length(path: Path) -> float:
    """The minutes that it takes: 150 words of prose or ten lines of code a minute.

    Not counted: details that a reader opens, and all that follows *Your turn*.
    """
    words = lines = 0
    for cell in read(path).cells:
        text, your_turn, _ = cell.source.partition("## Your turn")
        if cell.cell_type == "markdown":
            shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
            words += len(shown.split())
        else:
            lines += sum(bool(line.strip()) for line in text.splitlines())
        if your_turn:
            break
    return words / 150 + lines / 10


@every_notebook
def test_stated_minutes_match_the_length(path: Path) -> None:
    assert minutes(path) == 5 * math.ceil(length(path) / 5)


def test_part_1_takes_at_most_90_minutes() -> None:
    assert sum(map(length, PART_1)) <= 90


@pytest.mark.parametrize("path", EXERCISES, ids=name)
def test_exercises_take_10_to_20_minutes(path: Path) -> None:
    assert 10 <= minutes(path) <= 20


@every_lesson_of_part_1
def test_your_turn_has_a_quiz_with_hidden_answers(path: Path) -> None:
    your_turn = prose(path).partition("## Your turn")[2]
    questions = re.findall(r"^\*\*\d\. .*[?]\*\*$", your_turn, re.MULTILINE)
    answers = re.findall(
        r"^<details><summary>Answer</summary>\n\n.+?\n\n</details>$",
        your_turn,
        re.MULTILINE | re.DOTALL,
    )

    assert 2 <= len(questions) <= 3
    assert len(answers) == len(questions)


@pytest.mark.parametrize("path", EXERCISES, ids=name)
def test_lesson_links_to_its_exercises_with_a_sentence_for_each_task(
    path: Path,
) -> None:
    your_turn = prose(ROOT / "notebooks" / path.name).partition("## Your turn")[2]
    tasks = [text for _, text in headings(path) if text.startswith("Task ")]

    assert f"(exercises/{path.name})" in your_turn
    assert len(re.findall(r"^\d\. ", your_turn, re.MULTILINE)) == len(tasks)


def test_glossary_links_each_term_to_the_lesson_that_introduces_it() -> None:
    text = (ROOT / "notebooks" / "glossary.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[\d\d\]\((.+)\) \|$", text, re.M)
    terms = [term for term, _ in rows]
    bold = {path.name: re.findall(r"\*\*(.+?)\*\*", prose(path)) for path in PART_1}
    introduced = {
        (term, lesson) for lesson in bold for term in terms if term in bold[lesson]
    }

    assert terms == sorted(terms, key=str.casefold)
    assert introduced == set(rows)


def test_readme_shows_the_script_of_lesson_03() -> None:
    cells = code_cells(ROOT / "notebooks" / "03_gather_coroutines.ipynb")
    [script] = [cell.source for cell in cells if "script" in tags(cell)]
    code = script.partition("\n")[2]

    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text("utf-8")


@every_file
def test_code_is_formatted_except_article_programs(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if "article" not in tags(cell)]
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length=79"]

    done = subprocess.run([*command, copy], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


@every_file
def test_every_picture_has_a_description(path: Path) -> None:
    assert "![](" not in prose(path)
    assert not re.search(r"<img(?![^>]*\balt=)", prose(path))
    for cell in code_cells(path):
        drawn = [
            output.data["text/plain"]
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        printed = any(output.output_type == "stream" for output in cell.outputs)
        # pyplot describes a figure by its size only: then the cell must print.
        assert all(printed or not text.startswith("<Figure") for text in drawn)


@every_file
def test_outputs_are_stored_from_one_run_in_order(path: Path) -> None:
    cells = code_cells(path)

    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        if re.search(r"^(check|print)\(", cell.source, re.MULTILINE):
            assert cell.outputs, cell.source


@every_file
def test_stored_outputs_show_no_ids_or_times(path: Path) -> None:
    """They differ in every run, and a reader learns nothing from them."""
    for cell in code_cells(path):
        shown = re.sub(r'"image/png": "[^"]*"', "", json.dumps(cell.outputs))
        assert not re.search(STUB_ID, shown), cell.source
        assert not re.search(r"(?<![\d.])1[6-9]\d{8}(?![\d.])", shown), cell.source


@every_file
def test_stores_no_unexpected_error_or_warning(
    path: Path,
) -> None:
    for cell in code_cells(path):
        for output in cell.outputs:
            if output.output_type == "error":
                assert "raises-exception" in tags(cell), cell.source
            assert output.get("name") != "stderr", cell.source


@every_file
def test_only_listed_cells_are_not_compared(path: Path) -> None:
    ignored = [
        cell.source for cell in code_cells(path) if "nbval-ignore-output" in tags(cell)
    ]
    reasons = NOT_COMPARED.get(name(path), {})

    for source in ignored:
        assert any(part in source for part in reasons), source
    assert len(ignored) == len(reasons)


@every_file
def test_relative_links_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(path)):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


@every_file
def test_links_name_the_number_of_their_lesson(path: Path) -> None:
    for text, number in re.findall(r"\[(\d\d)[^\]]*\]\((\d\d)_", prose(path)):
        assert text == number


@every_file
def test_uses_plain_jupyter_markdown(path: Path) -> None:
    assert not re.search(r"^```\{|^:::|^> \[!", prose(path), re.MULTILINE)


@every_file
def test_has_no_sleeps_hidden_warnings_or_long_outputs(path: Path) -> None:
    for cell in code_cells(path):
        assert "filterwarnings" not in cell.source
        assert "time.sleep" not in cell.source
        outputs = json.dumps(
            [output for output in cell.outputs if "data" not in output]
        )
        assert outputs.count("\\n") <= 40, "longer than a screen"


def test_each_lesson_links_to_the_next() -> None:
    for path, following in pairwise(NOTEBOOKS):
        assert f"({following.name})" in read(path).cells[-1].source


def test_both_maps_have_the_minutes_of_every_lesson() -> None:
    for place in (prose(NOTEBOOKS[0]), (ROOT / "README.md").read_text("utf-8")):
        for path in LESSONS:
            row = re.search(rf"\|.*{path.name}.*\|", place)
            assert row, path.name
            assert f"| {minutes(path)} |" in row[0]

"""The contract of a notebook, as far as a machine can check it."""

import json
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
SETUP = (
    "from helpers import Timeline, check, connect\n\n"
    r"provider = connect\((\w+=[\w.]+(, )?)*\)"
)
SECRET = r"sk-[A-Za-z0-9_-]{16,}|api_key\s*=\s*[\"']"
ABSOLUTE_PATH = r"(?<![\w.:/])/(?:home|root|Users|tmp|usr|opt|work|var)/|[A-Z]:\\"

# The article that the collection grew from, program by program.
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

# The cells that nbval runs and does not compare: a part of each, and why.
# What else may differ stands in nbval.cfg.
NOT_COMPARED = {
    "02_use_a_thread_pool": {
        "逐次": "two threads print at once",
        "in as_completed(futures)": "answers that come close together may swap",
        'Timeline("lost")': "refusals are so quick that few or many overlap",
    },
    "03_gather_coroutines": {
        "asyncio.as_completed(calls)": "answers that come close together may swap",
    },
    "04_choose_threads_or_asyncio": {
        "Timeline.compare(stubborn, obedient)": "given up before all had been sent",
    },
    "05_bound_what_is_in_flight": {
        'Timeline("all at once")': "how many leave before the first answer comes",
        'Timeline("8 at a time")': "the same flood, beside the bounded run",
        'Timeline("all at once, 1.5 s each")': "how many are given up is a race",
        "collect(batches)": "the default pool is as large as the machine's CPUs",
    },
    "06_stay_under_the_rate_limit": {
        'Timeline("36 calls, SDK retries")': "how many come back in time is a race",
        'rows["headers"]["run"]': "how many are in flight follows from their seconds",
    },
    "07_survive_failures": {
        "stormy": "whether a call given up and the next one overlap is a race",
    },
    "08_stream_and_show_progress": {
        "live=True": "nbval sees the first frame, the file holds the last",
    },
    "10_finish_the_job_tomorrow": {
        "Timeline.compare(*runs)": "how many are in flight when it is killed is a race",
    },
    "12_let_the_provider_do_it": {
        "Timeline.compare(live, batched)": "how many polls fit depends on the seconds",
    },
    "15_choose": {
        'head = "way wall': "a table of measured figures, in columns",
    },
}


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


def tags(cell: Any) -> set[str]:
    return set(cell.metadata.get("tags", []))


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def test_the_part_of_the_course_that_has_landed_is_there() -> None:
    landed = [*range(9), 10, 11, 12, 15]  # 09, 13 and 14 are still to come
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in landed]


@pytest.mark.parametrize("name", ARTICLE)
def test_the_articles_program_stands_word_for_word(name: str) -> None:
    def unindented(source: str) -> list[str]:
        return [line.strip() for line in source.strip().splitlines()]

    cells = code_cells(ROOT / "notebooks" / f"{name}.ipynb")
    marked = [cell.source for cell in cells if "article" in tags(cell)]

    assert [unindented(source) for source in marked] == [unindented(ARTICLE[name])]


@every_notebook
def test_it_is_valid_and_holds_nothing_of_a_machine(path: Path) -> None:
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


@every_notebook
def test_it_begins_with_its_only_title_and_no_heading_skips_a_level(path: Path) -> None:
    levels = [level for level, _ in headings(path)]

    assert read(path).cells[0].source.startswith("# ")
    assert levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))


@every_notebook
def test_its_first_cell_tells_question_minutes_needs_and_aim(path: Path) -> None:
    _, question, plan = read(path).cells[0].source.split("\n\n")

    assert question.endswith("?")
    assert re.match(r"\*\*\d+ minutes\*\* · needs .+ · afterwards you can ", plan)


@every_notebook
def test_its_set_up_is_the_same_as_everywhere(path: Path) -> None:
    first = 0 if path in LESSONS else 1  # 00 looks at the packages first
    source = code_cells(path)[first].source.removesuffix("\nprovider")

    assert re.fullmatch(SETUP, source)


@every_lesson
def test_its_sections_end_in_the_agreed_order(path: Path) -> None:
    sections = [text for level, text in headings(path) if level == 2]
    questions = [text for text in sections if text.endswith("?")]
    traps = [text for text in sections if text.startswith("Trap: ")]

    assert sections[-3:] == ["In practice", "What we learned", "Your turn"]
    assert len(questions) + len(traps) + 3 == len(sections)
    assert questions
    assert traps


@every_lesson
def test_it_lets_predict_explains_and_proves(path: Path) -> None:
    assert "**Predict.**" in prose(path)
    assert "**What just happened.**" in prose(path)
    assert sum("check(" in cell.source for cell in code_cells(path)) >= 5


@every_notebook
def test_its_cells_are_short(path: Path) -> None:
    lengths = []
    for cell in code_cells(path):
        lines = cell.source.splitlines()
        lengths.append(len(lines))
        if "article" not in tags(cell):
            assert len(lines) <= 15, cell.source
        assert max(map(len, lines)) <= 79, cell.source
    assert median(lengths) <= 8


@every_lesson
def test_it_has_enough_prose_and_not_too_much(path: Path) -> None:
    lines = sum(len(cell.source.splitlines()) for cell in code_cells(path))

    assert 10 <= len(prose(path).split()) / lines <= 20


@every_notebook
def test_its_code_is_formatted_but_for_the_articles(path: Path, tmp_path: Path) -> None:
    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if "article" not in tags(cell)]
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length=79"]

    done = subprocess.run([*command, copy], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


@every_notebook
def test_every_picture_is_described(path: Path) -> None:
    assert "![](" not in prose(path)
    assert not re.search(r"<img(?![^>]*\balt=)", prose(path))
    for cell in code_cells(path):
        drawn = [
            output.data["text/plain"]
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        printed = any(output.output_type == "stream" for output in cell.outputs)
        # pyplot says no more of a figure than its size: then the cell prints.
        assert all(printed or not text.startswith("<Figure") for text in drawn)


@every_notebook
def test_its_outputs_are_stored_and_in_the_order_of_one_run(path: Path) -> None:
    cells = code_cells(path)

    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        if re.search(r"^(check|print)\(", cell.source, re.MULTILINE):
            assert cell.outputs, cell.source


@every_notebook
def test_no_output_is_an_error_or_a_warning_that_the_lesson_does_not_want(
    path: Path,
) -> None:
    for cell in code_cells(path):
        for output in cell.outputs:
            if output.output_type == "error":
                assert "raises-exception" in tags(cell), cell.source
            assert output.get("name") != "stderr", cell.source


@every_notebook
def test_only_the_cells_listed_here_are_not_compared(path: Path) -> None:
    ignored = [
        cell.source for cell in code_cells(path) if "nbval-ignore-output" in tags(cell)
    ]
    reasons = NOT_COMPARED.get(path.stem, {})

    for source in ignored:
        assert any(part in source for part in reasons), source
    assert len(ignored) == len(reasons)


@every_notebook
def test_its_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(path)):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


@every_notebook
def test_its_links_call_a_lesson_by_its_number(path: Path) -> None:
    for text, number in re.findall(r"\[(\d\d)[^\]]*\]\((\d\d)_", prose(path)):
        assert text == number


@every_notebook
def test_it_keeps_to_plain_jupyter_markdown(path: Path) -> None:
    assert not re.search(r"^```\{|^:::|^> \[!", prose(path), re.MULTILINE)


@every_notebook
def test_it_hides_and_waits_for_nothing(path: Path) -> None:
    for cell in code_cells(path):
        assert "filterwarnings" not in cell.source
        assert "time.sleep" not in cell.source
        outputs = json.dumps(
            [output for output in cell.outputs if "data" not in output]
        )
        assert outputs.count("\\n") <= 40, "longer than a screen"


def test_each_lesson_leads_to_the_next() -> None:
    for path, following in pairwise(NOTEBOOKS):
        assert f"({following.name})" in read(path).cells[-1].source


def test_the_map_names_every_lesson_with_the_minutes_that_it_states() -> None:
    for place in (prose(NOTEBOOKS[0]), (ROOT / "README.md").read_text("utf-8")):
        for path in LESSONS:
            minutes = re.search(r"\*\*(\d+) minutes", prose(path))
            assert minutes
            row = re.search(rf"\|.*{path.name}.*\|", place)
            assert row, path.name
            assert re.search(rf"\| {minutes[1]} \|", row[0])

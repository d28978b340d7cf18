import ast
import csv
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
WAYS = ["loop", "pool", "gather", "semaphore", "workers", "batch", "abatch"]
WAYS += ["aiohttp", "Dask", "Batch API"]
FLOORS = ["bare SDK", "bare SDK, aiohttp", "bare aiohttp"]


def benchmark(
    name: str, *words: object, within: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=within
    )


scoreboard = partial(benchmark, "scoreboard")


def written(stem: Path) -> tuple[Any, list[dict[str, str]]]:
    """The JSON and the rows of the CSV, if there is a picture as well."""
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    with stem.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return content, list(csv.DictReader(file))


def test_the_benchmark_of_the_provider_measures_it_beside_a_bare_server() -> None:
    done = benchmark("provider", "--quick", "--generator=aiohttp")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "| 100 |" in line]
    assert [row[0] for row in rows] == ["| bare aiohttp", "| provider"]
    for _, _, rate, ideal, *_, errors in rows:
        assert 0 < int(rate.replace(",", "")) <= int(ideal.replace(",", ""))
        assert errors == "0 |"
    assert len(re.findall(r"\d calls: \d+ MB", done.stdout)) >= 2


def test_the_benchmark_of_bounds_runs_the_lessons_own_three_ways() -> None:
    done = benchmark("bounds", 60)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "| 60 |" in line]
    ways = ["| workers", "| with_semaphore", "| unbounded"]
    assert [row[0] for row in rows] == ways
    assert [answers for _, _, answers, *_ in rows] == ["60"] * 3


def test_the_scoreboard_has_a_row_for_every_way_and_every_floor(
    tmp_path: Path,
) -> None:
    done = scoreboard("--quick", "--out", tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content, rows = written(tmp_path / "scoreboard")
    table = [line.split(" | ") for line in done.stdout.splitlines() if "|" in line]
    assert [cells[0] for cells in table[2:]] == [f"| {n}" for n in [*WAYS, *FLOORS]]
    assert len({len(cells) for cells in table}) == 1
    assert [row["way"] for row in content["rows"]] == [*WAYS, *FLOORS]
    assert [row["way"] for row in rows] == [*WAYS, *FLOORS]
    assert content["settings"]["prompts"] == 16
    for row in content["rows"]:
        assert row["answered"] == row["prompts"]  # each has the answer to it
        assert row["refused"] == 0
        assert row["seconds"] > 0
        assert row["cpu_ms"] > 0
        assert row["memory_mb"] > 10
        if row["way"] == "Batch API":
            assert row["efficiency"] is None
            continue
        assert row["attempts"] == row["prompts"]
        assert 0 < row["least"] <= row["efficiency"] <= row["most"] <= 1.02
        bound = {"loop": 1, "gather": 16}.get(row["way"], 8)
        assert 1 <= row["in_flight"] <= bound


def test_the_ways_are_those_of_the_lesson_and_their_lines_are_counted_there(
    tmp_path: Path,
) -> None:
    path = ROOT / "notebooks" / "15_choose.ipynb"
    cells = [
        ast.parse(cell.source)
        for cell in nbformat.read(path, as_version=4).cells
        if "bench" in cell.metadata.get("tags", [])
    ]
    named = [
        node.value
        for cell in cells
        for node in ast.walk(cell)
        if isinstance(node, ast.Constant) and node.value in WAYS
    ]
    assert list(dict.fromkeys(named)) == WAYS

    done = scoreboard("--quick", "--ways", "batch", "bare SDK", "--out", tmp_path)

    assert done.returncode == 0, done.stderr
    _, rows = written(tmp_path / "scoreboard")
    assert [row["lines"] for row in rows] == ["5", ""]


def test_under_a_limit_the_scoreboard_shows_what_was_refused_and_lost(
    tmp_path: Path,
) -> None:
    done = scoreboard(
        *("--quick", "--prompts", 40, "--at-once", 40, "--limit", 300),
        *("--ways", "semaphore", "--out", tmp_path),
    )

    assert done.returncode == 0, done.stderr
    [row] = written(tmp_path / "scoreboard")[0]["rows"]
    assert row["attempts"] > 40
    assert row["refused"] > 20
    assert row["answered"] < 40


def test_the_scoreboard_follows_the_cost_as_the_number_of_prompts_grows(
    tmp_path: Path,
) -> None:
    done = scoreboard(
        *("--growth", 10, 50, "--quick", "--repeat", 2, "--warm"),
        *("--ways", "workers", "aiohttp", "--out", tmp_path),
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content, _ = written(tmp_path / "growth")
    found = [(row["way"], row["prompts"]) for row in content["rows"]]
    assert found == [(w, n) for n in (10, 50) for w in ("workers", "aiohttp")]
    assert len(content["runs"]) == 8
    assert all(row["answered"] == row["prompts"] for row in content["rows"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "-3"], "wanted a whole number above 0, got '-3'"),
        (["--at-once", "many"], "wanted a whole number above 0, got 'many'"),
        (["--latency", "0"], "wanted seconds above 0, got '0'"),
        (["--growth", "10", "0"], "wanted a whole number above 0, got '0'"),
        (["--ways", "telepathy"], "'telepathy' (choose from"),
        (["--at-once", "1"], "--at-once must not be less than --workers"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["now"], "unrecognized arguments: now"),
    ],
)
def test_a_wrong_option_is_answered_with_a_sentence_and_nothing_is_measured(
    words: list[str], said: str, tmp_path: Path
) -> None:
    done = scoreboard(*words, "--out", tmp_path, within=30)

    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())

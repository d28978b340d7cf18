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
BASELINES = ["bare SDK", "bare SDK, aiohttp", "bare aiohttp"]


def run_benchmark(
    name: str, *arguments: object, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


run_scoreboard = partial(run_benchmark, "scoreboard")


def read_results(stem: Path) -> tuple[Any, list[dict[str, str]]]:
    """The JSON content and the CSV rows. Fails if the picture is missing."""
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    with stem.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return content, list(csv.DictReader(file))


def test_bench_stub_compares_the_stub_with_a_bare_server() -> None:
    result = run_benchmark("stub", "--quick", "--generator=aiohttp")

    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = [
        line.split(" | ") for line in result.stdout.splitlines() if "| 100 |" in line
    ]
    assert [row[0] for row in rows] == ["| bare aiohttp", "| stub"]
    for _, _, rate, ideal, *_, errors in rows:
        assert 0 < int(rate.replace(",", "")) <= int(ideal.replace(",", ""))
        assert errors == "0 |"
    assert len(re.findall(r"\d requests: \d+ MB", result.stdout)) >= 2


def test_bench_bounds_runs_the_three_ways_of_the_lesson() -> None:
    result = run_benchmark("bounds", 60)

    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = [
        line.split(" | ") for line in result.stdout.splitlines() if "| 60 |" in line
    ]
    ways = ["| workers", "| with_semaphore", "| unbounded"]
    assert [row[0] for row in rows] == ways
    assert [answers for _, _, answers, *_ in rows] == ["60"] * 3


def test_scoreboard_has_a_row_for_every_way_and_every_baseline(
    tmp_path: Path,
) -> None:
    result = run_scoreboard("--quick", "--out", tmp_path)

    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    content, rows = read_results(tmp_path / "scoreboard")
    table = [line.split(" | ") for line in result.stdout.splitlines() if "|" in line]
    assert [cells[0] for cells in table[2:]] == [f"| {n}" for n in [*WAYS, *BASELINES]]
    assert len({len(cells) for cells in table}) == 1
    assert [row["way"] for row in content["rows"]] == [*WAYS, *BASELINES]
    assert [row["way"] for row in rows] == [*WAYS, *BASELINES]
    lines = {row["way"]: row["lines"] for row in rows}
    assert lines["batch"] == "5"  # counted in the lesson
    assert {lines[way] for way in BASELINES} == {""}
    assert content["settings"]["prompts"] == 16
    for row in content["rows"]:
        assert row["answered"] == row["prompts"]  # with the right answer
        assert row["rejected"] == 0
        assert row["seconds"] > 0
        assert row["cpu_ms"] > 0
        assert row["memory_mb"] > 10
        if row["way"] == "Batch API":
            assert row["efficiency"] is None
            continue
        assert row["attempts"] == row["prompts"]
        assert 0 < row["min_efficiency"] <= row["efficiency"]
        assert row["efficiency"] <= row["max_efficiency"] <= 1.02
        limit = {"loop": 1, "gather": 16}.get(row["way"], 8)
        assert 1 <= row["in_flight"] <= limit


def test_ways_come_from_the_lesson() -> None:
    path = ROOT / "notebooks" / "15_choose.ipynb"
    cells = [
        ast.parse(cell.source)
        for cell in nbformat.read(path, as_version=4).cells
        if "bench" in cell.metadata.get("tags", [])
    ]
    names = [
        node.value
        for cell in cells
        for node in ast.walk(cell)
        if isinstance(node, ast.Constant) and node.value in WAYS
    ]
    assert list(dict.fromkeys(names)) == WAYS


def test_scoreboard_counts_rejected_requests_and_lost_answers(
    tmp_path: Path,
) -> None:
    result = run_scoreboard(
        *("--quick", "--prompts", 40, "--at-once", 40, "--limit", 300),
        *("--ways", "semaphore", "--out", tmp_path),
    )

    assert result.returncode == 0, result.stderr
    [row] = read_results(tmp_path / "scoreboard")[0]["rows"]
    assert row["attempts"] > 40
    assert row["rejected"] > 20
    assert row["answered"] < 40


def test_growth_measures_each_way_for_each_number_of_prompts(
    tmp_path: Path,
) -> None:
    result = run_scoreboard(
        *("--growth", 10, 50, "--quick", "--repeat", 1, "--warm"),
        *("--ways", "workers", "aiohttp", "--out", tmp_path),
    )

    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    content, _ = read_results(tmp_path / "growth")
    measured = [(row["way"], row["prompts"]) for row in content["rows"]]
    assert measured == [(w, n) for n in (10, 50) for w in ("workers", "aiohttp")]
    assert len(content["runs"]) == 4
    assert all(row["answered"] == row["prompts"] for row in content["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "-3"], "--prompts: must be an integer above 0, not '-3'"),
        (["--at-once", "many"], "--at-once: must be an integer above 0, not 'many'"),
        (
            ["--latency", "0"],
            "must be a number above 0 and below 3600 (seconds), not '0'",
        ),
        (
            ["--latency", "3600"],
            "must be a number above 0 and below 3600 (seconds), not '3600'",
        ),
        (["--growth", "10", "0"], "--growth: must be an integer above 0, not '0'"),
        (["--ways", "telepathy"], "'telepathy' (choose from"),
        (["--at-once", "1"], "--at-once must be at least as large as --workers"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["now"], "unrecognized arguments: now"),
    ],
)
def test_invalid_option_is_rejected_with_a_message_before_any_measurement(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = run_scoreboard(*arguments, "--out", tmp_path, timeout=30)

    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())

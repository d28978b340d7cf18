import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_of_the_provider_measures_it_beside_a_bare_server() -> None:
    command = [sys.executable, "benchmarks/provider.py", "--quick"]
    command.append("--generator=aiohttp")

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "| 100 |" in line]
    assert [row[0] for row in rows] == ["| bare aiohttp", "| provider"]
    for _, _, rate, ideal, *_, errors in rows:
        assert 0 < int(rate.replace(",", "")) <= int(ideal.replace(",", ""))
        assert errors == "0 |"
    assert len(re.findall(r"\d calls: \d+ MB", done.stdout)) >= 2


def test_the_benchmark_of_bounds_runs_the_lessons_own_three_ways() -> None:
    command = [sys.executable, "benchmarks/bounds.py", "60"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "| 60 |" in line]
    ways = ["| workers", "| with_semaphore", "| unbounded"]
    assert [row[0] for row in rows] == ways
    assert [answers for _, _, answers, *_ in rows] == ["60"] * 3

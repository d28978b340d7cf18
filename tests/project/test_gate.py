"""The gate fails if a test failed or was skipped, and says what took long."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Replaces run.py: writes the results that it is told to, and exits as told.
FAKE_RUN = """
import os, sys
[option] = [word for word in sys.argv if word.startswith("--junitxml=")]
open(option.partition("=")[2], "w").write(os.environ["JUNIT"])
sys.exit(int(os.environ["EXIT"]))
"""
SLOW = '<testcase classname="lessons" name="test_slow" time="61.5"/>'
QUICK = '<testcase classname="lessons" name="test_quick" time="0.5"/>'
SKIPPED = (
    '<testcase classname="browser" name="test_panel" time="0.1">'
    '<skipped message="no browser found"/></testcase>'
)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "run.py").write_text(FAKE_RUN)
    return Path(shutil.copy(ROOT / ".ci" / "gate.py", tmp_path / ".ci"))


def run(gate: Path, *cases: str, exit_code: int = 0) -> tuple[int, list[str]]:
    """Run the first leg; return the gate's exit code and its last lines."""
    done = subprocess.run(
        [sys.executable, gate, "everything"],
        env={
            "JUNIT": f"<testsuite>{''.join(cases)}</testsuite>",
            "EXIT": str(exit_code),
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_passes_if_all_tests_passed_and_lists_the_slowest_first(gate: Path) -> None:
    code, lines = run(gate, QUICK, SLOW)

    assert code == 0
    assert "everything passed, 2 tests, 0.0 of 11 minutes" in lines[-1]
    slow, quick = (
        next(i for i, line in enumerate(lines) if n in line)
        for n in ("test_slow", "test_quick")
    )
    assert slow < quick
    assert "61.5 s" in lines[slow]


def test_fails_and_names_the_test_if_one_was_skipped(gate: Path) -> None:
    code, lines = run(gate, QUICK, SKIPPED)

    assert code == 1
    assert "everything FAILED" in lines[-2]
    assert lines[-1].strip() == "skipped: browser::test_panel"


def test_fails_if_the_command_fails(gate: Path) -> None:
    code, lines = run(gate, QUICK, exit_code=1)

    assert code == 1
    assert "everything FAILED" in lines[-1]


def test_unknown_leg_is_rejected(gate: Path) -> None:
    done = subprocess.run(
        [sys.executable, gate, "every"], capture_output=True, text=True
    )

    assert done.returncode == 2
    assert "no such leg: every. Choose from: everything, other" in done.stdout

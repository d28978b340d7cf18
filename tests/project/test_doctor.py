"""`python run.py doctor` says what works, and how to fix what doesn't."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.environment import RECORD

ROOT = Path(__file__).parents[2]
CHECKS = ["Python", "disk", "port", "packages", "kernel", "browser", "Chromium"]
BROKEN_KERNEL = {"argv": ["false"], "display_name": "Python 3", "language": "python"}


@pytest.fixture
def project(tmp_path: Path, link_environment: Callable[[Path], None]) -> Path:
    """A copy of the project that is set up."""
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    for name in "run.py", "doctor.py", "requirements.lock":
        shutil.copy(ROOT / name, project)
    link_environment(project)
    return project


def doctor(
    project: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: text
        for name, text in os.environ.items()
        if name not in ("LLM_PROVIDER_URL", RECORD)
    }
    return subprocess.run(
        [sys.executable, project / "run.py", "doctor", *options],
        cwd=project,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def only_fault(project: Path, **environment: str) -> str:
    """The text of the only line that says "fix"."""
    done = doctor(project, "--json", **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    names = [check["name"] for check in report["checks"]]
    assert names == [name for name in CHECKS if name in names]
    [fault] = [check for check in report["checks"] if check["status"] == "fix"]
    text: str = fault["text"]
    return text


def test_healthy_machine_gets_ok_for_all_that_a_lesson_needs(project: Path) -> None:
    done = doctor(project)

    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [name for _, name, _ in lines[:-1]] == CHECKS
    assert {status for status, _, _ in lines[:-3]} == {"ok"}
    assert done.stdout.endswith("can run the notebooks: python run.py lab\n")


def test_missing_package_is_named(
    project: Path, link_environment: Callable[[Path], None]
) -> None:
    with (project / "requirements.lock").open("a") as lock:
        print(f"pip-without-a-release==1 --hash=sha256:{'0' * 64}", file=lock)
    shutil.rmtree(project / ".venv")
    link_environment(project)

    fault = only_fault(project)

    assert "pip-without-a-release==1" in fault
    assert "Delete the folder .venv" in fault


def test_failing_set_up_is_one_of_the_lines(project: Path) -> None:
    shutil.rmtree(project / ".venv")

    fault = only_fault(project, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)

    assert "needs the network" in fault


def test_another_kernel_that_is_in_the_way_is_found(
    project: Path, tmp_path: Path
) -> None:
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(BROKEN_KERNEL))

    fault = only_fault(project, JUPYTER_PATH=str(tmp_path / "jupyter"))

    assert "another kernel named python3" in fault
    assert str(kernel) in fault


def test_unknown_option_is_rejected(project: Path) -> None:
    done = doctor(project, "--jsn")

    assert done.returncode == 2
    assert "--jsn" in done.stderr

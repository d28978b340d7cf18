"""The gate: run all legs, or those named as arguments, and say how long each took.

Exits with 1 if a leg failed or a test was skipped. Without arguments, a failure of the
leg "newest" is only reported: it shows what the next update will break.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"everything": 11, "other": 5, "lowest": 6, "newest": 8}  # minutes
ONLY_REPORTED = {"newest"}
UNIT_TESTS = "tests/helpers", "tests/llm_stub"
UV = ROOT / ".venv" / "bin" / "uv"

Leg = Callable[[Path, Path], bool]


def run(*command: str | Path, cwd: Path = ROOT) -> bool:
    """Run a command; return whether it succeeded."""
    print("$", *command, flush=True)
    return subprocess.run([str(word) for word in command], cwd=cwd).returncode == 0


def everything(folder: Path, junit: Path) -> bool:
    """README's test command with the lock: all checks, with nothing skipped."""
    return run(sys.executable, "run.py", "test", "-rs", f"--junitxml={junit}")


def other(folder: Path, junit: Path) -> bool:
    """All notebooks with the lock, on another Python and in a copy of the project."""
    if not (python := other_python()):
        print("No other Python was found. Install 3.13 or 3.12.")
        return False
    copy = folder / "project"
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in files.split("\0")[:-1]:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    pytest = copy / ".venv" / "bin" / "pytest"
    return run(python, "run.py", "doctor", cwd=copy) and run(
        pytest, "-rs", f"--junitxml={junit}", "notebooks", cwd=copy
    )


def other_python() -> str | None:
    """The path of a Python other than this one: 3.13 if possible, otherwise 3.12."""
    for version in "3.13", "3.12":
        pyenv = Path.home().glob(f".pyenv/versions/{version}*/bin/python")
        for found in shutil.which(f"python{version}"), *map(str, pyenv):
            code = f"import sys; assert sys.version.startswith('{version}')"
            if version in sys.version[:5] or not found:
                continue
            # pyenv has shims even for versions that are not in use.
            if subprocess.run([found, "-c", code], capture_output=True).returncode == 0:
                return found
    return None


def lowest(folder: Path, junit: Path) -> bool:
    """The unit tests with the lowest versions that our ranges allow."""
    python = environment(folder, "--resolution=lowest-direct")
    return python is not None and pytest(python, junit, *UNIT_TESTS)


def newest(folder: Path, junit: Path) -> bool:
    """Unit tests and notebooks with the newest versions that our ranges allow."""
    python = environment(folder, "--upgrade")
    return python is not None and pytest(python, junit, *UNIT_TESTS, "notebooks")


def environment(folder: Path, option: str) -> Path | None:
    """The Python of a new environment with the dependencies; None if uv failed."""
    python = folder / "bin" / "python"
    install = "pip", "install", "--quiet", "--python", python, option
    requirements = "-r", "requirements.txt", "--group", "pyproject.toml:test"
    if (UV.exists() or run(sys.executable, "run.py", "doctor")) and (
        run(UV, "venv", "--quiet", "--clear", "--python", sys.executable, folder)
        and run(UV, *install, *requirements)
    ):
        return python
    return None


def pytest(python: Path, junit: Path, *tests: str) -> bool:
    """Run these tests; return whether all passed."""
    return run(python, "-m", "pytest", "-rs", f"--junitxml={junit}", *tests)


def cases(junit: Path) -> list[ET.Element]:
    """The tests in a JUnit file; none if pytest wrote no file."""
    return list(ET.parse(junit).iter("testcase")) if junit.exists() else []


def name_of(case: ET.Element) -> str:
    """The file and the name of a test."""
    return f"{case.get('classname')}::{case.get('name')}"


def slowest(junit: Path) -> list[str]:
    """A line for each of the ten slowest tests."""
    by_time = sorted(cases(junit), key=lambda case: -float(case.get("time", 0)))
    return [f"{float(c.get('time', 0)):6.1f} s  {name_of(c)}" for c in by_time[:10]]


LEGS: dict[str, Leg] = {f.__name__: f for f in (everything, other, lowest, newest)}


def main(names: list[str]) -> int:
    """Run the legs and print the report; return the exit code."""
    unknown = set(names) - set(LEGS)
    if unknown:
        print(f"no such leg: {', '.join(unknown)}. Choose from: {', '.join(LEGS)}.")
        return 2
    os.environ["UV_LINK_MODE"] = os.environ.get("UV_LINK_MODE", "copy")
    report: list[str] = []
    slow: list[str] = []
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in names or LEGS:
            print(f"\n=== {name}: at most {BUDGETS[name]} minutes", flush=True)
            junit, started = Path(folder, f"{name}.xml"), time.monotonic()
            passed = LEGS[name](Path(folder, name), junit)
            skipped = [
                name_of(c) for c in cases(junit) if c.find("skipped") is not None
            ]
            minutes = (time.monotonic() - started) / 60
            verdict = "passed" if passed and not skipped else "FAILED"
            if verdict == "FAILED" and name in ONLY_REPORTED and not names:
                verdict = "failed (only reported)"
            good &= verdict != "FAILED"
            late = ", OVER ITS BUDGET" if minutes > BUDGETS[name] else ""
            report.append(
                f"{name:11}{verdict}, {len(cases(junit))} tests, "
                f"{minutes:.1f} of {BUDGETS[name]} minutes{late}"
            )
            report += [f"           skipped: {test}" for test in skipped]
            slow = slow or [name, *slowest(junit)]
    print("\n=== the ten slowest tests of the leg", *slow, sep="\n")
    print("\n=== the legs", *report, sep="\n", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The files for GitHub and pre-commit, as far as they can be checked without them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
SCHEMAS = {
    "github-workflows": sorted(GITHUB.glob("workflows/*.yml")),
    "github-issue-forms": sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")),
    "dependabot": [GITHUB / "dependabot.yml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_match_their_published_schema(schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", f"vendor.{schema}", *map(str, SCHEMAS[schema])]

    done = subprocess.run(command, capture_output=True, text=True)

    assert SCHEMAS[schema]
    assert done.returncode == 0, done.stdout + done.stderr


def test_actions_are_pinned_by_their_major_version() -> None:
    for path in SCHEMAS["github-workflows"]:
        used = re.findall(r"uses: *(.*)", path.read_text())
        assert used
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)


def test_workflows_run_only_files_and_commands_that_exist() -> None:
    text = "".join(path.read_text() for path in SCHEMAS["github-workflows"])
    for test in re.findall(r"tests/[\w./]+", text):
        assert (ROOT / test).exists(), test
    for notebook in re.findall(r"\b\d\d_\w+", text):
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists(), notebook
    commands = set(re.findall(r"run\.py (\w+)", text))
    assert commands <= {"doctor", "test", "notebooks"}


def test_pre_commit_uses_the_versions_in_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.findall(r"\[(\w+==[\w.]+)\]", config)
    assert pinned
    for requirement in pinned:
        assert f"\n{requirement} " in lock

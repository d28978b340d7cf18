import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("lab", "test", "doctor", "notebooks", "bench")
TOOLS = ("lab", "test", "notebooks", "bench")  # they start a program
LOCK = """\
helpers==1 \\
    --hash=sha256:11
uv==0.13.9 \\
    --hash=sha256:22 \\
    --hash=sha256:33
    # via many-llm-calls
wheel==2 \\
    --hash=sha256:44
"""

posix_only = pytest.mark.skipif(
    os.name == "nt", reason="the fake for .venv's Python is a shell script"
)

with_uv_and_without = pytest.mark.parametrize(
    "project", ["uv works", "uv fails"], indirect=True
)

# Replaces .venv's Python. It notes what pip and uv were called with. Any other tool
# prints its working directory and its arguments.
FAKE_PYTHON = """#!/bin/sh
case "$2 $3" in
"pip config")
    printf '%s' "$PIP_SETTINGS" ;;
"uv cache")
    echo "$CACHE" ;;
"pip install")
    echo "$@" >> "$CALLS"
    case "$*" in
    */uv.txt) exit "$GET_UV_EXIT" ;;
    esac
    exit "$INSTALL_EXIT" ;;
"uv pip")
    echo "$@" >> "$CALLS"
    env | grep -E '^(UV|HTTPS|SSL)_' >> "$CALLS"
    exit $((INSTALL_EXIT + UV_EXIT)) ;;
*)
    pwd
    printf '<%s>' "$@"
    echo
    exit "$TOOL_EXIT" ;;
esac
"""

# Replaces the standard library's venv, which takes seconds to install pip.
FAKE_VENV = """
import os, pathlib, shutil, sys
with open(os.environ["CALLS"], "a") as calls:
    print("-m venv", file=calls)
venv = pathlib.Path(sys.argv[-1])
shutil.rmtree(venv, ignore_errors=True)
(venv / "bin").mkdir(parents=True)
for program in "python", "typos":
    shutil.copy(os.environ["PYTHON"], venv / "bin" / program)
"""


@dataclass
class Project:
    """A fresh copy of what run.py needs, with fakes for the programs it calls."""

    root: Path
    environment: dict[str, str]
    calls: Path

    def run(
        self, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> "Result":
        process = subprocess.run(
            [sys.executable, str(self.root / "run.py"), *arguments],
            cwd=cwd or self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        return Result(process.returncode, process.stdout, process.stderr)

    def calls_of(self, command: str) -> list[str]:
        """The calls of venv, pip or uv that begin with this command."""
        lines = self.calls.read_text().splitlines()
        return [line for line in lines if line.startswith(command)]

    @property
    def environments_created(self) -> int:
        """How often .venv was created."""
        return len(self.calls_of("-m venv"))


@dataclass
class Result:
    exit_code: int
    output: str
    errors: str

    @property
    def message(self) -> str:
        """The error message of run.py itself: the last line on standard error."""
        *_, last = self.errors.splitlines()
        assert last.startswith("run.py: ")
        assert last.endswith(".") or "for example: " in last
        assert "Traceback" not in self.errors
        return last


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Project:
    root = tmp_path / "a project"
    fakes = tmp_path / "fakes"
    for folder in root / "notebooks", root / "benchmarks", fakes:
        folder.mkdir(parents=True)
    for name in "run.py", "doctor.py":
        shutil.copy(ROOT / name, root)
    (root / "requirements.lock").write_text(LOCK)
    for name in "_ways", "bounds", "scoreboard":
        (root / "benchmarks" / f"{name}.py").touch()
    (root / "notebooks" / "01_make_one_call.ipynb").touch()
    (root / "notebooks" / "02_make_two_calls.ipynb").touch()
    (fakes / "venv.py").write_text(FAKE_VENV)
    inherited = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("PIP_", "UV_", "SSL_", "HTTPS_"))
    }
    environment = {
        **inherited,
        "PYTHONPATH": str(fakes),
        "PYTHON": str(executable(fakes / "python", FAKE_PYTHON)),
        "CALLS": str(tmp_path / "calls"),
        "CACHE": str(tmp_path / "cache" / "uv"),
        "PIP_SETTINGS": "",
        "GET_UV_EXIT": "0",
        "UV_EXIT": str(int(getattr(request, "param", "") == "uv fails")),
        "INSTALL_EXIT": "0",
        "TOOL_EXIT": "0",
    }
    return Project(root, environment, tmp_path / "calls")


TOO_OLD = "import sys; sys.exit(not (3, 6) <= sys.version_info < (3, 11))"


def older_pythons() -> list[list[str]]:
    """Commands that run an older Python: one simulated, and any installed here."""
    simulated = (
        "import runpy, sys\n"
        "sys.version_info = (3, 10, 0, 'final', 0)\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    names = [f"python3.{minor}" for minor in range(6, 11)]
    shims = [path for name in names if (path := shutil.which(name))]
    versions = Path.home().glob(".pyenv/versions/3.*/bin/python")
    return [[sys.executable, "-c", simulated]] + [
        [path]
        for path in [*shims, *map(str, versions)]
        # pyenv has shims even for versions that are not in use.
        if subprocess.run([path, "-c", TOO_OLD], capture_output=True).returncode == 0
    ]


@pytest.mark.parametrize("arguments", [[], ["labs"], [""], ["--help"]])
def test_unknown_or_missing_command_lists_the_commands(
    tmp_path: Path, arguments: list[str]
) -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    result = Result(process.returncode, process.stdout, process.stderr)
    assert result.exit_code == 2
    for command in COMMANDS:
        assert command in result.message
        assert f"python run.py {command}" in result.output


def test_older_python_is_rejected_with_a_message_before_anything_is_created(
    tmp_path: Path,
) -> None:
    script = shutil.copy(ROOT / "run.py", tmp_path)
    for python in older_pythons():
        process = subprocess.run(
            [*python, str(script), "lab"], capture_output=True, text=True
        )
        message = Result(process.returncode, process.stdout, process.stderr).message
        assert process.returncode == 2
        assert "3.11 or newer" in message
        assert "this is Python 3." in message
    assert list(tmp_path.iterdir()) == [tmp_path / "run.py"]


@posix_only
@with_uv_and_without
def test_environment_is_created_once(project: Project) -> None:
    for _ in range(3):
        assert project.run("lab").exit_code == 0
    assert project.environments_created == 1


@posix_only
@with_uv_and_without
def test_environment_is_recreated_when_the_lock_changes(
    project: Project,
) -> None:
    project.run("lab")
    (project.root / "requirements.lock").write_text(LOCK + "zipp==2\n")
    for _ in range(2):
        assert project.run("lab").exit_code == 0
    assert project.environments_created == 2


@posix_only
def test_environment_is_recreated_after_it_was_deleted(project: Project) -> None:
    project.run("lab")
    shutil.rmtree(project.root / ".venv")
    assert project.run("lab").exit_code == 0
    assert project.environments_created == 2


@posix_only
@with_uv_and_without
def test_environment_is_recreated_after_the_folder_was_moved(project: Project) -> None:
    project.run("lab")
    project.root = project.root.rename(project.root.with_name("moved"))
    for _ in range(2):
        assert project.run("lab").exit_code == 0
    assert project.environments_created == 2


@posix_only
@with_uv_and_without
def test_failed_installation_gives_one_message_and_is_retried_by_the_next_run(
    project: Project,
) -> None:
    for attempt in 1, 2:
        result = project.run("lab", INSTALL_EXIT="1")
        assert result.exit_code == 2
        assert "needs the network" in result.message
        assert "run the same command again" in result.message
        assert project.environments_created == attempt
    assert project.run("lab").exit_code == 0
    assert project.environments_created == 3


@posix_only
@with_uv_and_without
def test_failed_installation_of_a_new_lock_invalidates_the_old_environment(
    project: Project,
) -> None:
    lock = project.root / "requirements.lock"
    old = lock.read_text()
    project.run("lab")
    lock.write_text(LOCK + "zipp==2\n")
    project.run("lab", INSTALL_EXIT="1")
    lock.write_text(old)
    assert project.run("lab").exit_code == 0
    assert project.environments_created == 3


@posix_only
def test_uv_installs_the_lock_and_the_project_with_hashes(project: Project) -> None:
    result = project.run("lab")

    assert len(project.calls_of("-m pip")) == 1  # for uv itself
    packages, ours = project.calls_of("-m uv pip install")
    lock = project.root / "requirements.lock"
    assert packages.endswith(f"--require-hashes -r {lock}")
    assert ours.endswith(f"--no-deps --no-build-isolation -e {project.root}")
    steps = [line for line in result.errors.splitlines() if "/3 " in line]
    assert len(steps) == 3


@posix_only
def test_uv_itself_is_installed_as_the_lock_pins_it(project: Project) -> None:
    project.run("lab")

    [call] = project.calls_of("-m pip install")
    assert "--require-hashes" in call
    pinned = (project.root / ".venv" / "uv.txt").read_text().split()
    assert pinned == "uv==0.13.9 \\ --hash=sha256:22 \\ --hash=sha256:33".split()


def test_the_lock_pins_uv() -> None:
    assert "\nuv==" in (ROOT / "requirements.lock").read_text()


@posix_only
@pytest.mark.parametrize("failing", ["GET_UV_EXIT", "UV_EXIT"])
def test_pip_installs_the_same_if_uv_fails(project: Project, failing: str) -> None:
    project.environment[failing] = "1"
    result = project.run("lab")

    assert result.exit_code == 0
    _, packages, ours = project.calls_of("-m pip install")
    lock = project.root / "requirements.lock"
    assert packages.endswith(f"--require-hashes -r {lock}")
    assert ours.endswith(f"--no-deps --no-build-isolation -e {project.root}")
    assert "pip, which takes a few minutes" in result.errors


@posix_only
def test_uv_uses_the_package_index_proxy_and_certificates_of_pip(
    project: Project,
) -> None:
    settings = r"""\
:env:.index-url='https://from-the-environment.example/simple'
global.cert='/etc/our own.pem'
global.extra-index-url='\nhttps://one.example\nhttps://two.example'
global.index-url='https://from-a-file.example/simple'
global.proxy='http://proxy.example:3128'
install.find-links='/wheels /more'
"""
    project.run("lab", PIP_SETTINGS=settings, UV_INDEX="https://mine.example")

    seen = project.calls_of("")
    assert "UV_DEFAULT_INDEX=https://from-the-environment.example/simple" in seen
    assert "UV_FIND_LINKS=/wheels,/more" in seen
    assert "SSL_CERT_FILE=/etc/our own.pem" in seen
    assert "HTTPS_PROXY=http://proxy.example:3128" in seen
    assert "UV_INDEX=https://mine.example" in seen  # the reader's own word for uv


@posix_only
def test_uv_gets_another_cache_if_the_home_folder_is_read_only(
    project: Project, tmp_path: Path
) -> None:
    project.run("lab")
    assert project.calls_of("UV_CACHE_DIR") == []

    (tmp_path / "file").touch()  # not even root can create a folder in it
    shutil.rmtree(project.root / ".venv")
    project.run("lab", CACHE=str(tmp_path / "file" / "uv"))

    assert set(project.calls_of("UV_CACHE_DIR")) == {
        f"UV_CACHE_DIR={project.root / '.venv' / 'cache'}"
    }


@posix_only
def test_failing_venv_gives_one_message(project: Project, tmp_path: Path) -> None:
    (tmp_path / "fakes" / "venv.py").write_text("raise SystemExit(1)")
    result = project.run("lab")
    assert result.exit_code == 2
    assert "could not create the virtual environment" in result.message
    assert "python3-venv" in result.message


def test_real_installer_without_network_gives_one_message(
    tmp_path: Path,
) -> None:
    for name in "run.py", "requirements.lock":
        shutil.copy(ROOT / name, tmp_path)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_"))
    }
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }
    result = Project(tmp_path, environment, tmp_path / "calls").run("lab")
    assert result.exit_code == 2
    assert "needs the network" in result.message
    assert not (tmp_path / ".venv" / "installed.txt").exists()


@posix_only
@with_uv_and_without
def test_run_py_works_from_any_folder(project: Project, tmp_path: Path) -> None:
    result = project.run("lab", cwd=tmp_path)
    assert result.exit_code == 0
    assert str(project.root) in result.output.splitlines()
    assert (project.root / ".venv").is_dir()
    assert not (tmp_path / ".venv").exists()


@posix_only
def test_further_arguments_are_passed_to_the_tool_unchanged(project: Project) -> None:
    lab = project.run("lab", "--no-browser", "--port", "8889").output
    assert "<-m><jupyterlab>" in lab
    assert lab.endswith("<--no-browser><--port><8889>\n")
    test = project.run("test", "-k", "timeline and not live").output
    assert test.endswith("<-m><pytest><-k><timeline and not live>\n")


@posix_only
def test_notebooks_executes_all_notebooks_or_only_the_named_ones(
    project: Project,
) -> None:
    all_notebooks = project.run("notebooks").output
    assert "<-m><nbconvert>" in all_notebooks
    assert all_notebooks.count(".ipynb>") == 2
    one = project.run("notebooks", "01_make_one_call").output
    assert one.count(".ipynb>") == 1
    assert one.endswith("01_make_one_call.ipynb>\n")


@posix_only
def test_missing_notebook_is_named_and_nothing_is_executed(
    project: Project,
) -> None:
    result = project.run("notebooks", "01_make_one_call", "77_make_none")
    assert result.exit_code == 2
    assert "77_make_none.ipynb" in result.message
    assert "nbconvert" not in result.output


@posix_only
@pytest.mark.parametrize(
    ("arguments", "command_line"),
    [
        ([], "scoreboard.py>"),
        (["--quick", "--at-once", "8"], "scoreboard.py><--quick><--at-once><8>"),
        (["bounds", "60"], "bounds.py><60>"),
    ],
)
def test_bench_runs_the_named_benchmark_or_the_scoreboard_by_default(
    project: Project, arguments: list[str], command_line: str
) -> None:
    result = project.run("bench", *arguments)
    assert result.exit_code == 0
    assert result.output.endswith(f"{command_line}\n")


@posix_only
@pytest.mark.parametrize("name", ["bound", "_ways", ""])
def test_unknown_benchmark_lists_the_benchmarks(project: Project, name: str) -> None:
    result = project.run("bench", name)
    assert result.exit_code == 2
    assert (
        f"unknown benchmark {name!r}. Choose from: bounds, scoreboard" in result.message
    )


@posix_only
@pytest.mark.parametrize("command", TOOLS)
def test_exit_code_is_that_of_the_tool(project: Project, command: str) -> None:
    assert project.run(command, TOOL_EXIT="5").exit_code == 5


@posix_only
def test_command_test_stops_at_the_first_failing_tool(project: Project) -> None:
    result = project.run("test", TOOL_EXIT="1")
    assert "<ruff>" in result.output
    assert "<pytest>" not in result.output

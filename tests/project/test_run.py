import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("lab", "test", "notebooks", "bench")

posix_only = pytest.mark.skipif(
    os.name == "nt", reason="the stand-ins for uv and python are shell scripts"
)

with_and_without_uv = pytest.mark.parametrize(
    "project", ["with uv", "without uv"], indirect=True
)

# In the place of .venv's python: pip does as it is told, a tool says its words.
PYTHON = """#!/bin/sh
if [ "$2" = pip ]; then
    echo "install" >> "$CALLS"
    exit "$INSTALL_EXIT"
fi
pwd
printf '<%s>' "$@"
echo
exit "$TOOL_EXIT"
"""

UV = """#!/bin/sh
case $1 in
venv)
    echo "make" >> "$CALLS"
    for venv; do :; done
    rm -rf "$venv"
    mkdir -p "$venv/bin"
    cp "$PYTHON" "$venv/bin/python"
    ;;
pip)
    echo "install" >> "$CALLS"
    exit "$INSTALL_EXIT"
    ;;
esac
"""

# In the place of the standard library's, which needs seconds to install pip.
VENV = """
import os, pathlib, shutil, sys
with open(os.environ["CALLS"], "a") as calls:
    print("make", file=calls)
venv = pathlib.Path(sys.argv[-1])
shutil.rmtree(venv, ignore_errors=True)
(venv / "bin").mkdir(parents=True)
shutil.copy(os.environ["PYTHON"], venv / "bin" / "python")
"""


@dataclass
class Project:
    """A fresh copy of what run.py needs, with stand-ins for what it calls."""

    root: Path
    environment: dict[str, str]
    calls: Path

    def run(self, *words: str, cwd: Path | None = None, **environment: str) -> "Ended":
        process = subprocess.run(
            [sys.executable, str(self.root / "run.py"), *words],
            cwd=cwd or self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        return Ended(process.returncode, process.stdout, process.stderr)

    @property
    def set_ups(self) -> int:
        """How often an environment was made."""
        return self.calls.read_text().split().count("make")

    @property
    def installs(self) -> int:
        return self.calls.read_text().split().count("install")


@dataclass
class Ended:
    code: int
    said: str
    errors: str

    @property
    def sentence(self) -> str:
        """What run.py itself said on standard error."""
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
    stand_ins = tmp_path / "stand-ins"
    tools = tmp_path / "tools"
    for folder in root / "notebooks", stand_ins, tools:
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "run.py", root)
    (root / "requirements.lock").write_text("helpers==1\n")
    (root / "benchmarks").mkdir()
    for name in "_ways", "bounds", "scoreboard":
        (root / "benchmarks" / f"{name}.py").touch()
    (root / "notebooks" / "01_make_one_call.ipynb").touch()
    (root / "notebooks" / "02_make_two_calls.ipynb").touch()
    environment = {
        **os.environ,
        "PATH": str(tools),
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": str(executable(stand_ins / "python", PYTHON)),
        "INSTALL_EXIT": "0",
        "TOOL_EXIT": "0",
    }
    if getattr(request, "param", "with uv") == "with uv":
        executable(tools / "uv", UV)
        environment["PATH"] += os.pathsep + os.defpath
    else:
        (stand_ins / "venv.py").write_text(VENV)
        environment["PYTHONPATH"] = str(stand_ins)
    return Project(root, environment, tmp_path / "calls")


TOO_OLD = "import sys; sys.exit(not (3, 6) <= sys.version_info < (3, 11))"


def older_pythons() -> list[list[str]]:
    """Command lines of an older Python: one simulated, and those found here."""
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
        # pyenv's shims stand there also for versions that are not in use.
        if subprocess.run([path, "-c", TOO_OLD], capture_output=True).returncode == 0
    ]


@pytest.mark.parametrize("words", [[], ["labs"], [""], ["--help"]])
def test_an_unknown_word_or_none_is_answered_with_the_words_there_are(
    tmp_path: Path, words: list[str]
) -> None:
    process = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    ended = Ended(process.returncode, process.stdout, process.stderr)
    assert ended.code == 2
    for word in WORDS:
        assert word in ended.sentence
        assert f"python run.py {word}" in ended.said


def test_a_python_older_than_3_11_is_told_so_and_nothing_is_made(
    tmp_path: Path,
) -> None:
    script = shutil.copy(ROOT / "run.py", tmp_path)
    for python in older_pythons():
        process = subprocess.run(
            [*python, str(script), "lab"], capture_output=True, text=True
        )
        sentence = Ended(process.returncode, process.stdout, process.stderr).sentence
        assert process.returncode == 2
        assert "3.11 or newer" in sentence
        assert "this is Python 3." in sentence
    assert list(tmp_path.iterdir()) == [tmp_path / "run.py"]


@posix_only
@with_and_without_uv
def test_the_environment_is_set_up_once(project: Project) -> None:
    for _ in range(3):
        assert project.run("lab").code == 0
    assert project.set_ups == 1


@posix_only
@with_and_without_uv
def test_the_environment_is_set_up_again_when_the_lock_changes(
    project: Project,
) -> None:
    project.run("lab")
    (project.root / "requirements.lock").write_text("helpers==2\n")
    for _ in range(2):
        assert project.run("lab").code == 0
    assert project.set_ups == 2


@posix_only
def test_the_environment_is_set_up_again_when_it_was_deleted(project: Project) -> None:
    project.run("lab")
    shutil.rmtree(project.root / ".venv")
    assert project.run("lab").code == 0
    assert project.set_ups == 2


@posix_only
@with_and_without_uv
def test_a_failed_installation_is_one_sentence_and_the_next_run_tries_again(
    project: Project,
) -> None:
    for tries in 1, 2:
        ended = project.run("lab", INSTALL_EXIT="1")
        assert ended.code == 2
        assert "needs the network" in ended.sentence
        assert "run the same command again" in ended.sentence
        assert project.installs == tries
    assert project.run("lab").code == 0
    assert project.set_ups == 3


@posix_only
@with_and_without_uv
def test_a_failed_installation_of_a_new_lock_does_not_pass_for_the_old_one(
    project: Project,
) -> None:
    lock = project.root / "requirements.lock"
    old = lock.read_text()
    project.run("lab")
    lock.write_text("helpers==2\n")
    project.run("lab", INSTALL_EXIT="1")
    lock.write_text(old)
    assert project.run("lab").code == 0
    assert project.set_ups == 3


@posix_only
def test_a_uv_that_fails_is_one_sentence(tmp_path: Path) -> None:
    for name in "run.py", "requirements.lock":
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "uv", "#!/bin/sh\nexit 1\n")
    project = Project(tmp_path, {**os.environ, "PATH": str(tools)}, tmp_path / "calls")
    ended = project.run("lab")
    assert ended.code == 2
    assert "could not make the virtual environment" in ended.sentence
    assert not (tmp_path / ".venv").exists()


def test_without_network_the_real_installer_ends_in_one_sentence(
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
        "PATH": str(tmp_path / "no uv here"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }
    ended = Project(tmp_path, environment, tmp_path / "calls").run("lab")
    assert ended.code == 2
    assert "needs the network" in ended.sentence
    assert not (tmp_path / ".venv" / "installed.txt").exists()


@posix_only
@with_and_without_uv
def test_it_works_from_any_folder(project: Project, tmp_path: Path) -> None:
    ended = project.run("lab", cwd=tmp_path)
    assert ended.code == 0
    assert str(project.root) in ended.said.splitlines()
    assert (project.root / ".venv").is_dir()
    assert not (tmp_path / ".venv").exists()


@posix_only
def test_further_words_go_to_the_tool_behind_as_they_are(project: Project) -> None:
    opened = project.run("lab", "--no-browser", "--port", "8889").said
    assert "<-m><jupyterlab>" in opened
    assert opened.endswith("<--no-browser><--port><8889>\n")
    tested = project.run("test", "-k", "timeline and not live").said
    assert tested.endswith("<-m><pytest><-k><timeline and not live>\n")


@posix_only
def test_notebooks_executes_all_or_the_ones_named(project: Project) -> None:
    both = project.run("notebooks").said
    assert "<-m><nbconvert>" in both
    assert both.count(".ipynb>") == 2
    one = project.run("notebooks", "01_make_one_call").said
    assert one.count(".ipynb>") == 1
    assert one.endswith("01_make_one_call.ipynb>\n")


@posix_only
def test_a_notebook_that_does_not_exist_is_named_and_nothing_is_executed(
    project: Project,
) -> None:
    ended = project.run("notebooks", "01_make_one_call", "77_make_none")
    assert ended.code == 2
    assert "77_make_none.ipynb" in ended.sentence
    assert "nbconvert" not in ended.said


@posix_only
@pytest.mark.parametrize(
    ("words", "behind"),
    [
        ([], "scoreboard.py>"),
        (["--quick", "--at-once", "8"], "scoreboard.py><--quick><--at-once><8>"),
        (["bounds", "60"], "bounds.py><60>"),
    ],
)
def test_bench_measures_what_the_first_word_names_or_else_the_scoreboard(
    project: Project, words: list[str], behind: str
) -> None:
    ended = project.run("bench", *words)
    assert ended.code == 0
    assert ended.said.endswith(f"{behind}\n")


@posix_only
@pytest.mark.parametrize("word", ["bound", "_ways", ""])
def test_a_benchmark_that_does_not_exist_is_answered_with_those_there_are(
    project: Project, word: str
) -> None:
    ended = project.run("bench", word)
    assert ended.code == 2
    assert f"bounds or scoreboard; got {word!r}" in ended.sentence


@posix_only
@pytest.mark.parametrize("word", WORDS)
def test_the_exit_code_is_that_of_the_tool_behind(project: Project, word: str) -> None:
    assert project.run(word, TOOL_EXIT="5").code == 5


@posix_only
def test_the_first_tool_that_finds_something_ends_the_proof(project: Project) -> None:
    ended = project.run("test", TOOL_EXIT="1")
    assert "<ruff>" in ended.said
    assert "<pytest>" not in ended.said

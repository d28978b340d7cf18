"""Both packages are built as one distribution, without the network."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.environment import RECORD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run([*command, "-d", folder], cwd=ROOT, capture_output=True, check=True)
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_contains_both_packages_and_nothing_else(
    wheel: zipfile.ZipFile,
) -> None:
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    [metadata] = {name for name in folders if name.endswith(".dist-info")}
    assert folders - {metadata} == {"helpers", "llm_stub"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_stub_starts_from_the_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = (
        "import helpers\n"
        "provider = helpers.connect()\n"
        "print(helpers.__file__, provider.ask('/_provider/stats')['requests'])\n"
    )
    environ = {
        name: text
        for name, text in os.environ.items()
        if name not in ("LLM_PROVIDER_URL", RECORD)
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "helpers" / "__init__.py"), "0"]

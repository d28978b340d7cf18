import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path


def test_example_in_the_readme_works(tmp_path: Path) -> None:
    readme = files("llm_stub").joinpath("README.md").read_text("utf-8")
    [example] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "test_example.py").write_text(example)
    pytest = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed" in pytest.stdout, pytest.stdout

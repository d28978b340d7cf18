"""After `python run.py lab`, the first notebooks work in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Page, expect

if TYPE_CHECKING:
    from .conftest import Lab, Notebook

FIRST = "00_start_here"
NOTEBOOKS = [
    FIRST,
    "01_make_one_call",
    "02_use_a_thread_pool",
    "03_gather_coroutines",
]


def count_pictures(cells: list[dict[str, Any]]) -> int:
    """The number of pictures among the outputs."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_lab_opens_the_first_notebook(lab: Lab, page: Page) -> None:
    page.goto(lab.url)
    status = page.locator(".jp-StatusBar-TextItem")
    expect(status.filter(has_text="(ipykernel) | Idle")).to_be_visible()
    tabs = page.locator("#jp-main-dock-panel .lm-TabBar-tabLabel")
    expect(tabs).to_have_text([f"{FIRST}.ipynb"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.runs_all(name)) for name in NOTEBOOKS]
)
def test_run_all_shows_every_picture_and_no_message(
    name: str, page: Page, open_notebook: Callable[[str], Notebook], screenshots: Path
) -> None:
    notebook = open_notebook(name)
    notebook.run_all()

    images = page.locator(".jp-OutputArea-output img")
    widths = images.evaluate_all(
        "images => Promise.all("
        "images.map(image => image.decode().then(() => image.naturalWidth)))"
    )
    assert len(widths) >= count_pictures(notebook.stored)
    assert all(widths)

    notebook.take_screenshot(screenshots)
    assert notebook.messages() == []

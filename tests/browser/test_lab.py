"""A newcomer types `python run.py lab`, and the notebooks work."""

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


def pictures(cells: list[dict[str, Any]]) -> int:
    """How many outputs of a notebook are pictures."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_first_page_is_the_first_notebook(lab: Lab, page: Page) -> None:
    page.goto(lab.url)
    status = page.locator(".jp-StatusBar-TextItem")
    expect(status.filter(has_text="(ipykernel) | Idle")).to_be_visible()
    tabs = page.locator("#jp-main-dock-panel .lm-TabBar-tabLabel")
    expect(tabs).to_have_text([f"{FIRST}.ipynb"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_cells(
    name: str, page: Page, opened: Callable[[str], Notebook], screenshots: Path
) -> None:
    notebook = opened(name)
    notebook.run_all()

    images = page.locator(".jp-OutputArea-output img")
    widths = images.evaluate_all(
        "images => Promise.all("
        "images.map(image => image.decode().then(() => image.naturalWidth)))"
    )
    assert len(widths) >= pictures(notebook.stored)
    assert all(widths)

    notebook.take_a_picture(screenshots)
    assert notebook.messages() == []

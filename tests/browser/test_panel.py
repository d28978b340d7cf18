"""The panel of lesson 08, used with mouse and keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Locator, Page, expect

if TYPE_CHECKING:
    from .conftest import Notebook

LESSON = "08_stream_and_show_progress"
PROMPT, END_OF_ANSWER = "Why is the sky blue?", "part of the sky."


class Panel:
    """The parts of the panel, found by the CSS classes that the lesson gives them."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.whole = page.locator(".our-panel")
        self.run, self.cancel, self.status, self.timeline, self.slider = (
            self.whole.locator(f".our-{part}")
            for part in ("run", "cancel", "status", "timeline", "slider")
        )

    def card(self, prompt: str) -> Locator:
        title = self.page.locator("b", has_text=prompt)
        return self.whole.locator(".widget-html-content").filter(has=title)

    def set_slider(self, target: int) -> None:
        """Move the slider with the arrow keys, one step at a time."""
        value = self.slider.locator(".widget-readout")
        handle = self.slider.locator(".noUi-handle")
        handle.focus()
        while (now := int(value.inner_text())) != target:
            handle.press("ArrowRight" if now < target else "ArrowLeft")
            expect(value).not_to_have_text(str(now))
        # Clicking Run could overtake slider moves that the kernel has not seen yet.
        expect(self.run).to_have_text(f"Run, {target} at once")

    def press_run(self) -> None:
        self.run.dblclick()  # like an impatient reader; must start only one run
        expect(self.status).to_have_text("Running …")
        expect(self.run).to_be_disabled()
        expect(self.cancel).to_be_enabled()

    def expect_final_status(self, status: str) -> None:
        """The status is the timeline's sentence, taken from the stub's journal."""
        expect(self.status).to_have_text(re.compile(f"^The provider saw: {status}"))
        expect(self.run).to_be_enabled()
        expect(self.cancel).to_be_disabled()


@pytest.mark.runs_all(LESSON)
def test_panel_runs_cancels_and_runs_again(
    page: Page, open_notebook: Callable[[str], Notebook], screenshots: Path
) -> None:
    notebook = open_notebook(LESSON)
    notebook.run_all()
    panel = Panel(page)
    panel.whole.scroll_into_view_if_needed()

    # Run: the timeline moves and text streams in. Cancel halfway.
    panel.set_slider(3)
    panel.press_run()
    expect(panel.timeline).to_contain_text("receiving")
    expect(panel.timeline).to_contain_text("queued")
    seen = panel.timeline.inner_text()
    expect(panel.timeline).not_to_have_text(seen)
    expect(panel.card(PROMPT)).to_contain_text("short blue")
    page.screenshot(path=screenshots / "panel_running.png")
    panel.cancel.click()
    panel.expect_final_status(r"\d+ calls, \d cancelled, at most 3 in flight")
    expect(panel.timeline).to_contain_text("cancelled")
    expect(panel.timeline).to_contain_text("never sent")
    page.screenshot(path=screenshots / "panel_cancelled.png")

    # Run repeatedly: JupyterLab delivers later messages to another thread.
    for limit in (10, 11, 12):
        panel.set_slider(limit)
        panel.press_run()
        panel.expect_final_status(f"12 calls, at most {limit} in flight")
        expect(panel.card(PROMPT)).to_contain_text(END_OF_ANSWER)
    page.screenshot(path=screenshots / "panel_done.png")

    # The lesson says so, and has a button that shows it.
    button = page.locator(".where-button")
    for presses in (2, 3, 4):  # a cell made the first press
        button.click()
        expect(button).to_have_text(f"Pressed {presses} ×")
    expect(page.locator(".where-label")).to_have_text(
        "This callback ran in another loop."
    )
    assert notebook.messages() == []

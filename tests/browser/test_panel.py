"""A reader works the panel of lesson 08, by mouse and keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import Locator, Page, expect

if TYPE_CHECKING:
    from .conftest import Notebook

LESSON = "08_stream_and_show_progress"
QUESTION, ITS_LAST_WORDS = "Why is the sky blue?", "part of the sky."


class Panel:
    """The panel's parts on the page, by the names that the lesson gives them."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.whole = page.locator(".our-panel")
        self.run, self.cancel, self.status, self.timeline, self.slider = (
            self.whole.locator(f".our-{part}")
            for part in ("run", "cancel", "status", "timeline", "slider")
        )

    def card(self, question: str) -> Locator:
        title = self.page.locator("b", has_text=question)
        return self.whole.locator(".widget-html-content").filter(has=title)

    def set_slider(self, wanted: int) -> None:
        """With the arrow keys, one step after another."""
        value = self.slider.locator(".widget-readout")
        handle = self.slider.locator(".noUi-handle")
        handle.focus()
        while (now := int(value.inner_text())) != wanted:
            handle.press("ArrowRight" if now < wanted else "ArrowLeft")
            expect(value).not_to_have_text(str(now))
        # A press overtakes moves that are still on their way to the kernel.
        expect(self.run).to_have_text(f"Run, {wanted} at once")

    def press_run(self) -> None:
        self.run.dblclick()  # as impatient readers do: it is one run all the same
        expect(self.status).to_have_text("Running …")
        expect(self.run).to_be_disabled()
        expect(self.cancel).to_be_enabled()

    def ends_with(self, status: str) -> None:
        """The status is the timeline's sentence: what the provider's journal has."""
        expect(self.status).to_have_text(re.compile(f"^The provider saw: {status}"))
        expect(self.run).to_be_enabled()
        expect(self.cancel).to_be_disabled()


def test_a_reader_works_the_panel(
    page: Page, opened: Callable[[str], Notebook], screenshots: Path
) -> None:
    notebook = opened(LESSON)
    notebook.run_all()
    panel = Panel(page)
    panel.whole.scroll_into_view_if_needed()

    # Run: the timeline moves, and text streams in. Cancel in the middle.
    panel.set_slider(3)
    panel.press_run()
    expect(panel.timeline).to_contain_text("receiving")
    expect(panel.timeline).to_contain_text("queued")
    seen = panel.timeline.inner_text()
    expect(panel.timeline).not_to_have_text(seen)
    expect(panel.card(QUESTION)).to_contain_text("short blue")
    page.screenshot(path=screenshots / "panel_running.png")
    panel.cancel.click()
    panel.ends_with(r"\d+ calls, \d cancelled, at most 3 in flight")
    expect(panel.timeline).to_contain_text("cancelled")
    expect(panel.timeline).to_contain_text("never sent")
    page.screenshot(path=screenshots / "panel_cancelled.png")

    # Run after run: JupyterLab delivers what follows to another thread.
    for bound in (10, 11, 12):
        panel.set_slider(bound)
        panel.press_run()
        panel.ends_with(f"12 calls, at most {bound} in flight")
        expect(panel.card(QUESTION)).to_contain_text(ITS_LAST_WORDS)
    page.screenshot(path=screenshots / "panel_done.png")

    # So the lesson says, and has a button that shows it.
    button = page.locator(".where-button")
    for presses in (2, 3, 4):  # the first was a cell's
        button.click()
        expect(button).to_have_text(f"Pressed {presses} ×")
    expect(page.locator(".where-label")).to_have_text(
        "This callback ran in another loop."
    )
    assert notebook.messages() == []

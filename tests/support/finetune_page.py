"""The Fine-tune tab in tests: values of its form, events of its buttons, and actions in a browser page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    from playwright.sync_api import Page

JOBS, HOSTED = "Hugging Face Jobs", "Moondream's tuning API"
FORM: dict[str, Any] = {
    "base": "moondream-tiny",
    "photo_source": "Bundled photos",
    "files": None,
    "dataset": "",
    "length": "Smoke test",
    "steps": None,
    "seed": 1,
    "name": "",
    "learning_rate": 2e-3,
    "beta": 0.02,
    "rollouts": 4,
    "rank": 16,
    "backend": "This machine",
    "hardware": None,
    "hub_token": "",
    "moondream_key": "",
    "budget": 5.0,
    "sft_steps": 10,
}


def event(**data: Any) -> gr.EventData:
    """Return the data of an event of the run view or the history."""
    return gr.EventData(None, data)


def open_finetune_tab(page: Page) -> None:
    """Open the tab and wait until its form and run view are drawn."""
    page.get_by_role("tab", name="Fine-tune").click()
    page.wait_for_selector("#tune-start")
    page.wait_for_selector("#run-view .run-intro", state="attached")


def start_run(page: Page, seed: int, length: str = "Smoke test", name: str = "") -> None:
    """Fill in the form, submit it and wait until the run is displayed. `tests.support.fake_run` explains the seeds."""
    open_finetune_tab(page)
    page.get_by_label(length).check()
    page.locator("#tune-name input, #tune-name textarea").fill(name)
    page.locator("#tune-seed input").fill(str(seed))
    page.get_by_role("button", name="Retrain with this reward").click()
    page.locator(".run-summary").get_by_text(f"seed {seed}").wait_for()


def wait_for_state(page: Page, state: str = "done") -> None:
    """Wait until the displayed run has a state."""
    page.wait_for_selector(f"#run-view .run[data-state={state}]")

"""One short run with the real trainer, from the Fine-tune tab to the columns of the Playground."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from inference.registry import MODELS
from tests.support.app_server import app_server
from tests.support.finetune_page import open_finetune_tab, start_run, wait_for_state
from training.runs.queue import COMMAND
from training.runs.run import RunStore

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
Open = Callable[..., "Page"]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Serve an application with the real training command."""
    assert (sys.executable, "-m", "training.grpo") == COMMAND
    with app_server(folder, COMMAND) as address:
        yield address
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


def test_real_run_trains_and_its_model_answers_in_the_playground(open_page: Open, folder: Path) -> None:
    page = open_page("photo=chelsea.jpg&n=1&reward=sharpness:1")
    page.set_default_timeout(300_000)
    open_finetune_tab(page)
    page.get_by_label("Custom").check()
    page.locator("#tune-steps input").fill(str(STEPS))
    start_run(page, seed=7, length="Custom")
    wait_for_state(page)
    run = RunStore(folder / "runs").list()[0]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3] and run.status().step == STEPS
    assert page.locator(".curve-legend .line-reward").count() == 1
    assert page.locator(".probe-thumbnails li").count() == len(run.probes())
    assert page.locator(".run-table tbody tr").count() == 5
    result = run.result() or {}
    assert f"on {result['held_out']} held-out photos" in page.locator(".run-verdict").inner_text()
    page.wait_for_function("() => [...document.querySelectorAll('.pair img')].every(image => image.naturalWidth > 0)")
    if page.get_by_role("button", name="Use anyway").is_visible():
        page.get_by_role("button", name="Use anyway").click()
    page.get_by_role("button", name="Revert").wait_for()
    page.get_by_role("tab", name="Playground").click()
    page.locator(".picker-selection").get_by_text("moondream-tiny · tuned: sharpness 1").wait_for()
    page.get_by_role("button", name="Run", exact=True).click()
    for model in ("moondream-tiny", f"run-{run.id}"):
        page.wait_for_selector(f".model-column[data-model='{model}'][data-status=done]")
    assert page.locator(".card[data-status=ready]").count() == 2

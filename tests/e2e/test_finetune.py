"""The Fine-tune tab in a browser, with the fake training command."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from app import build_services
from inference.registry import MODELS
from settings import Settings
from tests.support.app_server import app_server
from tests.support.browser import PHONE, set_weight, violations
from tests.support.fake_run import write_adapter, write_result, write_step
from tests.support.finetune_page import open_finetune_tab, start_run, wait_for_state
from tests.support.hub_server import TOKEN, HubServer
from tests.support.runs import FAKE, make_config, until
from training.runs.adapters import AdapterRegistry
from training.runs.run import RunConfig, RunStore
from ui.playground.samples import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
CAT = "photo=chelsea.jpg&n=1"
DEFAULT_STEPS = RunConfig.model_fields["steps"].default


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Serve an application for this file alone: its runs change the models that the Playground offers."""
    with app_server(folder) as address:
        yield address
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


@pytest.fixture(autouse=True)
def runs(folder: Path) -> Iterator[RunStore]:
    """Return the application's runs. At the end of a test, cancel unfinished ones and disable their models."""
    store = RunStore(folder / "runs")
    yield store
    for run in store.list():
        if not run.status().finished:
            run.cancel()
    until(lambda: all(run.status().finished and not run.alive() for run in store.list()))
    adapters = AdapterRegistry(store)
    for run in store.list():
        if adapters.is_enabled(run.id):
            adapters.disable(run.id)


def create_finished_run(runs: RunStore, name: str, *owner: str) -> None:
    """Create a run that has ended, with a result. `owner` is its owner's id and name."""
    run = runs.create(make_config(name=name), *owner)
    write_adapter(run)
    write_result(run, wins=False, alarm="")
    run.set_status(state="done", step=6, steps=6, started=100.0, ended=142.0)


def selected_models(page: Page) -> str:
    return page.locator(".picker-selection").text_content() or ""


def test_empty_tab_explains_the_steps_and_estimates_a_run(open_page: Open, runs: RunStore) -> None:
    for run in runs.list():
        runs.delete(run.id)
    page = open_page("reward=sharpness:0.5,colour:0.25")
    open_finetune_tab(page)
    introduction = page.locator("#run-view").inner_text()
    for text in ("Set the reward sliders", "Retrain with this reward", "wins on held-out photos"):
        assert text in introduction
    page.locator(".tune-reward").get_by_text("sharpness 0.5 · colour 0.25").wait_for()
    assert f"{DEFAULT_STEPS} steps take about" in page.locator("#tune-estimate").inner_text()
    page.get_by_label("Smoke test").check()
    page.locator("#tune-estimate").get_by_text("10 steps take about").wait_for()
    assert violations(page) == []


def test_playground_button_opens_the_tab_with_the_sliders_reward(open_page: Open) -> None:
    page = open_page("")
    for name, weight in {"sharpness": 0.8, "colour": 0, "creativity": 0}.items():
        set_weight(page, name, weight)
    page.get_by_role("button", name="Fine-tune with this reward").click()
    page.locator("#tune-start").wait_for()
    page.locator(".tune-reward").get_by_text("sharpness 0.8", exact=True).wait_for()
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("Caption").check()
    assert page.locator("#fine-tune-reward").is_hidden()


def test_job_shows_its_price_needs_a_token_and_clears_it(open_page: Open, runs: RunStore, hub: HubServer) -> None:
    page = open_page("reward=sharpness:1")
    open_finetune_tab(page)
    page.get_by_label("Hugging Face Jobs").check()
    page.locator("#tune-estimate").get_by_text("$1.60 at most").wait_for()
    page.get_by_label("Smoke test").check()
    page.locator("#tune-seed input").fill("142")
    page.get_by_role("button", name="Retrain with this reward").click()
    page.get_by_text("Enter your Hugging Face token").wait_for()
    assert all(run.config().seed != 142 for run in runs.list())
    token = page.get_by_label("Hugging Face token")
    token.fill(TOKEN)
    page.get_by_role("button", name="Retrain with this reward").click()
    page.locator(".run-summary").get_by_text("seed 142").wait_for()
    wait_for_state(page)
    config = runs.list()[-1].config()
    assert (config.backend, config.hardware) == ("jobs", "l4x1")
    page.wait_for_function("input => input.value === ''", arg=token.element_handle())
    assert TOKEN not in page.content()


def test_winner_is_selected_beside_its_base_until_it_is_reverted(open_page: Open, runs: RunStore) -> None:
    page = open_page(CAT + "&reward=sharpness:1")
    before = selected_models(page)
    start_run(page, seed=7)
    wait_for_state(page)
    run = runs.list()[-1]
    assert run.config().reward == {"sharpness": 1.0}
    assert "The tuned model wins: on 24 held-out photos" in page.locator(".run-verdict").inner_text()
    assert page.locator(".run-table tbody tr").count() == 5
    assert page.locator(".pair").count() == 3
    page.wait_for_function("() => [...document.querySelectorAll('.pair img')].every(image => image.naturalWidth > 0)")
    page.get_by_role("tab", name="Playground").click()
    page.locator(".picker-selection").get_by_text("tuned: sharpness 1").wait_for()
    assert selected_models(page) == "moondream-tiny · tuned: sharpness 1"
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(f".model-column[data-model='run-{run.id}'][data-status=done]")
    page.wait_for_selector(".model-column[data-model='moondream-tiny'][data-status=done]")
    open_page("").locator(".picker-selection").get_by_text("moondream-tiny · tuned: sharpness 1").wait_for()
    page.get_by_role("tab", name="Fine-tune").click()
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use in the Playground").wait_for()
    page.get_by_role("tab", name="Playground").click()
    page.wait_for_function("() => document.querySelector('.picker-selection').textContent === 'moondream-tiny'")
    open_page("").locator(".picker-selection").get_by_text(before).wait_for()


def test_run_survives_a_reload_and_a_second_page_can_cancel_it(open_page: Open) -> None:
    page = open_page("")
    start_run(page, seed=300)
    page.get_by_text("step 3 of 10").first.wait_for()
    page.reload()
    page.wait_for_selector("body[data-opened]")
    open_finetune_tab(page)
    page.get_by_text("Training · step 3 of 10").wait_for()
    other = open_page("")
    open_finetune_tab(other)
    other.get_by_text("Training · step 3 of 10").wait_for()
    assert other.locator(".probe-after").get_attribute("src").startswith("data:image/jpeg")
    other.get_by_role("button", name="Cancel", exact=True).last.click()
    for view in (page, other):
        wait_for_state(view, "cancelled")
        assert "The training so far is kept" in view.locator(".run-message").inner_text()


def test_second_run_waits_for_the_first(open_page: Open) -> None:
    first, second = open_page(""), open_page("")
    start_run(first, seed=301)
    first.get_by_text("step 3 of 10").first.wait_for()
    start_run(second, seed=2)
    second.get_by_text("Waiting for 1 earlier run").wait_for()
    assert first.locator(".run-summary").inner_text().endswith("seed 301")
    first.get_by_role("button", name="Cancel", exact=True).last.click()
    wait_for_state(second)


def test_losing_model_can_be_used_anyway(open_page: Open) -> None:
    page = open_page("")
    start_run(page, seed=100, name="Second best")
    wait_for_state(page)
    assert "is not clearly better" in page.locator(".run-verdict").inner_text()
    assert "Second best" not in selected_models(page)
    page.get_by_role("button", name="Use anyway").click()
    page.get_by_role("button", name="Revert").wait_for()
    page.wait_for_function("() => document.querySelector('.picker-selection').textContent.includes('Second best')")
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use anyway").wait_for()


def test_warning_of_an_earlier_versions_result_is_shown_and_the_model_is_not_taken_over(open_page: Open) -> None:
    page = open_page("")
    start_run(page, seed=500, name="Warned")
    wait_for_state(page)
    page.locator(".run-warning").get_by_text("The reward rose, but not on new photos.").wait_for()
    page.get_by_role("button", name="Use anyway").wait_for()
    assert "Warned" not in selected_models(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_alarm_is_shown_live_and_the_model_is_used_by_hand_only(open_page: Open, runs: RunStore, scheme: str) -> None:
    page = open_page("", color_scheme=scheme, viewport={"width": 390 if scheme == "dark" else 1280, "height": 900})
    name = f"Alarmed {scheme}"
    start_run(page, seed=600 if scheme == "light" else 601, name=name)
    page.locator(".alarm-title").get_by_text("Edits cut off the subject").wait_for()
    wait_for_state(page, "running")
    assert page.locator("#run-alarms-title").inner_text() == "2 alarms"
    page.locator(".alarm-title small").get_by_text("steps 2 to 3").first.wait_for()
    assert "not taken over by itself, even if it wins" in page.locator(".run-alarm-note").inner_text()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.alarm-photos img')].filter(img => img.naturalWidth > 100).length === 4"
    )
    assert page.locator(".alarm-after").first.get_attribute("alt") == "astronaut.jpg, after: crop to 60 x 60 %"
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    run = next(run for run in runs.list() if run.config().name == name)
    (run.folder / "continue").touch()
    wait_for_state(page)
    assert "The tuned model wins" in page.locator(".run-verdict").inner_text()
    page.locator(".run-alarm-note").get_by_text("Look at the photos, then decide").wait_for()
    assert name not in selected_models(page)
    page.get_by_role("button", name="Use anyway").click()
    page.get_by_text("The run raised an alarm: compare its edits").wait_for()
    page.locator(".run-alarm-note").get_by_text("in use in spite of the alarm").wait_for()
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use anyway").wait_for()


def test_values_at_the_pointer_stay_while_a_run_trains(open_page: Open, runs: RunStore) -> None:
    page = open_page("")
    start_run(page, seed=300)
    page.locator(".run-log").get_by_text("step 3:").wait_for()
    page.locator(".curve-reward .u-over").hover(position={"x": 2, "y": 100})
    page.locator(".curve-at").get_by_text("step 1", exact=True).wait_for()
    page.evaluate(
        "() => { const at = document.querySelector('.curve-at'); window.changed = 0;"
        " new MutationObserver(() => { window.changed += 1; }).observe(at, {childList: true, subtree: true}); }"
    )
    values = page.locator(".curve-legend").inner_text()
    write_step(runs.list()[-1], 4, 10, runs.list()[-1].probes()[0]["photo"], "")
    page.wait_for_function("() => document.querySelector('.curve-reward').ariaLabel.includes('to 0.46')")
    assert page.locator(".curve-at").inner_text() == "step 1" and page.evaluate("window.changed") == 0
    assert page.locator(".curve-legend").inner_text() == values
    width = page.locator(".curve-reward canvas").evaluate("canvas => canvas.width")
    page.set_viewport_size({"width": 1200, "height": 1000})
    page.wait_for_function("width => document.querySelector('.curve-reward canvas').width < width", arg=width)
    assert page.locator(".curve-at").inner_text() == "step 1"


def test_failed_run_shows_its_log_and_can_be_resumed(open_page: Open) -> None:
    page = open_page("")
    start_run(page, seed=200)
    wait_for_state(page, "failed")
    assert "exit code 3). See the log" in page.locator(".run-message").inner_text()
    assert page.locator(".run-log").is_visible()
    assert page.get_by_role("button", name="Resume").is_enabled()


def test_log_scrolls_to_its_end_and_curves_are_drawn(open_page: Open) -> None:
    page = open_page("")
    start_run(page, seed=3, length="Short run")
    wait_for_state(page)
    page.locator(".run-log").get_by_text(f"step {DEFAULT_STEPS}").wait_for()
    page.wait_for_function(
        "() => { const log = document.querySelector('.run-log');"
        " return log.scrollHeight > log.clientHeight && log.scrollTop + log.clientHeight >= log.scrollHeight - 8; }"
    )
    assert "reward from 0.30" in page.locator(".curve-reward").get_attribute("aria-label")
    assert page.locator(".curve-plot canvas").count() == 2
    legend = page.locator(".curve-legend li")
    assert legend.count() == 4 and page.locator(".curve-at").inner_text() == "latest"
    plot = page.locator(".curve-reward .u-over")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5, box["y"] + 50)
    page.wait_for_function("() => document.querySelector('.curve-at').textContent === 'step 1'")
    assert legend.first.inner_text() == "reward 0.30" and page.locator(".kl-latest").inner_text() == "0.010"
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50, steps=5)
    page.mouse.up()
    page.get_by_role("button", name="Whole run").click()
    assert page.locator(".curve-reset").is_hidden()
    smoothing = page.locator(".curve-smoothing")
    smoothing.focus()
    page.keyboard.press("Home")
    assert page.locator(".probe-thumbnails li").count() == 8
    page.locator(".rollouts-latest").click()
    page.locator(".group .rollout").nth(7).wait_for()
    assert page.locator(".rollouts-number").inner_text() == f"step {DEFAULT_STEPS}"
    assert page.locator(".group-signal:visible").count() == 1
    assert page.locator(".rollout-advantage").first.inner_text().startswith("advantage +")
    slider = page.locator(".rollouts-step")
    slider.focus()
    page.keyboard.press("Home")
    page.locator(".rollouts-number").get_by_text("step 1", exact=True).wait_for()
    before = page.locator(".rollout-text").all_inner_texts()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => [...document.querySelectorAll('.rollout-text')].some((n, index) => n.textContent !== before[index])",
        arg=before,
    )
    assert violations(page) == []
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use in the Playground").wait_for()


def test_text_of_models_and_users_is_not_interpreted_as_html(open_page: Open) -> None:
    page = open_page("")
    start_run(page, seed=400, name="<img src=x onerror=window.hacked=1>${window.hacked=2}")
    wait_for_state(page)
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use in the Playground").wait_for()
    assert "<img src=x" in page.locator(".run-name").inner_text()
    assert "<img src=x" in page.locator(".probe-description").inner_text()
    assert page.locator(".history-name").get_by_text("<img src=x").count() == 1
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_run_is_renamed_downloaded_and_deleted(open_page: Open, runs: RunStore, tmp_path: Path) -> None:
    page = open_page("")
    start_run(page, seed=101)
    wait_for_state(page)
    run = runs.list()[-1]
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("New name").fill("Soft light")
    page.keyboard.press("Enter")
    page.locator(".run-name").get_by_text("Soft light").wait_for()
    page.locator(".history-name").get_by_text("Soft light").wait_for()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download zip").click()
    assert waiting.value.suggested_filename.startswith("Soft-light")
    waiting.value.save_as(tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert {"README.md", "config.json", "result.json", "adapter/adapter_model.safetensors"} <= set(
            archive.namelist()
        )
        assert json.loads(archive.read("config.json"))["name"] == "Soft light"
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Confirm delete").click()
    page.wait_for_function("() => !document.querySelector('#history').textContent.includes('Soft light')")
    assert run.id not in [listed.id for listed in runs.list()]


def test_uploaded_photos_are_used_and_invalid_ones_refused(open_page: Open, runs: RunStore, tmp_path: Path) -> None:
    page = open_page("")
    open_finetune_tab(page)
    page.get_by_label("My photos").check()
    page.get_by_role("button", name="Retrain with this reward").click()
    page.get_by_text("Choose photos or a zip of photos first").wait_for()
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"PK no zip at all")
    page.locator("#tune-files input[type=file]").set_input_files(bad)
    page.locator("#tune-files").get_by_text("bad").first.wait_for()
    page.get_by_role("button", name="Retrain with this reward").click()
    page.get_by_text("This zip file cannot be read").wait_for()
    page.get_by_label("Clear").first.click()
    page.locator("#tune-files input[type=file]").set_input_files(SAMPLES["chelsea.jpg"].path)
    page.locator("#tune-files").get_by_text("chelsea").first.wait_for()
    start_run(page, seed=102)
    wait_for_state(page)
    assert "uploaded photos" in page.locator(".run-summary").inner_text()
    assert [file.name for file in Path(runs.list()[-1].config().photos).iterdir()] == ["0000-chelsea.jpg"]


def test_earlier_run_is_selected_in_the_list_by_keyboard(open_page: Open, runs: RunStore) -> None:
    for name in ("Earlier", "Later"):
        create_finished_run(runs, name)
    page = open_page("")
    open_finetune_tab(page)
    page.locator(".history-row").last.wait_for()
    assert page.locator(".history-row").count() == len(runs.list())
    page.locator(".history-row").last.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".history-row:last-child")
    page.wait_for_function("() => [...document.querySelectorAll('.history-row')].at(-1).ariaPressed === 'true'")
    assert page.locator(".run-summary").inner_text().endswith(f"seed {runs.list()[0].config().seed}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(open_page: Open, runs: RunStore, scheme: str) -> None:
    create_finished_run(runs, f"Finished, {scheme}")
    page = open_page("", color_scheme=scheme)
    start_run(page, seed=302 if scheme == "light" else 303)
    page.get_by_text("step 3 of 10").first.wait_for()
    for accordion in ("Advanced", "Push this model to the Hugging Face Hub"):
        page.get_by_text(accordion).click()
    for kind in ("Hub dataset", "My photos"):
        page.get_by_label(kind).check()
    page.wait_for_selector("#tune-files input[type=file]", state="attached")
    assert violations(page) == []
    page.get_by_role("button", name="Cancel", exact=True).last.click()
    wait_for_state(page, "cancelled")
    page.locator(".history-row", has_text=f"Finished, {scheme}").click()
    page.wait_for_selector(".run-table")
    assert violations(page) == []


def test_phone_does_not_scroll_horizontally(open_page: Open) -> None:
    page = open_page("", **PHONE)
    start_run(page, seed=103)
    wait_for_state(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#run-view').getBoundingClientRect().top") < 844
    overflowing = page.evaluate(
        "() => [...document.querySelectorAll('#tune *')].filter(part => part.offsetParent"
        " && part.getBoundingClientRect().right > 390.5).map(part => part.id || part.className || part.tagName)"
    )
    assert overflowing == []


def test_client_trains_cancels_uses_and_reverts(server: str) -> None:
    client = Client(server, verbose=False)

    def call(name: str, *values: object) -> Any:
        return client.predict(*values, api_name=f"/{name}")

    cancelled = call("retrain", {"colour": 1}, "moondream-tiny", "bundled", 6, 304, "By program")["run"]
    until(lambda: call("run_status", cancelled)["step"] == 3)
    assert call("cancel_run", cancelled)["state"] in ("running", "cancelled")
    until(lambda: call("run_status", cancelled)["state"] == "cancelled")
    won = call("retrain", {"colour": 1}, "moondream-tiny", "bundled", 6, 4, "")["run"]
    until(lambda: call("run_status", won)["in_use"])
    status = call("run_status", won)
    assert status["result"]["wins"] and status["metrics"]["step"] == status["step"] == 6
    assert [run["state"] for run in call("runs") if run["run"] in (cancelled, won)] == ["cancelled", "done"]
    assert f"run-{won}" in [model["name"] for model in call("models")]
    photo = handle_file(SAMPLES["chelsea.jpg"].path)
    models = call("compare", photo, ["moondream-tiny", f"run-{won}"], "recipe", "", 1, 0, 1)["models"]
    assert [model["error"] for model in models] == [None, None]
    assert models[0]["candidates"][0]["recipe"] == models[1]["candidates"][0]["recipe"], "the adapter is all zeros"
    assert f"run-{won}" not in call("revert", won)["models"]
    assert call("use_run", won)["models"] == ["moondream-tiny", f"run-{won}"]
    call("revert", won)
    with pytest.raises(AppError, match="There is no run"):
        call("run_status", "../../etc")


# Visitors of a deployment on another address than localhost


def open_as(browser: Browser, address: str, path: str = "/", **settings: Any) -> Page:
    """Open the Fine-tune tab in a browser context of its own, which is another visitor."""
    page = browser.new_context(**settings).new_page()
    page.set_default_timeout(60_000)  # the machine may be busy
    page.goto(address + path)
    page.wait_for_selector("body[data-opened]")
    open_finetune_tab(page)
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_guest_sees_runs_of_others_and_why_nothing_can_be_changed(
    browser: Browser, tmp_path: Path, scheme: str
) -> None:
    create_finished_run(RunStore(tmp_path / "runs"), "Crisp", "hf:1", "ada")
    with app_server(tmp_path, host="0.0.0.0") as address:
        page = open_as(browser, address, color_scheme=scheme, viewport={"width": 1280, "height": 900})
        page.get_by_text("Guests cannot train models here").wait_for()
        assert page.locator("#tune-start").is_disabled()
        assert page.locator("#tune-backend input:enabled").count() == 0
        page.locator(".run-note").get_by_text("Only ada and administrators can change or download").wait_for()
        buttons = page.locator(".run-actions button:visible")
        assert buttons.all_inner_texts() == [
            "Use anyway",
            "Use for everyone",
            "Download zip",
            "Rename",
            "Delete",
        ]
        assert page.locator(".run-actions button:visible:enabled").count() == 0
        page.get_by_text("Push this model to the Hugging Face Hub").click()
        page.locator("#push").get_by_text("Only ada and administrators").wait_for()
        assert page.locator("#push").get_by_role("button", name="Push", exact=True).is_disabled()
        page.locator(".history-created").get_by_text("ada").wait_for()
        assert "hf:1" not in page.content()
        assert violations(page) == []
        page.context.close()


def test_guest_trains_one_short_run_and_an_administrator_shares_it(browser: Browser, tmp_path: Path) -> None:
    options: dict[str, Any] = {"host": "0.0.0.0", "guest_runs": True}
    services = build_services(Settings(data_dir=tmp_path, **options), FAKE)
    with app_server(tmp_path, services=services, **options) as address:
        guest = open_as(browser, address)
        guest.get_by_label("Custom").check()
        guest.locator("#tune-steps input").fill("500")
        guest.get_by_text(f"Guests can train for at most {DEFAULT_STEPS} steps").wait_for()
        assert guest.locator("#tune-start").is_disabled()
        guest.get_by_label("Smoke test").check()
        guest.wait_for_selector("#tune-start:not([disabled])")
        start_run(guest, seed=7)
        wait_for_state(guest)
        guest.locator(".run-note").get_by_text("Only administrators can offer a model to everyone").wait_for()
        guest.get_by_role("tab", name="Playground").click()
        guest.locator(".picker-selection").get_by_text("tuned: sharpness").wait_for()

        other = open_as(browser, address)
        other.locator(".run-note").get_by_text("Only the guest who started it").wait_for()
        other.get_by_role("tab", name="Playground").click()
        assert "tuned" not in selected_models(other)

        admin = open_as(browser, address, f"/admin?token={services.access.link.token}")
        admin.locator(".run-summary").get_by_text("Owner: Guest").wait_for()
        admin.get_by_role("button", name="Use for everyone").click()
        admin.get_by_role("button", name="Stop using for everyone").wait_for()
        admin.locator(".history-badge").get_by_text("For everyone").wait_for()
        newcomer = open_as(browser, address)
        newcomer.get_by_role("tab", name="Playground").click()
        assert "tuned: sharpness" in selected_models(newcomer)
        for page in (guest, other, admin, newcomer):
            page.context.close()
    services.worker.stop()

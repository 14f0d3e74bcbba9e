"""The Fine-tune tab in a real browser, with runs that learn nothing but say what the real ones say."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from inference.registry import MODELS
from tests.e2e.conftest import serving
from tests.e2e.test_page import PHONE, violations
from tests.e2e.test_playground import set_weight
from tests.support.hub_server import TOKEN, StandInHub
from tests.training.runs.test_queue import until
from training.runs.run import RunConfig, Runs
from ui.playground.samples import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
CAT = "photo=chelsea.jpg&n=1"

SHORT = RunConfig.model_fields["steps"].default


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """An application of this file's own: its runs change what the playground offers."""
    with serving(folder) as address:
        yield address
    for name in [name for name in MODELS if name.startswith("run-")]:
        del MODELS[name]


@pytest.fixture(autouse=True)
def runs(folder: Path) -> Iterator[Runs]:
    """The runs of the application; what still works at a test's end is ended."""
    found = Runs(folder / "runs")
    yield found
    for run in found.list():
        if not run.status().over:
            run.cancel()
    until(lambda: all(run.status().over and not run.alive() for run in found.list()))


def tune(page: Page) -> None:
    """To the tab."""
    page.get_by_role("tab", name="Fine-tune").click()
    page.wait_for_selector("#tune-start")
    page.wait_for_selector("#run-view .run-lead", state="attached")


def start(page: Page, seed: int, length: str = "Smoke test", name: str = "") -> None:
    """Presses the button; the seed says how the run goes."""
    tune(page)
    page.get_by_label(length).check()
    page.locator("#tune-name input, #tune-name textarea").fill(name)
    page.locator("#tune-seed input").fill(str(seed))
    page.get_by_role("button", name="Retrain with this reward").click()
    page.locator(".run-about").get_by_text(f"seed {seed}").wait_for()


def ended(page: Page, state: str = "done") -> None:
    page.wait_for_selector(f"#run-view .run[data-state={state}]")


def chosen_models(page: Page) -> str:
    return page.locator(".picker-chosen").text_content() or ""


def test_the_empty_tab_says_what_to_do(open_page: Open) -> None:
    page = open_page("reward=sharpness:0.5,colour:0.25")
    tune(page)
    words = page.locator("#run-view").inner_text()
    for said in ("what your sliders ask for", "Retrain with this reward", "photos that it has not seen"):
        assert said in words
    page.locator(".tune-reward").get_by_text("sharpness 0.5 · colour 0.25").wait_for()
    assert f"{SHORT} steps take about" in page.locator("#tune-estimate").inner_text()
    page.get_by_label("Smoke test").check()
    page.locator("#tune-estimate").get_by_text("10 steps take about").wait_for()
    assert violations(page) == []


def test_the_playground_leads_to_the_tab_with_its_reward(open_page: Open) -> None:
    page = open_page("")
    for name, weight in {"sharpness": 0.8, "colour": 0, "creativity": 0}.items():
        set_weight(page, name, weight)
    page.get_by_role("button", name="Teach a model this reward").click()
    page.locator("#tune-start").wait_for()
    page.locator(".tune-reward").get_by_text("sharpness 0.8", exact=True).wait_for()
    page.get_by_role("tab", name="Playground").click()
    page.get_by_label("Caption").check()
    assert page.locator("#teach").is_hidden()


def test_a_run_can_be_sent_to_jobs_with_its_price_and_a_token(open_page: Open, runs: Runs, hub: StandInHub) -> None:
    page = open_page("reward=sharpness:1")
    tune(page)
    page.get_by_label("Hugging Face Jobs").check()
    page.locator("#tune-estimate").get_by_text("$1.60 at most").wait_for()
    page.get_by_label("Smoke test").check()
    page.locator("#tune-seed input").fill("142")
    page.get_by_role("button", name="Retrain with this reward").click()
    page.get_by_text("Give your Hugging Face token").wait_for()
    assert all(run.config().seed != 142 for run in runs.list())
    token = page.get_by_label("Your Hugging Face token")
    token.fill(TOKEN)
    page.get_by_role("button", name="Retrain with this reward").click()
    page.locator(".run-about").get_by_text("seed 142").wait_for()
    ended(page)
    config = runs.list()[-1].config()
    assert (config.where, config.hardware) == ("jobs", "l4x1")
    page.wait_for_function("input => input.value === ''", arg=token.element_handle())
    assert TOKEN not in page.content()


def test_a_winner_stands_beside_its_base_and_one_click_reverts(open_page: Open, runs: Runs) -> None:
    page = open_page(CAT + "&reward=sharpness:1")
    before = chosen_models(page)
    start(page, seed=7)
    ended(page)
    run = runs.list()[-1]
    assert run.config().reward == {"sharpness": 1.0}
    assert "The tuned model wins: on 24 photos" in page.locator(".run-verdict").inner_text()
    assert page.locator(".run-table tbody tr").count() == 5
    assert page.locator(".pair").count() == 3
    page.wait_for_function("() => [...document.querySelectorAll('.pair img')].every(image => image.naturalWidth > 0)")
    page.get_by_role("tab", name="Playground").click()
    page.wait_for_function("() => document.querySelector('.picker-chosen').textContent.includes('tuned: sharpness 1')")
    assert chosen_models(page) == "moondream-tiny · tuned: sharpness 1"
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(f".model-column[data-model='run-{run.id}'][data-status=done]")
    page.wait_for_selector(".model-column[data-model='moondream-tiny'][data-status=done]")
    open_page("").locator(".picker-chosen").get_by_text("moondream-tiny · tuned: sharpness 1").wait_for()
    page.get_by_role("tab", name="Fine-tune").click()
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use it in the playground").wait_for()
    page.get_by_role("tab", name="Playground").click()
    page.wait_for_function("() => document.querySelector('.picker-chosen').textContent === 'moondream-tiny'")
    open_page("").locator(".picker-chosen").get_by_text(before).wait_for()


def test_a_reload_and_a_second_visitor_find_the_run_and_may_cancel_it(open_page: Open) -> None:
    page = open_page("")
    start(page, seed=300)
    page.get_by_text("step 3 of 10").first.wait_for()
    page.reload()
    page.wait_for_selector("body[data-opened]")
    tune(page)
    page.get_by_text("Training · step 3 of 10").wait_for()
    other = open_page("")
    tune(other)
    other.get_by_text("Training · step 3 of 10").wait_for()
    assert other.locator(".probe-after").get_attribute("src").startswith("data:image/jpeg")
    other.get_by_role("button", name="Cancel", exact=True).last.click()
    for one in (page, other):
        ended(one, "cancelled")
        assert "what was learned is kept" in one.locator(".run-message").inner_text()


def test_a_second_run_waits_for_the_first(open_page: Open) -> None:
    first, second = open_page(""), open_page("")
    start(first, seed=301)
    first.get_by_text("step 3 of 10").first.wait_for()
    start(second, seed=2)
    second.get_by_text("Waiting for 1 run before it").wait_for()
    assert first.locator(".run-about").inner_text().endswith("seed 301")
    first.get_by_role("button", name="Cancel", exact=True).last.click()
    ended(second)


def test_a_loser_is_told_and_may_be_used_all_the_same(open_page: Open) -> None:
    page = open_page("")
    start(page, seed=100, name="Second best")
    ended(page)
    assert "is not clearly better" in page.locator(".run-verdict").inner_text()
    assert "Second best" not in chosen_models(page)
    page.get_by_role("button", name="Use it all the same").click()
    page.get_by_role("button", name="Revert").wait_for()
    page.wait_for_function("() => document.querySelector('.picker-chosen').textContent.includes('Second best')")
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use it all the same").wait_for()


def test_an_alarm_is_shown(open_page: Open) -> None:
    page = open_page("")
    start(page, seed=500)
    ended(page)
    page.locator(".run-alarm").get_by_text("The reward rose, but not on new photos.").wait_for()
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use it in the playground").wait_for()


def test_a_failed_run_says_why_and_can_be_resumed(open_page: Open) -> None:
    page = open_page("")
    start(page, seed=200)
    ended(page, "failed")
    assert "Its log says why" in page.locator(".run-message").inner_text()
    assert page.locator(".run-log").is_visible()
    assert page.get_by_role("button", name="Resume").is_enabled()


def test_the_log_is_at_its_end_and_the_curve_is_there(open_page: Open) -> None:
    page = open_page("")
    start(page, seed=3, length="Short run")
    ended(page)
    page.locator(".run-log").get_by_text(f"step {SHORT}").wait_for()
    page.wait_for_function(
        "() => { const log = document.querySelector('.run-log');"
        " return log.scrollHeight > log.clientHeight && log.scrollTop + log.clientHeight >= log.scrollHeight - 8; }"
    )
    assert "reward from 0.30" in page.locator(".curve-reward").get_attribute("aria-label")
    assert page.locator(".curve-reward polyline").count() == 4
    assert page.locator(".probe-strip li").count() == 8
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use it in the playground").wait_for()


def test_what_models_and_people_write_is_only_text(open_page: Open) -> None:
    page = open_page("")
    start(page, seed=400, name="<img src=x onerror=window.hacked=1>${window.hacked=2}")
    ended(page)
    page.get_by_role("button", name="Revert").click()
    page.get_by_role("button", name="Use it in the playground").wait_for()
    assert "<img src=x" in page.locator(".run-name").inner_text()
    assert "<img src=x" in page.locator(".probe-words").inner_text()
    assert page.locator(".history-name").get_by_text("<img src=x").count() == 1
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_a_run_is_renamed_downloaded_and_deleted(open_page: Open, runs: Runs, tmp_path: Path) -> None:
    page = open_page("")
    start(page, seed=101)
    ended(page)
    run = runs.list()[-1]
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("New name of the run").fill("Soft light")
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
    page.get_by_role("button", name="Really delete?").click()
    page.wait_for_function("() => !document.querySelector('#history').textContent.includes('Soft light')")
    assert run.id not in [other.id for other in runs.list()]


def test_own_photos_are_taken_and_bad_ones_refused(open_page: Open, runs: Runs, tmp_path: Path) -> None:
    page = open_page("")
    tune(page)
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
    start(page, seed=102)
    ended(page)
    assert "uploaded photos" in page.locator(".run-about").inner_text()
    assert [file.name for file in Path(runs.list()[-1].config().photos).iterdir()] == ["0000-chelsea.jpg"]


def test_earlier_runs_are_in_the_list_and_can_be_looked_at(open_page: Open, runs: Runs) -> None:
    page = open_page("")
    tune(page)
    page.locator(".history-row").last.wait_for()
    assert page.locator(".history-row").count() == len(runs.list())
    page.locator(".history-row").last.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".history-row:last-child")
    page.wait_for_function("() => [...document.querySelectorAll('.history-row')].at(-1).ariaPressed === 'true'")
    assert page.locator(".run-about").inner_text().endswith(f"seed {runs.list()[0].config().seed}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_of_ours_in_the_tab(open_page: Open, scheme: str) -> None:
    page = open_page("", color_scheme=scheme)
    start(page, seed=302 if scheme == "light" else 303)
    page.get_by_text("step 3 of 10").first.wait_for()
    for accordion in ("Advanced", "Push this model to the Hugging Face Hub"):
        page.get_by_text(accordion).click()
    for kind in ("Hub dataset", "My photos"):
        page.get_by_label(kind).check()
    page.wait_for_selector("#tune-files input[type=file]", state="attached")
    assert violations(page) == []
    page.get_by_role("button", name="Cancel", exact=True).last.click()
    ended(page, "cancelled")
    page.locator(".history-row").last.click()
    page.wait_for_selector(".run-table")
    assert violations(page) == []


def test_a_phone_scrolls_in_one_direction_only_in_the_tab(open_page: Open) -> None:
    page = open_page("", **PHONE)
    start(page, seed=103)
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#run-view').getBoundingClientRect().top") < 844
    wide = page.evaluate(
        "() => [...document.querySelectorAll('#tune *')].filter(part => part.offsetParent"
        " && part.getBoundingClientRect().right > 390.5).map(part => part.id || part.className || part.tagName)"
    )
    assert wide == []


def test_a_program_trains_uses_and_reverts(server: str) -> None:
    client = Client(server, verbose=False)

    def ask(name: str, *values: object) -> Any:
        return client.predict(*values, api_name=f"/{name}")

    run = ask("retrain", {"colour": 1}, "moondream-tiny", "bundled", 6, 304, "By program")["run"]
    until(lambda: ask("run_status", run)["step"] == 3)
    assert ask("cancel_run", run)["state"] in ("running", "cancelled")
    until(lambda: ask("run_status", run)["state"] == "cancelled")
    won = ask("retrain", {"colour": 1}, "moondream-tiny", "bundled", 6, 4, "")["run"]
    until(lambda: ask("run_status", won)["in_use"])
    told = ask("run_status", won)
    assert told["result"]["wins"] and told["metrics"]["step"] == told["step"] == 6
    assert [one["state"] for one in ask("runs") if one["run"] in (run, won)] == ["cancelled", "done"]
    assert f"run-{won}" in [one["name"] for one in ask("models")]
    photo = handle_file(SAMPLES["chelsea.jpg"].path)
    answered = ask("compare", photo, ["moondream-tiny", f"run-{won}"], "recipe", "", 1, 0, 1)["models"]
    assert [one["error"] for one in answered] == [None, None]
    assert answered[0]["candidates"][0]["recipe"] == answered[1]["candidates"][0]["recipe"], "its adapter adds nothing"
    assert f"run-{won}" not in ask("revert", won)["models"]
    assert ask("use_run", won)["models"] == ["moondream-tiny", f"run-{won}"]
    ask("revert", won)
    with pytest.raises(AppError, match="There is no run"):
        ask("run_status", "../../etc")

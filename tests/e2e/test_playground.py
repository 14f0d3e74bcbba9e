"""The Playground tab in a real browser: the whole click, and what a person may do around it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from recipes import load_photo, parse, read_recipe
from rewards import DEFAULT, REWARDS, RewardFunction, score_recipes
from ui.playground.samples import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
OVER = ".model-column:is([data-status=done], [data-status=failed], [data-status=cancelled])"
SEEN = "() => getComputedStyle(document.querySelector('.card .card-before')).opacity"
CAT = "photo=chelsea.jpg&models=one,three"


def run(page: Page) -> None:
    before = page.locator("#candidates .grid-columns").get_attribute("data-run")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function(
        "before => (document.querySelector('#candidates .grid-columns').dataset.run ?? null) !== before", arg=before
    )
    page.wait_for_selector("#candidates .model-column")
    page.wait_for_function(
        "over => [...document.querySelectorAll('.model-column')].every(column => column.matches(over))", arg=OVER
    )
    page.wait_for_selector("#run:not([disabled])")


def cards(page: Page) -> list[dict[str, Any]]:
    """What stands on the screen, in its order."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.card')].map(card => ({
            key: card.dataset.key, total: card.dataset.total === '' ? null : Number(card.dataset.total),
            best: card.dataset.best, rank: card.dataset.rank, words: card.querySelector('.card-words').textContent,
            recipe: card.querySelector('.card-canonical').textContent,
            shown: card.querySelector('.card-total').textContent,
            picture: card.querySelector('.card-after').getAttribute('src')}))"""
    )


def set_weight(page: Page, name: str, value: float) -> None:
    slider = page.locator(f"#weight-{name} input[type=range]")
    slider.evaluate(
        "(node, value) => { node.value = value; node.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def scores_of(recipes: list[str], sample: str = "chelsea.jpg") -> list[dict[str, float | None]]:
    photo = load_photo(SAMPLES[sample].path)
    return [scored.scores for scored in score_recipes(photo, [parse(text).recipe for text in recipes])]


def test_a_click_gives_ranked_pictures_of_every_model(open_page: Open) -> None:
    page = open_page(CAT)
    run(page)
    found = cards(page)
    assert len(found) == 8
    assert all(card["picture"].startswith("data:image/jpeg") for card in found)
    for model in ("one", "three"):
        totals = [card["total"] for card in found if card["key"].startswith(f"{model}/")]
        assert totals == sorted(totals, reverse=True)
    assert [card["total"] for card in found if card["best"] == "all"] == [max(card["total"] for card in found)]
    assert sum(card["best"] == "model" for card in found) == 1
    assert page.locator(".grid-status").text_content().startswith("8 of 8 candidates ready")


def test_the_totals_on_screen_are_those_of_python(open_page: Open) -> None:
    page = open_page(CAT + "&n=5")
    run(page)
    weights = {"sharpness": 0.25, "colour": 0.6, "creativity": 0.95}
    for name, weight in weights.items():
        set_weight(page, name, weight)
    page.wait_for_timeout(100)
    for model in ("one", "three"):
        column = [card for card in cards(page) if card["key"].startswith(f"{model}/")]
        column.sort(key=lambda card: int(card["key"].split("/")[1]))
        expected = [RewardFunction(weights).total(scores) for scores in scores_of([card["recipe"] for card in column])]
        assert [card["total"] for card in column] == pytest.approx(expected, abs=1e-9)


def test_sliders_rank_anew_without_a_request_and_without_new_pictures(open_page: Open) -> None:
    page = open_page(CAT + "&n=8")
    run(page)
    page.evaluate("document.querySelectorAll('.card-after').forEach((image, place) => { image.dataset.mark = place; })")
    before = cards(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for name in ("sharpness", "colour"):
        set_weight(page, name, 0)
    page.wait_for_timeout(600)
    after = cards(page)
    assert requests == []
    assert [card["key"] for card in after] != [card["key"] for card in before]
    assert page.locator(".card-after[data-mark]").count() == 16
    totals = [card["total"] for card in after if card["key"].startswith("one/")]
    assert totals == sorted(totals, reverse=True)
    assert "reward=creativity:1" in page.url


def test_a_card_keeps_the_focus_when_it_moves(open_page: Open) -> None:
    page = open_page(CAT + "&n=8")
    run(page)
    key = cards(page)[0]["key"]
    page.locator(f".card[data-key='{key}'] .card-compare").focus()
    for name in ("sharpness", "colour"):
        page.evaluate(
            "([name]) => { const node = document.querySelector(`#weight-${name} input[type=range]`); node.value = 0;"
            " node.dispatchEvent(new Event('input', {bubbles: true})); }",
            [name],
        )
    page.wait_for_timeout(100)
    assert [card["key"] for card in cards(page)].index(key) > 0
    assert page.evaluate("document.activeElement.closest('.card').dataset.key") == key


def test_weights_of_zero_are_explained(open_page: Open) -> None:
    page = open_page(CAT)
    run(page)
    for name in REWARDS:
        set_weight(page, name, 0)
    page.get_by_text("All reward sliders are at zero").wait_for()
    assert {card["shown"] for card in cards(page)} == {"–"}
    assert {card["best"] for card in cards(page)} == {""}
    set_weight(page, "colour", 0.5)
    page.get_by_text("All reward sliders are at zero").wait_for(state="hidden")


def test_the_same_seed_gives_the_same_result_and_another_does_not(open_page: Open) -> None:
    page = open_page(CAT + "&seed=7")
    run(page)
    first = {card["key"]: card["recipe"] for card in cards(page)}
    run(page)
    assert {card["key"]: card["recipe"] for card in cards(page)} == first
    page.locator("#seed input").fill("8")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function(
        "old => [...document.querySelectorAll('.card')].some(card =>"
        " card.querySelector('.card-canonical').textContent !== old[card.dataset.key])",
        arg=first,
    )


def test_before_and_after_by_mouse_keyboard_and_finger(open_page: Open) -> None:
    page = open_page(CAT, has_touch=True, viewport={"width": 1400, "height": 1000})
    run(page)
    card = page.locator(".card").first
    card.scroll_into_view_if_needed()
    assert page.evaluate(SEEN) == "0"
    card.locator(".card-frame").hover(position={"x": 20, "y": 60})
    page.wait_for_function(f"({SEEN})() === '1'")
    page.mouse.move(5, 5)
    card.locator(".card-compare").focus()
    page.keyboard.press("Enter")
    assert card.locator(".card-compare").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Space")
    assert card.locator(".card-compare").get_attribute("aria-pressed") == "false"
    card.locator(".card-frame").tap(position={"x": 30, "y": 50})
    assert card.locator(".card-compare").get_attribute("aria-pressed") == "true"


def test_a_failing_model_fails_in_its_own_column_only(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=one,broken,bug")
    run(page)
    assert page.locator(".model-column[data-model=one] .card[data-state=ready]").count() == 4
    assert page.locator(".model-column[data-model=one]").get_attribute("data-status") == "done"
    assert (
        "The fake model is broken. Choose another one." in page.locator(".model-column[data-model=broken]").inner_text()
    )
    assert "unexpected TypeError" in page.locator(".model-column[data-model=bug]").inner_text()
    assert "Traceback" not in page.locator("body").inner_text()


def test_cancel_stops_and_the_page_can_run_again(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=slow&n=8")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(".model-column[data-status=running]")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector(".model-column[data-status=cancelled]")
    assert page.locator(".grid-status").text_content().startswith("Cancelled with")
    page.wait_for_selector("#run:not([disabled])")
    page.locator("#models summary").click()
    page.locator("input[value=slow]").uncheck()
    page.locator("input[value=one]").check()
    run(page)
    assert len(cards(page)) == 8


def test_the_place_in_the_queue_is_shown(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=queued&n=1")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text(re.compile("[12] before you")).wait_for()
    page.wait_for_selector(".model-column[data-status=done]")


@pytest.mark.parametrize("skill", ["query", "caption"])
def test_text_streams(open_page: Open, skill: str) -> None:
    page = open_page(f"photo=chelsea.jpg&models=slow&n=1&skill={skill}&prompt=What+is+it")
    page.evaluate(
        """() => { window.heard = []; new MutationObserver(() => {
            const words = document.querySelector('.card-words');
            if (words && words.textContent && window.heard.at(-1) !== words.textContent)
                window.heard.push(words.textContent);
        }).observe(document.querySelector('#candidates'), {subtree: true, childList: true, characterData: true}); }"""
    )
    run(page)
    heard = page.evaluate("window.heard")
    assert len(heard) >= 3 and heard[-1].endswith("pixels.")
    assert all(late.startswith(early) for early, late in itertools.pairwise(heard))


@pytest.mark.parametrize(("skill", "shape"), [("detect", "rect"), ("point", "circle")])
def test_regions_are_drawn_over_the_photo(open_page: Open, skill: str, shape: str) -> None:
    page = open_page(f"photo=chelsea.jpg&models=one&n=1&skill={skill}&prompt=the+cat")
    run(page)
    picture, mark = page.locator(".card-after").bounding_box(), page.locator(".mark-line >> nth=0").bounding_box()
    assert page.locator(f".card-marks {shape}.mark-line").count() == 1
    assert picture["x"] < mark["x"] and mark["x"] + mark["width"] < picture["x"] + picture["width"]
    assert picture["y"] < mark["y"] and mark["y"] + mark["height"] < picture["y"] + picture["height"]


def test_what_a_model_writes_is_shown_and_never_run(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=hostile&n=2&skill=caption")
    run(page)
    assert page.evaluate("window.hacked") is None
    assert "${window.hacked=2} {{constructor}}" in page.locator(".card-words").first.text_content()
    assert page.locator("#candidates img[src=x], #candidates script").count() == 0


def test_prose_without_a_recipe_is_said_to_be_so(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=prose&n=1")
    run(page)
    assert "No recipe could be read in: What a lovely day it was." in page.locator(".card-words").text_content()
    assert page.locator(".card-download").is_hidden()


def test_a_link_brings_the_settings_back(open_page: Open) -> None:
    page = open_page("")
    page.locator(".sample[data-file='coffee.jpg']").click()
    page.wait_for_selector("#photo img[src]")
    page.locator("#models summary").click()
    while page.locator(".picker-box:checked").count():
        page.locator(".picker-box:checked").first.uncheck()
    page.locator("input[value=two]").check()
    page.keyboard.press("Escape")
    page.get_by_label("Detect").check()
    page.wait_for_function("() => document.querySelector('#prompt textarea').value === 'the main subject'")
    page.locator("#prompt textarea").fill("a cup & saucer")
    page.locator("#seed input").fill("42")
    set_weight(page, "sharpness", 0.3)
    page.wait_for_timeout(400)
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_timeout(200)
    again = open_page(page.url.split("?", 1)[1])
    again.wait_for_function("() => document.querySelector('#seed input').value === '42'")
    assert again.locator("#prompt textarea").input_value() == "a cup & saucer"
    assert again.locator(".picker-chosen").text_content() == "Fake two"
    assert again.get_by_label("Detect").is_checked()
    assert again.locator("#weight-sharpness input[type=range]").input_value() == "0.3"
    assert again.locator(".sample[aria-pressed=true]").get_attribute("data-file") == "coffee.jpg"


def test_downloads_carry_the_recipe(open_page: Open, tmp_path: Path) -> None:
    page = open_page(CAT)
    run(page)
    first = cards(page)[0]
    with page.expect_download() as waiting:
        page.locator(".card-download").first.click()
    picture = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(picture)
    assert str(read_recipe(picture)) == first["recipe"]
    with Image.open(picture) as image, Image.open(SAMPLES["chelsea.jpg"].path) as photo:
        left, top, right, bottom = parse(first["recipe"]).recipe.crop
        assert image.width == pytest.approx(photo.width * (right - left) / 100, abs=2)
        assert image.height == pytest.approx(photo.height * (bottom - top) / 100, abs=2)


def test_the_report_holds_what_is_on_the_screen(open_page: Open, tmp_path: Path) -> None:
    page = open_page(CAT + "&reward=colour:0.5")
    run(page)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Report (JSON)").click()
    waiting.value.save_as(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["sample_photo"] == "chelsea.jpg"
    totals = {f"{m['model']}/{c['index']}": c["total"] for m in report["models"] for c in m["candidates"]}
    assert totals == pytest.approx({card["key"]: card["total"] for card in cards(page)})


def test_two_people_do_not_see_each_other(open_page: Open) -> None:
    left, right = open_page("photo=chelsea.jpg&models=one&seed=1"), open_page("photo=coffee.jpg&models=one&seed=500")
    for page in (left, right):
        page.get_by_role("button", name="Run", exact=True).click()
    for page in (left, right):
        page.wait_for_selector(".model-column[data-status=done]")
    assert {card["recipe"] for card in cards(left)} & {card["recipe"] for card in cards(right)} == set()
    assert scores_of([card["recipe"] for card in cards(left)]) != scores_of([card["recipe"] for card in cards(right)])
    right.get_by_role("button", name="Report (JSON)")
    with right.expect_download() as waiting:
        right.get_by_role("button", name="Report (JSON)").click()
    assert json.loads(waiting.value.path().read_text())["settings"]["sample_photo"] == "coffee.jpg"


def test_a_reward_function_is_kept_loaded_renamed_and_deleted(open_page: Open) -> None:
    page = open_page("reward=sharpness:0.2,colour:0.4")
    page.get_by_text("Save, load and share reward functions").click()
    page.locator("#reward-name textarea, #reward-name input").fill("quiet")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("Kept as “quiet”.").wait_for()
    other = open_page("")
    other.get_by_text("Save, load and share reward functions").click()
    other.locator("#saved input").click()
    other.get_by_role("option", name="quiet").click()
    other.wait_for_function("() => document.querySelector('#weight-sharpness input[type=range]').value === '0.2'")
    assert other.locator("#weight-creativity input[type=range]").input_value() == "0"
    other.locator("#reward-name textarea, #reward-name input").fill("calm")
    other.get_by_role("button", name="Rename").click()
    other.wait_for_function("() => document.querySelector('#saved input').value === 'calm'")
    other.get_by_role("button", name="Delete").click()
    other.get_by_text("“calm” was deleted.").wait_for()


def test_a_reward_function_travels_as_a_file(open_page: Open, tmp_path: Path) -> None:
    page = open_page("reward=creativity:0.35")
    page.get_by_text("Save, load and share reward functions").click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export file").click()
    file = tmp_path / "mine.json"
    waiting.value.save_as(file)
    assert json.loads(file.read_text()) == {"creativity": 0.35}
    other = open_page("")
    other.get_by_text("Save, load and share reward functions").click()
    other.locator("#reward-functions input[type=file]").set_input_files(file)
    other.wait_for_function("() => document.querySelector('#weight-creativity input[type=range]').value === '0.35'")
    (tmp_path / "wrong.json").write_text('{"beauty": 1}')
    other.locator("#reward-functions input[type=file]").set_input_files(tmp_path / "wrong.json")
    other.get_by_text("There is no reward named beauty").wait_for()


def test_default_weights_are_on_the_sliders(open_page: Open) -> None:
    page = open_page("")
    for name, weight in DEFAULT.weights.items():
        assert float(page.locator(f"#weight-{name} input[type=range]").input_value()) == weight


def test_a_model_that_cannot_be_used_is_greyed_and_says_why(open_page: Open) -> None:
    page = open_page("")
    page.locator("#models summary").click()
    choice = page.locator(".picker-choice:has(input[value=moondream2])")
    assert choice.locator("input").is_disabled()
    assert "Not available: " in choice.inner_text()

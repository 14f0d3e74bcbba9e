"""Tests of the Playground tab in a real browser."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from inference.types import SKILLS
from recipes import load_photo, parse, read_recipe
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_recipes
from tests.support.browser import OpenPage, run_comparison, set_weight, violations
from ui.playground.samples import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
SPLIT = "() => getComputedStyle(document.querySelector('.card .card-before')).clipPath"
CAT_QUERY = "photo=chelsea.jpg&models=one,three"


def cards(page: Page) -> list[dict[str, Any]]:
    """Return the cards on the page, in their order."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.card')].map(card => ({
            key: card.dataset.key, total: card.dataset.total === '' ? null : Number(card.dataset.total),
            best: card.dataset.best, rank: card.dataset.rank, text: card.querySelector('.card-text').textContent,
            recipe: card.querySelector('.card-recipe-text').textContent,
            shown: card.querySelector('.card-total').textContent,
            picture: card.querySelector('.card-after').getAttribute('src')}))"""
    )


def scores_of(recipes: list[str], sample: str = "chelsea.jpg") -> list[dict[str, float | None]]:
    """Score recipes on a sample photo in Python."""
    photo = load_photo(SAMPLES[sample].path)
    return [scored.scores for scored in score_recipes(photo, [parse(text).recipe for text in recipes])]


def test_run_shows_ranked_pictures_of_every_model(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY)
    run_comparison(page)
    shown = cards(page)
    assert len(shown) == 8
    assert all(card["picture"].startswith("data:image/jpeg") for card in shown)
    for model in ("one", "three"):
        totals = [card["total"] for card in shown if card["key"].startswith(f"{model}/")]
        assert totals == sorted(totals, reverse=True)
    assert [card["total"] for card in shown if card["best"] == "all"] == [max(card["total"] for card in shown)]
    assert sum(card["best"] == "model" for card in shown) == 1
    assert page.locator(".grid-status").text_content().startswith("8 of 8 candidates ready")


def test_displayed_totals_equal_python(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY + "&n=5")
    run_comparison(page)
    weights = {"sharpness": 0.25, "colour": 0.6, "creativity": 0.95}
    for name, weight in weights.items():
        set_weight(page, name, weight)
    page.wait_for_timeout(100)
    for model in ("one", "three"):
        column = [card for card in cards(page) if card["key"].startswith(f"{model}/")]
        column.sort(key=lambda card: int(card["key"].split("/")[1]))
        expected = [RewardFunction(weights).total(scores) for scores in scores_of([card["recipe"] for card in column])]
        assert [card["total"] for card in column] == pytest.approx(expected, abs=1e-9)


def test_sliders_rerank_without_requests_or_new_pictures(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY + "&n=8")
    run_comparison(page)
    page.evaluate("document.querySelectorAll('.card-after').forEach((image, index) => { image.dataset.mark = index; })")
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


def test_focused_card_keeps_the_focus_when_the_order_changes(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY + "&n=8&seed=3")
    run_comparison(page)
    key = cards(page)[0]["key"]
    page.locator(f".card[data-key='{key}'] .card-divider").focus()
    for name in ("sharpness", "colour"):
        set_weight(page, name, 0)
    page.wait_for_function("key => document.querySelector('.card').dataset.key !== key", arg=key)
    assert [card["key"] for card in cards(page)].index(key) > 0
    assert page.evaluate("document.activeElement.closest('.card').dataset.key") == key


def test_zero_weights_show_a_notice_and_no_totals(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY)
    run_comparison(page)
    for name in REWARDS:
        set_weight(page, name, 0)
    page.get_by_text("All sliders are at zero").wait_for()
    assert {card["shown"] for card in cards(page)} == {"–"}
    assert {card["best"] for card in cards(page)} == {""}
    set_weight(page, "colour", 0.5)
    page.get_by_text("All sliders are at zero").wait_for(state="hidden")


def test_results_are_deterministic_per_seed(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY + "&seed=7")
    run_comparison(page)
    first = {card["key"]: card["recipe"] for card in cards(page)}
    run_comparison(page)
    assert {card["key"]: card["recipe"] for card in cards(page)} == first
    page.locator("#seed input").fill("8")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function(
        "first => [...document.querySelectorAll('.card')].some(card =>"
        " card.querySelector('.card-recipe-text').textContent !== first[card.dataset.key])",
        arg=first,
    )


def test_before_and_after_by_mouse_keyboard_and_touch(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY, has_touch=True, viewport={"width": 1400, "height": 1000})
    run_comparison(page)
    card = page.locator(".card").first
    card.scroll_into_view_if_needed()
    divider = card.locator(".card-divider")
    assert page.evaluate(SPLIT) == "inset(0px 100% 0px 0px)"
    box = divider.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 3, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=4)
    page.mouse.up()
    assert 45 <= int(divider.input_value()) <= 55
    divider.focus()
    page.keyboard.press("End")
    assert page.evaluate(SPLIT) == "inset(0px 0% 0px 0px)"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert divider.get_attribute("aria-valuetext") == "1 % before"
    divider.tap(position={"x": box["width"] * 0.75, "y": 50})
    assert 70 <= int(divider.input_value()) <= 80


def test_full_screen_view_follows_the_order_of_the_cards(open_page: OpenPage) -> None:
    page = open_page(CAT_QUERY + "&n=2")
    run_comparison(page)
    page.locator(".card-enlarge").first.click()
    viewer = page.locator("dialog.viewer")
    titles = []
    for _ in range(4):
        titles.append(viewer.locator(".viewer-title").inner_text())
        page.keyboard.press("ArrowRight")
    assert [title.rpartition("(")[2] for title in titles] == [f"{number} of 4)" for number in (1, 2, 3, 4)]
    assert viewer.locator(".viewer-title").inner_text() == titles[0]
    page.keyboard.press("ArrowLeft")
    assert viewer.locator(".viewer-title").inner_text() == titles[3]
    box, frame = viewer.bounding_box(), viewer.locator(".card-frame").bounding_box()
    assert box is not None and frame is not None and frame["height"] > box["height"] / 2
    assert violations(page) == []
    page.keyboard.press("Escape")
    viewer.wait_for(state="hidden")


def test_equal_answers_are_one_card_and_the_order_can_be_that_of_the_seeds(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=hostile&n=4&skill=query&prompt=why")
    run_comparison(page)
    assert page.locator(".card:visible").count() == 1
    assert page.locator(".card-agree:visible").inner_text() == "4 of 4 agree"
    assert page.locator(".grid-sort").is_hidden()
    page = open_page("photo=chelsea.jpg&models=one&n=4")
    run_comparison(page)
    assert page.locator(".card-agree:visible").count() == 0
    ranked = [card["key"] for card in cards(page)]
    page.get_by_label("Sort by reward").uncheck()
    assert [card["key"] for card in cards(page)] == [f"one/{index}" for index in range(4)] != ranked
    page.get_by_label("Sort by reward").check()
    assert [card["key"] for card in cards(page)] == ranked


def test_skill_that_no_selected_model_has_is_disabled_with_the_reason(open_page: OpenPage) -> None:
    page = open_page("models=one")
    assert page.get_by_label("Segment", exact=True).is_disabled()
    assert page.get_by_label("Detect", exact=True).is_enabled()
    assert "Segment needs Moondream 3.1" in page.locator(".picker-skills").inner_text()


def test_failure_stays_in_its_column(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=one,broken,bug")
    run_comparison(page)
    assert page.locator(".model-column[data-model=one] .card[data-status=ready]").count() == 4
    assert page.locator(".model-column[data-model=one]").get_attribute("data-status") == "done"
    assert (
        "The fake model is broken. Choose another one." in page.locator(".model-column[data-model=broken]").inner_text()
    )
    assert "unexpected TypeError" in page.locator(".model-column[data-model=bug]").inner_text()
    assert "Traceback" not in page.locator("body").inner_text()


def test_cancelled_comparison_can_be_run_again(open_page: OpenPage) -> None:
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
    run_comparison(page)
    assert len(cards(page)) == 8


def test_queue_position_is_shown(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=queued&n=1")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text(re.compile("[12] ahead in the queue")).wait_for()
    page.wait_for_selector(".model-column[data-status=done]")


@pytest.mark.parametrize("skill", ["query", "caption"])
def test_text_is_streamed(open_page: OpenPage, skill: str) -> None:
    page = open_page(f"photo=chelsea.jpg&models=slow&n=1&skill={skill}&prompt=What+is+it")
    page.evaluate(
        """() => { window.texts = []; new MutationObserver(() => {
            const node = document.querySelector('.card-text');
            if (node && node.textContent && window.texts.at(-1) !== node.textContent)
                window.texts.push(node.textContent);
        }).observe(document.querySelector('#candidates'), {subtree: true, childList: true, characterData: true}); }"""
    )
    run_comparison(page)
    texts = page.evaluate("window.texts")
    assert len(texts) >= 3 and texts[-1].endswith("pixels.")
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


@pytest.mark.parametrize(("skill", "shape"), [("detect", "rect"), ("point", "circle")])
def test_regions_are_drawn_on_the_photo(open_page: OpenPage, skill: str, shape: str) -> None:
    page = open_page(f"photo=chelsea.jpg&models=one&n=1&skill={skill}&prompt=the+cat")
    run_comparison(page)
    picture, region = page.locator(".card-after").bounding_box(), page.locator(".region-line >> nth=0").bounding_box()
    assert page.locator(f".card-regions {shape}.region-line").count() == 1
    assert picture["x"] < region["x"] and region["x"] + region["width"] < picture["x"] + picture["width"]
    assert picture["y"] < region["y"] and region["y"] + region["height"] < picture["y"] + picture["height"]


def test_text_of_a_model_is_displayed_and_not_executed(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=hostile&n=2&skill=caption")
    run_comparison(page)
    assert page.evaluate("window.hacked") is None
    assert "${window.hacked=2} {{constructor}}" in page.locator(".card-text").first.text_content()
    assert page.locator("#candidates img[src=x], #candidates script").count() == 0


def test_answer_without_a_recipe_is_shown_with_a_message(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=prose&n=1")
    run_comparison(page)
    assert "No recipe found in the answer: What a lovely day it was." in page.locator(".card-text").text_content()
    assert page.locator(".card-download").is_hidden()


def test_link_restores_the_settings(open_page: OpenPage) -> None:
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
    page.wait_for_url("**sharpness:0.3**")
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_function("() => document.querySelector('#copy-link').textContent.trim() !== 'Copy link'")
    restored = open_page(page.url.split("?", 1)[1])
    restored.wait_for_function("() => document.querySelector('#seed input').value === '42'")
    assert restored.locator("#prompt textarea").input_value() == "a cup & saucer"
    assert restored.locator(".picker-selection").text_content() == "Fake two"
    assert restored.get_by_label("Detect").is_checked()
    assert restored.locator("#weight-sharpness input[type=range]").input_value() == "0.3"
    assert restored.locator(".sample[aria-pressed=true]").get_attribute("data-file") == "coffee.jpg"


def test_download_contains_the_recipe(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(CAT_QUERY)
    run_comparison(page)
    first = cards(page)[0]
    with page.expect_download() as download:
        page.locator(".card-download").first.click()
    picture = tmp_path / download.value.suggested_filename
    download.value.save_as(picture)
    assert str(read_recipe(picture)) == first["recipe"]
    with Image.open(picture) as image, Image.open(SAMPLES["chelsea.jpg"].path) as photo:
        left, top, right, bottom = parse(first["recipe"]).recipe.crop
        assert image.width == pytest.approx(photo.width * (right - left) / 100, abs=2)
        assert image.height == pytest.approx(photo.height * (bottom - top) / 100, abs=2)


def test_report_contains_what_is_displayed(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(CAT_QUERY + "&reward=colour:0.5")
    run_comparison(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download report").click()
    download.value.save_as(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["sample_photo"] == "chelsea.jpg"
    totals = {
        f"{model['model']}/{candidate['index']}": candidate["total"]
        for model in report["models"]
        for candidate in model["candidates"]
    }
    assert totals == pytest.approx({card["key"]: card["total"] for card in cards(page)})


def test_two_pages_have_separate_sessions(open_page: OpenPage) -> None:
    left, right = open_page("photo=chelsea.jpg&models=one&seed=1"), open_page("photo=coffee.jpg&models=one&seed=500")
    for page in (left, right):
        page.get_by_role("button", name="Run", exact=True).click()
    for page in (left, right):
        page.wait_for_selector(".model-column[data-status=done]")
    assert {card["recipe"] for card in cards(left)} & {card["recipe"] for card in cards(right)} == set()
    assert scores_of([card["recipe"] for card in cards(left)]) != scores_of([card["recipe"] for card in cards(right)])
    with right.expect_download() as download:
        right.get_by_role("button", name="Download report").click()
    assert json.loads(download.value.path().read_text())["settings"]["sample_photo"] == "coffee.jpg"


def test_reward_function_is_saved_loaded_renamed_and_deleted(open_page: OpenPage) -> None:
    page = open_page("reward=sharpness:0.2,colour:0.4")
    page.get_by_text("Saved reward functions").click()
    page.locator("#reward-name textarea, #reward-name input").fill("quiet")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("Saved as “quiet”.").wait_for()
    other = open_page("")
    other.get_by_text("Saved reward functions").click()
    other.locator("#saved input").click()
    other.get_by_role("option", name="quiet").click()
    other.wait_for_function("() => document.querySelector('#weight-sharpness input[type=range]').value === '0.2'")
    assert other.locator("#weight-creativity input[type=range]").input_value() == "0"
    other.locator("#reward-name textarea, #reward-name input").fill("calm")
    other.get_by_role("button", name="Rename").click()
    other.wait_for_function("() => document.querySelector('#saved input').value === 'calm'")
    other.get_by_role("button", name="Delete").click()
    other.get_by_text("“calm” was deleted.").wait_for()


def test_reward_function_is_exported_and_imported(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page("reward=creativity:0.35")
    page.get_by_text("Saved reward functions").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export file").click()
    file = tmp_path / "mine.json"
    download.value.save_as(file)
    assert json.loads(file.read_text()) == {"creativity": 0.35}
    other = open_page("")
    other.get_by_text("Saved reward functions").click()
    other.locator("#reward-functions input[type=file]").set_input_files(file)
    other.wait_for_function("() => document.querySelector('#weight-creativity input[type=range]').value === '0.35'")
    (tmp_path / "wrong.json").write_text('{"beauty": 1}')
    other.locator("#reward-functions input[type=file]").set_input_files(tmp_path / "wrong.json")
    other.get_by_text("There is no reward named beauty").wait_for()


def test_sliders_are_shown_for_the_scored_skill_only(open_page: OpenPage) -> None:
    """A link and a click on the skill hide the sliders alike."""
    page = open_page("")
    for name, skill in reversed(SKILLS.items()):  # the first one is selected already
        if name == "segment":  # not a skill of the selected model
            continue
        page.get_by_label(skill.title, exact=True).check()
        page.wait_for_selector(f"#results[data-skill={name}]")
        for part in ("#weights", "#reward-functions", "#fine-tune-reward"):
            assert page.locator(part).is_visible() == (skill.output == "recipe"), (name, part)
    linked = open_page("skill=segment")
    linked.wait_for_selector("#results[data-skill=segment]")
    assert not linked.locator("#weights").is_visible()


def test_sliders_start_at_equal_weights(open_page: OpenPage) -> None:
    page = open_page("")
    for name, weight in EQUAL_WEIGHTS.weights.items():
        assert float(page.locator(f"#weight-{name} input[type=range]").input_value()) == weight


def test_unavailable_model_is_disabled_with_the_reason(open_page: OpenPage) -> None:
    page = open_page("")
    page.locator("#models summary").click()
    choice = page.locator(".picker-choice:has(input[value=moondream2])")
    assert choice.locator("input").is_disabled()
    assert "Unavailable: " in choice.inner_text()

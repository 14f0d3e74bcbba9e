"""The click path of the walkthrough: `python -m docs.walkthrough` takes its screenshots and its film from the app.

`walk` clicks through the steps of `docs/walkthrough.md`. The tests run the same function.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from docs.capture import ROOT, answer_photos, app, chromium, run, take_screenshot

BRANCH = "feature/warmer"
PHOTO = "dark-city.jpg"
FUNCTION = "vivid"
SIZE = {"width": 1280, "height": 800}
FILM_WIDTH, FILM_SECONDS = 960, 2.5  # of a step
STEPS = 60
EVALUATED_PHOTOS = 6


def walk(page: Page, address: str, preview: str, steps: int, visit: Callable[[str], None]) -> None:
    """Click through the walkthrough.

    Args:
        page: A new page.
        address: Address of the deployment of the main branch.
        preview: Address of the deployment of another branch that shares its database.
        steps: Steps of the fine-tune.
        visit: Called with the name of each step when its result is on screen.
    """
    page.goto(address)
    page.wait_for_selector("body[data-opened]")
    page.wait_for_selector(".card[data-status=ready]")
    visit("open")
    set_weights(page, {"sharpness": 0.4, "colour": 1.0, "creativity": 0.2})
    visit("weights")
    page.locator(f".sample[data-file='{PHOTO}']").click()
    run(page)
    visit("compare")
    page.locator(".card-enlarge").first.click()
    page.locator("dialog.viewer .card-divider").focus()
    page.keyboard.press("ArrowLeft")
    visit("viewer")
    page.keyboard.press("Escape")
    page.get_by_text("Saved reward functions").click()
    page.locator("#reward-name textarea, #reward-name input").fill(FUNCTION)
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text(f"Saved as “{FUNCTION}”.").wait_for()
    visit("save")
    retrain(page, steps)
    page.evaluate("() => scrollTo(0, 0)")
    visit("retrain")
    if page.get_by_role("button", name="Use anyway").is_visible():
        page.get_by_role("button", name="Use anyway").click()
    page.get_by_role("button", name="Revert").wait_for()
    page.get_by_role("tab", name="Playground").click()
    page.locator(".picker-selection").get_by_text("tuned").wait_for()
    run(page)
    visit("tuned")
    page.get_by_role("tab", name="Evaluate").click()
    page.wait_for_function("document.querySelector('#eval-estimate').textContent.includes('photos')")
    page.get_by_label("At most").fill(str(EVALUATED_PHOTOS))
    page.locator("#eval-start").click()
    page.wait_for_selector("#evaluation .eval[data-state=done]")
    page.locator("#evaluation").scroll_into_view_if_needed()
    visit("evaluate")
    page.goto(preview)
    page.wait_for_selector("body[data-opened]")
    page.locator("#deployment").get_by_text(BRANCH).wait_for()
    visit("preview")
    page.goto(f"{address}/?usage.period=hour")
    page.get_by_role("tab", name="Usage").click()
    page.locator("#dashboard").get_by_text(BRANCH).first.wait_for()
    visit("usage")


def set_weights(page: Page, weights: dict[str, float]) -> None:
    """Move the sliders of the rewards."""
    for name, value in weights.items():
        page.locator(f"#weight-{name} input[type=range]").fill(str(value))


def retrain(page: Page, steps: int) -> None:
    """Start a fine-tune with the sliders' reward and wait until it ends."""
    page.get_by_role("tab", name="Fine-tune").click()
    page.wait_for_selector("#tune-start")
    page.get_by_label("Custom").check()
    page.locator("#tune-steps input").fill(str(steps))
    page.get_by_role("button", name="Retrain with this reward").click()
    page.wait_for_selector("#run-view .run[data-state=done]", timeout=600_000)


def main() -> None:
    """Serve two branches, walk, and write a screenshot of each step and the film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "walkthrough", help="folder")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the fine-tune")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    frames: list[Image.Image] = []
    with (
        tempfile.TemporaryDirectory(prefix="playground-walkthrough-") as folder,
        app(Path(folder), BRANCH) as preview,
        app(Path(folder), "main") as address,
        chromium() as browser,
    ):
        answer_photos(preview, ("coffee.jpg", "chelsea.jpg"))
        page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.set_default_timeout(60_000)

        def visit(name: str) -> None:
            frame = take_screenshot(page)
            frame.save(args.out / f"{name}.webp", quality=80, method=6)
            frames.append(frame.resize((FILM_WIDTH, FILM_WIDTH * frame.height // frame.width)))
            print(args.out / f"{name}.webp", flush=True)

        walk(page, address, preview, args.steps, visit)
    film, duration = args.out / "walkthrough.webp", round(1000 * FILM_SECONDS)
    frames[0].save(film, save_all=True, append_images=frames[1:], duration=duration, loop=0, quality=70, method=6)
    print(film)


if __name__ == "__main__":
    main()

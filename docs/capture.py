"""Take the screenshots of the documentation from the running app: `python -m docs.capture`.

The app is started as users start it, with an empty data folder. Two branches answer photos, one fine-tune runs to its
end, and each tab is captured on a desktop in light and dark mode and on a phone. This takes about two minutes.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "assets" / "photos"
CALLS = {"feature/warmer": ("coffee.jpg",), "main": ("coffee.jpg", "chelsea.jpg", "china.jpg")}
MODELS = ["moondream-tiny", "moondream-tiny-steady"]
STEPS = 60
DESKTOP = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}
VIEWS = {"light": (DESKTOP, "light"), "dark": (DESKTOP, "dark"), "phone": (PHONE, "light")}
BROWSER_ARGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
SETTINGS = "photo=coffee.jpg&reward=sharpness:0.6,colour:1&seed=7"


@contextmanager
def app(data_dir: Path, branch: str) -> Iterator[str]:
    """Serve the app as a subprocess under a branch name and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DATA_DIR": str(data_dir),
        "PORT": str(port),
        "PREVIEW_BRANCH": branch,
        "HARDWARE": "cpu-upgrade",  # so that calls have a cost: that of such a Space
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{address}/healthz").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def answer_photos(address: str, names: tuple[str, ...]) -> None:
    """Send sample photos to the models, so that there is usage to show."""
    client = Client(address, verbose=False)
    for seed, name in enumerate(names):
        client.predict(handle_file(PHOTOS / name), MODELS, "recipe", "", 4, 1.0, seed, api_name="/compare")
        client.predict(handle_file(PHOTOS / name), MODELS[:1], "caption", "", 1, 0.0, seed, api_name="/compare")


def retrain(address: str) -> None:
    """Run a fine-tune to its end."""
    client = Client(address, verbose=False)
    run = client.predict({"sharpness": 0.6, "colour": 1.0}, "moondream-tiny", "bundled", STEPS, 7, api_name="/retrain")
    while (status := client.predict(run["run"], api_name="/run_status"))["state"] in ("queued", "running"):
        time.sleep(2)
    if status["state"] != "done":
        raise SystemExit(f"The fine-tune ended as {status['state']}: {status}")


def run(page: Page) -> None:
    """Run the chosen models and wait until every candidate is ready."""
    page.locator(".grid-status").evaluate("node => { node.textContent = '' }")  # of the run before
    page.get_by_role("button", name="Run", exact=True).click()
    status = re.compile(r"^(\d+) of \1 candidates ready after")
    page.locator(".grid-status").filter(has_text=status).wait_for()


def take_screenshot(page: Page) -> Image.Image:
    """Return what the page shows once its pictures are loaded and its transitions have ended."""
    page.wait_for_function(
        "() => [...document.images].every(image => image.complete || image.loading === 'lazy' && "
        "!image.checkVisibility() || image.getBoundingClientRect().top > innerHeight)"
    )
    page.wait_for_timeout(700)  # transitions
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        return picture.convert("RGB")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the installed Chromium. Raises SystemExit if there is none."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("no Chromium found: install it, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGS))
        yield browser
        browser.close()


def open_tab(page: Page, tab: str) -> None:
    """Bring a tab into the state that the screenshot shows."""
    if tab == "Playground":
        page.wait_for_selector("#photo img[src]")
        run(page)
        if page.viewport_size == PHONE:
            page.locator(".model-column").first.scroll_into_view_if_needed()
        return
    page.get_by_role("tab", name=tab).click()
    page.wait_for_selector({"Fine-tune": "#run-view .run[data-state=done]", "Usage": "#dashboard canvas"}[tab])


def capture(browser: Browser, address: str, out: Path) -> None:
    """Write `<tab>-<view>.webp` for every tab and view."""
    for tab in ("Playground", "Fine-tune", "Usage"):
        for view, (size, scheme) in VIEWS.items():
            context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
            page = context.new_page()
            page.set_default_timeout(60_000)
            # A filter of the Usage tab in the address opens that tab.
            page.goto(f"{address}/?{'usage.period=hour' if tab == 'Usage' else SETTINGS}")
            page.wait_for_selector("body[data-opened]")
            open_tab(page, tab)
            file = out / f"{tab.lower().replace('-', '')}-{view}.webp"
            take_screenshot(page).save(file, quality=82, method=6)
            context.close()
            print(file, flush=True)


def main() -> None:
    """Start the app, fill it with data and take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the screenshots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="playground-capture-") as folder:
        for branch, names in CALLS.items():
            with app(Path(folder), branch) as address:
                answer_photos(address, names)
                if branch == "main":
                    retrain(address)
                    with chromium() as browser:
                        capture(browser, address, args.out)


if __name__ == "__main__":
    main()

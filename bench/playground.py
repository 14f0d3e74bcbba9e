"""How long a reward slider takes to show on the screen: 24 candidates in the real page, in a real browser.

The alternative is measured beside it: the sliders' values go to the server, which scores and ranks and sends back small
news (no picture twice), and the page draws them in the same way.
`answer` here is a backend that answers at once: no model is measured.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.registry import BACKENDS, MODELS
from inference.types import Answer, Event, ModelSpec, Queued, Request
from recipes import random_recipe

if TYPE_CHECKING:
    from playwright.sync_api import Page

MODELS_AT_ONCE, CANDIDATES, MOVES = 3, 8, 60
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
# Moves a slider, waits for the grid to change and for the frame that shows it. Milliseconds, one per move.
MEASURE = """async ({slider, moves}) => {
  const grid = document.querySelector('#candidates'), node = document.querySelector(slider), times = [];
  for (let move = 0; move < moves; move++) {
    const changed = new Promise(done => {
      const observer = new MutationObserver(() => { observer.disconnect(); done(); });
      observer.observe(grid, {subtree: true, childList: true, characterData: true});
    });
    const start = performance.now();
    node.value = (move % 20) / 20;
    node.dispatchEvent(new Event('input', {bubbles: true}));
    await changed;
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - start);
    await new Promise(done => setTimeout(done, 40));
  }
  return times;
}"""

SHOW = """news => {
  document.dispatchEvent(new CustomEvent('playground-weights', {detail: news.weights}));
  return [];
}"""


def rows() -> list[dict[str, Any]]:
    """Slider to paint, and the first picture and all pictures after a click; needs Chromium (CHROMIUM names one)."""
    names = [f"bench-{place}" for place in range(MODELS_AT_ONCE)]
    BACKENDS["bench"] = __name__
    MODELS.update({name: ModelSpec(name, name, "", "bench", "") for name in names})
    with _served(_application()) as address, _page() as page:
        page.goto(f"{address}/?photo=chelsea.jpg&n={CANDIDATES}&models={','.join(names)}")
        page.wait_for_selector("#photo img[src]")
        first, complete = _click(page)
        here = page.evaluate(MEASURE, {"slider": "#weight-sharpness input[type=range]", "moves": MOVES})
    with _served(_alternative()) as address, _page() as page:
        page.goto(address)
        page.wait_for_selector(".card-after[src]")
        there = page.evaluate(MEASURE, {"slider": "#weight-sharpness input[type=range]", "moves": MOVES})
    count = MODELS_AT_ONCE * CANDIDATES
    note = f"median {statistics.median(here):.0f} ms; baseline: p95 of a round trip to the server, on this machine"
    return [
        {
            "name": f"slider to paint, {count} candidates, p95",
            "value": _p95(here),
            "unit": "ms",
            "baseline": _p95(there),
            "ratio": _p95(there) / _p95(here),
            "target": "<= 50",
            "note": note,
        },
        {"name": "click to first picture, without a model", "value": first, "unit": "ms", "note": "scored and painted"},
        {"name": f"click to {count} pictures, without a model", "value": complete, "unit": "ms"},
    ]


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """The contract of a backend, at once."""
    yield Queued(0)
    for index in range(request.n):
        draw = np.random.default_rng((request.seed, index, sum(entry.name.encode())))
        yield Answer(index, str(random_recipe(draw)))


def _p95(times: list[float]) -> float:
    return float(np.percentile(times, 95))


def _click(page: Page) -> tuple[float, float]:
    """Milliseconds from the click on Run to the first picture and to the last."""
    return tuple(
        page.evaluate(
            """async count => {
              const start = performance.now(), shown = () => document.querySelectorAll('.card-after[src]').length;
              const until = many => new Promise(done => {
                const look = () => shown() >= many ? done(performance.now() - start) : requestAnimationFrame(look);
                look();
              });
              document.querySelector('#run').click();
              return [await until(1), await until(count)];
            }""",
            MODELS_AT_ONCE * CANDIDATES,
        )
    )


def _application() -> Any:
    import app
    from settings import Settings

    return app.create_app(Settings(data_dir=Path(tempfile.mkdtemp(prefix="playground-bench-"))))


def _alternative() -> Any:
    """The same grid and sliders, scored and ranked by the server on every move."""
    import gradio as gr
    from fastapi import FastAPI

    from rewards import EQUAL_WEIGHTS, REWARDS
    from ui.playground.grid import candidate_grid
    from ui.theme import HEAD, theme

    value = _grid_value()
    with gr.Blocks(analytics_enabled=False, fill_width=True) as page:
        sliders = [
            gr.Slider(0, 1, EQUAL_WEIGHTS.weights[name], step=0.05, label=name, elem_id=f"weight-{name}") for name in REWARDS
        ]
        grid, news = candidate_grid(), gr.JSON(visible=False)
        page.load(lambda: value, None, grid)
        for slider in sliders:
            moved = slider.change(
                lambda *weights: _ranked(value, weights), sliders, news, queue=False, show_progress="hidden"
            )
            moved.then(None, news, None, js=SHOW)
    return gr.mount_gradio_app(FastAPI(), page, path="/", theme=theme(), head=HEAD, ssr_mode=False)


def _grid_value() -> dict[str, Any]:
    from recipes import load_photo, shrink
    from ui.playground.compare import compare, picture_url
    from ui.playground.grid import grid_value
    from ui.playground.samples import SAMPLES

    photo = load_photo(SAMPLES["chelsea.jpg"].path)
    names = [name for name in MODELS if name.startswith("bench-")]
    *_, last = compare(names, Request(photo, "recipe", n=CANDIDATES), threading.Event(), every=0.0)
    view = {"src": picture_url(shrink(photo)), "width": photo.shape[1], "height": photo.shape[0]}
    return grid_value(last, "bench", view)


def _ranked(value: dict[str, Any], weights: tuple[float, ...]) -> dict[str, Any]:
    """The weights, and each column's cards with their totals, best first."""
    from rewards import REWARDS, RewardFunction

    named = dict(zip(REWARDS, weights))
    function = RewardFunction(named) if any(weights) else None
    order = {}
    for column in value["columns"]:
        totalled = [
            (function.total(card["scores"]) or 0.0 if function else 0.0, card["index"]) for card in column["cards"]
        ]
        order[column["name"]] = sorted(totalled, key=lambda one: -one[0])
    return {"weights": named, "order": order}


@contextmanager
def _served(application: Any) -> Iterator[str]:
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@contextmanager
def _page() -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()

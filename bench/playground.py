"""Playground: time from a reward slider to the screen with 24 candidates, in the real page and a real browser.

The baseline sends the sliders' values to the server, which scores, ranks and returns a small update without pictures,
and renders it in the same way. `answer` is a backend without a model.
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

from bench import app as bench_app
from inference.registry import BACKENDS, MODELS
from inference.types import Answer, AnswerEvent, ModelSpec, Queued, Request
from recipes import random_recipe

if TYPE_CHECKING:
    from playwright.sync_api import Page

MODEL_COUNT, CANDIDATES, MOVES = 3, 8, 60
IDLE_SECONDS = 10  # in which the models are loaded in the background
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
# Moves a slider, waits until the grid has changed and a frame is painted. Returns milliseconds per move. The moves are
# wide, because a narrow one may change no digit of the totals.
MEASURE_MOVES = """async ({slider, moves}) => {
  const grid = document.querySelector('#candidates'), node = document.querySelector(slider), times = [];
  for (let move = 0; move < moves; move++) {
    const changed = new Promise((done, fail) => {
      const observer = new MutationObserver(() => { observer.disconnect(); done(); });
      setTimeout(() => fail(new Error('the grid did not change after move ' + move)), 10000);
      observer.observe(grid, {subtree: true, childList: true, characterData: true});
    });
    const start = performance.now();
    const step = (move % 5) / 20;
    node.value = move % 2 ? 1 - step : step;
    node.dispatchEvent(new Event('input', {bubbles: true}));
    await changed;
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    times.push(performance.now() - start);
    await new Promise(done => setTimeout(done, 40));
  }
  return times;
}"""

# Clicks Run once the previous comparison has ended, and waits until a new one is finished. Returns milliseconds. The
# page ignores a click in the moment between the last update of a comparison and the end of its event.
MEASURE_COMPARISON = """async () => {
  const frame = () => new Promise(requestAnimationFrame), grid = document.querySelector('.grid-columns');
  while (document.querySelector('#run').disabled) await frame();
  await new Promise(done => setTimeout(done, 500));
  const previous = grid.dataset.run, start = performance.now();
  const columns = () => [...grid.querySelectorAll('.model-column')];
  document.querySelector('#run').click();
  while (grid.dataset.run === previous || !columns().every(column => column.dataset.status === 'done')) {
    if (performance.now() - start > 60000) throw new Error('no comparison after a minute');
    await frame();
  }
  return performance.now() - start;
}"""
APPLY_UPDATE = """update => {
  document.dispatchEvent(new CustomEvent('playground-weights', {detail: update.weights}));
  return [];
}"""


def rows() -> list[dict[str, Any]]:
    """Measure slider to paint, and click to pictures. Needs Chromium; the variable CHROMIUM may name the executable."""
    names = [f"bench-{index}" for index in range(MODEL_COUNT)]
    BACKENDS["bench"] = __name__
    MODELS.update({name: ModelSpec(name, name, "", "bench", "") for name in names})
    with _serve(_create_app()) as address, _open_page() as page:
        page.goto(f"{address}/?photo=chelsea.jpg&n={CANDIDATES}&models={','.join(names)}")
        page.wait_for_selector("body[data-opened]")  # the settings of the link are applied
        first, complete = _measure_run(page)
        client_times = page.evaluate(MEASURE_MOVES, {"slider": "#weight-sharpness input[type=range]", "moves": MOVES})
    with _serve(_create_baseline()) as address, _open_page() as page:
        page.goto(address)
        page.wait_for_selector(".card-after[src]")
        server_times = page.evaluate(MEASURE_MOVES, {"slider": "#weight-sharpness input[type=range]", "moves": MOVES})
    first_run, second_run = _measure_first_run()
    count = MODEL_COUNT * CANDIDATES
    note = f"median {statistics.median(client_times):.0f} ms; baseline: p95 with a round trip to a local server"
    return [
        {
            "name": f"slider to paint, {count} candidates, p95",
            "value": _p95(client_times),
            "unit": "ms",
            "baseline": _p95(server_times),
            "ratio": _p95(server_times) / _p95(client_times),
            "target": "<= 50",
            "note": note,
        },
        {
            "name": f"first Run, {IDLE_SECONDS} s after the page was opened",
            "value": first_run,
            "unit": "s",
            "baseline": second_run,
            "ratio": first_run / second_run,
            "target": "ratio <= 1.2",
            "note": "against the second Run, moondream-tiny, click to finished comparison",
        },
        {"name": "click to first picture, without a model", "value": first, "unit": "ms", "note": "scored and painted"},
        {"name": f"click to {count} pictures, without a model", "value": complete, "unit": "ms"},
    ]


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Answer at once, as a backend."""
    yield Queued(0)
    for index in range(request.n):
        rng = np.random.default_rng((request.seed, index, sum(entry.name.encode())))
        yield Answer(index, str(random_recipe(rng)))


def _p95(times: list[float]) -> float:
    return float(np.percentile(times, 95))


def _measure_run(page: Page) -> tuple[float, float]:
    """Return the milliseconds from the click on Run to the first and to the last picture."""
    return tuple(
        page.evaluate(
            """async count => {
              const start = performance.now(), countShown = () => document.querySelectorAll('.card-after[src]').length;
              const until = count => new Promise(done => {
                const elapsed = () => performance.now() - start;
                const poll = () => countShown() >= count ? done(elapsed()) : requestAnimationFrame(poll);
                poll();
              });
              document.querySelector('#run').click();
              return [await until(1), await until(count)];
            }""",
            MODEL_COUNT * CANDIDATES,
        )
    )


def _measure_first_run() -> tuple[float, float]:
    """Return the seconds that the first and the second Run take in an app of its own, which has loaded no model."""
    port = bench_app.free_port()
    process = bench_app.start(["app.py"], port, {"DATA_DIR": tempfile.mkdtemp(prefix="playground-bench-")})
    try:
        bench_app.wait_for_page(process, port)
        with _open_page() as page:
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_selector("body[data-opened]")
            page.wait_for_timeout(IDLE_SECONDS * 1000)
            first, second = (page.evaluate(MEASURE_COMPARISON) / 1000 for _ in range(2))
            return first, second
    finally:
        bench_app.stop(process)


def _create_app() -> Any:
    import app
    from settings import Settings

    return app.create_app(Settings(data_dir=Path(tempfile.mkdtemp(prefix="playground-bench-"))))


def _create_baseline() -> Any:
    """Create a page with the same grid and sliders, ranked by the server on every move."""
    import gradio as gr
    from fastapi import FastAPI

    from rewards import EQUAL_WEIGHTS, REWARDS
    from ui.playground.grid import candidate_grid
    from ui.theme import HEAD, theme

    value = _grid_value()
    with gr.Blocks(analytics_enabled=False, fill_width=True) as page:
        sliders = [
            gr.Slider(0, 1, EQUAL_WEIGHTS.weights[name], step=0.05, label=name, elem_id=f"weight-{name}")
            for name in REWARDS
        ]
        grid, update = candidate_grid(), gr.JSON(visible=False)
        page.load(lambda: value, None, grid)
        for slider in sliders:
            moved = slider.change(
                lambda *weights: _ranked(value, weights), sliders, update, queue=False, show_progress="hidden"
            )
            moved.then(None, update, None, js=APPLY_UPDATE)
    return gr.mount_gradio_app(FastAPI(), page, path="/", theme=theme(), head=HEAD, ssr_mode=False)


def _grid_value() -> dict[str, Any]:
    from recipes import jpeg_data_url, load_photo, shrink
    from ui.playground.compare import PICTURE_QUALITY, compare
    from ui.playground.grid import grid_snapshot
    from ui.playground.samples import SAMPLES

    photo = load_photo(SAMPLES["chelsea.jpg"].path)
    names = [name for name in MODELS if name.startswith("bench-")]
    *_, last = compare(names, Request(photo, "recipe", n=CANDIDATES), threading.Event(), interval=0.0)
    view = {"src": jpeg_data_url(shrink(photo), PICTURE_QUALITY), "width": photo.shape[1], "height": photo.shape[0]}
    return grid_snapshot(last, "bench", view)


def _ranked(value: dict[str, Any], weights: tuple[float, ...]) -> dict[str, Any]:
    """Return the weights, and each column's totals and candidate indices, best first."""
    from rewards import REWARDS, RewardFunction

    weights_by_name = dict(zip(REWARDS, weights))
    function = RewardFunction(weights_by_name) if any(weights) else None
    order = {}
    for column in value["columns"]:
        totals = [
            (function.total(candidate["scores"]) or 0.0 if function else 0.0, candidate["index"])
            for candidate in column["candidates"]
        ]
        order[column["name"]] = sorted(totals, key=lambda pair: -pair[0])
    return {"weights": weights_by_name, "order": order}


@contextmanager
def _serve(application: Any) -> Iterator[str]:
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
def _open_page() -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()

"""The whole application: the page from ui.TABS, mounted beside the plain routes. `python app.py` serves it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI

from inference.offers import discover, offer
from recipes import MAX_BYTES
from serving import endpoint, health, usage
from serving.keys import Keys
from settings import ROOT, VERSION, Settings, SettingsError
from training.worker import COMMAND
from ui import TABS
from ui.house import House, Shared
from ui.samples import PHOTOS
from ui.theme import HEAD, theme
from usage.deployment import deployment
from usage.prices import PriceError, Prices
from usage.store import StoreError

TITLE = "Moondream Playground"
LOCAL = ("127.0.0.1", "0.0.0.0", "::", "::1")


def blocks(house: House) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="banner", apply_default_css=False)
        with gr.Tabs() as tabs:
            shared = Shared.make(tabs)
            for title, build in TABS.items():
                with gr.Tab(title, id=title):
                    build(house, shared)
    return page.queue(max_size=64)


def create_app(settings: Settings, training: tuple[str, ...] = COMMAND) -> FastAPI:
    """Page and routes as one ASGI application. training: the command that does a run, given its folder."""
    app = FastAPI(title=TITLE)
    prices = Prices.read(settings.prices) if settings.prices else Prices()
    where = deployment(settings.branch, settings.commit, settings.space, ROOT)
    inside = _inside() if settings.train_in_request else None
    offer(settings.moondream_url, settings.moondream_key, settings.moondream_rate, settings.endpoints)
    discover()
    house = House.open(settings.data_dir, settings.store_url, training, where, prices, settings.hardware, inside)
    app.include_router(health.router(VERSION, where, house.usage.database))
    app.include_router(usage.router(house.usage, house.budgets, house.meter.recorder))
    keys = Keys(settings.api_keys, settings.api_rate)
    app.mount("/v1", endpoint.create(house.meter, keys, settings.data_dir / "tuning"))
    return gr.mount_gradio_app(
        app,
        blocks(house),
        path="/",
        theme=theme(),
        head=HEAD,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        max_file_size=MAX_BYTES,
        allowed_paths=[str(PHOTOS)],
        blocked_paths=[str(settings.data_dir)],
    )


def _inside() -> Callable[[str], object]:
    """What does a run inside a request. Imported before anything can use CUDA, as ZeroGPU demands."""
    from training import zero_gpu

    return zero_gpu.do


def main() -> None:
    """Serves until it is stopped."""
    try:
        settings = Settings.from_env(os.environ)
        app = create_app(settings)
    except (SettingsError, PriceError, StoreError) as error:
        sys.exit(str(error))
    print(f"{TITLE}: http://{'localhost' if settings.host in LOCAL else settings.host}:{settings.port}", flush=True)
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning")


if __name__ == "__main__":
    main()

"""The whole application: the page from ui.TABS, mounted beside the plain routes. `python app.py` serves it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html import escape
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from inference.offers import discover_hosted_models, register_hosted_models
from recipes import MAX_BYTES
from serving import api as endpoint
from serving import health, usage
from serving.auth import ApiKeyAuth
from settings import ROOT, VERSION, Settings, SettingsError
from storage.reward_functions import StoreError
from training.runs.queue import COMMAND
from ui import TABS
from ui.playground.samples import PHOTOS
from ui.services import AppServices, SharedComponents
from ui.theme import HEAD, theme
from usage.deployment import deployment
from usage.events import Deployment
from usage.prices import PriceError, Prices

TITLE = "Moondream Playground"
LOCAL = ("127.0.0.1", "0.0.0.0", "::", "::1")


def blocks(services: AppServices, where: Deployment | None = None) -> gr.Blocks:
    """The page. where: the branch and commit that it says at its head to be; None: those under which calls count."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(_head(where or services.meter.recorder.deployment), elem_id="banner", apply_default_css=False)
        with gr.Tabs() as tabs:
            shared_components = SharedComponents.make(tabs)
            for title, build in TABS.items():
                with gr.Tab(title, id=title):
                    build(services, shared_components)
    return page.queue(max_size=64)


def _head(where: Deployment) -> str:
    """Title, branch and commit. The whole commit stands in the page, so that a deployer can read it there."""
    branch, commit = escape(where.branch), escape(where.commit)
    short = f" · <code>{commit[:7]}</code>" if commit else ""
    told = f'<p id="deployment" title="What runs here: {branch} {commit}"><span>{branch}</span>{short}</p>'
    return f'<div class="head"><h1>{TITLE}</h1>{told}</div>'


def build_services(settings: Settings, training: tuple[str, ...] = COMMAND) -> AppServices:
    """What the page works on, opened. training: the command that does a run, given its folder."""
    prices = Prices.read(settings.prices) if settings.prices else Prices()
    where = deployment(settings.branch, settings.commit, settings.space, ROOT)
    inside = _inside() if settings.train_in_request else None
    register_hosted_models(settings.moondream_url, settings.moondream_key, settings.moondream_rate, settings.endpoints)
    discover_hosted_models()
    return AppServices.open(settings.data_dir, settings.store_url, training, where, prices, settings.hardware, inside)


def routes(settings: Settings, services: AppServices) -> FastAPI:
    """Everything that is not the page."""
    app = FastAPI(title=TITLE)
    recorder = services.meter.recorder
    app.include_router(health.router(VERSION, lambda: recorder.deployment, services.usage.database))
    app.include_router(usage.router(services.usage, services.budgets, recorder))
    keys = ApiKeyAuth(settings.api_keys, settings.api_rate)
    app.mount("/v1", endpoint.create(services.meter, keys, settings.data_dir / "tuning"))
    return app


def how_served(settings: Settings) -> dict[str, Any]:
    """What Gradio is told about the page, however it is served."""
    return {
        "theme": theme(),
        "head": HEAD,
        "footer_links": ["api"],
        "run_history": False,
        "ssr_mode": False,
        "show_error": False,
        "max_file_size": MAX_BYTES,
        "allowed_paths": [str(PHOTOS)],
        "blocked_paths": [str(settings.data_dir)],
    }


def create_app(settings: Settings, training: tuple[str, ...] = COMMAND) -> FastAPI:
    """Page and routes as one ASGI application. training: the command that does a run, given its folder."""
    services = build_services(settings, training)
    return gr.mount_gradio_app(routes(settings, services), blocks(services), path="/", **how_served(settings))


def _inside() -> Callable[[str], object]:
    """What does a run inside a request. Imported before anything can use CUDA, as ZeroGPU demands."""
    from training.runs import inline as zero_gpu

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


# ── In a Space ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Only `launch` starts what hot reload and ZeroGPU need, and hot reload shows a new page only if a line of this file
# that makes the page is another one: so `python -m previews deploy` writes the commit into that line.


@cache
def space() -> tuple[Settings, AppServices]:
    """The Space's one house, which hot reload keeps: its store, threads and models outlive a page."""
    try:
        settings = Settings.from_env(os.environ)
        return settings, build_services(settings)
    except (SettingsError, PriceError, StoreError) as error:
        sys.exit(str(error))


def stamped(module: str, commit: str) -> gr.Blocks | None:
    """The page of this commit, if this is the program of a Space. commit: "" for what the settings say.

    Calls count under the commit, and /healthz tells it, once its page has been built: one that fails changes nothing.
    """
    if module != "__main__" or "SPACE_ID" not in os.environ:
        return None
    services = space()[1]
    recorder = services.meter.recorder
    where = replace(recorder.deployment, commit=commit or recorder.deployment.commit)
    page = blocks(services, where)
    recorder.deployment = where
    return page


def launch(page: gr.Blocks) -> None:
    """Serves a Space's page, and the routes before Gradio's own."""
    settings, services = space()
    page.launch(
        server_name=settings.host,
        server_port=settings.port,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs={"routes": [*routes(settings, services).router.routes]},
        **how_served(settings),
    )
    while True:
        time.sleep(3600)


demo = stamped(__name__, "")

if __name__ == "__main__":
    launch(demo) if demo else main()

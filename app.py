"""The whole application: the page from ui.TABS, mounted beside the plain routes. `python app.py` serves it."""

from __future__ import annotations

import os

import gradio as gr
import uvicorn
from fastapi import FastAPI

from serving import health
from ui import TABS
from ui.samples import PHOTOS
from ui.theme import CSS, theme

TITLE = "Moondream Playground"


def blocks() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>A photo in, recipes out: compare what models would do with it.</p>", elem_id="banner"
        )
        for title, build in TABS.items():
            with gr.Tab(title):
                build()
    return page.queue(max_size=64)


def create_app() -> FastAPI:
    """Page and routes as one ASGI application."""
    app = FastAPI(title=TITLE)
    app.include_router(health.router)
    return gr.mount_gradio_app(
        app, blocks(), path="/", theme=theme(), css_paths=[CSS], footer_links=["api"], run_history=False,
        ssr_mode=False, show_error=False, max_file_size="50mb", allowed_paths=[str(PHOTOS)],
    )  # fmt: skip


if __name__ == "__main__":
    port = int(os.environ.get("GRADIO_SERVER_PORT") or os.environ.get("PORT") or 7860)
    uvicorn.run(create_app(), host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), port=port, log_level="warning")

"""The application: the page built from `ui.TABS` with the API routes mounted beside it. Run it with `python app.py`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from access.control import AccessControl
from access.middleware import AccessMiddleware
from inference.registry import discover_hosted_models, register_hosted_models
from recipes import MAX_BYTES
from serving import health, usage
from serving.api import create_api
from serving.auth import ApiKeyAuth
from settings import ROOT, VERSION, Settings, SettingsError
from storage.database import StoreError
from storage.state.bucket import StateBucket
from training.data.bundled import PHOTO_FOLDER, SAMPLE_FOLDER
from training.runs.queue import COMMAND
from ui import TABS
from ui.account import build_account
from ui.mcp import server as mcp
from ui.permissions import protect
from ui.playground.warm_up import WarmUp
from ui.services import AppServices, SharedComponents
from ui.state_notice import build_state_notice
from ui.theme import HEAD, theme
from ui.upload_quota import UploadQuota
from usage.alerts import Webhook
from usage.deployment import resolve_deployment
from usage.events import Deployment
from usage.prices import PriceError, Prices
from usage.visitors import VisitorHasher

TITLE = "Moondream Playground"
STREAM_SECONDS = 3  # that open pages may delay the end of the server
# That idle connections stay open: longer than those of clients (httpx: 5) and load balancers (often 60), or they would
# send requests on connections that the server is closing.
IDLE_SECONDS = 75
MAX_SESSIONS = 1000  # open pages whose state is kept; each takes about 0.5 MB
M_ARENA_MAX = -8  # glibc's name of the option
LOCAL_HOSTS = ("127.0.0.1", "0.0.0.0", "::", "::1")


def build_page(services: AppServices, deployment: Deployment | None = None, sign_in: bool = False) -> gr.Blocks:
    """Build the Gradio page.

    Args:
        services: The application's services.
        deployment: Branch and commit shown in the header; by default those of the usage recorder.
        sign_in: Whether visitors can sign in with Hugging Face, as in a Space with `hf_oauth`.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)) as page:
        header = _header_html(deployment or services.meter.recorder.deployment)
        with gr.Row(elem_id="header"):
            gr.HTML(header, elem_id="banner", apply_default_css=False)
            build_account(services.access, sign_in)
        build_state_notice(services.access, services.state_bucket, services.forgets)
        with gr.Tabs() as tabs:
            shared_components = SharedComponents.create(page, tabs)
            for title, build in TABS.items():
                with gr.Tab(title, id=title):
                    build(services, shared_components)
    protect(page, services.access)
    page.state_session_capacity = MAX_SESSIONS
    return page.queue(max_size=64)


def _header_html(deployment: Deployment) -> str:
    """Return title, branch and commit. The preview deployer reads the full commit in the page."""
    branch, commit = escape(deployment.branch), escape(deployment.commit)
    short_commit = f" · <code>{commit[:7]}</code>" if commit else ""
    version = f'<p id="deployment" title="Deployed: {branch} {commit}"><span>{branch}</span>{short_commit}</p>'
    return f'<div class="head"><h1>{TITLE}</h1>{version}</div>'


def build_services(settings: Settings, command: tuple[str, ...] = COMMAND) -> AppServices:
    """Build the application's services.

    Args:
        settings: The settings.
        command: Command that runs a training run, given its folder.

    Raises:
        PriceError: The file of prices is invalid.
        StoreError: The URL of the database is invalid.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # INFO has addresses, and a webhook's can contain a secret
    prices = Prices.read(settings.prices) if settings.prices else Prices()
    state_bucket = open_state_bucket(settings)
    deployment = resolve_deployment(settings.branch, settings.commit, settings.space, ROOT)
    run_inline = _import_run_inline() if settings.train_in_request else None
    register_hosted_models(settings.moondream_url, settings.moondream_key, settings.moondream_rate, settings.endpoints)
    discover_hosted_models()
    auth = ApiKeyAuth(settings.api_keys, settings.api_rate, settings.metrics_token)
    access = AccessControl(
        settings.access_mode,
        space=settings.space or "",
        admins=settings.admins,
        guest_runs=settings.guest_runs,
        hash_secret=VisitorHasher(settings.data_dir).hash,
        tenant_of=auth.tenant_of,
    )
    services = AppServices.build(
        settings.data_dir,
        settings.store_url,
        command,
        deployment,
        prices,
        settings.hardware,
        run_inline,
        access,
        settings.upload_quota,
        settings.retention_months,
        settings.telemetry,
        Webhook(settings.alert_webhook, settings.alert_secret) if settings.alert_webhook else None,
    )
    return replace(services, state_bucket=state_bucket)


def open_state_bucket(settings: Settings) -> StateBucket | None:
    """Load the deployment's state from its bucket into the data folder, and save changes from then on.

    Call it before anything reads the data folder.
    """
    if settings.state_bucket is None:
        return None
    bucket = StateBucket(
        settings.state_bucket,
        settings.data_dir,
        settings.database_url,
        settings.state_bucket_token,
        settings.space or socket.gethostname(),
        settings.state_bucket_seconds,
    )
    bucket.restore()
    print(bucket.status().message, flush=True)
    bucket.start()
    return bucket


def build_routes(settings: Settings, services: AppServices) -> FastAPI:
    """Create the HTTP routes beside the page: health, usage, the tools for agents and the /v1 API."""
    app = FastAPI(title=TITLE)
    recorder = services.meter.recorder
    app.include_router(health.router(VERSION, lambda: recorder.deployment, services.usage.database))
    app.include_router(usage.router(services.usage, services.budgets, recorder))
    allow_local = settings.access_mode == "local"
    auth = ApiKeyAuth(settings.api_keys, settings.api_rate, settings.metrics_token, allow_local)
    app.router.routes.extend(mcp.routes(services, settings.data_dir / "photos"))
    app.mount("/v1", create_api(services.meter, auth, settings.data_dir / "tuning"))
    return app


def access_options(settings: Settings, services: AppServices) -> dict[str, Any]:
    """Return the options of `access.middleware.AccessMiddleware`, which checks every request."""
    auth = ApiKeyAuth(metrics_token_digest=settings.metrics_token)
    return {
        "access": services.access,
        "is_metrics_token": auth.is_metrics_token,
        "admit_upload": UploadQuota(Path(get_upload_folder())).admit,
        "print_link": lambda: print_admin_link(settings, services.access),
    }


def print_admin_link(settings: Settings, access: AccessControl) -> None:
    """Print the one-time link of the administrator, where neither this machine nor an account identifies one."""
    if access.mode == "link" or (access.mode == "space" and not settings.oauth):
        host = f"https://{settings.space_host}" if settings.space_host else f"http://{_display_host(settings)}"
        print(f"Administrator (this link works once): {host}/admin?token={access.link.token}", flush=True)


def _display_host(settings: Settings) -> str:
    host = "localhost" if settings.host in LOCAL_HOSTS else settings.host
    return f"{host}:{settings.port}"


def gradio_options(settings: Settings) -> dict[str, Any]:
    """Return the options of both `gr.mount_gradio_app` and `Blocks.launch`."""
    return {
        "theme": theme(),
        "head": HEAD,
        "footer_links": ["api"],
        "run_history": False,
        "ssr_mode": False,
        "show_error": False,
        "max_file_size": MAX_BYTES,
        "allowed_paths": [str(PHOTO_FOLDER), str(SAMPLE_FOLDER)],
        "blocked_paths": [str(settings.data_dir)],
    }


def create_app(settings: Settings, command: tuple[str, ...] = COMMAND, services: AppServices | None = None) -> FastAPI:
    """Create the page and the routes as one ASGI application; see `build_services`."""
    services = services or build_services(settings, command)
    routes, page = build_routes(settings, services), build_page(services, sign_in=settings.oauth)
    routes.add_middleware(AccessMiddleware, **access_options(settings, services))
    return gr.mount_gradio_app(routes, page, path="/", **gradio_options(settings))


def _import_run_inline() -> Callable[[str], object]:
    """Import the runner of training runs inside a request. ZeroGPU requires the import before any use of CUDA."""
    from training.runs.inline import run_inline

    return run_inline


def limit_allocator() -> None:
    """Let glibc keep freed memory in two arenas instead of one per thread, so that memory does not grow with threads.

    It counts only before the first threads start.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def main() -> None:
    """Serve the application until it is stopped."""
    limit_allocator()
    try:
        settings = Settings.from_env(os.environ)
        services = replace(build_services(settings), warm_up=WarmUp())
        app = create_app(settings, services=services)
    except (SettingsError, PriceError, StoreError) as error:
        sys.exit(str(error))
    print(f"{TITLE}: http://{_display_host(settings)}", flush=True)
    print_admin_link(settings, services.access)
    with closing(services):
        exit_on_sigterm()
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=STREAM_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
        )


def exit_on_sigterm() -> None:
    """End the process by an exception at SIGTERM, which a Space gets before a restart, so that the services close."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


# ── Hugging Face Spaces ─────────────────────────────────────────────────────────────────────────────────────────────
# Hot reload and ZeroGPU need `Blocks.launch`. Hot reload shows a new page only if a line of this file that builds the
# page has changed: `python -m previews deploy` therefore writes the commit into the line `demo = ...` below.


@cache
def space_services() -> tuple[Settings, AppServices]:
    """Return the settings and services of the Space. They survive hot reloads, unlike the page.

    On ZeroGPU no model is loaded in advance: there, only requests may use the GPU.
    """
    try:
        settings = Settings.from_env(os.environ)
        services = build_services(settings)
        return settings, services if settings.train_in_request else replace(services, warm_up=WarmUp())
    except (SettingsError, PriceError, StoreError) as error:
        sys.exit(str(error))


def space_page(module: str, commit: str) -> gr.Blocks | None:
    """Build the page in a Space; return None elsewhere.

    Usage events and /healthz report the commit once its page is built; if that fails, they keep the previous one.

    Args:
        module: `__name__` of this module.
        commit: The deployed commit, or "" for the one in the settings.
    """
    if module != "__main__" or "SPACE_ID" not in os.environ:
        return None
    limit_allocator()
    settings, services = space_services()
    recorder = services.meter.recorder
    deployment = replace(recorder.deployment, commit=commit or recorder.deployment.commit)
    page = build_page(services, deployment, sign_in=settings.oauth)
    recorder.deployment = deployment
    return page


def launch_in_space(page: gr.Blocks) -> None:
    """Serve the page of a Space, with this application's routes before Gradio's own."""
    settings, services = space_services()
    print_admin_link(settings, services.access)
    with closing(services):
        exit_on_sigterm()
        page.launch(
            server_name=settings.host,
            server_port=settings.port,
            state_session_capacity=MAX_SESSIONS,
            prevent_thread_lock=True,
            quiet=True,
            app_kwargs={
                "routes": [*build_routes(settings, services).router.routes],
                "middleware": [Middleware(AccessMiddleware, **access_options(settings, services))],
            },
            **gradio_options(settings),
        )
        while True:
            time.sleep(3600)


demo = space_page(__name__, "")

if __name__ == "__main__":
    launch_in_space(demo) if demo else main()

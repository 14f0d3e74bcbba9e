"""The permissions of all handlers of the page and all routes of the server, in one table each.

A handler or route that is not listed is refused. What depends on the owner of a run or reward function, or on the key
that pays, is checked inside the handler as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Literal

from starlette.routing import compile_path

from access.roles import Role


class AccessDenied(Exception):  # noqa: N818
    """Raised when a visitor may not do something. The message says what to do."""


SIGN_IN = "Sign in to do this."
ADMIN_ONLY = "Only an administrator of this deployment may do this."
NO_SESSION = "This page's session is unknown. Reload the page; if this happens again, allow cookies for this site."


@dataclass(frozen=True)
class HandlerRule:
    """Who may call a handler.

    Attributes:
        role: Lowest role.
        session: Whether the request must come from a browser with a secret, because the handler returns or changes
            what a session holds.
    """

    role: Role = Role.GUEST
    session: bool = False


GUEST, USER, ADMIN = HandlerRule(Role.GUEST), HandlerRule(Role.USER), HandlerRule(Role.ADMIN)
SESSION = HandlerRule(Role.GUEST, session=True)

# Handlers of the page, by module and function. The API endpoints keep no session.
HANDLERS: dict[str, HandlerRule] = {
    # Page
    "ui.account.show_account": GUEST,
    "ui.state_notice.show_state": GUEST,
    "gradio.components.login_button._check_login_status": GUEST,
    "ui.events.handler": GUEST,
    # Playground
    "ui.playground.tab.page_opened": GUEST,
    "ui.playground.tab.sample_selected": GUEST,
    "ui.playground.tab.photo_changed": GUEST,
    "ui.playground.tab.skill_changed": GUEST,
    "ui.playground.tab.key_entered": GUEST,
    "ui.playground.tab.run_clicked": SESSION,
    "ui.playground.tab.cancel": SESSION,
    "ui.playground.tab.render_full_size": SESSION,
    "ui.playground.tab.write_report": SESSION,
    "ui.playground.code_panel.code_requested": GUEST,
    "ui.playground.reward_functions.selection_changed": GUEST,
    "ui.playground.reward_functions.save_clicked": GUEST,
    "ui.playground.reward_functions.rename_clicked": GUEST,
    "ui.playground.reward_functions.delete_clicked": GUEST,
    "ui.playground.reward_functions.import_file": GUEST,
    "ui.playground.reward_functions.export_file": GUEST,
    "ui.playground.preference_panel.panel_opened": GUEST,
    "ui.playground.preference_panel.acted": SESSION,  # the visitor's own choices
    "ui.playground.preference_panel.card_preferred": SESSION,
    "ui.playground.preference_panel.retrain_clicked": SESSION,
    "ui.playground.preference_panel.dpo_clicked": SESSION,  # guests need GUEST_RUNS
    "ui.playground.preference_panel.download_choices": SESSION,
    # Fine-tune
    "ui.finetune.tab.refreshed": GUEST,
    "ui.finetune.tab.pick": GUEST,
    "ui.finetune.tab.rollouts_chosen": GUEST,  # others' own photos are not shown
    "ui.finetune.form.photo_source_changed": GUEST,
    "ui.finetune.form.length_changed": GUEST,
    "ui.finetune.form.backend_changed": GUEST,
    "ui.finetune.tab.updated_estimate": GUEST,
    "ui.finetune.tab.form_opened": GUEST,
    "ui.finetune.tab.retrain_clicked": SESSION,  # guests need GUEST_RUNS
    "ui.finetune.tab.clear_credentials": GUEST,
    "ui.finetune.tab.run_submitted": SESSION,  # owners only
    "ui.finetune.tab.action_clicked": SESSION,  # owners only
    "ui.finetune.tab.download_clicked": SESSION,  # owners only
    "ui.finetune.tab.push_clicked": HandlerRule(Role.USER, session=True),  # owners only
    # Evaluate
    "ui.evaluate.tab.refreshed": GUEST,  # own evaluations only
    "ui.evaluate.tab.tab_opened": GUEST,
    "ui.evaluate.tab.options_changed": GUEST,
    "ui.evaluate.tab.pick": GUEST,
    "ui.evaluate.tab.photos_shown": GUEST,  # owners only
    "ui.evaluate.tab.reward_chosen": GUEST,
    "ui.evaluate.tab.skill_prompt": GUEST,
    "ui.evaluate.tab.updated_estimate": GUEST,
    "ui.evaluate.tab.start_clicked": SESSION,  # guests need GUEST_RUNS
    "ui.evaluate.tab.clear_key": GUEST,
    "ui.evaluate.tab.action_clicked": SESSION,  # owners only
    "ui.evaluate.tab.download_clicked": SESSION,  # owners only
    "ui.evaluate.tab.cell_opened": SESSION,  # owners only
    # Usage
    "ui.usage.tab.link_opened": GUEST,
    "ui.usage.tab.refreshed_if_open": GUEST,
    "ui.usage.tab.period_changed": GUEST,
    "ui.usage.tab.period_selected": GUEST,
    "ui.usage.tab.budget_submitted": HandlerRule(Role.ADMIN, session=True),
    "ui.usage.tab.alert_submitted": HandlerRule(Role.ADMIN, session=True),
    "ui.usage.tab.machine_price_submitted": HandlerRule(Role.ADMIN, session=True),
    "ui.usage.tab.generate_sample_traffic": HandlerRule(Role.ADMIN, session=True),
    # API endpoints
    "ui.api.compare.compare": GUEST,
    "ui.api.compare.score": GUEST,
    "ui.api.compare.models": GUEST,
    "ui.api.compare.reward_functions": GUEST,
    "ui.api.compare.save_reward_function": USER,
    "ui.api.preferences.prefer": GUEST,
    "ui.api.preferences.fit_reward": GUEST,
    "ui.api.preferences.preferences": GUEST,
    "ui.api.preferences.delete_preferences": GUEST,
    "ui.api.runs.retrain_requested": GUEST,  # guests need GUEST_RUNS
    "ui.api.runs.runs_requested": GUEST,
    "ui.api.runs.run_status_requested": GUEST,
    "ui.api.runs.cancel_run_requested": GUEST,  # owners only
    "ui.api.runs.use_run_requested": GUEST,  # owners only
    "ui.api.runs.revert_requested": GUEST,  # owners only
    "ui.api.evaluations.evaluate_requested": GUEST,  # guests need GUEST_RUNS
    "ui.api.evaluations.evaluation_requested": GUEST,  # owners only
    "ui.api.usage.metrics": ADMIN,
    "ui.api.usage.series": ADMIN,
}

# Tools for agents, by name; `ui.mcp.tools` defines them.
TOOLS: dict[str, HandlerRule] = {
    "models": GUEST,
    "compare": GUEST,
    "score": GUEST,
    "finish_photo": GUEST,
    "retrain": GUEST,  # guests need GUEST_RUNS
    "run_status": GUEST,
    "evaluate": GUEST,  # guests need GUEST_RUNS
    "evaluation": GUEST,  # owners only
}


def handler_name(handler: Callable[..., Any]) -> str:
    """Return the name of a handler in HANDLERS: its module and function, also of a partial or a method."""
    while isinstance(handler, partial):
        handler = handler.func
    handler = getattr(handler, "__wrapped__", handler)
    while isinstance(handler, partial):
        handler = handler.func
    return f"{handler.__module__}.{handler.__qualname__.rpartition('.')[2]}"


class RouteAccess(Enum):
    """Who may call a route."""

    ANYONE = "anyone"
    API_KEY = "API key"  # checked by the API: an API key, or without keys a request from this machine
    USAGE = "admin, API key or metrics token"
    CLOSED = "nobody"


@dataclass(frozen=True)
class RouteRule:
    """Who may call a route, and how its requests are checked.

    Attributes:
        methods: HTTP methods.
        path: Path as Starlette writes it.
        access: Who may call it.
        session: Where the request carries its session hash.
        max_body: Maximum size of the body in bytes; None if the route limits it itself.
    """

    methods: tuple[str, ...]
    path: str
    access: RouteAccess = RouteAccess.ANYONE
    session: Literal["", "body", "query", "path"] = ""
    max_body: int | None = 2**16

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is for this route."""
        return method in self.methods and _pattern(self.path).match(path) is not None


MAX_JSON_BODY = 16 * 2**20
MAX_UPLOAD_BODY = 256 * 2**20  # several files; each one is limited as well
_READ, _POST, _GET = ("GET", "HEAD"), ("POST",), ("GET",)
_ANY = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

# The first match counts. Routes of Gradio that this application does not use are closed.
ROUTES: tuple[RouteRule, ...] = (
    # This application
    RouteRule(_READ, "/healthz"),
    RouteRule(_GET, "/admin"),  # exchanges the token of the one-time link for a cookie
    RouteRule(_READ, "/v1/usage", RouteAccess.USAGE),
    RouteRule(_READ, "/v1/usage.{kind}", RouteAccess.USAGE),
    RouteRule(_READ, "/metrics", RouteAccess.USAGE),
    RouteRule(_ANY, "/v1", RouteAccess.API_KEY, max_body=None),
    RouteRule(_ANY, "/v1/{path:path}", RouteAccess.API_KEY, max_body=None),
    RouteRule(("GET", "HEAD", "POST", "DELETE"), "/mcp", max_body=MAX_JSON_BODY),  # every tool checks its rule in TOOLS
    RouteRule(_POST, "/photos", max_body=MAX_JSON_BODY),
    RouteRule(_READ, "/photos/{name}"),
    RouteRule(_READ, "/openapi.json"),
    RouteRule(_READ, "/docs"),
    RouteRule(_READ, "/docs/oauth2-redirect"),
    RouteRule(_READ, "/redoc"),
    # Gradio: the page and its files
    RouteRule(_READ, "/"),
    RouteRule(_GET, "/config"),
    RouteRule(_READ, "/static/{path:path}"),
    RouteRule(_READ, "/assets/{path:path}"),
    RouteRule(_READ, "/svelte/{path:path}"),
    RouteRule(_READ, "/favicon.ico"),
    RouteRule(_READ, "/theme.css"),
    RouteRule(_READ, "/robots.txt"),
    RouteRule(_READ, "/pwa_icon"),
    RouteRule(_READ, "/pwa_icon/{size}"),
    RouteRule(_READ, "/manifest.json"),
    RouteRule(_READ, "/gradio_api/theme.css"),
    RouteRule(_READ, "/gradio_api/app_id"),
    RouteRule(_READ, "/gradio_api/info"),
    RouteRule(_READ, "/gradio_api/openapi.json"),
    RouteRule(_READ, "/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}"),
    RouteRule(_READ, "/gradio_api/startup-events"),
    RouteRule(_READ, "/gradio_api/user"),
    RouteRule(_READ, "/gradio_api/login_check"),
    # Gradio: sign-in
    RouteRule(_GET, "/login/huggingface"),
    RouteRule(_GET, "/login/callback"),
    RouteRule(_GET, "/logout"),
    # Gradio: events and files
    RouteRule(_POST, "/gradio_api/queue/join", session="body", max_body=MAX_JSON_BODY),
    RouteRule(_GET, "/gradio_api/queue/data", session="query"),
    RouteRule(_GET, "/gradio_api/queue/status"),
    RouteRule(_POST, "/gradio_api/run/{api_name}", session="body", max_body=MAX_JSON_BODY),
    RouteRule(_POST, "/gradio_api/api/{api_name}", session="body", max_body=MAX_JSON_BODY),
    RouteRule(_POST, "/gradio_api/call/v2/{api_name}", session="body", max_body=MAX_JSON_BODY),
    RouteRule(_GET, "/gradio_api/call/v2/{api_name}/{event_id}"),
    RouteRule(_POST, "/gradio_api/call/{api_name}", session="body", max_body=MAX_JSON_BODY),
    RouteRule(_GET, "/gradio_api/call/{api_name}/{event_id}"),
    RouteRule(_POST, "/gradio_api/cancel", session="body"),
    RouteRule(_POST, "/gradio_api/reset", session="body"),
    RouteRule(_GET, "/gradio_api/heartbeat/{session_hash}", session="path"),
    RouteRule(_POST, "/gradio_api/upload", max_body=MAX_UPLOAD_BODY),
    RouteRule(_GET, "/gradio_api/upload_progress"),
    RouteRule(_READ, "/gradio_api/file=http{rest:path}", RouteAccess.CLOSED),  # Gradio fetches any address
    RouteRule(_READ, "/gradio_api/file/http{rest:path}", RouteAccess.CLOSED),
    RouteRule(_READ, "/gradio_api/file={path_or_url:path}"),
    RouteRule(_READ, "/gradio_api/file/{path:path}"),
    # Gradio: not used
    RouteRule(_POST, "/login", RouteAccess.CLOSED),
    RouteRule(_GET, "/monitoring", RouteAccess.CLOSED),
    RouteRule(_GET, "/monitoring/{key:path}", RouteAccess.CLOSED),
    RouteRule(_GET, "/gradio_api/token", RouteAccess.CLOSED),
    RouteRule(_GET, "/gradio_api/deep_link", RouteAccess.CLOSED),
    RouteRule(_GET, "/gradio_api/dev/reload", RouteAccess.CLOSED),
    RouteRule(_GET, "/gradio_api/runs", RouteAccess.CLOSED),
    RouteRule(_READ, "/gradio_api/proxy={url_path:path}", RouteAccess.CLOSED),
    RouteRule(_ANY, "/gradio_api/stream/{path:path}", RouteAccess.CLOSED),
    RouteRule(_POST, "/gradio_api/component_server", RouteAccess.CLOSED),
    RouteRule(_POST, "/gradio_api/process_recording", RouteAccess.CLOSED),
    RouteRule(_ANY, "/gradio_api/vibe-edit", RouteAccess.CLOSED),
    RouteRule(_ANY, "/gradio_api/undo-vibe-edit", RouteAccess.CLOSED),
    RouteRule(_ANY, "/gradio_api/vibe-code", RouteAccess.CLOSED),
    RouteRule(_ANY, "/gradio_api/vibe-starter-queries", RouteAccess.CLOSED),
)


def find_route(method: str, path: str) -> RouteRule | None:
    """Return the rule of a request; None for a route that is not listed. A slash at the end does not matter."""
    path = path if path == "/" else path.rstrip("/") or "/"
    return next((rule for rule in ROUTES if rule.matches(method, path)), None)


def unlisted_routes(routes: Iterator[tuple[str, str]]) -> list[str]:
    """Return the routes that ROUTES does not list, from pairs of method and path."""
    return [f"{method} {path}" for method, path in routes if find_route(method, _example(path)) is None]


_patterns: dict[str, re.Pattern[str]] = {}


def _pattern(path: str) -> re.Pattern[str]:
    if path not in _patterns:
        _patterns[path] = compile_path(path)[0]
    return _patterns[path]


def _example(path: str) -> str:
    """Return a path that a route's pattern matches."""
    return re.sub(r"\{[^}]*\}", "x", path)

"""Lists the routes and handlers of a running application, as seen from outside its tables of permissions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from access.permissions import handler_name

SPACE_HANDLERS = {"gradio.components.login_button._check_login_status", "ui.state_notice.show_state"}  # only in a Space


def walk_routes(routes: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield method and path of every route, also of mounted applications and included routers."""
    for route in routes:
        if hasattr(route, "original_router"):  # FastAPI's wrapper of an included router
            yield from walk_routes(route.original_router.routes, prefix + route.include_context.prefix)
        elif getattr(route, "routes", None) is not None:
            yield from walk_routes(route.routes, prefix + route.path)
        else:
            for method in getattr(route, "methods", None) or ("WEBSOCKET",):
                yield method, prefix + route.path


def handler_names(page: gr.Blocks) -> dict[int, str]:
    """Return the names of all handlers of a page, by the number with which HTTP requests call them."""
    return {number: handler_name(event.fn) for number, event in page.fns.items() if event.fn is not None}

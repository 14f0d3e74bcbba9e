"""Checks permissions inside every handler of the page."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from starlette.requests import HTTPConnection

from access.control import AccessControl, browser_secret
from access.permissions import ADMIN_ONLY, HANDLERS, NO_SESSION, SIGN_IN, AccessDenied, HandlerRule, handler_name
from access.roles import Role, Visitor
from ui.messages import as_gradio_error

TITLE = "Not allowed"


def protect(page: gr.Blocks, access: AccessControl) -> None:
    """Make every handler of a page check its rule in HANDLERS before it works.

    A handler can be called by number over HTTP whatever the page displays, so hiding a control protects nothing.

    Raises:
        KeyError: A handler is not listed.
    """
    for event in page.fns.values():
        if event.fn is not None:
            event.fn = _protected(event.fn, HANDLERS[handler_name(event.fn)], access)


def visitor_of(access: AccessControl, request: gr.Request) -> Visitor:
    """Return the visitor who sent the request of an event."""
    connection = request.request
    return access.visitor(connection) if isinstance(connection, HTTPConnection) else Visitor()


def check_rule(rule: HandlerRule, access: AccessControl, request: gr.Request | None) -> None:
    """Raise AccessDenied if the sender of a request may not call a handler."""
    connection = request.request if request is not None else None
    if not isinstance(connection, HTTPConnection):
        raise AccessDenied(NO_SESSION)
    visitor = access.visitor(connection)
    if visitor.role < rule.role:
        raise AccessDenied(ADMIN_ONLY if rule.role == Role.ADMIN else SIGN_IN)
    if rule.session and not browser_secret(connection):
        raise AccessDenied(NO_SESSION)


def _protected(handler: Callable[..., Any], rule: HandlerRule, access: AccessControl) -> Callable[..., Any]:
    """Wrap a handler. The wrapper keeps the signature, by which Gradio passes requests and event data."""

    def check() -> None:
        with as_gradio_error(AccessDenied, title=TITLE):
            check_rule(rule, access, LocalContext.request.get(None))

    def call(*args: Any, **kwargs: Any) -> Any:
        check()
        return handler(*args, **kwargs)

    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        check()
        yield from handler(*args, **kwargs)

    unwrapped = handler.func if isinstance(handler, functools.partial) else handler
    wrapper = functools.wraps(handler)(stream if inspect.isgeneratorfunction(unwrapped) else call)
    if isinstance(handler, functools.partial):
        wrapper.__annotations__ = {}
        wrapper.__doc__ = handler.func.__doc__
    return wrapper

"""The account line in the page's header: who is signed in, and how to sign in."""

from __future__ import annotations

from html import escape

import gradio as gr

from access.control import AccessControl
from access.roles import Role
from ui.events import UNQUEUED
from ui.permissions import visitor_of

GUEST_NOTE = {
    "space": "Guest",
    "link": "Guest · administrators: see the server’s log",
    "local": "Guest",
}


def build_account(access: AccessControl, sign_in: bool) -> None:
    """Build the account line.

    Args:
        access: Determines the visitor.
        sign_in: Whether to show the button “Sign in with Hugging Face”.
    """
    account = gr.HTML("", elem_id="account", apply_default_css=False)
    if sign_in:
        gr.LoginButton("Sign in with Hugging Face", "Sign out ({})", size="sm", elem_id="sign-in")

    def show_account(request: gr.Request) -> str:
        return account_html(access, request)

    gr.on(None, show_account, None, account, **UNQUEUED)


def account_html(access: AccessControl, request: gr.Request) -> str:
    """Return the visitor's name and role as HTML."""
    visitor = visitor_of(access, request)
    if visitor.role == Role.GUEST:
        return f'<p data-role="guest">{GUEST_NOTE[access.mode]}</p>'
    role = "administrator" if visitor.role == Role.ADMIN else "signed in"
    label = visitor.name if visitor.name == "Administrator" else f"{visitor.name} · {role}"
    return f'<p data-role="{visitor.role.name.lower()}">{escape(label)}</p>'

"""Note on the page about state that is lost at a restart, or that the deployment's bucket does not keep at present."""

from __future__ import annotations

from html import escape

import gradio as gr

from access.control import AccessControl
from access.roles import Role
from storage.state.bucket import BucketStatus, StateBucket
from ui.events import UNQUEUED
from ui.permissions import visitor_of

FORGETS = "This Space has no lasting disk: runs, reward functions and usage are lost when it restarts."
FORGETS_ADMIN = f"{FORGETS} Set STATE_BUCKET or DATABASE_URL to keep them."
NOT_SAVED = "Changes are not being saved at present, and would be lost at a restart."


def build_state_notice(access: AccessControl, bucket: StateBucket | None, forgets: bool) -> None:
    """Build the note, which is empty while everything is kept.

    Args:
        access: Determines the visitor; administrators see the reason.
        bucket: Keeps the state of this deployment, if it has one.
        forgets: Whether the disk is lost at a restart, with the state on it.
    """
    if bucket is None and not forgets:
        return
    note = gr.HTML("", elem_id="state-notice", apply_default_css=False)

    def show_state(request: gr.Request) -> str:
        is_admin = visitor_of(access, request).role == Role.ADMIN
        return notice_html(bucket.status() if bucket else None, is_admin)

    gr.on(None, show_state, None, note, **UNQUEUED)


def notice_html(status: BucketStatus | None, is_admin: bool) -> str:
    """Return the note as HTML: for a bucket's status, or None for a Space without a bucket; "" if all is well."""
    if status is None:
        text = FORGETS_ADMIN if is_admin else FORGETS
    elif status.ok:
        return ""
    else:
        text = status.message if is_admin else NOT_SAVED
    return f'<p role="status">{escape(text)}</p>'

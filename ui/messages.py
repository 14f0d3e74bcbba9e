"""Errors, warnings and notes on the page. Gradio renders messages as HTML, so all of them are escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr


def user_error(message: str, title: str = "Error") -> gr.Error:
    """Create an error that the user can fix. The message says how; no traceback is printed."""
    return gr.Error(html.escape(message), title=html.escape(title), duration=12, print_exception=False)


@contextmanager
def as_gradio_error(*errors: type[Exception], title: str) -> Iterator[None]:
    """Convert exceptions whose message is meant for the user to a gr.Error."""
    try:
        yield
    except errors as error:
        raise user_error(str(error), title) from None


def show_warning(message: str, title: str = "Warning") -> None:
    """Show a warning; the current action goes on."""
    gr.Warning(html.escape(message), title=html.escape(title), duration=12)


def show_info(message: str, title: str = "Done") -> None:
    """Show a note."""
    gr.Info(html.escape(message), title=html.escape(title), duration=5)

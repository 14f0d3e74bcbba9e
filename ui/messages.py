"""What the page says when something is refused. Gradio shows messages as HTML, so every one is escaped here."""

from __future__ import annotations

import html

import gradio as gr


def refusal(message: str, title: str = "That cannot be done") -> gr.Error:
    """An error to raise: the message says how to mend it. No traceback is printed, for nothing is broken."""
    return gr.Error(html.escape(message), title=html.escape(title), duration=12, print_exception=False)


def warn(message: str, title: str = "Please note") -> None:
    """Shows a warning; what was being done goes on."""
    gr.Warning(html.escape(message), title=html.escape(title), duration=12)


def inform(message: str, title: str = "Done") -> None:
    """Shows a note."""
    gr.Info(html.escape(message), title=html.escape(title), duration=5)

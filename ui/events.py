"""Options that the tabs' Gradio events share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

# Not listed in the API. This hides an event but does not protect it: handlers check permissions themselves.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
UNQUEUED: dict[str, Any] = {"queue": False, **PRIVATE}
# Repeats an event that was triggered again before it ended. Gradio ignores such a trigger, except of `change` alone.
UNQUEUED_LATEST: dict[str, Any] = {"trigger_mode": "always_last", **UNQUEUED}
# Sends every trigger at once, as the selection of a tab needs: "always_last" repeats old event data.
UNQUEUED_EACH: dict[str, Any] = {"trigger_mode": "multiple", **UNQUEUED}


def tab_selected(tab: str) -> Callable[[gr.SelectData], bool]:
    """Create a handler of `gr.Tabs.select` that returns whether the selected tab is the given one."""

    def handler(event: gr.SelectData) -> bool:  # a function of its own: Gradio passes no event data to a partial
        return event.value == tab

    return handler

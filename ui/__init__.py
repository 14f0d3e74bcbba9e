"""The web page: TABS are its tabs, each a title and the function that builds it."""

from __future__ import annotations

from collections.abc import Callable

from ui.finetune import tab as finetune
from ui.playground import tab as playground
from ui.services import AppServices, SharedComponents
from ui.usage import tab as dashboard

TABS: dict[str, Callable[[AppServices, SharedComponents], None]] = {
    "Playground": playground.build,
    finetune.TAB: finetune.build,
    dashboard.TAB: dashboard.build,
}

"""The web page: TABS are its tabs, each a title and the function that builds it."""

from __future__ import annotations

from collections.abc import Callable

from ui import dashboard, finetune, playground
from ui.house import House, Shared

TABS: dict[str, Callable[[House, Shared], None]] = {
    "Playground": playground.build,
    finetune.TAB: finetune.build,
    dashboard.TAB: dashboard.build,
}

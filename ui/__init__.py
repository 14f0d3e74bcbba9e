"""The web page. TABS maps the title of each tab to the function that builds it."""

from __future__ import annotations

from collections.abc import Callable

from ui.evaluate import tab as evaluate
from ui.finetune import tab as finetune
from ui.playground import tab as playground
from ui.services import AppServices, SharedComponents
from ui.usage import tab as usage

TABS: dict[str, Callable[[AppServices, SharedComponents], None]] = {
    playground.TAB: playground.build,
    finetune.TAB: finetune.build,
    evaluate.TAB: evaluate.build,
    usage.TAB: usage.build,
}

"""The web page: TABS are its tabs, each a title and the function that builds it."""

from __future__ import annotations

from collections.abc import Callable

from ui import playground
from usage.store import Store

TABS: dict[str, Callable[[Store], None]] = {"Playground": playground.build}

"""The fenced code blocks of the README and of docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LOCAL = "http://localhost:7860"  # the app's address in the blocks


class Block(NamedTuple):
    """A fenced code block: its page, line, language and text."""

    page: Path
    line: int
    language: str
    text: str


def blocks() -> Iterator[Block]:
    """Yield the fenced code blocks of all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```([\w -]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


BLOCKS = list(blocks())

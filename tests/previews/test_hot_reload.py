"""Hot-reload analysis: its verdict for each kind of change, compared with Gradio's own hot-reload server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from bench.app import free_port
from bench.spaces_server import SITECUSTOMIZE
from previews.hot_reload import Codebase, reload_blocker
from previews.source import read_commit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
APP = '''"""An application."""
import os
import gradio as gr
from page import build
from start import opened

def space_page(name, commit):
    return build(commit)

demo = space_page(__name__, "one")

if __name__ == "__main__":
    opened()
    demo.launch(server_port=int(os.environ["GRADIO_SERVER_PORT"]), quiet=True)
'''
PAGE = '''"""Its page."""
from dataclasses import dataclass
from functools import cache
import gradio as gr
from parts import NAME, part
from start import OPENED
import start

SHORT = start.WORD
LABEL = "label-A"
BASE = "base-A"
DERIVED = BASE + "-derived"
TABLE = {"x": "table-A"}

@dataclass(frozen=True)
class Thing:
    field: str = "field-A"
    def method(self):
        return "method-A"

THING = Thing()

@cache
def kept():
    return "kept-A"

def default(x="default-A"):
    return x

def build(commit):
    words = [LABEL, DERIVED, TABLE["x"], NAME, part(), Thing().field, THING.method(), kept(), default()]
    words += [*OPENED, SHORT, "body-A"]
    with gr.Blocks() as page:
        gr.Markdown(" ".join([commit, *words]))
    return page
'''
PARTS = '"""Parts."""\nNAME = "name-A"\ndef part():\n    return "part-A"\n'
START = '"""Startup."""\nOPENED = []\nWORD = "word-A"\ndef opened():\n    OPENED.append("opened-A")\n'
FILES = {"app.py": APP, "page.py": PAGE, "parts.py": PARTS, "start.py": START}

# File, word that changes from A to B, and why hot reload does not apply the change ("" if it does).
CHANGES = [
    ("page.py", "body", ""),
    ("page.py", "label", ""),
    ("page.py", "table", ""),
    ("page.py", "method", ""),
    ("page.py", "default", ""),
    ("parts.py", "part", ""),
    ("parts.py", "name", "other modules hold NAME"),
    ("page.py", "base", "BASE is used at module level"),
    ("page.py", "field", "class Thing changes in more than its methods"),
    ("page.py", "kept", "kept() has a decorator"),
    ("start.py", "word", "other modules hold WORD"),
    ("start.py", "opened", "opened() already ran at startup"),
]


def change(name: str, word: str) -> dict[str, str]:
    text = FILES[name].replace(f'{word}-A"', f'{word}-B"')
    assert text != FILES[name]
    return {**FILES, name: text}


def find_blocker(files: dict[str, str]) -> str | None:
    """Return why hot reload would not apply the change from FILES to these files."""
    before = {name: text.encode() for name, text in FILES.items() if files.get(name) != text}
    return reload_blocker(before, Codebase({name: text.encode() for name, text in files.items()}))


@pytest.mark.parametrize(("name", "word", "expected"), CHANGES, ids=[word for _, word, _ in CHANGES])
def test_blocker_of_each_kind_of_change(name: str, word: str, expected: str) -> None:
    blocker = find_blocker(change(name, word))
    assert (blocker or "").startswith(f"{name}: {expected}") if expected else blocker is None


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("app.py", '"one"', '"two"', ""),  # the stamp itself
        ("app.py", "    opened()\n", "", "a module-level statement changes"),
        ("app.py", "return build(commit)", "return build(commit + commit)", ""),
        ("page.py", "import gradio as gr\n", "import gradio as gr\nimport json\n", ""),
        (
            "page.py",
            "import dataclass\n",
            "import dataclass, field\n",
            "",
        ),  # though `dataclass` is used at module level
        (
            "page.py",
            "from functools import cache",
            "from functools import lru_cache as cache",
            "cache is used at module level",
        ),
        ("page.py", 'TABLE = {"x"', 'NEW = 1\nTABLE = {"x"', ""),
        ("page.py", "def default", "def new():\n    return 1\n\ndef default", ""),
        ("page.py", '"""Its page."""', '"""The page."""', ""),
        ("page.py", "@cache\ndef kept", "def kept", "kept() has a decorator"),
        ("page.py", "(frozen=True)", "", "class Thing changes"),
        ("page.py", "from parts import NAME, part", "from start import NAME, part", ""),
        ("page.py", "def build(commit):\n", "def build(commit):\n    # a comment\n", ""),
        ("start.py", "OPENED = []", "OPENED = [1]", "other modules hold OPENED"),
        ("start.py", "def opened", "print(OPENED)\n\n\ndef opened", "a module-level statement changes"),
        ("parts.py", PARTS, "", ""),  # no old state is left
    ],
)
def test_blocker_of_other_changes(name: str, old: str, new: str, expected: str) -> None:
    assert old in FILES[name]
    blocker = find_blocker({**FILES, name: FILES[name].replace(old, new, 1)})
    assert (blocker or "").startswith(f"{name}: {expected}") if expected else blocker is None, blocker


def test_new_file_is_no_blocker_and_unparsable_old_file_is() -> None:
    assert find_blocker({**FILES, "more.py": "A = 1\n"}) is None
    assert (
        reload_blocker({"page.py": b"def ("}, Codebase({"page.py": b""}))
        == "page.py: the Space's version cannot be parsed"
    )


class AppProcess:
    """The application in a process, with Gradio's hot-reload server."""

    def __init__(self, folder: Path) -> None:
        (folder / "site").mkdir(parents=True)
        (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.folder, self.port, self.reload_port, self.reloads = folder / "app", free_port(), free_port(), 0
        self.folder.mkdir()
        for name, text in FILES.items():
            (self.folder / name).write_text(text)
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(folder / "site"), "SYSTEM": "spaces"}
        env |= {"SPACE_ID": "a/b", "GRADIO_SERVER_PORT": str(self.port), "RELOAD_PORT": str(self.reload_port)}
        env |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        log = (folder / "log").open("w")
        command = [sys.executable, "app.py"]
        self.process = subprocess.Popen(  # with a group of its own, which ends together
            command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True
        )

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{self.reload_port}/healthz")
                self.text()
                return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError((self.folder.parent / "log").read_text())

    def text(self) -> str:
        """Return the text of the page."""
        config = httpx.get(f"http://127.0.0.1:{self.port}/config").json()
        (text,) = [part["props"]["value"] for part in config["components"] if part["type"] == "markdown"]
        return text

    def hot_reload(self, name: str, text: str) -> list[str]:
        """Hot-reload one file, and return the kinds of the events."""
        self.reloads += 1
        request = {"filepath": name, "contents": text, "reloadId": f"r{self.reloads}"}
        address = f"http://127.0.0.1:{self.reload_port}"
        httpx.post(f"{address}/create-reload", json=request).raise_for_status()
        events = httpx.post(f"{address}/get-reload", json={"reloadId": request["reloadId"]}, timeout=30).text
        return [json.loads(line[5:])["data"]["kind"] for line in events.splitlines() if line.startswith("data:")]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppProcess]:
    app = AppProcess(tmp_path_factory.mktemp("hot"))
    try:
        app.wait_until_started()
        yield app
    finally:
        with suppress(ProcessLookupError):
            os.killpg(app.process.pid, signal.SIGKILL)
        app.process.wait()


@pytest.mark.parametrize(("name", "word", "expected"), CHANGES, ids=[word for _, word, _ in CHANGES])
def test_gradios_hot_reload_agrees_with_the_blocker(app: AppProcess, name: str, word: str, expected: str) -> None:
    """Files are sent as by the deployer, the stamp last; hot reload reports success in all cases."""
    text = (app.folder / name).read_text()
    kinds = app.hot_reload(name, text.replace(f'{word}-A"', f'{word}-B"'))
    stamp = f"s{app.reloads}"
    kinds += app.hot_reload("app.py", re.sub(r'__name__, "\w+"', f'__name__, "{stamp}"', APP))
    assert not {"exception", "error"} & set(kinds)
    text = app.text()
    assert text.startswith(stamp)
    assert (f"{word}-A" in text, f"{word}-B" in text) == ((True, False) if expected else (False, True))


def test_blockers_of_changes_to_this_application() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    python = read_commit(ROOT, head.strip()).python

    def edit(name: str, old: bytes, new: bytes) -> str | None:
        assert old in python[name]
        return reload_blocker({name: python[name]}, Codebase({**python, name: python[name].replace(old, new, 1)}))

    assert edit("ui/playground/tab.py", b"Fine-tune with this reward", b"Another label") is None
    assert edit("rewards/sharpness.py", b"return guard(", b"return 0 * 0 + guard(") is None
    assert edit("ui/__init__.py", b"playground.TAB: ", b'"Play": ') == "ui/__init__.py: other modules hold TABS"
    assert edit("ui/usage/tab.py", b'TAB = "Usage"', b'TAB = "Calls"') == "ui/usage/tab.py: other modules hold TAB"
    assert "already ran at startup" in (edit("serving/health.py", b"version=version", b"version=version[:9]") or "")
    assert "class Settings" in (edit("settings.py", b'"PREVIEW_BRANCH"', b'"BRANCH"') or "")
    assert "app.py" in (edit("app.py", b"footer_links", b"footer") or "")

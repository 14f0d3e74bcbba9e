"""Which changes hot reload shows: what is claimed of each kind, and that Gradio's own hot reload bears it out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.spaces_server import SITE, free_port
from previews.hot_reload import Program, obstacle
from previews.source import read

ROOT = Path(__file__).resolve().parents[2]
APP = '''"""An application."""
import os
import gradio as gr
from page import build
from start import opened

def stamped(name, commit):
    return build(commit)

demo = stamped(__name__, "one")

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
START = '"""What is done once."""\nOPENED = []\nWORD = "word-A"\ndef opened():\n    OPENED.append("opened-A")\n'
FILES = {"app.py": APP, "page.py": PAGE, "parts.py": PARTS, "start.py": START}

# What is changed from A to B, in which file, and why hot reload would not show it ("" where it does).
CHANGES = [
    ("page.py", "body", ""),
    ("page.py", "label", ""),
    ("page.py", "table", ""),
    ("page.py", "method", ""),
    ("page.py", "default", ""),
    ("parts.py", "part", ""),
    ("parts.py", "name", "other modules hold NAME"),
    ("page.py", "base", "BASE is used where the module is loaded"),
    ("page.py", "field", "class Thing changes in more than its methods"),
    ("page.py", "kept", "kept() has a decorator"),
    ("start.py", "word", "other modules hold WORD"),
    ("start.py", "opened", "opened() has done its work"),
]


def changed(name: str, word: str) -> dict[str, str]:
    text = FILES[name].replace(f'{word}-A"', f'{word}-B"')
    assert text != FILES[name]
    return {**FILES, name: text}


def why(files: dict[str, str]) -> str | None:
    """The obstacle between the application and these files."""
    before = {name: text.encode() for name, text in FILES.items() if files.get(name) != text}
    return obstacle(before, Program({name: text.encode() for name, text in files.items()}))


@pytest.mark.parametrize(("name", "word", "expected"), CHANGES, ids=[word for _, word, _ in CHANGES])
def test_a_change_is_judged(name: str, word: str, expected: str) -> None:
    found = why(changed(name, word))
    assert (found or "").startswith(f"{name}: {expected}") if expected else found is None


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("app.py", '"one"', '"two"', ""),  # the stamp itself
        ("app.py", "    opened()\n", "", "a statement that runs while it is loaded changes"),
        ("app.py", "return build(commit)", "return build(commit + commit)", ""),
        ("page.py", "import gradio as gr\n", "import gradio as gr\nimport json\n", ""),
        ("page.py", "import dataclass\n", "import dataclass, field\n", ""),  # though the first is used while loading
        ("page.py", "from functools import cache", "from functools import lru_cache as cache", "cache is used where"),
        ("page.py", 'TABLE = {"x"', 'NEW = 1\nTABLE = {"x"', ""),
        ("page.py", "def default", "def new():\n    return 1\n\ndef default", ""),
        ("page.py", '"""Its page."""', '"""The page."""', ""),
        ("page.py", "@cache\ndef kept", "def kept", "kept() has a decorator"),
        ("page.py", "(frozen=True)", "", "class Thing changes"),
        ("page.py", "from parts import NAME, part", "from start import NAME, part", ""),
        ("page.py", "def build(commit):\n", "def build(commit):\n    # a comment\n", ""),
        ("start.py", "OPENED = []", "OPENED = [1]", "other modules hold OPENED"),
        ("start.py", "def opened", "print(OPENED)\n\n\ndef opened", "a statement that runs while it is loaded"),
        ("parts.py", PARTS, "", ""),  # nothing of it is left that could be wrong; who still uses it fails
    ],
)
def test_other_changes_are_judged(name: str, old: str, new: str, expected: str) -> None:
    assert old in FILES[name]
    found = why({**FILES, name: FILES[name].replace(old, new, 1)})
    assert (found or "").startswith(f"{name}: {expected}") if expected else found is None, found


def test_a_new_file_is_no_obstacle_and_an_unreadable_old_one_is() -> None:
    assert why({**FILES, "more.py": "A = 1\n"}) is None
    assert (
        obstacle({"page.py": b"def ("}, Program({"page.py": b""}))
        == "page.py: the Space's version of it cannot be read"
    )


class Running:
    """The application in a process of its own, with Gradio's hot-reload server."""

    def __init__(self, folder: Path) -> None:
        (folder / "site").mkdir(parents=True)
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        self.folder, self.port, self.reload_port, self.reloads = folder / "app", free_port(), free_port(), 0
        self.folder.mkdir()
        for name, text in FILES.items():
            (self.folder / name).write_text(text)
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(folder / "site"), "SYSTEM": "spaces"}
        env |= {"SPACE_ID": "a/b", "GRADIO_SERVER_PORT": str(self.port), "RELOAD_PORT": str(self.reload_port)}
        env |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        log = (folder / "log").open("w")
        self.process = subprocess.Popen([sys.executable, "app.py"], cwd=self.folder, env=env, stdout=log, stderr=log)

    def wait(self) -> None:
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
        config = httpx.get(f"http://127.0.0.1:{self.port}/config").json()
        (found,) = [one["props"]["value"] for one in config["components"] if one["type"] == "markdown"]
        return found

    def send(self, name: str, text: str) -> list[str]:
        """Reloads one file; the kinds of what happened."""
        self.reloads += 1
        asked = {"filepath": name, "contents": text, "reloadId": f"r{self.reloads}"}
        address = f"http://127.0.0.1:{self.reload_port}"
        httpx.post(f"{address}/create-reload", json=asked).raise_for_status()
        told = httpx.post(f"{address}/get-reload", json={"reloadId": asked["reloadId"]}, timeout=30).text
        return [json.loads(line[5:])["data"]["kind"] for line in told.splitlines() if line.startswith("data:")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("hot"))
    try:
        running.wait()
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize(("name", "word", "expected"), CHANGES, ids=[word for _, word, _ in CHANGES])
def test_hot_reload_does_as_is_claimed(running: Running, name: str, word: str, expected: str) -> None:
    """With the file and then the stamp, as the deployer sends them. What is not shown is success to hot reload."""
    now = (running.folder / name).read_text()
    kinds = running.send(name, now.replace(f'{word}-A"', f'{word}-B"'))
    stamp = f"s{running.reloads}"
    kinds += running.send("app.py", re.sub(r'__name__, "\w+"', f'__name__, "{stamp}"', APP))
    assert not {"exception", "error"} & set(kinds)
    text = running.text()
    assert text.startswith(stamp)
    assert (f"{word}-A" in text, f"{word}-B" in text) == ((True, False) if expected else (False, True))


def test_this_applications_page_can_be_hot_reloaded_and_its_start_cannot() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    python = read(ROOT, head.strip()).python

    def edited(name: str, old: bytes, new: bytes) -> str | None:
        assert old in python[name]
        return obstacle({name: python[name]}, Program({**python, name: python[name].replace(old, new, 1)}))

    assert edited("ui/playground/tab.py", b"Teach a model this reward", b"Another label") is None
    assert edited("rewards/sharpness.py", b"return ", b"return 0 * 0 + ") is None
    assert edited("ui/__init__.py", b'"Playground": ', b'"Play": ') == "ui/__init__.py: other modules hold TABS"
    assert edited("ui/usage/tab.py", b'TAB = "Usage"', b'TAB = "Calls"') == "ui/usage/tab.py: other modules hold TAB"
    assert "has done its work" in (edited("serving/health.py", b"version=version", b"version=version[:9]") or "")
    assert "class Settings" in (edited("settings.py", b'"PREVIEW_BRANCH"', b'"BRANCH"') or "")
    assert "app.py" in (edited("app.py", b"footer_links", b"footer") or "")

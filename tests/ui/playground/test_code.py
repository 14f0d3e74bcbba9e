"""Tests of the panel "Use from code": what it quotes, which models it leaves out, and that its code runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from access.roles import Role, Visitor
from inference.registry import MODELS
from inference.types import SKILLS, Request
from recipes import load_photo
from rewards import EQUAL_WEIGHTS, REWARDS
from settings import ROOT, Settings
from tests.support import fake_backend
from tests.support.app_server import app_server
from ui.playground.code import CLIENTS, api_prompt, snippets
from ui.playground.code_panel import LOCAL_ADDRESS, checked_address, write_code
from ui.playground.compare import compare
from ui.playground.link import LINK_FIELDS, PlaygroundSettings
from ui.playground.samples import SAMPLES

KEY = "a-key-of-20-letters-"
HOSTILE = 'What\'s "this"?\n$(touch hacked) `touch hacked` \\n %s {{ 7 * 7 }} ${HOME} \'\'\'""" é 漢 🙂'
CLIENT_PYTHON = ROOT / ".venv-clients" / "bin" / "python"
ADDRESS = "https://example.org/playground"


def code_of(settings: PlaygroundSettings, address: str = ADDRESS) -> dict[str, str]:
    return snippets(settings, MODELS, address, EQUAL_WEIGHTS)


def strings(code: str) -> list[str]:
    """Return the strings in a Python program."""
    nodes = ast.walk(ast.parse(code))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@given(st.text(max_size=60), st.sampled_from(["recipe", "query", "detect", "point"]))
def test_every_prompt_is_quoted(prompt: str, skill: str) -> None:
    settings = PlaygroundSettings(skill=skill, prompt=prompt)
    code, expected = code_of(settings), api_prompt(settings)
    for client in ("moondream", "openai"):
        assert expected in strings(code[client]) or not expected
    assert prompt in strings(code["gradio_client"])
    (line,) = (line for line in code["curl"].split(" | post ")[:-1] if "seed" in line)
    body = next(word for word in shlex.split(line.rpartition("do\n")[2]) if word.startswith('{"model"'))
    assert expected in json.loads(body + "}}").values()


def test_code_has_the_settings_and_no_more() -> None:
    settings = PlaygroundSettings(
        "coffee.jpg", ("moondream-tiny", "moondream-tiny-steady"), n=3, temperature=0.5, seed=7
    )
    code = code_of(settings)
    assert set(code) == set(CLIENTS)
    for text in code.values():
        assert ADDRESS in text and "coffee.jpg" in text and "moondream-tiny-steady" in text
        assert all(name in text for name in REWARDS)
    for client in ("moondream", "openai", "curl"):
        assert re.search(r'steady".*"temperature": 0\.2\b', code[client]), client  # scaled, as in the Playground
    assert "range(7, 10)" in code["moondream"] and "for seed in 7 8 9;" in code["curl"]
    assert "n=3,\n        seed=7," in code["openai"] and "temperature=0.5" in code["gradio_client"]


def test_models_that_v1_does_not_serve_are_named_in_a_comment() -> None:
    code = code_of(PlaygroundSettings(models=("moondream-tiny", "moondream3-preview")))
    assert code["curl"].startswith('# Not served under /v1, but to the Gradio client: "moondream3-preview"\n')
    assert "moondream3-preview" not in code["openai"].partition("\n")[2]
    assert "moondream3-preview" in code["gradio_client"]
    only_hosted = code_of(PlaygroundSettings(models=("moondream3-preview",)))
    assert all(only_hosted[client].count("\n") == 1 for client in ("moondream", "openai", "curl"))


def panel(address: str = ADDRESS, **changes: Any) -> dict[str, Any]:
    """Return what the panel displays for inputs."""
    inputs = {
        "photo": "", "models": ["moondream-tiny"], "skill": "recipe", "prompt": "", "length": "normal", "n": 4,
        "temperature": 1.0, "seed": 1, **dict.fromkeys(REWARDS, 1.0), **changes,
    }  # fmt: skip
    services: Any = SimpleNamespace(adapters=SimpleNamespace(visible_models=lambda visitor: MODELS))
    return write_code(services, Visitor(Role.GUEST, "guest:abc", hash="0123abcd"), address, list(inputs.values()))


def test_panel_explains_what_is_missing() -> None:
    assert panel(models=[]) == {"code": {}, "note": "Select 1 to 4 models."}
    assert panel(models=["<b>"])["note"].startswith("Unknown model '<b>'")
    assert panel(skill="query")["note"].startswith("Question needs a prompt")
    assert "seed" in panel(seed=None)["note"]
    assert "score" not in panel(**dict.fromkeys(REWARDS, 0))["code"]["curl"]
    for photo in ("", "../../etc/passwd"):
        shown = panel(photo=photo)
        assert 'Image.open("photo.jpg")' in shown["code"]["moondream"] and "photo.jpg" in shown["note"]
    assert "abc" not in "".join(panel()["code"].values())  # neither the visitor nor the browser
    assert set(LINK_FIELDS) | set(REWARDS) == set(PlaygroundSettings.__dataclass_fields__) - {"reward"} | set(REWARDS)


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)",
        "https://",
        "http://user@host",
        "http://[",
        "https://host/?a=b",
        "http://" + "a" * 300,
        "x",
    ],
)
def test_invalid_address_is_replaced(address: str) -> None:
    assert checked_address(address) == LOCAL_ADDRESS
    assert checked_address("https://owner-name.hf.space/") == "https://owner-name.hf.space"


# ── Running the code ────────────────────────────────────────────────────────────────────────────────────────────────

RUNS = [
    PlaygroundSettings("coffee.jpg", ("moondream-tiny", "moondream-tiny-steady"), "recipe", HOSTILE, n=2, seed=5),
    PlaygroundSettings("coffee.jpg", ("moondream-tiny",), "query", HOSTILE, n=2, temperature=0.7, seed=3),
    PlaygroundSettings("", ("moondream-tiny",), "caption", "", "short", n=2, temperature=0.5, seed=9),
    PlaygroundSettings("coffee.jpg", ("moondream-tiny",), "detect", HOSTILE, n=1, temperature=0.0),
    PlaygroundSettings("coffee.jpg", ("moondream-tiny",), "point", HOSTILE, n=1, temperature=0.0),
    PlaygroundSettings("coffee.jpg", ("segmenter",), "segment", "a cup", n=1),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the app with a key, and a fake model that segments."""
    MODELS["segmenter"] = fake_backend.fake_spec("segmenter", segments=True)
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path_factory.mktemp("code"), api_keys=keys, api_rate=100.0) as address:
        yield address
    del MODELS["segmenter"]


def playground_answers(settings: PlaygroundSettings) -> list[Any]:
    """Return what the Playground displays: the answers of all candidates, as JSON has them."""
    photo = load_photo(SAMPLES["coffee.jpg"].path)
    sampling = {"n": settings.n, "temperature": settings.temperature, "seed": settings.seed, "length": settings.length}
    request = Request(photo, settings.skill, settings.prompt, **sampling)
    *_, last = compare(list(settings.models), request, threading.Event())
    candidates = [candidate for column in last.columns for candidate in column.candidates]
    key = {"detect": "boxes", "point": "points", "segment": "path"}.get(settings.skill, "text")
    return [getattr(candidate, key) for candidate in candidates]


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_code_runs_and_answers_as_the_playground(client: str, server: str, tmp_path: Path) -> None:
    if client in ("moondream", "openai") and not CLIENT_PYTHON.exists():
        message = "the clients are not installed: run `make clients`"
        (pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip)(message)
    python = sys.executable if client == "gradio_client" else str(CLIENT_PYTHON)
    for name in ("coffee.jpg", "photo.jpg"):
        (tmp_path / name).write_bytes(SAMPLES["coffee.jpg"].path.read_bytes())
    programs = [code_of(settings, server)[client] for settings in RUNS]
    separator = "echo -----" if client == "curl" else 'print("-----")'
    program = f"\n{separator}\n".join(programs)  # in one process, because importing a client takes seconds
    assert KEY not in program
    command = ["sh", "-ec", program] if client == "curl" else [python, "-c", program]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PLAYGROUND_API_KEY": KEY}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr + result.stdout
    assert not (tmp_path / "hacked").exists()
    for settings, output in zip(RUNS, result.stdout.split("-----\n"), strict=True):
        if client == "openai" and settings.skill == "segment":
            assert output == ""
            continue
        expected = playground_answers(settings)
        assert "error" not in output.lower()
        if settings.skill == "recipe":
            assert len(re.findall(r"[ :]0\.\d+[ ,}]", output)) >= len(expected)  # the rewards
        if SKILLS[settings.skill].output == "regions":
            assert output.strip()
        elif client == "moondream":  # the SDK compresses the photo again, which changes answers
            assert len(output.splitlines()) == len(expected)
        elif not (client == "openai" and settings.skill == "caption"):  # captions of normal length
            assert all(answer in output for answer in expected), (expected, output)

"""Tests of `python -m inference.moondream export`: the folder loads where only transformers is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inference.moondream.__main__ import main
from inference.registry import answer
from inference.types import Answer, Request
from recipes import load_photo
from tests.support.clean_environment import create_environment
from tests.support.doc_blocks import BLOCKS

ROOT = Path(__file__).resolve().parents[3]
PHOTO = ROOT / "assets" / "photos" / "coffee.jpg"
# Before the example of docs/api.md: neither this project nor what else it requires can be imported. After it: detect.
BEFORE = """
import importlib.util
others = ("inference", "recipes", "cv2", "gradio", "peft", "trl", "pip")
found = [name for name in others if importlib.util.find_spec(name)]
assert found == [], found
"""
AFTER = """
photo = Image.open("photo.jpg").convert("RGB")
assert len(model.detect(**processor.prepare(photo, "detect", "the main subject"))) == 1
"""


def export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command. In this process, because importing torch again takes seconds."""
    monkeypatch.setattr(sys, "argv", ["inference.moondream", "export", *arguments])
    main()


@pytest.mark.slow
def test_exported_folder_loads_with_transformers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "exported"
    export(monkeypatch, "moondream-tiny", str(folder))
    assert json.loads((folder / "config.json").read_text())["auto_map"]
    python = create_environment(tmp_path / "environment", "transformers", "torch", "pillow")
    (example,) = (block.text for block in BLOCKS if block.language == "python export")
    shutil.copyfile(PHOTO, tmp_path / "photo.jpg")
    command = [str(python), "-I", "-c", BEFORE + example + AFTER]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    loaded = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert loaded.returncode == 0, loaded.stderr[-2000:]

    request = Request(load_photo(PHOTO), "query", "Is the photo bright or dark?", temperature=0, max_tokens=24)
    (expected,) = [event.text for event in answer("moondream-tiny", request) if isinstance(event, Answer)]
    assert loaded.stdout.strip() == expected
    for model, target in (("moondream-tiny", folder), (str(tmp_path / "none"), tmp_path / "x")):
        with pytest.raises(SystemExit, match="could not be exported"):
            export(monkeypatch, model, str(target))

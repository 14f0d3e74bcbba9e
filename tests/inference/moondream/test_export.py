"""Tests of `python -m inference.moondream export`: the folder loads without this project, by its own classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PHOTO = ROOT / "assets" / "photos" / "coffee.jpg"
# The example of docs/api.md, without its photo, then a check that no module of this project was used.
LOAD = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, photo = sys.argv[1], Image.open(sys.argv[2]).convert("RGB")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.prepare(photo, "query", "Is the photo bright or dark?")
ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)
print(processor.decode_answers(ids[:, inputs["input_ids"].shape[1]:])[0])
assert "inference" not in sys.modules and "recipes" not in sys.modules
assert len(model.detect(**processor.prepare(photo, "detect", "the main subject"))) == 1
"""


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=settings, check=False)


@pytest.mark.slow
def test_exported_folder_loads_without_the_project(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    export = ("-m", "inference.moondream", "export", "moondream-tiny", str(folder))
    assert run(*export, cwd=ROOT).returncode == 0
    assert json.loads((folder / "config.json").read_text())["auto_map"]
    loaded = run("-I", "-c", LOAD, str(folder), str(PHOTO), cwd=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    from inference.registry import answer
    from inference.types import Answer, Request
    from recipes import load_photo

    request = Request(load_photo(PHOTO), "query", "Is the photo bright or dark?", temperature=0, max_tokens=24)
    (expected,) = [event.text for event in answer("moondream-tiny", request) if isinstance(event, Answer)]
    assert loaded.stdout.strip() == expected
    again = run(*export, cwd=ROOT)
    assert again.returncode == 1 and "could not be exported" in again.stderr
    missing = run("-m", "inference.moondream", "export", str(tmp_path / "none"), str(tmp_path / "x"), cwd=ROOT)
    assert missing.returncode == 1 and "could not be exported" in missing.stderr

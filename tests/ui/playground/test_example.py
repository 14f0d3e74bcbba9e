"""Tests of the samples and of the example with which the page opens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from access.roles import LOCAL_ADMIN
from inference.local.engine import Engine
from inference.registry import MODELS
from recipes import load_photo, parse
from rewards import score_recipes
from training.data.bundled import SAMPLE_FOLDER, bundled_photos
from ui.playground import tab as playground
from ui.playground.example import EXAMPLE_FILE, EXAMPLE_SETTINGS, compute_example, flawed_photos, load_example
from ui.playground.link import PlaygroundSettings
from ui.playground.samples import ORDER, SAMPLES
from ui.services import AppServices


def test_every_sample_exists_and_the_flawed_ones_come_last() -> None:
    assert list(SAMPLES) == list(ORDER) and len(ORDER) == 12
    assert all(sample.path.is_file() and sample.credit and sample.licence for sample in SAMPLES.values())
    assert ORDER[-3:] == tuple(flawed_photos())
    assert "used in training" in SAMPLES["mountain1.jpg"].caption
    assert "used in training" not in SAMPLES["coffee.jpg"].caption


def test_first_sample_is_colourful() -> None:
    photo = load_photo(SAMPLES[ORDER[0]].path).astype(int)
    assert (photo.max(axis=-1) - photo.min(axis=-1)).mean() > 60


def test_flawed_samples_are_made_from_bundled_photos_and_keep_their_licence() -> None:
    made, originals = flawed_photos(), {photo.path.name: photo for photo in bundled_photos()}
    listed = {photo.path.name: photo for photo in bundled_photos(folder=SAMPLE_FOLDER)}
    assert set(listed) == set(made) == {path.name for path in SAMPLE_FOLDER.glob("*.jpg")}
    for name, (photo, origin, _) in made.items():
        stored = load_photo(listed[name].path)
        assert np.abs(stored.astype(int) - photo).mean() < 3, name  # the loss of JPEG
        assert (listed[name].width, listed[name].height) == Image.open(listed[name].path).size
        for field in ("licence", "credit", "split"):
            assert getattr(listed[name], field) == getattr(originals[origin], field)


def test_scores_of_the_example_are_those_of_the_rewards() -> None:
    photo = load_photo(SAMPLES[EXAMPLE_SETTINGS.photo].path)
    for column in json.loads(EXAMPLE_FILE.read_text())["columns"]:
        recipes = [parse(candidate["text"]).recipe for candidate in column["candidates"]]
        for candidate, scored in zip(column["candidates"], score_recipes(photo, recipes), strict=True):
            assert candidate["scores"] == pytest.approx(scored.scores, abs=1e-6)
            assert candidate["fidelity"] == pytest.approx(scored.fidelity, abs=1e-4)


def test_example_is_what_the_model_answers() -> None:
    """Otherwise run `python -m ui.playground.example`."""
    engine = Engine(torch.device("cpu"))
    fresh = compute_example(lambda name, request, cancel: engine.answer(MODELS[name], request, cancel))
    stored = json.loads(EXAMPLE_FILE.read_text())
    for content in (stored, fresh):
        for column in content["columns"]:
            for candidate in column["candidates"]:
                del candidate["seconds"], candidate["scores"], candidate["fidelity"]
    assert stored == fresh


def test_example_uses_the_default_settings() -> None:
    """So Run repeats it, and its link is the one that the sliders write."""
    assert PlaygroundSettings(photo=ORDER[0]) == EXAMPLE_SETTINGS


def test_snapshot_is_small_and_labelled() -> None:
    snapshot = playground.example_snapshot()
    assert snapshot is not None and snapshot["label"] == "Example"
    assert [column["name"] for column in snapshot["columns"]] == list(EXAMPLE_SETTINGS.models)
    assert all(len(column["candidates"]) == EXAMPLE_SETTINGS.n for column in snapshot["columns"])
    pictures = {candidate["picture"] for column in snapshot["columns"] for candidate in column["candidates"]}
    assert len(pictures) >= 8
    assert len(json.dumps(snapshot)) < 700_000


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ({}, True),
        ({"reward": "colour:1"}, True),
        ({"__theme": "dark"}, True),
        ({"photo": "coffee.jpg", "models": ",".join(EXAMPLE_SETTINGS.models), "n": "4", "reward": "colour:1"}, True),
        ({"photo": "china.jpg"}, False),
        ({"n": "4"}, False),
        ({"photo": "coffee.jpg", "models": "moondream-tiny"}, False),
        ({"photo": "coffee.jpg", "seed": "2"}, False),
    ],
)
def test_page_keeps_the_example_unless_its_url_names_other_settings(
    tmp_path: Path, query: dict[str, str], shown: bool
) -> None:
    services = AppServices.build(tmp_path, f"sqlite:///{tmp_path / 'db.sqlite3'}")
    values = playground.open_page(services, LOCAL_ADMIN, query, {})
    services.close()
    assert (values["session"] is not None) == shown
    assert (values["grid"] is None) == (not shown)
    photo = query.get("photo", "coffee.jpg" if shown else "")
    assert values["upload"] == (str(SAMPLES[photo].path) if photo else None)


def test_page_opens_without_the_files_of_the_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_example.cache_clear()
    monkeypatch.setattr(sys.modules[load_example.__module__], "EXAMPLE_FILE", tmp_path / "missing.json")
    assert playground.example_snapshot() is None
    load_example.cache_clear()


def test_picture_of_the_example_can_be_downloaded() -> None:
    session = playground.example_session()
    assert session is not None
    candidate = playground._find_candidate(session, {"model": "moondream-tiny", "index": 2})
    assert candidate is not None and candidate.recipe is not None and candidate.picture is None

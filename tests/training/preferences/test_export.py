"""Tests of the export in TRL's preference format."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from recipes import Recipe, encode_jpeg
from rewards import EQUAL_WEIGHTS
from storage.preferences import JudgedCandidate, Preference
from training.data.bundled import bundled_photos
from training.preferences.export import FILE, read_folder, to_choices, to_rows, to_zip, write_folder

LEFT = JudgedCandidate("moondream-tiny", str(Recipe(exposure=20)), {"sharpness": 0.5})
RIGHT = JudgedCandidate("run-1", str(Recipe(contrast=-20)), {"sharpness": 0.1})
SAMPLE = bundled_photos("held-out")[0].path
SAMPLES = {SAMPLE.name: SAMPLE}
PHOTO = encode_jpeg(np.full((40, 60, 3), 128, np.uint8))
CHOICES = [
    Preference(LEFT, RIGHT, "left", EQUAL_WEIGHTS, SAMPLE.name),
    Preference(LEFT, RIGHT, "right", EQUAL_WEIGHTS, photo=PHOTO),
    Preference(LEFT, RIGHT, "equal", EQUAL_WEIGHTS, photo=PHOTO),
    Preference(LEFT, RIGHT, "left", EQUAL_WEIGHTS),  # without its photo
]


def test_zip_contains_the_preference_format_with_the_photos() -> None:
    with zipfile.ZipFile(io.BytesIO(to_zip(CHOICES, SAMPLES))) as archive:
        rows = [json.loads(line) for line in archive.read(FILE).decode().splitlines()]
        assert [row["chosen"][0]["content"] for row in rows] == [LEFT.recipe, RIGHT.recipe, LEFT.recipe]
        assert [row["rejected"][0]["content"] for row in rows] == [RIGHT.recipe, LEFT.recipe, RIGHT.recipe]
        assert [message["role"] for message in (rows[0]["prompt"] + rows[0]["chosen"])] == ["user", "assistant"]
        assert [len(row["images"]) for row in rows] == [1, 1, 0]
        assert archive.read(rows[0]["images"][0]) == SAMPLE.read_bytes()
        assert archive.read(rows[1]["images"][0]) == PHOTO
        assert sorted(archive.namelist()) == sorted([FILE, *rows[0]["images"], *rows[1]["images"]])
    assert [choice.outcome for choice in to_choices(CHOICES)] == ["left", "right", "equal", "left"]


def test_folder_contains_what_can_be_trained_on(tmp_path: Path) -> None:
    assert write_folder([*CHOICES, replace(CHOICES[1], photo=b"not a photo")], SAMPLES, tmp_path) == 3
    rows, photos = read_folder(tmp_path)
    assert len(rows) == 2 and len(photos) == 2
    assert photos[rows[1]["images"][0]].shape == (40, 60, 3)


def test_no_path_of_a_stored_sample_is_opened() -> None:
    rows, photos = to_rows([replace(CHOICES[0], sample="../LICENSE")], SAMPLES)
    assert photos == {} and rows[0]["images"] == []

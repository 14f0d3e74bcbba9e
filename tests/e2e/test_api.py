"""Tests of the named API endpoints, called with gradio_client over HTTP."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from inference.availability import unavailable
from inference.registry import MODELS
from recipes import MAX_BYTES, Recipe, load_photo, parse
from rewards import score_recipes
from settings import VERSION
from ui.playground.samples import SAMPLES

pytestmark = pytest.mark.slow

CAT = str(SAMPLES["chelsea.jpg"].path)
ENDPOINTS = {"/compare", "/score", "/models", "/reward_functions", "/save_reward_function"}
ENDPOINTS |= {"/retrain", "/run_status", "/cancel_run", "/runs", "/use_run", "/revert"}
ENDPOINTS |= {"/evaluate", "/evaluation"}
ENDPOINTS |= {"/usage", "/usage_series"}
ENDPOINTS |= {"/prefer", "/fit_reward", "/preferences", "/delete_preferences"}


@pytest.fixture(scope="module")
def client(server: str) -> Client:
    return Client(server, verbose=False)


def test_only_the_named_endpoints_are_public(client: Client) -> None:
    api = client.view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == ENDPOINTS
    assert api["unnamed_endpoints"] == {}
    names = [parameter["parameter_name"] for parameter in api["named_endpoints"]["/compare"]["parameters"]]
    assert names == ["photo", "models", "skill", "prompt", "n", "temperature", "seed", "length"]


def test_compare_returns_candidates_and_failures(client: Client) -> None:
    result = client.predict(handle_file(CAT), ["one", "broken"], "recipe", "", 3, 1.0, 5, api_name="/compare")
    working, broken = result["models"]
    assert (working["model"], working["error"], len(working["candidates"])) == ("one", None, 3)
    assert broken["error"] == "The fake model is broken. Choose another one." and broken["candidates"] == []
    assert {"text", "recipe", "scores", "seconds"} <= set(working["candidates"][0])


def test_compare_score_and_python_agree(client: Client) -> None:
    compared = client.predict(handle_file(CAT), ["two"], "recipe", "", 4, 1.0, 11, api_name="/compare")
    candidates = compared["models"][0]["candidates"]
    recipes = [candidate["recipe"] for candidate in candidates]
    scored = client.predict(handle_file(CAT), recipes, api_name="/score")
    expected = score_recipes(load_photo(CAT), [parse(recipe).recipe for recipe in recipes])
    assert [entry["scores"] for entry in scored] == [entry.scores for entry in expected]
    assert [entry["scores"] for entry in candidates] == [entry.scores for entry in expected]
    assert [entry["fidelity"] for entry in scored] == [entry.fidelity for entry in expected]


@pytest.mark.parametrize(("skill", "field"), [("caption", "text"), ("detect", "boxes"), ("point", "points")])
def test_compare_runs_the_other_skills(client: Client, skill: str, field: str) -> None:
    result = client.predict(handle_file(CAT), ["one"], skill, "the cat", 1, 0.0, 1, api_name="/compare")
    assert result["models"][0]["candidates"][0][field]


def test_choices_fit_the_reward_and_are_exported(client: Client) -> None:
    sample = next(iter(SAMPLES.values()))
    photo, better, worse = handle_file(str(sample.path)), {"exposure": 5}, str(Recipe(exposure=-90, saturation=90))
    assert client.predict(api_name="/delete_preferences") == {"deleted": 0}
    for number in range(3):
        better["contrast"] = 5 * number
        fitted = client.predict(photo, better, worse, "left", {"sharpness": 1, "colour": 0.2}, api_name="/prefer")
    assert (fitted["choices"], fitted["decided"], fitted["usable"]) == (3, 3, True)
    assert fitted["start"] == {"sharpness": 1.0, "colour": 0.2}
    assert fitted == client.predict(None, api_name="/fit_reward")
    rows, file = client.predict(api_name="/preferences")
    assert [row["rejected"][0]["content"] for row in rows] == [worse] * 3 and rows[0]["images"] == []
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["preferences.jsonl"]
    kept = client.predict(photo, better, worse, "equal", None, True, "a", "b", api_name="/prefer")
    assert (kept["choices"], kept["decided"]) == (4, 3)
    with pytest.raises(AppError, match="same"):
        client.predict(photo, worse, worse, "left", None, api_name="/prefer")
    assert client.predict(api_name="/delete_preferences") == {"deleted": 4}
    assert client.predict(api_name="/preferences")[0] == []


def test_models_lists_why_a_model_is_unavailable(client: Client) -> None:
    models = {model["name"]: model for model in client.predict(api_name="/models")}
    assert list(models) == list(MODELS)
    assert models["one"]["unavailable"] is None
    assert models["moondream2"]["unavailable"] == unavailable(MODELS["moondream2"])


def test_reward_functions_are_saved_once(client: Client) -> None:
    saved = client.predict("by program", {"sharpness": 0.3, "creativity": 0.7}, api_name="/save_reward_function")
    assert saved == {"name": "by program", "weights": {"sharpness": 0.3, "creativity": 0.7}}
    assert client.predict(api_name="/reward_functions")["by program"] == saved["weights"]
    with pytest.raises(AppError, match="already"):
        client.predict("by program", {"sharpness": 1}, api_name="/save_reward_function")


INVALID_CALLS: dict[str, tuple[Callable[[Client], object], str]] = {
    "an unknown model": (
        lambda client: client.predict(handle_file(CAT), ["gpt"], api_name="/compare"),
        "Unknown model",
    ),
    "no models": (lambda client: client.predict(handle_file(CAT), [], api_name="/compare"), "1 to 4 models"),
    "no photo": (lambda client: client.predict(None, ["one"], api_name="/compare"), "no photo"),
    "an overlong prompt": (
        lambda client: client.predict(handle_file(CAT), ["one"], "query", "x" * 100_000, api_name="/compare"),
        "2,000",
    ),
    "no recipes": (lambda client: client.predict(handle_file(CAT), [], api_name="/score"), "1 to 64"),
    "no recipe": (
        lambda client: client.predict(handle_file(CAT), ["hello", "look mono"], api_name="/score"),
        "number 1",
    ),
    "an unknown reward": (
        lambda client: client.predict("x", {"beauty": 1}, api_name="/save_reward_function"),
        "beauty",
    ),
    "weights of zero": (lambda client: client.predict("x", {"colour": 0}, api_name="/save_reward_function"), "zero"),
    "no name": (lambda client: client.predict("", {"colour": 1}, api_name="/save_reward_function"), "name"),
}


@pytest.mark.parametrize("case", INVALID_CALLS)
def test_invalid_call_raises_a_message(client: Client, case: str) -> None:
    call, message = INVALID_CALLS[case]
    with pytest.raises(AppError, match=message):
        call(client)


def test_text_file_is_refused_as_a_photo(client: Client, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("I am no photo.")
    with pytest.raises(AppError) as raised:
        client.predict(handle_file(tmp_path / "photo.jpg"), ["one"], api_name="/compare")
    assert "Traceback" not in str(raised.value) and str(tmp_path) not in str(raised.value)


def test_extreme_recipes_are_clamped(client: Client) -> None:
    extreme = [
        "exposure +1000000000; contrast -10",
        {"exposure": "NaN", "saturation": 1e9},
        "crop 90 80 10 20; look mono",
    ]
    for entry in client.predict(handle_file(CAT), extreme, api_name="/score"):
        assert entry["problems"] and parse(entry["recipe"]).recipe
        assert all(value is None or 0 <= value <= 1 for value in entry["scores"].values())
        assert np.isfinite(entry["fidelity"])


def test_files_of_the_server_cannot_be_read(server: str) -> None:
    """Endpoint and file route refuse a path that was not uploaded."""
    photo = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    response = httpx.post(f"{server}/gradio_api/run/score", json={"data": [photo, ["look mono"]]}, timeout=60)
    assert response.status_code >= 400 and "root:" not in response.text
    assert httpx.get(f"{server}/gradio_api/file=/etc/passwd", timeout=60).status_code in (403, 404)


def test_oversized_upload_is_refused(server: str) -> None:
    files = {"files": ("big.jpg", b"\xff" * (MAX_BYTES + 1), "image/jpeg")}
    assert httpx.post(f"{server}/gradio_api/upload", files=files, timeout=60).status_code == 413


def test_healthz_reports_the_status(server: str) -> None:
    response = httpx.get(f"{server}/healthz", timeout=60)
    health = response.json()
    assert (response.status_code, health["status"], health["store"], health["version"]) == (200, "ok", "ok", VERSION)
    assert health["branch"] and isinstance(health["models_loaded"], list)
    assert httpx.get(f"{server}/health", timeout=60).status_code == 404

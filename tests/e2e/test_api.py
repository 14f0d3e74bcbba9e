"""The named endpoints, called with gradio_client over HTTP, as a program would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from inference.registry import MODELS
from recipes import MAX_BYTES, load_photo, parse
from rewards import score_recipes
from settings import VERSION
from ui.playground.samples import SAMPLES

CAT = str(SAMPLES["chelsea.jpg"].path)
NAMED = {"/compare", "/score", "/models", "/reward_functions", "/save_reward_function"}
NAMED |= {"/retrain", "/run_status", "/cancel_run", "/runs", "/use_run", "/revert"}
NAMED |= {"/usage", "/usage_series"}


@pytest.fixture(scope="module")
def client(server: str) -> Client:
    return Client(server, verbose=False)


def test_exactly_the_named_endpoints_are_offered(client: Client) -> None:
    told = client.view_api(return_format="dict", print_info=False)
    assert set(told["named_endpoints"]) == NAMED
    assert told["unnamed_endpoints"] == {}
    names = [parameter["parameter_name"] for parameter in told["named_endpoints"]["/compare"]["parameters"]]
    assert names == ["photo", "models", "skill", "prompt", "n", "temperature", "seed"]


def test_compare_gives_every_candidate_and_every_failure(client: Client) -> None:
    told = client.predict(handle_file(CAT), ["one", "broken"], "recipe", "", 3, 1.0, 5, api_name="/compare")
    fine, broken = told["models"]
    assert (fine["model"], fine["error"], len(fine["candidates"])) == ("one", None, 3)
    assert broken["error"] == "The fake model is broken. Choose another one." and broken["candidates"] == []
    assert {"text", "recipe", "scores", "seconds"} <= set(fine["candidates"][0])


def test_compare_and_score_and_python_agree(client: Client) -> None:
    told = client.predict(handle_file(CAT), ["two"], "recipe", "", 4, 1.0, 11, api_name="/compare")["models"][0]
    recipes = [candidate["recipe"] for candidate in told["candidates"]]
    scored = client.predict(handle_file(CAT), recipes, api_name="/score")
    expected = score_recipes(load_photo(CAT), [parse(recipe).recipe for recipe in recipes])
    assert [one["scores"] for one in scored] == [one.scores for one in expected]
    assert [one["scores"] for one in told["candidates"]] == [one.scores for one in expected]
    assert [one["fidelity"] for one in scored] == [one.fidelity for one in expected]


@pytest.mark.parametrize(("skill", "part"), [("caption", "text"), ("detect", "boxes"), ("point", "points")])
def test_the_other_skills_answer_too(client: Client, skill: str, part: str) -> None:
    told = client.predict(handle_file(CAT), ["one"], skill, "the cat", 1, 0.0, 1, api_name="/compare")
    assert told["models"][0]["candidates"][0][part]


def test_models_say_why_they_cannot_be_used(client: Client) -> None:
    told = {model["name"]: model for model in client.predict(api_name="/models")}
    assert list(told) == list(MODELS)
    assert told["one"]["unavailable"] is None
    assert told["moondream2"]["unavailable"] == MODELS["moondream2"].unavailable()


def test_reward_functions_are_kept(client: Client) -> None:
    saved = client.predict("by program", {"sharpness": 0.3, "creativity": 0.7}, api_name="/save_reward_function")
    assert saved == {"name": "by program", "weights": {"sharpness": 0.3, "creativity": 0.7}}
    assert client.predict(api_name="/reward_functions")["by program"] == saved["weights"]
    with pytest.raises(AppError, match="already"):
        client.predict("by program", {"sharpness": 1}, api_name="/save_reward_function")


REFUSED: dict[str, tuple[Callable[[Client], object], str]] = {
    "an unknown model": (lambda c: c.predict(handle_file(CAT), ["gpt"], api_name="/compare"), "no model called"),
    "no models": (lambda c: c.predict(handle_file(CAT), [], api_name="/compare"), "one to 4 models"),
    "no photo": (lambda c: c.predict(None, ["one"], api_name="/compare"), "no photo"),
    "an endless prompt": (
        lambda c: c.predict(handle_file(CAT), ["one"], "query", "x" * 100_000, api_name="/compare"),
        "2,000",
    ),
    "no recipes": (lambda c: c.predict(handle_file(CAT), [], api_name="/score"), "1 to 64"),
    "no recipe": (lambda c: c.predict(handle_file(CAT), ["hello", "look mono"], api_name="/score"), "number 1"),
    "an unknown reward": (lambda c: c.predict("x", {"beauty": 1}, api_name="/save_reward_function"), "beauty"),
    "weights of zero": (lambda c: c.predict("x", {"colour": 0}, api_name="/save_reward_function"), "zero"),
    "no name": (lambda c: c.predict("", {"colour": 1}, api_name="/save_reward_function"), "name"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_in_words(client: Client, what: str) -> None:
    call, words = REFUSED[what]
    with pytest.raises(AppError, match=words):
        call(client)


def test_a_text_file_is_no_photo(client: Client, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("I am no photo.")
    with pytest.raises(AppError) as refused:
        client.predict(handle_file(tmp_path / "photo.jpg"), ["one"], api_name="/compare")
    assert "Traceback" not in str(refused.value) and str(tmp_path) not in str(refused.value)


def test_wild_recipes_are_clamped(client: Client) -> None:
    wild = ["exposure +1000000000; contrast -10", {"exposure": "NaN", "saturation": 1e9}, "crop 90 80 10 20; look mono"]
    for one in client.predict(handle_file(CAT), wild, api_name="/score"):
        assert one["problems"] and parse(one["recipe"]).recipe
        assert all(value is None or 0 <= value <= 1 for value in one["scores"].values())
        assert np.isfinite(one["fidelity"])


def test_files_of_the_server_cannot_be_read(server: str) -> None:
    """A path that was not uploaded is refused, in the endpoint and in the file route."""
    photo = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{server}/gradio_api/run/score", json={"data": [photo, ["look mono"]]}, timeout=60)
    assert answer.status_code >= 400 and "root:" not in answer.text
    assert httpx.get(f"{server}/gradio_api/file=/etc/passwd", timeout=60).status_code in (403, 404)


def test_an_upload_that_is_too_large_is_refused(server: str) -> None:
    files = {"files": ("big.jpg", b"\xff" * (MAX_BYTES + 1), "image/jpeg")}
    assert httpx.post(f"{server}/gradio_api/upload", files=files, timeout=60).status_code == 413


def test_the_server_says_that_it_is_up(server: str) -> None:
    answer = httpx.get(f"{server}/healthz", timeout=60)
    told = answer.json()
    assert (answer.status_code, told["status"], told["store"], told["version"]) == (200, "ok", "ok", VERSION)
    assert told["branch"] and isinstance(told["models_loaded"], list)
    assert httpx.get(f"{server}/health", timeout=60).status_code == 404

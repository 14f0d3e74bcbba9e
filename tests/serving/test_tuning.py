"""The tuning API over HTTP: the official SDK, tenants, restarts, invalid requests, and a hosted run that learns."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import httpx
import moondream
import numpy as np
import pytest
import torch
from PIL import Image

import training.server
from inference.metering import UsageMeter
from inference.types import RECIPE_QUESTION
from recipes import Recipe, load_photo, parse, render, save_picture, shrink
from serving import json_body
from serving.json_body import parse_json
from serving.middleware import MAX_BODY, MAX_TRAIN_STEP_BODY
from serving.tuning import TuningService
from settings import Settings
from storage.database import Database
from tests.support.api_client import PHOTO_URL, error_message, make_picture
from tests.support.app_server import app_server
from tests.support.usage_rows import wait_for_usage
from training.data.bundled import bundled_photos
from training.grpo.__main__ import execute
from training.hosted.trainer import train_hosted
from training.runs.run import Run, RunConfig
from training.server.finetunes import FinetuneStore
from training.server.regions import region_log_probs, region_reward
from training.server.trainer import Completion, Group, LoraTrainer, Prompt
from usage.events import Deployment
from usage.prices import Prices
from usage.recorder import Recorder

pytestmark = pytest.mark.slow

KEY, OTHER_KEY = "a-key-of-20-letters-", "another-of-20-letter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": f"{KEY},{OTHER_KEY}"}).api_keys
    with app_server(folder, api_keys=keys, api_rate=1000.0) as address:
        yield f"{address}/v1"


def open_finetune(server: str, name: str, key: str = KEY) -> Any:
    return moondream.ft(key, name=name, rank=8, endpoint=f"{server}/tuning")


def sample(finetune: Any, count: int = 4, **settings: Any) -> Any:
    return finetune.rollouts(
        "query", image=make_picture(), question=RECIPE_QUESTION, num_rollouts=count, settings=settings or None
    )


def rl_group(response: Any, rewards: list[float]) -> dict[str, Any]:
    """Return a group for `train_step` from the response of a rollouts request."""
    return {"mode": "rl", "request": response["request"], "rollouts": response["rollouts"], "rewards": rewards}


def auth(key: str = KEY) -> dict[str, str]:
    return {"X-Moondream-Auth": key}


def test_sdk_trains_saves_and_queries_a_finetune(server: str) -> None:
    finetune = open_finetune(server, "first")
    response = sample(finetune)
    texts = [rollout["output"]["answer"] for rollout in response["rollouts"]]
    assert len(set(texts)) > 1 and all(parse(text).ok for text in texts) and response["rewards"] is None
    group = rl_group(response, [0.0, 1.0, 0.2, 0.5])
    step = finetune.train_step([group], lr=1e-3)
    assert (step["step"], step["applied"]) == (1, True) and step["grad_norm"] > 0 and step["kl"] == pytest.approx(0)
    assert step["reward_mean"] == pytest.approx(0.425)
    checkpoint = finetune.save_checkpoint()["checkpoint"]
    assert checkpoint["step"] == 1 and checkpoint["finetune_id"] == finetune.finetune_id
    assert [item["step"] for item in finetune.list_checkpoints()["checkpoints"]] == [1]
    assert finetune.log_metrics(1, {"eval/reward": 0.5}) == {"ok": True, "step": 1, "logged_count": 1}
    model = moondream.vl(KEY, endpoint=server, model=finetune.model(1))
    assert parse(model.query(make_picture(), RECIPE_QUESTION)["answer"]).ok
    assert moondream.ft(KEY, finetune_id=finetune.finetune_id, endpoint=f"{server}/tuning").name == "first"
    finetune.delete_checkpoint(1)
    assert finetune.list_checkpoints()["checkpoints"] == []
    finetune.delete()
    error_message(httpx.get(f"{server}/tuning/finetunes/{finetune.finetune_id}", headers=auth()), 404, "not_found")


def usage_of(server: str, finetune: Any, count: int) -> list[dict[str, str]]:
    """Return the usage events of a finetune, once there are `count`."""
    return wait_for_usage(server, lambda row: row["adapter"] == finetune.finetune_id, count, auth())


def test_model_calls_are_recorded(server: str) -> None:
    finetune = open_finetune(server, "recorded")
    group = rl_group(sample(finetune, 3), [0.0, 1.0, 0.5])
    truth = {"points": [{"x": 0.2, "y": 0.75}]}
    finetune.rollouts("point", image=make_picture(), object="the main subject", num_rollouts=2, ground_truth=truth)
    finetune.train_step([group], lr=1e-3)
    rows = usage_of(server, finetune, 3)
    assert [(row["skill"], row["candidates"]) for row in rows] == [("query", "3"), ("point", "2"), ("train_step", "3")]
    for row in rows:
        assert (row["outcome"], row["error"], row["model"]) == ("ok", "", "moondream-tiny")
        assert row["source"] == "v1-tuning" and len(row["request_id"]) == 32
        assert float(row["latency"]) > 0 and float(row["queue"]) >= 0
        assert row["tokens_basis"] == "reported" and int(row["tokens_in"]) > 10 and int(row["tokens_out"]) > 0
    sampled = sum(len(rollout["answer_tokens"]) for rollout in group["rollouts"])
    assert [int(row["tokens_out"]) for row in rows if row["skill"] != "point"] == [sampled, sampled]
    assert rows[0]["reward"] == "" and rows[1]["reward"] != "" and float(rows[2]["reward"]) == pytest.approx(0.5)


def test_failed_model_calls_are_recorded_as_errors(server: str) -> None:
    finetune = open_finetune(server, "failures")
    request = {"skill": "query", "question": "a", "image_url": PHOTO_URL}
    body = {"finetune_id": finetune.finetune_id, "num_rollouts": 2, "request": request | {"image_url": "nothing"}}
    error_message(httpx.post(f"{server}/tuning/rollouts", json=body, headers=auth()), 400, "invalid_request")
    group = {"mode": "rl", "request": request, "rollouts": [{"answer_tokens": [2**30]}] * 2, "rewards": [0.0, 1.0]}
    body = {"finetune_id": finetune.finetune_id, "groups": [group]}
    error_message(httpx.post(f"{server}/tuning/train_step", json=body, headers=auth()), 400, "invalid_request")
    rows = usage_of(server, finetune, 2)
    assert [row["skill"] for row in rows] == ["query", "train_step"]
    assert {(row["outcome"], row["error"], row["tokens_basis"]) for row in rows} == {
        ("error", "invalid_request", "unknown")
    }
    body = {"finetune_id": "0" * 26, "num_rollouts": 2, "request": request}
    response = httpx.post(f"{server}/tuning/rollouts", json=body, headers=auth())
    error_message(response, 404, "not_found")
    request_id = response.headers["x-request-id"]
    (row,) = wait_for_usage(server, lambda row: row["request_id"] == request_id, headers=auth())
    assert (row["outcome"], row["error"]) == ("error", "not_found")


def test_unexpected_failure_is_recorded_and_returns_the_documented_error(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    finetune = open_finetune(server, "bug")
    monkeypatch.setattr(FinetuneStore, "rollouts", fail)
    body = {"finetune_id": finetune.finetune_id, "request": {"skill": "query", "question": "a", "image_url": PHOTO_URL}}
    error_message(httpx.post(f"{server}/tuning/rollouts", json=body, headers=auth()), 500, "failed")
    (row,) = usage_of(server, finetune, 1)
    assert (row["outcome"], row["error"]) == ("error", "RuntimeError")


def test_waiting_call_of_a_client_that_leaves_is_recorded_as_cancelled(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, released = threading.Event(), threading.Event()

    def block(*_: Any) -> list[Completion]:
        started.set()
        assert released.wait(30)
        return []

    running, waiting = open_finetune(server, "running"), open_finetune(server, "waiting")
    monkeypatch.setattr(FinetuneStore, "rollouts", block)
    request = {"skill": "query", "question": "a", "image_url": PHOTO_URL}
    url = f"{server}/tuning/rollouts"
    with ThreadPoolExecutor(1) as pool:
        body = {"finetune_id": running.finetune_id, "request": request}
        first = pool.submit(httpx.post, url, json=body, headers=auth(), timeout=60)
        assert started.wait(20)
        started.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json={"finetune_id": waiting.finetune_id, "request": request}, headers=auth(), timeout=1)
        (row,) = usage_of(server, waiting, 1)
        released.set()
        assert first.result().status_code == 200 and not started.is_set()
    assert (row["outcome"], row["error"], float(row["latency"])) == ("cancelled", "", 0) and float(row["queue"]) > 0
    assert usage_of(server, running, 1)[0]["outcome"] == "ok"


def test_concurrent_first_requests_share_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stores would write the same folder without a common lock."""
    first_started, second_waits = threading.Event(), threading.Event()
    create = FinetuneStore.__init__

    def slow_init(store: FinetuneStore, folder: Path) -> None:
        first_started.set()
        second_waits.wait(0.5)  # never set: long enough for the second thread to reach the property
        create(store, folder)

    monkeypatch.setattr(FinetuneStore, "__init__", slow_init)
    recorder = Recorder(Database(f"sqlite:///{tmp_path / 'usage.sqlite3'}"), tmp_path / "spool", Deployment())
    service = TuningService(tmp_path, UsageMeter(recorder, Prices()))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: service.finetunes)
        assert first_started.wait(20)
        second = pool.submit(lambda: service.finetunes)
        assert first.result() is second.result()


def assert_server_answers(server: str) -> None:
    assert httpx.get(f"{server}/models", headers=auth(), timeout=20).status_code == 200


def test_first_checkpoint_lookup_does_not_block_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup imports torch and peft, which takes seconds. A blocked import stands for it."""
    importing, released = threading.Event(), threading.Event()

    class BlockedImport(MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "training.server.finetunes":
                importing.set()
                assert released.wait(30)

    monkeypatch.setattr(sys, "meta_path", [BlockedImport(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "training.server.finetunes")
    monkeypatch.setattr(training.server, "finetunes", None)  # the import sets it; restored after the test
    with app_server(tmp_path) as address, ThreadPoolExecutor(1) as pool:
        body = {"image_url": PHOTO_URL, "question": "Is it dark?", "model": f"moondream-tiny/{'0' * 26}@1"}
        lookup = pool.submit(httpx.post, f"{address}/v1/query", json=body, timeout=60)
        try:
            assert importing.wait(20)
            assert_server_answers(f"{address}/v1")
            assert not lookup.done()
        finally:
            released.set()
        error_message(lookup.result(), 404, "not_found")


@pytest.mark.parametrize("path", ["query", "tuning/train_step"])
def test_large_body_does_not_block_the_event_loop(server: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body is parsed and validated in one thread while another request is answered."""
    parsing, released = threading.Event(), threading.Event()

    def slow_parse(*arguments: Any) -> Any:
        parsing.set()
        assert released.wait(30)
        return parse_json(*arguments)

    monkeypatch.setattr(json_body, "parse_json", slow_parse)
    size = MAX_TRAIN_STEP_BODY - 2**20 if path == "tuning/train_step" else MAX_BODY - 2**20
    content = b'{"image_url": "' + b"A" * size + b'"}'
    headers = auth() | {"Content-Type": "application/json"}
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(httpx.post, f"{server}/{path}", content=content, headers=headers, timeout=60)
        try:
            assert parsing.wait(20)
            assert_server_answers(server)
            assert not large.done()
        finally:
            released.set()
        message = error_message(large.result(), 400, "invalid_request")
    missing = ("finetune_id", "groups") if path == "tuning/train_step" else ("question",)
    assert message == "; ".join(f"{name}: Field required" for name in missing) + "."


def test_large_train_step_is_applied(server: str) -> None:
    """A step of more than 1 MB, with the same body in a thread as a smaller one on the event loop."""
    finetune = open_finetune(server, "large")
    group = rl_group(sample(finetune, 2), [0.0, 1.0])
    body = {"finetune_id": finetune.finetune_id, "groups": [group | {"request": group["request"] | {"x": "A" * 2**20}}]}
    response = httpx.post(f"{server}/tuning/train_step", json=body, headers=auth(), timeout=60)
    assert response.status_code == 200 and response.json()["applied"] is True


def test_equal_rewards_apply_no_step(server: str) -> None:
    finetune = open_finetune(server, "flat")
    response = sample(finetune, 2)
    group = rl_group(response, [0.5, 0.5])
    step = finetune.train_step([group])
    assert (step["step"], step["applied"]) == (0, False)


def test_sft_step_lowers_the_loss(server: str) -> None:
    finetune = open_finetune(server, "examples")
    target = "crop 0 0 100 100; exposure +90; contrast 0; saturation 0; warmth 0; sharpening 0; look none"
    request = {"skill": "query", "question": RECIPE_QUESTION, "image": make_picture()}
    losses = [
        finetune.train_step([{"mode": "sft", "request": request, "target": {"answer": target}}], lr=5e-3)["sft_loss"]
        for _ in range(12)
    ]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("skill", ["point", "detect"])
def test_rl_steps_raise_the_reward_of_regions(server: str, skill: str) -> None:
    """The reward is the x coordinate of the rightmost region; training moves the regions to the right."""
    finetune = open_finetune(server, f"regions-{skill}")
    name, side = ("points", "x") if skill == "point" else ("objects", "x_min")
    path = next(info.path for info in bundled_photos("held-out") if info.path.name == "coffee.jpg")
    photo = Image.fromarray(shrink(load_photo(path), 256))
    settings = {"max_objects": 2, "temperature": 2.0}
    means: list[float] = []
    for _ in range(100):  # 10 to 50 were measured in 16 runs
        response = finetune.rollouts(skill, image=photo, object="the main subject", num_rollouts=16, settings=settings)
        rewards = [
            max((region[side] for region in rollout["output"][name]), default=0.0) for rollout in response["rollouts"]
        ]
        means.append(float(np.mean(rewards)))
        if len(means) >= 10 and np.mean(means[-5:]) > np.mean(means[:5]) + 0.1:
            break
        assert finetune.train_step([rl_group(response, rewards)], lr=5e-3)["applied"]
    else:
        pytest.fail(f"The mean rewards did not rise: {means}")


def test_ground_truth_gives_rewards_and_sft_targets(server: str) -> None:
    finetune = open_finetune(server, "truth")
    box = {"x_min": 0.1, "y_min": 0.6, "x_max": 0.3, "y_max": 0.9}
    for skill, truth in (("point", {"points": [{"x": 0.2, "y": 0.75}]}), ("detect", {"boxes": [box]})):
        request = {"image": make_picture(), "object": "the main subject"}
        response = finetune.rollouts(skill, **request, num_rollouts=3, ground_truth=truth)
        assert len(response["rewards"]) == 3 and all(0 <= reward <= 1 for reward in response["rewards"])
        group = {"mode": "sft", "request": {"skill": skill, **request}, "target": truth}
        losses = [finetune.train_step([group], lr=5e-3)["sft_loss"] for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("skill", ["point", "detect"])
def test_greedy_regions_have_the_highest_log_probability(skill: str) -> None:
    trainer = LoraTrainer(rank=8)
    prompt = Prompt(np.asarray(make_picture()), "the main subject", 0.0, skill=skill, max_objects=3)
    (completion,) = trainer.generate(prompt, 1)
    inputs = trainer._prepare(prompt)
    features = trainer._image_features(inputs)
    log_probs = {}
    for temperature in (1e-4, 1.0):
        trainer.policy.temperature = temperature
        with torch.no_grad():
            log_probs[temperature] = region_log_probs(
                trainer.policy, inputs["input_ids"], features, completion.objects, completion.finished, skill
            )
    assert completion.objects and float(log_probs[1e-4].min()) > -0.7 and float(log_probs[1.0].max()) <= 0


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        ([], [], 1.0),
        ([], [{"x": 0.5, "y": 0.5}], 0.0),
        ([{"x": 0.5, "y": 0.5}], [{"x": 0.52, "y": 0.48}], 1.0),
        ([{"x": 0.5, "y": 0.5}] * 2, [{"x": 0.52, "y": 0.48}], 0.5),
        ([{"x": 0.5, "y": 0.5}], [{"x_min": 0.4, "y_min": 0.4, "x_max": 0.6, "y_max": 0.6}], 1.0),
    ],
)
def test_region_reward_matches_predictions_to_the_ground_truth(
    predicted: list[Any], truth: list[Any], expected: float
) -> None:
    assert region_reward(predicted, truth) == pytest.approx(expected)


def test_region_reward_of_boxes_is_intersection_over_union() -> None:
    full = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    assert region_reward([full | {"x_max": 0.5}], [full]) == pytest.approx(0.5)


def test_tenants_cannot_access_each_others_finetunes(server: str) -> None:
    mine = open_finetune(server, "mine")
    response = sample(mine, 2)
    group = rl_group(response, [0.0, 1.0])
    mine.train_step([group])
    mine.save_checkpoint()
    own, others = (
        {item["finetune_id"] for item in httpx.get(f"{server}/tuning/finetunes", headers=headers).json()["finetunes"]}
        for headers in (auth(), auth(OTHER_KEY))
    )
    assert mine.finetune_id in own and not own & others
    url = f"{server}/tuning/finetunes/{mine.finetune_id}"
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/checkpoints"), ("POST", "/checkpoints/save")):
        error_message(httpx.request(method, url + path, headers=auth(OTHER_KEY)), 404, "not_found")
    body = {"image_url": PHOTO_URL, "question": "Is it dark?", "model": mine.model(1)}
    error_message(httpx.post(f"{server}/query", json=body, headers=auth(OTHER_KEY)), 404, "not_found")
    assert httpx.post(f"{server}/query", json=body, headers=auth(), timeout=60).status_code == 200
    assert open_finetune(server, "mine", OTHER_KEY).finetune_id != mine.finetune_id
    error_message(httpx.get(url), 401, "unauthorized")


def test_name_identifies_a_finetune_and_invalid_names_and_ranks_are_refused(server: str) -> None:
    assert open_finetune(server, "same").finetune_id == open_finetune(server, "same").finetune_id
    for body, status, kind in (
        ({"name": "same", "rank": 16}, 409, "conflict"),
        ({"name": "same", "rank": 7}, 400, "invalid_request"),
        ({"name": "../up", "rank": 8}, 400, "invalid_request"),
    ):
        error_message(httpx.post(f"{server}/tuning/finetunes", json=body, headers=auth()), status, kind)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"skill": "segment", "object": "cat", "image_url": PHOTO_URL}, "skill"),
        ({"skill": "detect", "question": "cat", "image_url": PHOTO_URL}, "object"),
        ({"skill": "query", "question": "", "image_url": PHOTO_URL}, "question"),
        ({"skill": "query", "question": "a", "image_url": "https://example.org/a.jpg"}, "data URL"),
        ({"skill": "query", "question": "a", "image_url": PHOTO_URL, "settings": {"top_p": 0.5}}, "top_p"),
    ],
)
def test_invalid_rollout_request_is_refused(server: str, request_: dict[str, Any], message: str) -> None:
    body = {"finetune_id": open_finetune(server, "refused").finetune_id, "num_rollouts": 2, "request": request_}
    assert message in error_message(
        httpx.post(f"{server}/tuning/rollouts", json=body, headers=auth()), 400, "invalid_request"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rewards": [1.0]},
        {"rollouts": [{"answer_tokens": [2**30]}] * 2},
        {"rollouts": [{"answer_tokens": [], "finish_reason": "length"}] * 2},
        {"mode": "sft"},
        {"request": {"skill": "point", "object": "a", "image_url": PHOTO_URL}},
        {"rewards": ["a", "b"]},
    ],
)
def test_invalid_group_is_refused_and_applies_no_step(server: str, change: dict[str, Any]) -> None:
    finetune = open_finetune(server, "groups")
    response = sample(finetune, 2)
    group = rl_group(response, [0.0, 1.0]) | change
    body = {"finetune_id": finetune.finetune_id, "groups": [group]}
    error_message(
        httpx.post(f"{server}/tuning/train_step", json=body, headers=auth(), timeout=60), 400, "invalid_request"
    )
    response = httpx.get(f"{server}/tuning/finetunes/{finetune.finetune_id}", headers=auth()).json()
    assert response["finetune"]["step"] == 0


def test_finetunes_are_listed_in_pages(server: str) -> None:
    for number in range(3):
        open_finetune(server, f"page-{number}", OTHER_KEY)
    names, cursor = [], ""
    while cursor is not None:
        page = httpx.get(f"{server}/tuning/finetunes?limit=2&cursor={cursor}", headers=auth(OTHER_KEY)).json()
        names += [finetune["name"] for finetune in page["finetunes"]]
        cursor = page["next_cursor"]
    assert len(names) == len(set(names)) and {"page-0", "page-1", "page-2"} <= set(names)


def train_once(store: FinetuneStore, finetune_id: str, prompt: Prompt, seed: int) -> None:
    """Sample four rollouts and apply one step with fixed rewards."""
    torch.manual_seed(seed)
    completions = store.rollouts("me", finetune_id, prompt, 4)
    store.train_step("me", finetune_id, [Group(prompt, tuple(completions), (0.0, 1.0, 0.3, 0.6))], 2e-3)


def test_training_continues_identically_after_a_restart(tmp_path: Path) -> None:
    prompt = Prompt(np.asarray(make_picture()), RECIPE_QUESTION)
    greedy = Prompt(prompt.photo, RECIPE_QUESTION, temperature=0.0)
    completions: list[list[Completion]] = []
    for restart in (False, True):
        store = FinetuneStore(tmp_path / str(restart))
        finetune_id = store.create("me", "a", 8).finetune_id
        train_once(store, finetune_id, prompt, 1)
        if restart:
            store = FinetuneStore(store.folder)
        train_once(store, finetune_id, prompt, 2)
        torch.manual_seed(3)
        completions.append(
            [*store.rollouts("me", finetune_id, greedy, 1), *store.rollouts("me", finetune_id, prompt, 4)]
        )
        steps = [folder.name for folder in (store.folder / "me" / finetune_id / "steps").iterdir()]
        assert steps == ["2"], "only the current step and saved ones are kept"
    assert completions[0] == completions[1]


def test_step_that_cannot_be_stored_is_discarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FinetuneStore(tmp_path)
    finetune_id = store.create("me", "a", 8).finetune_id
    prompt = Prompt(np.asarray(make_picture()), RECIPE_QUESTION)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.server.finetunes.write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            train_once(store, finetune_id, prompt, 1)
    assert store.get("me", finetune_id).step == 0
    train_once(store, finetune_id, prompt, 1)
    assert store.get("me", finetune_id).step == 1


def test_hosted_run_trains_moondream_tiny_over_http(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosted trainer against this application's own server: the held-out mean rises."""
    monkeypatch.setenv("MOONDREAM_API_URL", server)
    monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
    monkeypatch.setenv("MOONDREAM_RATE", "1000")
    (tmp_path / "run").mkdir()
    (tmp_path / "photos").mkdir()
    faded = Recipe(saturation=-60, contrast=-30)  # so that there is colour to win back
    for index, photo in enumerate(bundled_photos("held-out")[:3]):
        save_picture(render(shrink(load_photo(photo.path), 240), faded), Recipe(), tmp_path / "photos" / f"{index}.png")
    photos = str(tmp_path / "photos")
    settings: dict[str, Any] = {"base": "moondream-tiny", "reward": {"colour": 1.0}, "seed": 3, "steps": 30, "rank": 16}
    settings |= {"where": "hosted", "rollouts": 8, "probe_every": 6, "learning_rate": 1e-3, "photos_per_step": 2}
    config = RunConfig.create(**settings | {"photos": photos, "held_out": photos + "/"})
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    run = Run(tmp_path / "run")
    execute(run, run.config(), train_hosted)
    result = run.result()
    assert run.status().state == "done" and result
    means = [row["held_out"] for row in run.probes()]
    assert max(means[1:]) > means[0] + 0.03
    assert result["difference"]["mean"] > 0.03 and result["model"].startswith("moondream-tiny/")
    assert KEY not in "".join(path.read_text(errors="replace") for path in run.folder.rglob("*") if path.is_file())

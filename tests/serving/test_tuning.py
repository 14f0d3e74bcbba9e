"""The tuning API of our own over real HTTP: the official SDK, tenants, restarts, refusals; a hosted run that learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import moondream
import numpy as np
import pytest
import torch

from inference.types import RECIPE_QUESTION
from recipes import Recipe, load_photo, parse, save_picture, shrink
from settings import Settings
from tests.e2e.conftest import serving
from tests.serving.test_api import PHOTO, picture, refused
from training.data.bundled import bundled
from training.grpo import train as grpo
from training.hosted import trainer as hosted
from training.runs.run import Run, RunConfig
from training.server import regions
from training.server.trainer import Completion, FinetuneStore, Group, Prompt

KEY, OTHER = "a-key-of-20-letters-", "another-of-20-letter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": f"{KEY},{OTHER}"}).api_keys
    with serving(folder, api_keys=keys, api_rate=1000.0) as address:
        yield f"{address}/v1"


def client(server: str, name: str, key: str = KEY) -> Any:
    return moondream.ft(key, name=name, rank=8, endpoint=f"{server}/tuning")


def rollouts(finetune: Any, count: int = 4, **settings: Any) -> Any:
    return finetune.rollouts(
        "query", image=picture(), question=RECIPE_QUESTION, num_rollouts=count, settings=settings or None
    )


def test_the_sdk_draws_learns_saves_and_asks(server: str) -> None:
    finetune = client(server, "first")
    found = rollouts(finetune)
    texts = [one["output"]["answer"] for one in found["rollouts"]]
    assert len(set(texts)) > 1 and all(parse(text).ok for text in texts) and found["rewards"] is None
    group = {"mode": "rl", "request": found["request"], "rollouts": found["rollouts"], "rewards": [0.0, 1.0, 0.2, 0.5]}
    step = finetune.train_step([group], lr=1e-3)
    assert (step["step"], step["applied"]) == (1, True) and step["grad_norm"] > 0 and step["kl"] == pytest.approx(0)
    assert step["reward_mean"] == pytest.approx(0.425)
    saved = finetune.save_checkpoint()["checkpoint"]
    assert saved["step"] == 1 and saved["finetune_id"] == finetune.finetune_id
    assert [one["step"] for one in finetune.list_checkpoints()["checkpoints"]] == [1]
    assert finetune.log_metrics(1, {"eval/reward": 0.5}) == {"ok": True, "step": 1, "logged_count": 1}
    asked = moondream.vl(KEY, endpoint=server, model=finetune.model(1))
    assert parse(asked.query(picture(), RECIPE_QUESTION)["answer"]).ok
    assert moondream.ft(KEY, finetune_id=finetune.finetune_id, endpoint=f"{server}/tuning").name == "first"
    finetune.delete_checkpoint(1)
    assert finetune.list_checkpoints()["checkpoints"] == []
    finetune.delete()
    refused(httpx.get(f"{server}/tuning/finetunes/{finetune.finetune_id}", headers=head()), 404, "not_found")


def head(key: str = KEY) -> dict[str, str]:
    return {"X-Moondream-Auth": key}


def test_rewards_that_agree_change_nothing(server: str) -> None:
    finetune = client(server, "flat")
    found = rollouts(finetune, 2)
    group = {"mode": "rl", "request": found["request"], "rollouts": found["rollouts"], "rewards": [0.5, 0.5]}
    step = finetune.train_step([group])
    assert (step["step"], step["applied"]) == (0, False)


def test_examples_are_imitated(server: str) -> None:
    finetune = client(server, "examples")
    target = "crop 0 0 100 100; exposure +90; contrast 0; saturation 0; warmth 0; sharpening 0; look none"
    request = {"skill": "query", "question": RECIPE_QUESTION, "image": picture()}
    losses = [
        finetune.train_step([{"mode": "sft", "request": request, "target": {"answer": target}}], lr=5e-3)["sft_loss"]
        for _ in range(12)
    ]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("skill", ["point", "detect"])
def test_the_sdk_teaches_regions(server: str, skill: str) -> None:
    """The reward is how far to the right the first one is; what learns puts it there."""
    finetune = client(server, f"regions-{skill}")
    name, side = ("points", "x") if skill == "point" else ("objects", "x_min")
    means = []
    for _ in range(10):
        settings = {"max_objects": 2, "temperature": 1.0}
        found = finetune.rollouts(skill, image=picture(), object="the main subject", num_rollouts=8, settings=settings)
        rewards = [max((one[side] for one in said["output"][name]), default=0.0) for said in found["rollouts"]]
        means.append(float(np.mean(rewards)))
        group = {"mode": "rl", "request": found["request"], "rollouts": found["rollouts"], "rewards": rewards}
        assert finetune.train_step([group], lr=5e-3)["applied"]
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.05, means


def test_the_truth_gives_rewards_and_examples(server: str) -> None:
    finetune = client(server, "truth")
    box = {"x_min": 0.1, "y_min": 0.6, "x_max": 0.3, "y_max": 0.9}
    for skill, truth in (("point", {"points": [{"x": 0.2, "y": 0.75}]}), ("detect", {"boxes": [box]})):
        asked = {"image": picture(), "object": "the main subject"}
        found = finetune.rollouts(skill, **asked, num_rollouts=3, ground_truth=truth)
        assert len(found["rewards"]) == 3 and all(0 <= reward <= 1 for reward in found["rewards"])
        group = {"mode": "sft", "request": {"skill": skill, **asked}, "target": truth}
        losses = [finetune.train_step([group], lr=5e-3)["sft_loss"] for _ in range(12)]
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("skill", ["point", "detect"])
def test_what_was_likeliest_is_scored_as_likeliest(tmp_path: Path, skill: str) -> None:
    tuner = FinetuneStore(tmp_path)
    made = tuner.create("me", "a", 8)
    asked = Prompt(np.asarray(picture()), "the main subject", 0.0, skill=skill, max_objects=3)
    (said,) = tuner.rollouts("me", made.finetune_id, asked, 1)
    live = tuner._live["me", made.finetune_id]
    live._set(asked)
    inputs = live._inputs(asked)
    told = {}
    for temperature in (1e-4, 1.0):
        live.policy.temperature = temperature
        with torch.no_grad():
            scored = regions.score(
                live.policy, inputs["input_ids"], live._features(inputs), said.objects, said.ended, skill
            )
        told[temperature] = scored
    assert said.objects and float(told[1e-4].min()) > -0.7 and float(told[1.0].max()) <= 0


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        ([], [], 1.0),
        ([], [{"x": 0.5, "y": 0.5}], 0.0),
        ([{"x": 0.5, "y": 0.5}], [{"x": 0.52, "y": 0.48}], 1.0),
        ([{"x": 0.5, "y": 0.5}] * 2, [{"x": 0.52, "y": 0.48}], 0.5),
        ([{"x": 0.5, "y": 0.5}], [{"x_min": 0.4, "y_min": 0.4, "x_max": 0.6, "y_max": 0.6}], 1.0),
    ],
)
def test_rewards_against_the_truth(found: list[Any], truth: list[Any], expected: float) -> None:
    assert regions.reward(found, truth) == pytest.approx(expected)


def test_half_a_box_is_half_a_reward() -> None:
    whole = {"x_min": 0.0, "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}
    assert regions.reward([whole | {"x_max": 0.5}], [whole]) == pytest.approx(0.5)


def test_one_tenant_sees_nothing_of_another(server: str) -> None:
    mine = client(server, "mine")
    found = rollouts(mine, 2)
    group = {"mode": "rl", "request": found["request"], "rollouts": found["rollouts"], "rewards": [0.0, 1.0]}
    mine.train_step([group])
    mine.save_checkpoint()
    assert httpx.get(f"{server}/tuning/finetunes", headers=head(OTHER)).json()["finetunes"] == []
    at = f"{server}/tuning/finetunes/{mine.finetune_id}"
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/checkpoints"), ("POST", "/checkpoints/save")):
        refused(httpx.request(method, at + path, headers=head(OTHER)), 404, "not_found")
    body = {"image_url": PHOTO, "question": "Is it dark?", "model": mine.model(1)}
    refused(httpx.post(f"{server}/query", json=body, headers=head(OTHER)), 404, "not_found")
    assert httpx.post(f"{server}/query", json=body, headers=head(), timeout=60).status_code == 200
    assert client(server, "mine", OTHER).finetune_id != mine.finetune_id
    refused(httpx.get(at), 401, "unauthorized")


def test_names_and_ranks(server: str) -> None:
    assert client(server, "same").finetune_id == client(server, "same").finetune_id
    for body, status, kind in (
        ({"name": "same", "rank": 16}, 409, "conflict"),
        ({"name": "same", "rank": 7}, 400, "invalid_request"),
        ({"name": "../up", "rank": 8}, 400, "invalid_request"),
    ):
        refused(httpx.post(f"{server}/tuning/finetunes", json=body, headers=head()), status, kind)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"skill": "segment", "object": "cat", "image_url": PHOTO}, "skill"),
        ({"skill": "detect", "question": "cat", "image_url": PHOTO}, "object"),
        ({"skill": "query", "question": "", "image_url": PHOTO}, "question"),
        ({"skill": "query", "question": "a", "image_url": "https://example.org/a.jpg"}, "data URL"),
        ({"skill": "query", "question": "a", "image_url": PHOTO, "settings": {"top_p": 0.5}}, "top_p"),
    ],
)
def test_what_cannot_be_drawn_is_refused(server: str, request_: dict[str, Any], says: str) -> None:
    body = {"finetune_id": client(server, "refused").finetune_id, "num_rollouts": 2, "request": request_}
    assert says in refused(httpx.post(f"{server}/tuning/rollouts", json=body, headers=head()), 400, "invalid_request")


@pytest.mark.parametrize(
    "change",
    [
        {"rewards": [1.0]},
        {"rollouts": [{"answer_tokens": [2**30]}] * 2},
        {"rollouts": [{"answer_tokens": [], "finish_reason": "length"}] * 2},
        {"mode": "sft"},
        {"request": {"skill": "point", "object": "a", "image_url": PHOTO}},
        {"rewards": ["a", "b"]},
    ],
)
def test_a_group_that_is_none_changes_nothing(server: str, change: dict[str, Any]) -> None:
    finetune = client(server, "groups")
    found = rollouts(finetune, 2)
    group = {"mode": "rl", "request": found["request"], "rollouts": found["rollouts"], "rewards": [0.0, 1.0]} | change
    body = {"finetune_id": finetune.finetune_id, "groups": [group]}
    refused(httpx.post(f"{server}/tuning/train_step", json=body, headers=head(), timeout=60), 400, "invalid_request")
    told = httpx.get(f"{server}/tuning/finetunes/{finetune.finetune_id}", headers=head()).json()
    assert told["finetune"]["step"] == 0


def test_lists_come_in_pages(server: str) -> None:
    for number in range(3):
        client(server, f"page-{number}", OTHER)
    seen, cursor = [], ""
    while cursor is not None:
        told = httpx.get(f"{server}/tuning/finetunes?limit=2&cursor={cursor}", headers=head(OTHER)).json()
        seen += [one["name"] for one in told["finetunes"]]
        cursor = told["next_cursor"]
    assert len(seen) == len(set(seen)) and {"page-0", "page-1", "page-2"} <= set(seen)


def learn(tuner: FinetuneStore, finetune_id: str, asked: Prompt, seed: int) -> None:
    torch.manual_seed(seed)
    said = tuner.rollouts("me", finetune_id, asked, 4)
    tuner.learn("me", finetune_id, [Group(asked, tuple(said), (0.0, 1.0, 0.3, 0.6))], 2e-3)


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = Prompt(np.asarray(picture()), RECIPE_QUESTION)
    cold = Prompt(asked.photo, RECIPE_QUESTION, temperature=0.0)
    said: list[list[Completion]] = []
    for restart in (False, True):
        tuner = FinetuneStore(tmp_path / str(restart))
        made = tuner.create("me", "a", 8)
        learn(tuner, made.finetune_id, asked, 1)
        if restart:
            tuner = FinetuneStore(tuner.folder)
        learn(tuner, made.finetune_id, asked, 2)
        torch.manual_seed(3)
        said.append(
            [*tuner.rollouts("me", made.finetune_id, cold, 1), *tuner.rollouts("me", made.finetune_id, asked, 4)]
        )
        kept = [folder.name for folder in (tuner.folder / "me" / made.finetune_id / "steps").iterdir()]
        assert kept == ["2"], "only the present step and saved ones are kept"
    assert said[0] == said[1]


def test_a_step_that_cannot_be_kept_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = FinetuneStore(tmp_path)
    made = tuner.create("me", "a", 8)
    asked = Prompt(np.asarray(picture()), RECIPE_QUESTION)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.server.trainer.write_whole", full)
        with pytest.raises(OSError, match="No space"):
            learn(tuner, made.finetune_id, asked, 1)
    assert tuner.get("me", made.finetune_id).step == 0
    learn(tuner, made.finetune_id, asked, 1)
    assert tuner.get("me", made.finetune_id).step == 1


def test_a_hosted_run_teaches_moondream_tiny_over_http(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The production loop against the production server: what it measures on held-out photos rises."""
    monkeypatch.setenv("MOONDREAM_API_URL", server)
    monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
    monkeypatch.setenv("MOONDREAM_RATE", "1000")
    (tmp_path / "run").mkdir()
    (tmp_path / "photos").mkdir()
    for place, info in enumerate(bundled("held-out")[:3]):
        save_picture(shrink(load_photo(info.path), 240), Recipe(), tmp_path / "photos" / f"{place}.png")
    few = str(tmp_path / "photos")
    chosen: dict[str, Any] = {"base": "moondream-tiny", "reward": {"colour": 1.0}, "seed": 3, "steps": 16, "rank": 16}
    chosen |= {"where": "hosted", "rollouts": 8, "probe_every": 8, "learning_rate": 3e-3, "photos_per_step": 2}
    config = RunConfig.make(**chosen | {"photos": few, "held_out": few + "/"})
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    run = Run(tmp_path / "run")
    grpo._live(run, run.config(), True, hosted.work)
    result = run.result()
    assert run.status().state == "done" and result
    probes = [line["held_out"] for line in run.probes()]
    assert max(probes[1:]) > probes[0] + 0.03
    assert result["difference"]["mean"] > 0.03 and result["model"].startswith("moondream-tiny/")
    assert KEY not in "".join(path.read_text(errors="replace") for path in run.folder.rglob("*") if path.is_file())

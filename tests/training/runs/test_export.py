"""Tests of model cards, zip archives, and pushing adapters to a fake Hub over HTTP."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest

from inference.registry import MODELS
from tests.support.fake_run import write_adapter, write_alarms, write_result
from tests.support.hub_server import TOKEN, HubServer
from tests.support.runs import make_config
from training.runs.adapters import check_adapter
from training.runs.export import model_card, push_to_hub, write_zip
from training.runs.run import Ownership, Run, RunError, RunStore

TINY = MODELS["moondream-tiny"]
HOSTILE = "<img src=x> | [x](javascript:1) ``` # ${x}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    photos = str(tmp_path / "uploads" / "mine")
    config = make_config(reward={"sharpness": 1, "colour": 0.5}, seed=7, steps=10, photos=photos)
    run = RunStore(tmp_path / "runs").create(config)
    write_adapter(run)
    write_result(run, wins=True, alarm="")
    run.append_metrics({"step": 1, "reward": 0.5})
    (run.folder / "log.txt").write_text("a log\n")
    (run.folder / "checkpoint-5").mkdir()
    (run.folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"0" * 1000)
    run.set_status(state="done", step=10, steps=10)
    return run


def test_card_describes_rewards_data_and_results(run: Run) -> None:
    text = model_card(run, TINY)
    assert text.startswith("---\nbase_model: moondream-tiny\nlibrary_name: peft\n")
    for part in (
        '{"sharpness": 1.0, "colour": 0.5}',
        "Photos: own photos",
        "| sharpness | 0.410 (0.380 to 0.440) | 0.610 (0.580 to 0.640) |",
        "| total |",
        "Paired difference of the total: 0.200 (0.170 to 0.230). The tuned model is better than its base.",
        "seed 7",
        "24 photos",
    ):
        assert part in text
    assert "Warning" not in text and str(run.folder.parent) not in text


def test_card_of_a_losing_run_says_so_and_shows_its_warning(run: Run) -> None:
    write_result(run, wins=False, alarm="The reward rose, but not on new photos.")
    assert "The tuned model is not shown to be better" in model_card(run, TINY)
    assert "Warning: The reward rose" in model_card(run, TINY)


def test_card_and_zip_contain_the_alarms(run: Run, tmp_path: Path) -> None:
    write_alarms(run, step=4)
    write_result(run, wins=True, alarm="")
    card = model_card(run, TINY)
    assert "**Alarm: Edits cut off the subject.** In 5 of 8 answers" in card and "Warning" not in card
    write_zip(run, TINY, tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert {"alarms.json", "alarm-cut_subject-before.jpg", "alarm-cut_subject-after.jpg"} <= set(archive.namelist())


def test_card_without_a_result(run: Run) -> None:
    (run.folder / "result.json").unlink()
    assert "Not measured" in model_card(run, TINY)


def test_card_escapes_the_run_name(run: Run) -> None:
    run.rename(HOSTILE)
    title = next(line for line in model_card(run, TINY).splitlines() if line.startswith("# "))
    assert "\\<img src=x\\> \\| \\[x\\](javascript:1) \\`\\`\\` \\# \\$\\{x\\}" in title


def test_zip_contains_everything_but_checkpoints_and_local_paths(run: Run, tmp_path: Path) -> None:
    write_zip(run, TINY, tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        names = set(archive.namelist())
        config = json.loads(archive.read("config.json"))
        assert archive.read("log.txt") == b"a log\n"
        archive.extractall(tmp_path / "out")
    assert {"README.md", "metrics.jsonl", "result.json", "reward.png", "pair0.png"} <= names
    assert not [name for name in names if "checkpoint" in name or name.endswith((".pt", "lock"))]
    assert config["photos"] == "own photos" and config["base"] == "moondream-tiny" and config["where"] == "here"
    assert all(
        str(tmp_path).encode() not in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()
    )
    check_adapter(tmp_path / "out" / "adapter", TINY)


def test_exports_do_not_contain_the_owner(run: Run, hub: HubServer, tmp_path: Path) -> None:
    run.set_ownership(Ownership("hf:4711-the-owner", "Ada Owner", own_key=True))
    write_zip(run, TINY, tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        archive.extractall(tmp_path / "out")
    push_to_hub(run, TINY, "me/sharper", TOKEN)
    files = [file for folder in (tmp_path / "out", hub.files) for file in folder.rglob("*") if file.is_file()]
    assert {"config.json", "run.json", "README.md"} <= {file.name for file in files}
    assert "owner.json" not in {file.name for file in files}
    for file in files:
        assert b"4711" not in file.read_bytes() and b"Ada" not in file.read_bytes()


def test_push_uploads_adapter_and_card_with_the_given_token(
    run: Run, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        url = push_to_hub(run, TINY, " me/sharper ", f" {TOKEN}\n", private=True)
    assert url == f"{hub.address}/me/sharper"
    assert hub.tokens == {f"Bearer {TOKEN}"} and hub.created["visibility"] == "private"
    uploaded = {file.name for file in hub.files.iterdir()}
    assert uploaded == {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"}
    assert (hub.files / "README.md").read_text() == model_card(run, TINY)
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert (hub.files / "adapter_model.safetensors").read_bytes() == weights
    assert TOKEN not in caplog.text
    assert all(TOKEN.encode() not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(("code", "message"), [(401, "does not recognize this token"), (403, "may not write there")])
def test_refused_push_names_a_remedy_but_not_the_token(
    run: Run, hub: HubServer, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.refuse["/"] = code
    with pytest.raises(RunError, match=message) as error:
        push_to_hub(run, TINY, "me/sharper", TOKEN)
    assert TOKEN not in str(error.value) and error.value.__cause__ is None
    assert TOKEN not in "".join(capfd.readouterr())


def test_push_to_an_unreachable_hub_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="could not be reached"):
        push_to_hub(run, TINY, "me/sharper", TOKEN)


def test_push_in_offline_mode_names_the_setting(run: Run) -> None:
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        push_to_hub(run, TINY, "me/sharper", TOKEN)


@pytest.mark.parametrize("name", ["", "sharper", "me/", "../me/x", "me/sharper/..", "me/<b>", "me/" + "x" * 200])
def test_push_refuses_invalid_repository_names(run: Run, name: str) -> None:
    with pytest.raises(RunError, match="owner/name"):
        push_to_hub(run, TINY, name, TOKEN)


def test_push_needs_a_token_and_an_adapter(run: Run) -> None:
    with pytest.raises(RunError, match="token with write access"):
        push_to_hub(run, TINY, "me/sharper", "  ")
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter"):
        push_to_hub(run, TINY, "me/sharper", TOKEN)

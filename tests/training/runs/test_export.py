"""What leaves the house: the model card, the zip, and a push over HTTP to a stand-in that only plays the Hub."""

from __future__ import annotations

import base64
import json
import logging
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from inference.registry import MODELS
from tests.support.fake_run import write_adapter, write_result
from training.runs.adapters import check_adapter
from training.runs.export import card, pack, push
from training.runs.run import Run, RunConfig, RunError, RunStore

TINY = MODELS["moondream-tiny"]
TOKEN = "hf_secretsecretsecretsecretsecret12"
HOSTILE = "<img src=x> | [x](javascript:1) ``` # ${x}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    asked = {"base": "moondream-tiny", "reward": {"sharpness": 1, "colour": 0.5}, "seed": 7, "steps": 10}
    made = RunStore(tmp_path / "runs").create(RunConfig.create(**asked, photos=str(tmp_path / "uploads" / "mine")))
    write_adapter(made)
    write_result(made, wins=True, alarm="")
    made.add("metrics", {"step": 1, "reward": 0.5})
    (made.folder / "log.txt").write_text("a log\n")
    (made.folder / "checkpoint-5").mkdir()
    (made.folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"0" * 1000)
    made.set_status(state="done", step=10, steps=10)
    return made


class StandIn(ThreadingHTTPServer):
    """Answers the few requests of a push as the Hub would, and keeps what was sent. It is no Hub."""

    def __init__(self, refuse: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuse = refuse
        self.paths: list[str] = []
        self.tokens: set[str] = set()
        self.made: dict[str, object] = {}
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """One request to the stand-in."""

    server: StandIn

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.paths.append(self.path)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.refuse:
            self.answer(self.server.refuse, {"error": f"no, {self.headers.get('Authorization')}"})
        elif self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            self.answer(200, {"url": f"{self.server.address}/me/sharper", "id": "me/sharper", "name": "me/sharper"})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            self.answer(200, {"files": files, "commitOid": "0" * 40})
        elif "/commit/main" in self.path:
            self.keep(body)
            url = f"{self.server.address}/me/sharper/commit/{'1' * 40}"
            self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.answer(self.server.refuse or 200, {"id": "me/sharper", "sha": "0" * 40, "siblings": [], "private": True})

    def keep(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                self.server.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])

    def answer(self, code: int, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """Starts stand-ins for the Hub; in between this process may ask the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    running: list[StandIn] = []

    def started(refuse: int = 0) -> StandIn:
        running.append(StandIn(refuse))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running[-1].address)
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield started
    for one in running:
        one.shutdown()
        one.server_close()


def test_the_card_says_reward_data_and_held_out_table(run: Run) -> None:
    text = card(run, TINY)
    assert text.startswith("---\nbase_model: moondream-tiny\nlibrary_name: peft\n")
    for said in (
        '{"sharpness": 1.0, "colour": 0.5}',
        "Photos: own photos",
        "| sharpness | 0.410 (0.380 to 0.440) | 0.610 (0.580 to 0.640) |",
        "| total |",
        "Difference of the total, photo by photo: 0.200 (0.170 to 0.230). It is better than its base.",
        "seed 7",
        "24 photos",
    ):
        assert said in text
    assert "Warning" not in text and str(run.folder.parent) not in text


def test_the_card_of_a_loser_with_an_alarm_says_both(run: Run) -> None:
    write_result(run, wins=False, alarm="The reward rose, but not on new photos.")
    assert "It is not shown to be better" in card(run, TINY)
    assert "Warning: The reward rose" in card(run, TINY)


def test_a_run_without_a_result_has_a_card(run: Run) -> None:
    (run.folder / "result.json").unlink()
    assert "Not measured" in card(run, TINY)


def test_a_hostile_name_is_only_text_in_the_card(run: Run) -> None:
    run.rename(HOSTILE)
    title = next(line for line in card(run, TINY).splitlines() if line.startswith("# "))
    assert "\\<img src=x\\> \\| \\[x\\](javascript:1) \\`\\`\\` \\# \\$\\{x\\}" in title


def test_the_zip_holds_everything_but_checkpoints_and_paths(run: Run, tmp_path: Path) -> None:
    pack(run, TINY, tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        names = set(archive.namelist())
        config = json.loads(archive.read("config.json"))
        assert archive.read("log.txt") == b"a log\n"
        archive.extractall(tmp_path / "out")
    assert {"README.md", "metrics.jsonl", "result.json", "reward.png", "pair0.png"} <= names
    assert not [name for name in names if "checkpoint" in name or name.endswith((".pt", "lock"))]
    assert config["photos"] == "own photos" and config["base"] == "moondream-tiny"
    assert all(
        str(tmp_path).encode() not in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()
    )
    check_adapter(tmp_path / "out" / "adapter", TINY)


def test_a_push_sends_adapter_and_card_with_the_token_of_its_owner(
    run: Run, stand_in: Callable[..., StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    hub = stand_in()
    with caplog.at_level(logging.DEBUG):
        address = push(run, TINY, " me/sharper ", f" {TOKEN}\n", private=True)
    assert address == f"{hub.address}/me/sharper"
    assert hub.tokens == {f"Bearer {TOKEN}"} and hub.made["visibility"] == "private"
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"}
    assert hub.files["README.md"].decode() == card(run, TINY)
    assert hub.files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    assert TOKEN not in caplog.text
    assert all(TOKEN.encode() not in file.read_bytes() for file in run.folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(("code", "words"), [(401, "does not know this token"), (403, "may not write there")])
def test_a_refused_push_says_what_to_do_and_not_the_token(
    run: Run, stand_in: Callable[..., StandIn], code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(refuse=code)
    with pytest.raises(RunError, match=words) as refused:
        push(run, TINY, "me/sharper", TOKEN)
    assert TOKEN not in str(refused.value) and refused.value.__cause__ is None
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_hub_that_is_not_there_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="could not be reached"):
        push(run, TINY, "me/sharper", TOKEN)


def test_a_machine_that_works_without_the_hub_says_so(run: Run) -> None:
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        push(run, TINY, "me/sharper", TOKEN)


@pytest.mark.parametrize("name", ["", "sharper", "me/", "../me/x", "me/sharper/..", "me/<b>", "me/" + "x" * 200])
def test_only_a_repository_is_pushed_to(run: Run, name: str) -> None:
    with pytest.raises(RunError, match="owner/name"):
        push(run, TINY, name, TOKEN)


def test_a_push_needs_a_token_and_an_adapter(run: Run) -> None:
    with pytest.raises(RunError, match="token with write access"):
        push(run, TINY, "me/sharper", "  ")
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter"):
        push(run, TINY, "me/sharper", TOKEN)

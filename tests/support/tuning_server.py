"""A stand-in for Moondream's tuning API over real HTTP: a policy that knows a few recipes and likes them more or less.

It is no vision-language model: each finetune is a table of preferences over RECIPES, whatever the photo. But it learns
by the policy gradient of the rewards that it is sent, so that a loop that sends the right ones raises the reward.
Faults can be put before any request.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from recipes import Recipe

KEY = "md-tuning-secret-0987"
RECIPES = [
    *(str(Recipe(saturation=value)) for value in (-60, -30, 0, 30, 60)),
    *(str(Recipe(sharpening=value)) for value in (20, 60)),
    "a lovely photo",
]
RATE = 400.0  # preferences move by this times the learning rate


@dataclass
class Finetune:
    """Preferences, the step, and what was saved."""

    name: str
    rank: int
    likes: np.ndarray = field(default_factory=lambda: np.zeros(len(RECIPES)))
    step: int = 0
    saved: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def share(self) -> np.ndarray:
        return np.exp(self.likes) / np.exp(self.likes).sum()

    def learn(self, group: dict[str, Any], rate: float) -> None:
        """Moves the preferences by one group."""
        if group["mode"] == "sft":
            self.likes[-1] -= rate * RATE  # an example of the form: prose is said less often
            return
        rewards = np.array(group["rewards"])
        gains = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        share = self.share
        for rollout, gain in zip(group["rollouts"], gains, strict=True):
            said = np.arange(len(RECIPES)) == RECIPES.index(rollout["output"]["answer"])
            self.likes += rate * RATE * gain * (said - share) / len(gains)


@dataclass
class StandInTuning:
    """The server's state. before: called before each request with its path; what it returns is sent instead.

    says_step: whether a finetune says at which step it is. asked, bodies: of every request.
    """

    address: str = ""
    finetunes: dict[str, Finetune] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    says_step: bool = False
    before: Callable[[str], Any] = lambda path: None
    lock: threading.RLock = field(default_factory=threading.RLock)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer of a request."""
        match (method, *path.strip("/").split("/")[1:]):
            case ("POST", "query"):
                return 200, {"request_id": "q", "answer": self._likeliest(body["model"])}
            case ("POST", "tuning", "finetunes"):
                return self._create(body)
            case ("POST", "tuning", "rollouts"):
                return 200, self._rollouts(body)
            case ("POST", "tuning", "train_step"):
                return 200, self.train(body)
            case (_, "tuning", "finetunes", name, *rest) if name in self.finetunes:
                return self._finetune(name, rest)
        return 404, {"error": {"message": "there is none"}}

    def _create(self, body: Any) -> tuple[int, dict[str, Any]]:
        for key, one in self.finetunes.items():
            if one.name == body["name"]:
                return (200, {"finetune_id": key}) if one.rank == body["rank"] else (409, {"error": "other rank"})
        key = f"01HX{len(self.finetunes):04d}"
        self.finetunes[key] = Finetune(body["name"], body["rank"])
        return 200, {"finetune_id": key}

    def _finetune(self, name: str, rest: list[str]) -> tuple[int, dict[str, Any]]:
        one = self.finetunes[name]
        if rest == ["checkpoints", "save"]:
            if not one.step:
                return 404, {"error": {"message": "no step yet"}}
            one.saved[one.step] = one.likes.copy()
            return 200, {"ok": True, "checkpoint": {"step": one.step, "finetune_id": name}}
        if rest == ["metrics"]:
            return 200, {"ok": True}
        told = {"finetune_id": name, "name": one.name, "rank": one.rank}
        return 200, {"finetune": told | ({"step": one.step} if self.says_step else {})}

    def _rollouts(self, body: Any) -> dict[str, Any]:
        share, count = self.finetunes[body["finetune_id"]].share, body["num_rollouts"]
        cold = body["request"]["settings"]["temperature"] == 0
        places = [int(share.argmax())] * count if cold else self.rng.choice(len(share), count, p=share).tolist()
        rollouts = [
            {"skill": "query", "output": {"answer": RECIPES[place]}, "answer_tokens": [1] * 40, "opaque": place}
            for place in places
        ]
        return {"request": body["request"] | {"echoed": True}, "rollouts": rollouts, "rewards": None}

    def train(self, body: Any) -> dict[str, Any]:
        """One step. What was given out has to come back as it was."""
        one = self.finetunes[body["finetune_id"]]
        for group in body["groups"]:
            if group["mode"] == "rl":
                assert group["request"]["echoed"] and all("opaque" in rollout for rollout in group["rollouts"])
            one.learn(group, body["lr"])
        one.step += 1
        return {"step": one.step, "applied": True, "kl": 0.01, "reward_mean": None}

    def _likeliest(self, model: str) -> str:
        _, _, tuned = model.partition("/")
        if not tuned:
            return RECIPES[1]
        name, _, step = tuned.partition("@")
        return RECIPES[int(self.finetunes[name].saved[int(step)].argmax())]


@dataclass(frozen=True)
class Drop:
    """Closes the connection without an answer; `after`: once the request was carried out."""

    after: bool


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: StandInTuning

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        with self.state.lock:
            self.state.asked.append(f"{self.command} {self.path}")
            self.state.bodies.append(body)
            if self.headers.get("X-Moondream-Auth") != KEY:
                self._send(401, {"error": {"message": f"bad key {KEY}"}})
                return
            fault = self.state.before(self.path)
            if isinstance(fault, Drop):
                self._drop(fault, body)
            elif isinstance(fault, int):
                self._send(fault, {"error": {"message": "played"}})
            else:
                self._send(*self.state.answer(self.command, self.path, body))

    do_GET = do_DELETE = do_POST

    def _drop(self, fault: Drop, body: Any) -> None:
        if fault.after:
            self.state.answer(self.command, self.path, body)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _send(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stand_in_tuning() -> Iterator[StandInTuning]:
    """Runs on a free port of this machine while the block lasts."""
    state = StandInTuning()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    state.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()

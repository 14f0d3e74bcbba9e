"""Fake of Moondream's tuning API over HTTP.

A finetune is not a vision-language model but a table of preferences over RECIPES, independent of the photo. It learns
by policy gradient from the rewards that it receives, so correct training loops raise their reward. Faults can be
injected before any request.
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
LEARNING_RATE_SCALE = 400.0  # of the preferences


@dataclass
class Finetune:
    """Preferences over RECIPES, the current step, and saved checkpoints by step."""

    name: str
    rank: int
    preferences: np.ndarray = field(default_factory=lambda: np.zeros(len(RECIPES)))
    step: int = 0
    saved: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the preferences."""
        return np.exp(self.preferences) / np.exp(self.preferences).sum()

    def learn(self, group: dict[str, Any], learning_rate: float) -> None:
        """Update the preferences with one group."""
        rate = learning_rate * LEARNING_RATE_SCALE
        if group["mode"] == "sft":
            self.preferences[-1] -= rate  # an example recipe makes prose less likely
            return
        rewards = np.array(group["rewards"])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        probabilities = self.probabilities
        for rollout, advantage in zip(group["rollouts"], advantages, strict=True):
            sampled = np.arange(len(RECIPES)) == RECIPES.index(rollout["output"]["answer"])
            self.preferences += rate * advantage * (sampled - probabilities) / len(advantages)


@dataclass
class TuningServer:
    """State of the server.

    Attributes:
        address: URL up to /v1.
        finetunes: Finetunes by id.
        requests: Method and path of every request.
        bodies: Body of every request.
        reports_step: Whether a finetune's description contains its step.
        inject_fault: Called with the path before each request; returns an HTTP status or a `Drop` to fail it.
    """

    address: str = ""
    finetunes: dict[str, Finetune] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    reports_step: bool = False
    inject_fault: Callable[[str], Any] = lambda path: None
    lock: threading.RLock = field(default_factory=threading.RLock)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def respond(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Return status and body of the response to a request."""
        match (method, *path.strip("/").split("/")[1:]):
            case ("POST", "query"):
                return 200, {"request_id": "q", "answer": self._greedy_answer(body["model"])}
            case ("POST", "tuning", "finetunes"):
                return self._create(body)
            case ("POST", "tuning", "rollouts"):
                return 200, self._rollouts(body)
            case ("POST", "tuning", "train_step"):
                return 200, self.train(body)
            case (_, "tuning", "finetunes", finetune_id, *rest) if finetune_id in self.finetunes:
                return self._finetune(finetune_id, rest)
        return 404, {"error": {"message": "there is none"}}

    def _create(self, body: Any) -> tuple[int, dict[str, Any]]:
        for finetune_id, finetune in self.finetunes.items():
            if finetune.name == body["name"]:
                same_rank = finetune.rank == body["rank"]
                return (200, {"finetune_id": finetune_id}) if same_rank else (409, {"error": "other rank"})
        finetune_id = f"01HX{len(self.finetunes):04d}"
        self.finetunes[finetune_id] = Finetune(body["name"], body["rank"])
        return 200, {"finetune_id": finetune_id}

    def _finetune(self, finetune_id: str, rest: list[str]) -> tuple[int, dict[str, Any]]:
        finetune = self.finetunes[finetune_id]
        if rest == ["checkpoints", "save"]:
            if not finetune.step:
                return 404, {"error": {"message": "no step yet"}}
            finetune.saved[finetune.step] = finetune.preferences.copy()
            return 200, {"ok": True, "checkpoint": {"step": finetune.step, "finetune_id": finetune_id}}
        if rest == ["metrics"]:
            return 200, {"ok": True}
        description = {"finetune_id": finetune_id, "name": finetune.name, "rank": finetune.rank}
        return 200, {"finetune": description | ({"step": finetune.step} if self.reports_step else {})}

    def _rollouts(self, body: Any) -> dict[str, Any]:
        probabilities, count = self.finetunes[body["finetune_id"]].probabilities, body["num_rollouts"]
        if body["request"]["settings"]["temperature"] == 0:
            indices = [int(probabilities.argmax())] * count
        else:
            indices = self.rng.choice(len(probabilities), count, p=probabilities).tolist()
        rollouts = [
            {"skill": "query", "output": {"answer": RECIPES[index]}, "answer_tokens": [1] * 40, "opaque": index}
            for index in indices
        ]
        return {"request": body["request"] | {"echoed": True}, "rollouts": rollouts, "rewards": None}

    def train(self, body: Any) -> dict[str, Any]:
        """Apply one step; rollouts must come back unchanged."""
        finetune = self.finetunes[body["finetune_id"]]
        for group in body["groups"]:
            if group["mode"] == "rl":
                assert group["request"]["echoed"] and all("opaque" in rollout for rollout in group["rollouts"])
            finetune.learn(group, body["lr"])
        finetune.step += 1
        return {"step": finetune.step, "applied": True, "kl": 0.01, "reward_mean": None}

    def _greedy_answer(self, model: str) -> str:
        _, _, checkpoint = model.partition("/")
        if not checkpoint:
            return RECIPES[0]
        finetune_id, _, step = checkpoint.partition("@")
        return RECIPES[int(self.finetunes[finetune_id].saved[int(step)].argmax())]


@dataclass(frozen=True)
class Drop:
    """Fault that closes the connection without a response, before or `after` the request takes effect."""

    after: bool


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: TuningServer

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        with self.state.lock:
            self.state.requests.append(f"{self.command} {self.path}")
            self.state.bodies.append(body)
            if self.headers.get("X-Moondream-Auth") != KEY:
                self._send(401, {"error": {"message": f"bad key {KEY}"}})
                return
            fault = self.state.inject_fault(self.path)
            if isinstance(fault, Drop):
                self._drop(fault, body)
            elif isinstance(fault, int):
                self._send(fault, {"error": {"message": "injected"}})
            else:
                self._send(*self.state.respond(self.command, self.path, body))

    do_GET = do_DELETE = do_POST  # noqa: N815

    def _drop(self, fault: Drop, body: Any) -> None:
        if fault.after:
            self.state.respond(self.command, self.path, body)
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
def run_tuning_server() -> Iterator[TuningServer]:
    """Serve on a free local port within the context."""
    state = TuningServer()
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

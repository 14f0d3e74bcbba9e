"""From a push to a live preview: real processes of this application behind a stand-in for the Hub, by each path.

Simulated, and stated in the rows: what the Hub takes for an answer, a restart and a build. Real: the deployer as a
command, the application, its start, and Gradio's hot reload in it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.preview_repository import BUTTON, PreviewRepository
from bench.spaces_server import SpacesServer, spaces_server

ROOT = Path(__file__).resolve().parent.parent
# Nobody has published the Hub's times. Three calls of its API are said to take 1 to 2 seconds, a restart 30 to 90, a
# build one to fifteen minutes: taken here are .4 s a call, and the shortest of the others.
LATENCY, RESTART, BUILD = 0.4, 30.0, 60.0
SAID = f"simulated: {LATENCY} s a call of the Hub, {RESTART:.0f} s a restart, {BUILD:.0f} s a build"
HOT, RESTARTS = 12, 4


def rows() -> list[dict[str, Any]]:
    """A first deploy, hot reloads and restarts of one branch; then what a build installs, in full and slim."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "repository").mkdir()
        delays = {"latency": LATENCY, "restart": RESTART, "build": BUILD}
        with spaces_server(Path(folder) / "hub", **delays) as hub:
            at = PreviewRepository(Path(folder) / "repository", hub, f"sqlite:///{folder}/usage.sqlite3")
            at.git("checkout", "-q", "-b", "feature")
            first = deployed(at, hub, "build", lambda _: at.commit("a branch"), 1)
            hot = deployed(at, hub, "hot reload", lambda n: relabelled(at, n), HOT)
            again = deployed(at, hub, "restart", lambda n: restyled(at, n), RESTARTS)
    live, own = ([run[part] for run in hot] for part in (0, 1))
    restarted, own_restarting = ([run[part] for run in again] for part in (0, 1))
    restart = statistics.median(restarted)
    return [
        {
            "name": "push to live by hot reload, p95",
            "value": p95(live),
            "unit": "s",
            "baseline": restart,
            "ratio": p95(live) / restart,
            "target": "<= 5",
            "note": f"{HOT} changes, median {statistics.median(live):.2f} s; against the restart path; {SAID}",
        },
        {
            "name": "deployer's own share of it, p95",
            "value": p95(own),
            "unit": "s",
            "target": "<= 2",
            "note": f"without the Hub's work and the application's; median {statistics.median(own):.2f} s",
        },
        {
            "name": "push to live by restart, median",
            "value": restart,
            "unit": "s",
            "note": f"{RESTARTS} changes of the style sheet; {SAID}",
        },
        {
            "name": "deployer's own share of it, p95",
            "value": p95(own_restarting),
            "unit": "s",
            "target": "<= 3",
            "note": f"median {statistics.median(own_restarting):.2f} s",
        },
        {
            "name": "first deploy of a branch, by build",
            "value": first[0][0],
            "unit": "s",
            "note": f"once, all files sent; the deployer's own share {first[0][1]:.2f} s; {SAID}",
        },
        *installs(),
    ]


def deployed(
    at: PreviewRepository, hub: SpacesServer, path: str, change: Callable[[int], object], times: int
) -> list[tuple[float, float]]:
    """For each of some changes: seconds of the command from its start to its end, and its own share of them."""
    found = []
    for n in range(times):
        while hub.spaces and any(space.stage != "RUNNING" for space in hub.spaces.values()):
            time.sleep(0.1)  # the page is there a little before the port for hot reload
        change(n)
        began = time.monotonic()
        done = at.previews("deploy", "--branch", "feature")
        ended = time.monotonic()
        if done["path"] != path:
            raise RuntimeError(
                f"change {n} went by {done['path']}, not by {path}: {done['reason']} {done['fallbacks']}"
            )
        found.append((ended - began, ended - began - covered(hub.busy, began, ended)))
    return found


def covered(spans: list[list[float]], began: float, ended: float) -> float:
    """The seconds of a time that lie in at least one of the spans."""
    total, reached = 0.0, began
    for start, end in sorted(spans):
        start, end = max(start, reached), min(end, ended)
        if end > start:
            total, reached = total + end - start, end
    return total


def relabelled(at: PreviewRepository, n: int) -> None:
    """A change that hot reload can show."""
    old = BUTTON if n == 0 else f'gr.Button("Reward {n - 1}"'
    at.edit("ui/playground/tab.py", old, f'gr.Button("Reward {n}"')


def restyled(at: PreviewRepository, n: int) -> None:
    """A change that it cannot show."""
    with (at.folder / "ui" / "style.css").open("a") as file:
        file.write(f"#nothing-{n} {{ color: red }}\n")
    at.commit("style")


def p95(values: list[float]) -> float:
    """The value that 95 % are at most: of few values, the largest."""
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


def installs() -> list[dict[str, Any]]:
    """What the installation in a build takes, with the full requirements and with the slim ones; nothing cached."""
    took, size = {}, {}
    for name in ("requirements.txt", "requirements-slim.txt"):
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            command = [f"{folder}/bin/python", "-m", "pip", "install", "-q", "--no-cache-dir", "-r", str(ROOT / name)]
            began = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
            took[name] = time.monotonic() - began
            size[name] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**20
    full, slim = took.values()
    large, small = size.values()
    return [
        {
            "name": "installation of a slim preview",
            "value": slim,
            "unit": "s",
            "baseline": full,
            "ratio": slim / full,
            "target": "ratio <= 0.8",
            "note": f"{small:.0f} MB against {large:.0f} MB with the torch that pip gives here; PyPI's brings CUDA",
        }
    ]

"""Previews: time from a push to a live preview by build, restart and hot reload, with a simulated Hub.

Simulated: the Hub's times of an API call, a restart and a build, which the rows state. Real: the deployer as a command,
the application, its start, and Gradio's hot reload.
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
# Seconds. The Hub's times are not published; reports say 1 to 2 s for three API calls, 30 to 90 s for a restart, and
# 1 to 15 minutes for a build. The lower ends are used.
LATENCY, RESTART, BUILD = 0.4, 30.0, 60.0
SIMULATED = f"simulated: {LATENCY} s per API call, {RESTART:.0f} s per restart, {BUILD:.0f} s per build"
HOT_RELOADS, RESTARTS = 12, 4


def rows() -> list[dict[str, Any]]:
    """Measure a first deploy, hot reloads and restarts of one branch, and the installation of requirements."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "repository").mkdir()
        delays = {"latency": LATENCY, "restart": RESTART, "build": BUILD}
        with spaces_server(Path(folder) / "hub", **delays) as hub:
            repository = PreviewRepository(Path(folder) / "repository", hub, f"sqlite:///{folder}/usage.sqlite3")
            repository.git("checkout", "-q", "-b", "feature")
            first = measure_deploys(repository, hub, "build", lambda _: repository.commit("a branch"), 1)
            hot = measure_deploys(repository, hub, "hot reload", lambda n: edit_label(repository, n), HOT_RELOADS)
            restarts = measure_deploys(repository, hub, "restart", lambda n: edit_style(repository, n), RESTARTS)
    hot_total, hot_own = ([run[part] for run in hot] for part in (0, 1))
    restart_total, restart_own = ([run[part] for run in restarts] for part in (0, 1))
    restart = statistics.median(restart_total)
    return [
        {
            "name": "push to live by hot reload, p95",
            "value": p95(hot_total),
            "unit": "s",
            "baseline": restart,
            "ratio": p95(hot_total) / restart,
            "target": "<= 5",
            "note": f"{HOT_RELOADS} changes, median {statistics.median(hot_total):.2f} s; {SIMULATED}",
        },
        {
            "name": "time of the deployer alone, p95",
            "value": p95(hot_own),
            "unit": "s",
            "target": "<= 2",
            "note": f"without the Hub and the application; median {statistics.median(hot_own):.2f} s",
        },
        {
            "name": "push to live by restart, median",
            "value": restart,
            "unit": "s",
            "note": f"{RESTARTS} changes of the style sheet; {SIMULATED}",
        },
        {
            "name": "time of the deployer alone, p95",
            "value": p95(restart_own),
            "unit": "s",
            "target": "<= 3",
            "note": f"median {statistics.median(restart_own):.2f} s",
        },
        {
            "name": "first deploy of a branch, by build",
            "value": first[0][0],
            "unit": "s",
            "note": f"one deploy, all files uploaded; the deployer alone takes {first[0][1]:.2f} s; {SIMULATED}",
        },
        *installs(),
    ]


def measure_deploys(
    repository: PreviewRepository, hub: SpacesServer, path: str, change: Callable[[int], object], times: int
) -> list[tuple[float, float]]:
    """Deploy several changes. Returns, for each, the seconds of the command and those without the Hub's work."""
    durations = []
    for n in range(times):
        while hub.spaces and any(space.stage != "RUNNING" for space in hub.spaces.values()):
            time.sleep(0.1)  # the page is served shortly before the hot-reload port
        change(n)
        started = time.monotonic()
        result = repository.previews("deploy", "--branch", "feature")
        ended = time.monotonic()
        if result["path"] != path:
            raise RuntimeError(
                f"change {n} was deployed by {result['path']}, not by {path}: {result['reason']} {result['fallbacks']}"
            )
        durations.append((ended - started, ended - started - covered_seconds(hub.busy, started, ended)))
    return durations


def covered_seconds(spans: list[list[float]], started: float, ended: float) -> float:
    """Return the seconds between two times that lie in at least one of the spans."""
    total, reached = 0.0, started
    for start, end in sorted(spans):
        start, end = max(start, reached), min(end, ended)
        if end > start:
            total, reached = total + end - start, end
    return total


def edit_label(repository: PreviewRepository, n: int) -> None:
    """Make a change that hot reload can apply."""
    old = BUTTON if n == 0 else f'"Reward {n - 1}"'
    repository.edit("ui/playground/tab.py", old, f'"Reward {n}"')


def edit_style(repository: PreviewRepository, n: int) -> None:
    """Make a change that hot reload cannot apply."""
    with (repository.folder / "ui" / "style.css").open("a") as file:
        file.write(f"#nothing-{n} {{ color: red }}\n")
    repository.commit("style")


def p95(values: list[float]) -> float:
    """Return the 95th percentile; of few values, the largest."""
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


def installs() -> list[dict[str, Any]]:
    """Measure the installation of the full and of the slim requirements without a cache."""
    seconds, megabytes = {}, {}
    for name in ("requirements.txt", "requirements-slim.txt"):
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            command = [f"{folder}/bin/python", "-m", "pip", "install", "-q", "--no-cache-dir", "-r", str(ROOT / name)]
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
            seconds[name] = time.monotonic() - started
            megabytes[name] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**20
    full, slim = seconds.values()
    full_size, slim_size = megabytes.values()
    return [
        {
            "name": "installation of a slim preview",
            "value": slim,
            "unit": "s",
            "baseline": full,
            "ratio": slim / full,
            "target": "ratio <= 0.8",
            "note": f"{slim_size:.0f} MB against {full_size:.0f} MB with the default torch wheel; PyPI's includes CUDA",
        }
    ]

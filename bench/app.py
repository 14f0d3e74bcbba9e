"""Startup: time from `python app.py` to the first page, against an empty Gradio page on the same machine."""

import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
# No compiled files are found, and none are written.
NO_BYTECODE = {"PYTHONPYCACHEPREFIX": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
EMPTY = """
import os
import gradio as gr
with gr.Blocks() as page:
    pass
page.launch(server_port=int(os.environ["GRADIO_SERVER_PORT"]))
"""
# Runs app.py like `python app.py`, and writes the names of the loaded modules to a file on SIGUSR1.
WRITE_MODULES = """
import os, runpy, signal, sys
def write_modules(*_):
    with open(sys.argv[1] + ".part", "w") as file:
        file.write(" ".join(list(sys.modules)))
    os.replace(sys.argv[1] + ".part", sys.argv[1])
signal.signal(signal.SIGUSR1, write_modules)
runpy.run_path("app.py", run_name="__main__")
"""


def rows() -> list[dict[str, Any]]:
    """Measure the median startup of the app and of an empty page, with and without bytecode, and list heavy modules."""
    loaded = heavy_modules()
    return [
        start_row("start to first page", {}, "warm disk"),
        start_row("start to first page without bytecode", NO_BYTECODE, "as uv installs, or on a read-only disk"),
        {
            "name": "heavy modules at the first page",
            "value": len(loaded),
            "unit": "modules",
            "target": "<= 0",
            "note": f"of {', '.join(HEAVY)}" + (f"; loaded: {', '.join(loaded)}" if loaded else ""),
        },
    ]


def start_row(name: str, environment: dict[str, str], condition: str) -> dict[str, Any]:
    """Measure the app against an empty page, alternating."""
    ours, empty = ["app.py"], ["-c", EMPTY]
    for command in (ours, empty):
        first_page(command, environment)  # warm-up: reads files from the disk and compiles them
    pairs = [(first_page(ours, environment), first_page(empty, environment)) for _ in range(REPEATS)]
    app, gradio = (statistics.median(times) for times in zip(*pairs))
    return {
        "name": name,
        "value": app,
        "unit": "s",
        "baseline": gradio,
        "ratio": app / gradio,
        "target": "ratio <= 1.5",
        "note": f"against an empty Gradio page, medians of {REPEATS} alternating starts, {condition}",
    }


def first_page(arguments: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Return the seconds from the start of `python <arguments>` to its first 200 on /, and stop the process."""
    port = free_port()
    started = time.perf_counter()
    process = start(arguments, port, environment)
    try:
        wait_for_page(process, port)
        return time.perf_counter() - started
    finally:
        stop(process)


def heavy_modules() -> list[str]:
    """Return the modules of HEAVY that app.py has loaded at its first page."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "modules"
        process = start(["-c", WRITE_MODULES, str(file)], port)
        try:
            wait_for_page(process, port)
            process.send_signal(signal.SIGUSR1)
            while not file.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"the app exited with code {process.returncode} before it listed its modules")
                time.sleep(0.02)
            loaded = set(file.read_text().split())
        finally:
            stop(process)
    return [name for name in HEAVY if name in loaded]


def start(arguments: Sequence[str], port: int, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start Python in the project's folder with a Gradio server on `port`."""
    environment = {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        **(environment or {}),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the process; kill it after 10 seconds."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_page(process: subprocess.Popen[bytes], port: int, timeout: float = 120) -> None:
    """Wait for the first 200 on /.

    Raises:
        RuntimeError: If the process exits first.
        TimeoutError: After `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with code {process.returncode} before it served a page")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.01)
    raise TimeoutError(f"no page within {timeout:.0f} s")


def free_port() -> int:
    """Return an unused port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]

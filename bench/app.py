"""How long from `python app.py` to the first page, against an empty Gradio page on the same machine."""

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
# Python looks for compiled files where there are none, and writes none.
UNCOMPILED = {"PYTHONPYCACHEPREFIX": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
EMPTY = """
import os
import gradio as gr
with gr.Blocks() as page:
    pass
page.launch(server_port=int(os.environ["GRADIO_SERVER_PORT"]))
"""
# Runs app.py as `python app.py` does, and tells on SIGUSR1 which modules are loaded.
TELLING = """
import os, runpy, signal, sys
def tell(*_):
    with open(sys.argv[1] + ".half", "w") as file:
        file.write(" ".join(list(sys.modules)))
    os.replace(sys.argv[1] + ".half", sys.argv[1])
signal.signal(signal.SIGUSR1, tell)
runpy.run_path("app.py", run_name="__main__")
"""


def rows() -> list[dict[str, Any]]:
    """The median start of the app and of an empty page, with compiled bytecode and without, and the heavy modules."""
    loaded = heavy_modules()
    return [
        start_row("start to first page", {}, "warm disk"),
        start_row("the same without compiled bytecode", UNCOMPILED, "as uv installs, or where nothing can be written"),
        {
            "name": "heavy modules at the first page",
            "value": len(loaded),
            "unit": "modules",
            "target": "<= 0",
            "note": f"of {', '.join(HEAVY)}" + (f"; loaded: {', '.join(loaded)}" if loaded else ""),
        },
    ]


def start_row(name: str, environment: dict[str, str], words: str) -> dict[str, Any]:
    """The app against an empty page, in turns."""
    ours, empty = ["app.py"], ["-c", EMPTY]
    for command in (ours, empty):
        first_page(command, environment)  # the first start reads files from the disk and compiles them
    pairs = [(first_page(ours, environment), first_page(empty, environment)) for _ in range(REPEATS)]
    app, gradio = (statistics.median(times) for times in zip(*pairs))
    return {
        "name": name,
        "value": app,
        "unit": "s",
        "baseline": gradio,
        "ratio": app / gradio,
        "target": "ratio <= 1.5",
        "note": f"against an empty Gradio page, medians of {REPEATS} in turns, {words}",
    }


def first_page(arguments: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Seconds from the start of `python <arguments>` to its first 200 on /. The process is gone afterwards."""
    port = free_port()
    started = time.perf_counter()
    process = start(arguments, port, environment)
    try:
        wait_for_page(process, port)
        return time.perf_counter() - started
    finally:
        stop(process)


def heavy_modules() -> list[str]:
    """Which modules of HEAVY app.py has loaded by its first page."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "modules"
        process = start(["-c", TELLING, str(file)], port)
        try:
            wait_for_page(process, port)
            process.send_signal(signal.SIGUSR1)
            while not file.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"it ended with {process.returncode} instead of telling its modules")
                time.sleep(0.02)
            loaded = set(file.read_text().split())
        finally:
            stop(process)
    return [name for name in HEAVY if name in loaded]


def start(arguments: Sequence[str], port: int, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts Python in the project's folder, told to serve on `port`."""
    environment = {
        **os.environ,
        **(environment or {}),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, by force if it does not go."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_page(process: subprocess.Popen[bytes], port: int, patience: float = 120) -> None:
    """Returns at the first 200 on /. Raises RuntimeError if the process ends first, TimeoutError after `patience` s."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode} before it served a page")
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
    raise TimeoutError(f"no page within {patience:.0f} s")


def free_port() -> int:
    """A port that nothing listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]

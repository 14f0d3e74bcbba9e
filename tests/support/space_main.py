"""Runs app.py as `python app.py` does in a Space, with fake models, and writes its routes and handlers to a file.

Usage: python -m tests.support.space_main FILE. The models one, two, slow and hostile answer without weights, training
runs are those of `fake_run`, and the sample traffic of the Usage tab is empty, because a real model would answer.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import gradio as gr

from inference import registry
from settings import ROOT
from storage.files import write_atomically
from tests.support.fake_backend import fake_spec
from tests.support.runs import FAKE
from tests.support.server_routes import handler_names, walk_routes
from training.runs import queue
from ui.usage import tab as usage_tab

MODELS = ("one", "two", "slow", "hostile")


def main(file: Path) -> None:
    """Serve until the process is ended. The file is written when the server answers requests."""
    registry.BACKENDS["fake"] = "tests.support.fake_backend"
    for name in MODELS:
        registry.MODELS[name] = fake_spec(name, name if name in ("slow", "hostile") else "")
    queue.COMMAND = FAKE
    usage_tab.SAMPLE_SKILLS = ()
    launch = gr.Blocks.launch

    def observed_launch(page: gr.Blocks, *args: Any, **kwargs: Any) -> Any:
        launched = launch(page, *args, **kwargs)
        content = {"routes": list(walk_routes(page.app.routes)), "handlers": handler_names(page)}
        write_atomically(file, json.dumps(content))
        return launched

    gr.Blocks.launch = observed_launch
    sys.argv = ["app.py"]
    runpy.run_path(str(ROOT / "app.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

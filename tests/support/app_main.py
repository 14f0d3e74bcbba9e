"""Runs app.py as `python app.py` does, with the fake model "one" and with the training runs of `fake_run`.

Usage: python -m tests.support.app_main
"""

from __future__ import annotations

import runpy
import sys

from inference import registry
from settings import ROOT
from tests.support.fake_backend import fake_spec
from tests.support.runs import FAKE
from training.runs import queue


def main() -> None:
    """Serve until the process is ended."""
    registry.BACKENDS["fake"] = "tests.support.fake_backend"
    registry.MODELS["one"] = fake_spec("one")
    queue.COMMAND = FAKE
    sys.argv = ["app.py"]
    runpy.run_path(str(ROOT / "app.py"), run_name="__main__")


if __name__ == "__main__":
    main()

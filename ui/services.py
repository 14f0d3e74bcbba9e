"""What the tabs work on: the store, the runs and what does them; and the components that several tabs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from rewards import DEFAULT, REWARDS
from storage.database import Database
from storage.reward_functions import Store
from training.runs.adapters import Adopted
from training.runs.queue import COMMAND, Worker
from training.runs.run import Run, Runs
from ui.playground.link import Setup
from ui.playground.metering import Meter
from ui.playground.picker import model_picker
from usage.analytics import Usage
from usage.budgets import Budgets
from usage.events import Deployment
from usage.prices import Prices
from usage.recorder import Recorder


@dataclass(frozen=True)
class House:
    """One application's store, runs, worker, tuned models in service, and what its calls cost."""

    store: Store
    runs: Runs
    worker: Worker
    adopted: Adopted
    usage: Usage
    budgets: Budgets
    meter: Meter

    @classmethod
    def open(
        cls,
        data_dir: Path,
        store_url: str,
        command: tuple[str, ...] = COMMAND,
        where: Deployment | None = None,
        prices: Prices | None = None,
        hardware: str | None = None,
        inside: Callable[[str], object] | None = None,
    ) -> House:
        """Brings back what was in service, and goes on with the runs that were not over. Raises StoreError.

        where, prices, hardware: what the usage of this process is recorded with. inside: see `Worker`.
        """
        database = Database(store_url)
        runs = Runs(data_dir / "runs")
        adopted = Adopted(runs)
        adopted.load()
        recorder = Recorder(database, data_dir / "usage-spool", where or Deployment())
        recorder.start()
        budgets = Budgets(database)
        meter = Meter(recorder, prices or Prices(), hardware, budgets)

        def ended(run: Run) -> None:
            meter.count(run)
            adopted.settle(run)

        worker = Worker(runs, command, on_end=ended, inside=inside)
        worker.abandon()
        worker.wake()
        return cls(Store(database), runs, worker, adopted, Usage(database), budgets, meter)


@dataclass(frozen=True)
class Shared:
    """Components of more than one tab. The tab that shows one calls its `render`."""

    tabs: gr.Tabs
    sliders: list[gr.Slider]
    picker: gr.HTML

    @classmethod
    def make(cls, tabs: gr.Tabs) -> Shared:
        """Inside the page's blocks: the components, not yet shown."""
        picker = model_picker(list(Setup().models), elem_id="models", render=False)
        return cls(tabs, [_weight(name) for name in REWARDS], picker)


def _weight(name: str) -> gr.Slider:
    start = DEFAULT.weights.get(name, 0.0)
    label = name.capitalize()
    return gr.Slider(
        0, 1, start, step=0.05, label=label, min_width=90, buttons=[], elem_id=f"weight-{name}", render=False
    )

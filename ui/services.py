"""What the tabs work on: the store, the runs and what does them; and the components that several tabs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from rewards import DEFAULT, REWARDS
from storage.database import Database
from storage.reward_functions import RewardFunctionStore
from training.runs.adapters import AdapterRegistry
from training.runs.queue import COMMAND, RunQueue
from training.runs.run import Run, Runs
from ui.playground.link import PlaygroundSettings
from ui.playground.metering import ComparisonMeter
from ui.playground.picker import model_picker
from usage.analytics import Usage
from usage.budgets import Budgets
from usage.events import Deployment
from usage.prices import Prices
from usage.recorder import Recorder


@dataclass(frozen=True)
class AppServices:
    """One application's store, runs, worker, tuned models in service, and what its calls cost."""

    store: RewardFunctionStore
    runs: Runs
    worker: RunQueue
    adapters: AdapterRegistry
    usage: Usage
    budgets: Budgets
    meter: ComparisonMeter

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
    ) -> AppServices:
        """Brings back what was in service, and goes on with the runs that were not over. Raises StoreError.

        where, prices, hardware: what the usage of this process is recorded with. inside: see `RunQueue`.
        """
        database = Database(store_url)
        runs = Runs(data_dir / "runs")
        adapters = AdapterRegistry(runs)
        adapters.load()
        recorder = Recorder(database, data_dir / "usage-spool", where or Deployment())
        recorder.start()
        budgets = Budgets(database)
        meter = ComparisonMeter(recorder, prices or Prices(), hardware, budgets)

        def ended(run: Run) -> None:
            meter.count(run)
            adapters.settle(run)

        worker = RunQueue(runs, command, on_end=ended, inside=inside)
        worker.abandon()
        worker.wake()
        return cls(RewardFunctionStore(database), runs, worker, adapters, Usage(database), budgets, meter)


@dataclass(frozen=True)
class SharedComponents:
    """Components of more than one tab. The tab that shows one calls its `render`."""

    tabs: gr.Tabs
    sliders: list[gr.Slider]
    picker: gr.HTML

    @classmethod
    def make(cls, tabs: gr.Tabs) -> SharedComponents:
        """Inside the page's blocks: the components, not yet shown."""
        picker = model_picker(list(PlaygroundSettings().models), elem_id="models", render=False)
        return cls(tabs, [_weight(name) for name in REWARDS], picker)


def _weight(name: str) -> gr.Slider:
    start = DEFAULT.weights.get(name, 0.0)
    label = name.capitalize()
    return gr.Slider(
        0, 1, start, step=0.05, label=label, min_width=90, buttons=[], elem_id=f"weight-{name}", render=False
    )

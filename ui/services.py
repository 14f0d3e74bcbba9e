"""The services of the application, and the components that several tabs share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from access.control import AccessControl
from rewards import EQUAL_WEIGHTS, REWARDS
from storage.database import Database
from storage.preferences import PreferenceStore
from storage.reward_functions import RewardFunctionStore
from storage.state.bucket import StateBucket
from training.data import uploads
from training.data.uploads import TOTAL_QUOTA_BYTES
from training.evaluations.evaluation import EvaluationStore
from training.evaluations.queue import EvaluationQueue
from training.hosted.billing import BillingAccount
from training.runs.adapters import AdapterRegistry
from training.runs.queue import COMMAND, RunQueue
from training.runs.run import Run, RunStore
from ui.playground.compare import ComparisonMeter
from ui.playground.limits import ComparisonLimiter
from ui.playground.link import PlaygroundSettings
from ui.playground.picker import model_picker
from ui.playground.warm_up import WarmUp
from usage.alerts import Alerts, Webhook
from usage.analytics import UsageAnalytics
from usage.archive import RETENTION_MONTHS
from usage.budgets import Budgets
from usage.events import Deployment
from usage.machine import MachinePrice
from usage.prices import Prices
from usage.recorder import Recorder

if TYPE_CHECKING:
    from usage.telemetry import TelemetryExporter


@dataclass(frozen=True)
class AppServices:
    """The services that the tabs and endpoints work with.

    Attributes:
        store: Saved reward functions.
        runs: Training runs.
        worker: Queue that does the runs.
        evaluations: Evaluations of models on sets of photos.
        evaluation_queue: Queue that does the evaluations.
        adapters: Tuned models that can be selected.
        usage: Queries of the recorded usage events.
        budgets: Monthly budgets per branch.
        alerts: Limits of the usage per branch.
        meter: Records the usage events of model calls.
        access: Determines who sends a request.
        comparisons: Limits the comparisons of each visitor.
        upload_quota: Bytes of photos that all visitors together may upload for training runs.
        warm_up: Loads the default models when the page is opened for the first time; None loads them at the first Run.
        state_bucket: Keeps the state in the data folder, if the deployment has a bucket.
    """

    store: RewardFunctionStore
    runs: RunStore
    worker: RunQueue
    evaluations: EvaluationStore
    evaluation_queue: EvaluationQueue
    adapters: AdapterRegistry
    usage: UsageAnalytics
    budgets: Budgets
    alerts: Alerts
    meter: ComparisonMeter
    access: AccessControl = field(default_factory=AccessControl)
    comparisons: ComparisonLimiter = field(default_factory=ComparisonLimiter)
    upload_quota: int = TOTAL_QUOTA_BYTES
    warm_up: WarmUp | None = None
    state_bucket: StateBucket | None = None

    @property
    def preferences(self) -> PreferenceStore:
        """Choices between candidates, in the database of the reward functions."""
        return PreferenceStore(self.store.database)

    @property
    def forgets(self) -> bool:
        """Whether this is a Space whose state is lost with its disk at a restart."""
        in_space, on_disk = self.access.mode == "space", self.usage.database.dialect == "sqlite"
        return in_space and on_disk and self.state_bucket is None

    def close(self) -> None:
        """Interrupt a running evaluation, and write the usage events in memory to disk and the state to its bucket.

        Call before the process ends.
        """
        self.evaluation_queue.stop()
        self.meter.recorder.close()
        self.alerts.stop()
        self.usage.cache.close()
        if self.state_bucket:
            self.state_bucket.stop()

    @classmethod
    def build(
        cls,
        data_dir: Path,
        store_url: str,
        command: tuple[str, ...] = COMMAND,
        deployment: Deployment | None = None,
        prices: Prices | None = None,
        hardware: str | None = None,
        run_inline: Callable[[str], object] | None = None,
        access: AccessControl | None = None,
        upload_quota: int = TOTAL_QUOTA_BYTES,
        retention_months: int = RETENTION_MONTHS,
        telemetry_signals: Sequence[str] = (),
        webhook: Webhook | None = None,
    ) -> AppServices:
        """Build the services: register the enabled adapters and resume unfinished runs.

        Args:
            data_dir: Folder of the runs and of usage events that are not stored yet.
            store_url: URL of the database.
            command: Command that does a run, given its folder.
            deployment: Branch and commit that usage events are recorded with.
            prices: Prices of hosted models and of machines.
            hardware: Name of this machine in `prices`; None if unknown.
            run_inline: Function that does a run in this process instead of `command`; see `RunQueue`.
            access: Determines who sends a request. By default requests from this machine are the administrator's.
            upload_quota: Bytes of photos that all visitors together may upload for training runs.
            retention_months: Months after which usage events are archived.
            telemetry_signals: "traces" and "metrics" if usage events are also sent to a collector of OpenTelemetry.
            webhook: Receives alerts about the usage.

        Raises:
            StoreError: The database cannot be opened.
        """
        database = Database(store_url)
        runs = RunStore(data_dir / "runs")
        adapters = AdapterRegistry(runs)
        adapters.load()
        telemetry = open_telemetry(data_dir, telemetry_signals) if telemetry_signals else None
        recorder = Recorder(database, data_dir / "usage-spool", deployment or Deployment(), retention_months, telemetry)
        recorder.start()
        usage = UsageAnalytics(database, data_dir)
        usage.cache.start()
        alerts = Alerts(usage, webhook)
        alerts.start()
        budgets = Budgets(database)
        machine = MachinePrice(
            database, prices or Prices(), hardware, recorder.deployment.space or socket.gethostname()
        )
        meter = ComparisonMeter(recorder, prices or Prices(), hardware, budgets, machine)

        def run_ended(run: Run) -> None:
            meter.record_run(run)
            adapters.auto_enable(run)

        account = BillingAccount(store_url, recorder.deployment)
        worker = RunQueue(
            runs,
            command,
            on_end=run_ended,
            inline=run_inline,
            release=adapters.release,
            environment=account.to_env(),
        )
        worker.mark_orphans()
        worker.wake()
        evaluations = EvaluationStore(data_dir / "evaluations")
        evaluation_queue = EvaluationQueue(evaluations, lambda photos: uploads.delete_unused(runs, photos))
        evaluation_queue.mark_orphans()
        return cls(
            RewardFunctionStore(database),
            runs,
            worker,
            evaluations,
            evaluation_queue,
            adapters,
            usage,
            budgets,
            alerts,
            meter,
            access or AccessControl(),
            upload_quota=upload_quota,
        )


def open_telemetry(data_dir: Path, signals: Sequence[str]) -> TelemetryExporter:
    """Create the export to a collector. The SDK is imported only where it is used."""
    from usage.telemetry import TelemetryExporter

    return TelemetryExporter(data_dir / "telemetry-spool", signals)


@dataclass(frozen=True)
class SharedComponents:
    """Components that several tabs use. The Playground renders them.

    Attributes:
        page: The page. Use its event `load` for what opening the page does: `gr.on` without triggers would repeat it
            whenever an input of the handler changes.
        tabs: The tabs of the page.
        sliders: One slider per reward, in the order of REWARDS.
        picker: The model picker.
        playground: Inputs of the Playground by name, which its tab adds; other tabs fill them in.
    """

    page: gr.Blocks
    tabs: gr.Tabs
    sliders: list[gr.Slider]
    picker: gr.HTML
    playground: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, page: gr.Blocks, tabs: gr.Tabs) -> SharedComponents:
        """Create the other components without rendering them."""
        sliders = [
            gr.Slider(
                0,
                1,
                EQUAL_WEIGHTS.weights.get(name, 0.0),
                step=0.05,
                label=name.capitalize(),
                min_width=90,
                buttons=[],
                elem_id=f"weight-{name}",
                render=False,
            )
            for name in REWARDS
        ]
        picker = model_picker(list(PlaygroundSettings().models), elem_id="models", render=False)
        return cls(page, tabs, sliders, picker)

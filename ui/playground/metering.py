"""Counts the model calls of the page: a comparison's, whose events carry the reward of what came, and a fine-tune's."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from statistics import fmean

from inference.metering import CallTracker, UsageMeter
from inference.registry import answer
from inference.types import Request
from rewards import EQUAL_WEIGHTS
from training.runs.run import Run
from training.runs.usage_events import run_events
from ui.playground.compare import Ask, Column, Comparison, compare


@dataclass(frozen=True)
class ComparisonMeter(UsageMeter):
    """Metering for comparisons and runs."""

    def compare(
        self,
        names: list[str],
        request: Request,
        cancel: threading.Event,
        source: str,
        session: str = "",
        ask: Ask = answer,
        every: float = 0.1,
    ) -> Generator[Comparison, None, None]:
        """`compare`, with one event per model. The reward is that of the DEFAULT weights, of the candidates
        that have one: the sliders are the visitor's and move after the call."""
        calls = CallTracker(self, request, ask, source, session)
        try:
            for snapshot in compare(names, request, cancel, calls.ask, every):
                for column in snapshot.columns:
                    if column.over:
                        calls.settle(column.name, _reward(column))
                yield snapshot
        finally:
            calls.close()

    def count(self, run: Run) -> None:
        """Records the steps of a fine-tune that has ended; a run that is counted twice counts once."""
        for event in run_events(run, lambda seconds: self.prices.machine(self.hardware, seconds)):
            self.recorder.record(event.with_deployment(self.recorder.deployment))


def _reward(column: Column) -> float | None:
    totals = [EQUAL_WEIGHTS.total(card.scores) for card in column.cards if card.scores]
    known = [total for total in totals if total is not None]
    return fmean(known) if known else None

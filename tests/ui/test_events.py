"""Tests of how the page's events are triggered."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import app
from settings import Settings
from tests.support.server_routes import handler_name


def test_inputs_that_change_during_a_refresh_are_applied_after_it(tmp_path: Path) -> None:
    with closing(app.build_services(Settings(data_dir=tmp_path))) as services:
        page = app.build_page(services)
    events = [
        event
        for event in page.fns.values()
        if event.fn is not None
        and handler_name(event.fn).rpartition(".")[2] in ("refreshed", "refreshed_if_open", "updated_estimate")
        and {name for _, name in event.targets} & {"input", "change"}
    ]
    assert len(events) == 4  # Fine-tune, Evaluate (two) and Usage
    assert {event.trigger_mode for event in events} == {"always_last"}
    selections = [event for event in page.fns.values() if "select" in {name for _, name in event.targets}]
    assert len(selections) == 3  # of a tab that is left at once for another one, each is applied
    assert {event.trigger_mode for event in selections} == {"multiple"}

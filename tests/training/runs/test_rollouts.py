"""Check of the rollouts that a job recorded on another machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.runs import rollouts
from training.runs.rollouts import drop_invalid_rollouts
from training.runs.run import Run


def row(step: Any = 1, **group: Any) -> dict[str, Any]:
    """Build the record of a step with one group."""
    answer = {"text": "crop 0 0 100 100", "scores": {"colour": 0.5, "detail": None}, "total": 0.5, "advantage": None}
    return {"step": step, "groups": [{"photo": 3, "no_signal": False, "rollouts": [answer], **group}]}


@pytest.mark.parametrize(
    "invalid",
    [
        json.dumps(row(photo="../../secret")),
        json.dumps(row(photo=-1)),
        json.dumps(row(photo=1.0)),
        json.dumps(row(step="1")),
        json.dumps(row(no_signal="<b>")),
        json.dumps(row(rollouts=[{"text": "x" * 301, "scores": {}, "total": None, "advantage": None}])),
        json.dumps(row(rollouts=[{"text": "x", "scores": {}, "total": float("nan"), "advantage": None}])),
        json.dumps(row(folder="/etc")),
        '{"step": 1, "groups": [',
        "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_invalid_rows_of_a_job_are_dropped(invalid: str, tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    file.write_text("\n".join([json.dumps(row(1)), invalid, json.dumps(row(2))]) + "\n", encoding="utf-8")
    drop_invalid_rollouts(file)
    run = Run(tmp_path)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2
    assert run.rollouts(1) == row(1) and run.rollouts(5) == row(2)


def test_a_too_large_record_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MAX_RECORD_BYTES", 10)
    file = tmp_path / "rollouts.jsonl"
    file.write_text(json.dumps(row()) + "\n", encoding="utf-8")
    drop_invalid_rollouts(file)
    assert Run(tmp_path).rollouts(1) is None

"""The spread over seeds in the model card."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from inference.registry import TINY
from training.pretrain import seeds


def copy_model(folder: Path, error_lowered_by: float) -> str:
    """Copy card and figures of the published model with another figure."""
    folder.mkdir()
    shutil.copy(Path(TINY) / "README.md", folder)
    figures = json.loads((Path(TINY) / "quality.json").read_text(encoding="utf-8"))
    figures["recipe"]["error_lowered_by"] = error_lowered_by
    (folder / "quality.json").write_text(json.dumps(figures), encoding="utf-8")
    return str(folder)


def test_mean_and_deviation_are_added_to_the_card_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [copy_model(tmp_path / str(value), value / 100) for value in (20, 23, 29)]
    card = tmp_path / "20" / "README.md"
    before = card.read_text(encoding="utf-8").split(f"\n{seeds.HEADING}")[0]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["seeds", *folders])
        seeds.main()
    text = card.read_text(encoding="utf-8")
    assert text.startswith(before.rstrip("\n")) and text.count(seeds.HEADING) == 1
    assert "with 3 seeds" in text
    assert re.search(r"\| CIELAB error lowered by \| 20.0% \| 24.0% \| 4.6% \|", text)
    assert re.search(r"\| cases lowered \| \S+ \| \S+ \| 0.0% \|", text)


def test_missing_figures_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_model(tmp_path / "model", 0.2)
    monkeypatch.setattr(sys, "argv", ["seeds", folder, str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match=r"quality\.json"):
        seeds.main()

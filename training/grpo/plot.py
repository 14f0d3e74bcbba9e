"""The curve of a run as a picture, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards import REWARDS


def draw_curve(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward, its parts and the KL divergence over the steps, as a PNG. Raises OSError."""
    from matplotlib.figure import Figure  # not pyplot: it keeps figures and looks for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("reward", *REWARDS, "held_out"):
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        if points:
            style: dict[str, Any] = {"linewidth": 2.2} if name == "reward" else {"linewidth": 1, "alpha": 0.8}
            mark = "o" if name == "held_out" else None
            axes.plot(*zip(*points, strict=True), label=name.replace("_", "-"), marker=mark, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("score, 0 to 1")
    divergence = [(line["step"], line["kl"]) for line in metrics if line.get("kl") is not None]
    if divergence:
        right = axes.twinx()
        right.plot(*zip(*divergence, strict=True), color="grey", linestyle=":", label="KL to the base")
        right.set_ylabel("KL divergence, nats per token")
    figure.legend(loc="outside lower center", ncols=6)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)

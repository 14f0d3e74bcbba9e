"""The learning curve of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards import REWARDS
from storage.files import write_atomically


def draw_curve(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot reward, its components and the KL divergence over the steps.

    Args:
        metrics: The run's metrics, one row per step.
        path: The PNG file to write.

    Raises:
        OSError: The file could not be written.
    """
    from matplotlib.figure import Figure  # pyplot would keep figures and look for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("reward", *REWARDS, "held_out"):
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if points:
            style: dict[str, Any] = {"linewidth": 2.2} if name == "reward" else {"linewidth": 1, "alpha": 0.8}
            marker = "o" if name == "held_out" else None
            axes.plot(*zip(*points, strict=True), label=name.replace("_", "-"), marker=marker, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("score, 0 to 1")
    divergence = [(row["step"], row["kl"]) for row in metrics if row.get("kl") is not None]
    if divergence:
        right = axes.twinx()
        right.plot(*zip(*divergence, strict=True), color="grey", linestyle=":", label="KL to the base")
        right.set_ylabel("KL divergence, nats per token")
    figure.legend(loc="outside lower center", ncols=6)
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    write_atomically(path, png.getvalue())

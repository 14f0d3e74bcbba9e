"""Moondream at the released geometry: eight candidates for one look, and one answer against the sum of its parts."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Full geometry (378 px crops, 27 x 27 patches, 27 vision layers, 12 tiles), narrow layers, random weights.
MODEL = ROOT / "tests" / "data" / "moondream2-full"
PHOTO = (600, 900)  # height, width in pixels: 2 x 4 tiles, 9 crops with the whole picture
CANDIDATES, NEW_TOKENS, RUNS = 8, 32, 3


def rows() -> list[dict[str, Any]]:
    """Each mode is measured in a process of its own, so that the peaks of memory are its own."""
    together, apart, parts = (_in_a_process(mode) for mode in ("together", "apart", "parts"))
    setting = (
        f"{PHOTO[1]} x {PHOTO[0]} px, {NEW_TOKENS} tokens each, float32, CPU time of one thread, median of {RUNS} runs"
    )
    return [
        {
            "name": f"moondream: {CANDIDATES} sampled answers to one photo",
            "value": round(together["seconds"], 3),
            "unit": "s",
            "baseline": round(apart["seconds"], 3),
            "ratio": round(apart["seconds"] / together["seconds"], 2),
            "target": "ratio >= 5",
            "note": f"one call against {CANDIDATES} calls; {setting}",
        },
        {
            "name": f"moondream: peak memory of {CANDIDATES} answers",
            "value": round(together["megabytes"]),
            "unit": "MB",
            "baseline": round(apart["megabytes"]),
            "ratio": round(together["megabytes"] / apart["megabytes"], 2),
            "target": None,
            "note": f"whole process, one call against {CANDIDATES} calls",
        },
        {
            "name": "moondream: one answer",
            "value": round(parts["whole"], 3),
            "unit": "s",
            "baseline": round(parts["sum"], 3),
            "ratio": round(parts["whole"] / parts["sum"], 3),
            "target": "ratio <= 1.1",
            "note": f"generate() against the sum of its parts; {setting}",
        },
        *(_part_row(name, parts) for name in ("vision", "prefill", "decode")),
    ]


def _part_row(name: str, parts: dict[str, float]) -> dict[str, Any]:
    share = f"{parts[name] / parts['sum']:.0%} of the sum of the parts"
    row = {"name": f"moondream: one answer, {name}", "value": round(parts[name], 4), "unit": "s"}
    return {**row, "baseline": None, "ratio": None, "target": None, "note": share}


def _in_a_process(mode: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.moondream", mode]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _load() -> tuple[Any, dict[str, Any]]:
    """The model and one question about one drawn photo."""
    import numpy as np
    import torch
    from transformers import AutoModelForImageTextToText

    from inference.moondream import MoondreamImageProcessor

    torch.manual_seed(0)
    # On one thread CPU time is what an idle machine's clock shows, and a busy machine does not change it.
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
    config: Any = model.config
    around = config.templates["query"]
    prompt = [*around["prefix"], *range(100, 107), *around["suffix"] * 2]
    ids = [config.bos_id, *[config.image_token_id] * config.image_tokens, *prompt]
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)
    images = MoondreamImageProcessor.from_config(config)(photo)
    return model, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long(), **images}


def _answer(model: Any, given: dict[str, Any], count: int = 1, sample: bool = True) -> None:
    model.generate(
        **given,
        do_sample=sample,
        num_return_sequences=count,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _median(call: Callable[[], Any]) -> dict[str, float]:
    """Median time of the call, and the peak of the process's memory, once all runs are over."""
    seconds = statistics.median(_seconds(call) for _ in range(RUNS))
    # Kilobytes, but bytes on a Mac.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def _together() -> dict[str, float]:
    model, given = _load()
    _answer(model, given)
    return _median(lambda: _answer(model, given, CANDIDATES))


def _apart() -> dict[str, float]:
    model, given = _load()
    _answer(model, given)
    return _median(lambda: [_answer(model, given) for _ in range(CANDIDATES)])


def _parts() -> dict[str, float]:
    """The whole and its parts in turn, so that whatever else the machine does hits them alike; medians of each."""
    import torch

    model, given = _load()
    measured: dict[str, list[float]] = {name: [] for name in ("whole", "vision", "prefill", "decode", "sum")}
    with torch.inference_mode():
        _answer(model, given, sample=False)
        for _ in range(RUNS):
            measured["whole"].append(_seconds(lambda: _answer(model, given, sample=False)))
            parts = _measure_parts(model, given)
            for name, seconds in {**parts, "sum": sum(parts.values())}.items():
                measured[name].append(seconds)
    return {name: statistics.median(values) for name, values in measured.items()}


def _measure_parts(model: Any, given: dict[str, Any]) -> dict[str, float]:
    """The bare forward passes of one greedy answer, without `generate`."""
    start = time.process_time()
    features = model.get_image_features(given["pixel_values"], given["image_sizes"])
    seen = time.process_time()
    output = model(input_ids=given["input_ids"], image_features=features, use_cache=True, logits_to_keep=1)
    filled = time.process_time()
    for _ in range(NEW_TOKENS - 1):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return {"vision": seen - start, "prefill": filled - seen, "decode": time.process_time() - filled}


MODES: dict[str, Callable[[], dict[str, float]]] = {"together": _together, "apart": _apart, "parts": _parts}

if __name__ == "__main__":
    chosen = argparse.ArgumentParser(description=__doc__)
    chosen.add_argument("mode", choices=MODES)
    print(json.dumps(MODES[chosen.parse_args().mode]()))

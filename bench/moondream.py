"""Moondream at the released geometry: eight answers in one call, and one answer against the sum of its stages."""

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
    """Measure each mode in a separate process, so that peaks of memory are separate."""
    batched, separate, stages = (_run_mode(mode) for mode in ("batched", "separate", "stages"))
    setting = (
        f"{PHOTO[1]} x {PHOTO[0]} px, {NEW_TOKENS} tokens each, float32, CPU time of one thread, median of {RUNS} runs"
    )
    return [
        {
            "name": f"moondream: {CANDIDATES} sampled answers to one photo",
            "value": round(batched["seconds"], 3),
            "unit": "s",
            "baseline": round(separate["seconds"], 3),
            "ratio": round(separate["seconds"] / batched["seconds"], 2),
            "target": "ratio >= 5",
            "note": f"one call against {CANDIDATES} calls; {setting}",
        },
        {
            "name": f"moondream: peak memory of {CANDIDATES} answers",
            "value": round(batched["megabytes"]),
            "unit": "MB",
            "baseline": round(separate["megabytes"]),
            "ratio": round(batched["megabytes"] / separate["megabytes"], 2),
            "target": None,
            "note": f"whole process, one call against {CANDIDATES} calls",
        },
        {
            "name": "moondream: one answer",
            "value": round(stages["whole"], 3),
            "unit": "s",
            "baseline": round(stages["sum"], 3),
            "ratio": round(stages["whole"] / stages["sum"], 3),
            "target": "ratio <= 1.1",
            "note": f"generate() against the sum of its stages; {setting}",
        },
        *(_stage_row(name, stages) for name in ("vision", "prefill", "decode")),
    ]


def _stage_row(name: str, stages: dict[str, float]) -> dict[str, Any]:
    share = f"{stages[name] / stages['sum']:.0%} of the sum of the stages"
    row = {"name": f"moondream: one answer, {name}", "value": round(stages[name], 4), "unit": "s"}
    return {**row, "baseline": None, "ratio": None, "target": None, "note": share}


def _run_mode(mode: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.moondream", mode]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _load() -> tuple[Any, dict[str, Any]]:
    """Load the model and build one question about a random photo."""
    import numpy as np
    import torch
    from transformers import AutoModelForImageTextToText

    from inference.moondream import MoondreamImageProcessor

    torch.manual_seed(0)
    # On one thread, CPU time equals wall time on an idle machine, and a busy machine does not change it.
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
    config: Any = model.config
    template = config.templates["query"]
    prompt = [*template["prefix"], *range(100, 107), *template["suffix"] * 2]
    ids = [config.bos_id, *[config.image_token_id] * config.image_tokens, *prompt]
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)
    images = MoondreamImageProcessor.from_config(config)(photo)
    return model, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long(), **images}


def _answer(model: Any, inputs: dict[str, Any], count: int = 1, sample: bool = True) -> None:
    model.generate(
        **inputs,
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
    """Return the median CPU time of the call, and the peak memory of the process after all runs."""
    seconds = statistics.median(_seconds(call) for _ in range(RUNS))
    # kilobytes, but bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def _batched() -> dict[str, float]:
    model, inputs = _load()
    _answer(model, inputs)
    return _median(lambda: _answer(model, inputs, CANDIDATES))


def _separate() -> dict[str, float]:
    model, inputs = _load()
    _answer(model, inputs)
    return _median(lambda: [_answer(model, inputs) for _ in range(CANDIDATES)])


def _stages() -> dict[str, float]:
    """Measure the whole answer and its stages alternately, so that other load affects both; medians of each."""
    import torch

    model, inputs = _load()
    measured: dict[str, list[float]] = {name: [] for name in ("whole", "vision", "prefill", "decode", "sum")}
    with torch.inference_mode():
        _answer(model, inputs, sample=False)
        for _ in range(RUNS):
            measured["whole"].append(_seconds(lambda: _answer(model, inputs, sample=False)))
            stages = _measure_stages(model, inputs)
            for name, seconds in {**stages, "sum": sum(stages.values())}.items():
                measured[name].append(seconds)
    return {name: statistics.median(values) for name, values in measured.items()}


def _measure_stages(model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Run the forward passes of one greedy answer without `generate`."""
    start = time.process_time()
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    encoded = time.process_time()
    output = model(input_ids=inputs["input_ids"], image_features=features, use_cache=True, logits_to_keep=1)
    prefilled = time.process_time()
    for _ in range(NEW_TOKENS - 1):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return {"vision": encoded - start, "prefill": prefilled - encoded, "decode": time.process_time() - prefilled}


MODES: dict[str, Callable[[], dict[str, float]]] = {"batched": _batched, "separate": _separate, "stages": _stages}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=MODES)
    print(json.dumps(MODES[parser.parse_args().mode]()))

"""A GRPO step: stock TRL against cached image features and shared prompt prefixes."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The released vision geometry (378 px crops, 27 x 27 patches, 27 layers, 12 tiles), narrow layers, random weights.
FULL_GEOMETRY = ROOT / "tests" / "data" / "moondream2-full" / "config.json"
STEPS = {"tiny": 8, "378 px": 3}
PHOTOS, ROLLOUTS = 4, 8


def rows() -> list[dict[str, Any]]:
    """Measure each case in a separate process."""
    table = []
    for geometry, steps in STEPS.items():
        stock, ours = (_run_case(geometry, mode) for mode in ("stock", "cached"))
        note = f"{PHOTOS} photos x {ROLLOUTS} answers, one thread, median of {steps} steps after the first"
        target = "ratio >= 3" if geometry == "378 px" else None
        row = {"name": f"grpo: a step at {geometry}", "value": round(ours["seconds"], 3), "unit": "s"}
        ratio = round(stock["seconds"] / ours["seconds"], 2)
        row |= {"baseline": round(stock["seconds"], 3), "ratio": ratio, "target": target}
        table.append({**row, "note": f"photos and prompts computed once, against stock TRL; {note}"})
        memory = {"name": f"grpo: peak memory at {geometry}", "value": ours["megabytes"], "unit": "MB"}
        memory |= {"baseline": stock["megabytes"], "ratio": round(ours["megabytes"] / stock["megabytes"], 2)}
        table.append({**memory, "target": None, "note": "the whole process"})
    return table


def _run_case(geometry: str, mode: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.grpo", geometry, mode]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(geometry: str, cached: bool) -> dict[str, float]:
    """Return the median seconds of a step and the peak memory in MB."""
    import cv2
    import torch
    from transformers import TrainerCallback

    from training.grpo.reward import RecipeReward
    from training.grpo.train import build_trainer
    from training.runs.run import Run, RunConfig

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    config = RunConfig.create(base="moondream-tiny", reward={"colour": 1.0}, seed=1, save_every=2_000)
    bundle, photos = _load_policy(geometry, cached, config), _photos()
    times: list[float] = []

    class StepTimer(TrainerCallback):
        """Records when steps end."""

        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        reward = RecipeReward(photos, config.reward_function, ROLLOUTS)
        trainer = build_trainer(Run(folder), config, bundle, reward, STEPS[geometry] + 1)
        trainer.args.save_strategy = "no"  # type: ignore[assignment]
        trainer.add_callback(StepTimer())
        trainer.train()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": round(peak / (1e6 if sys.platform == "darwin" else 1e3))}


def _load_policy(geometry: str, cached: bool, config: Any) -> Any:
    import torch

    from inference.local.constraint import RecipeConstraint
    from inference.moondream import MoondreamConfig, MoondreamImageProcessor, MoondreamProcessor
    from recipes import grammar_segments
    from training.grpo.policy import Policy
    from training.grpo.train import add_lora, load_policy

    bundle = load_policy(config)
    if geometry != "tiny":
        released, tokenizer = json.loads(FULL_GEOMETRY.read_text()), bundle.processor.tokenizer
        sections = released["config"] | {"tokenizer": {"templates": bundle.policy.config.templates}}
        sections["text"] = sections["text"] | {"vocab_size": len(tokenizer)}
        torch.manual_seed(0)
        policy = Policy(MoondreamConfig(config=sections))  # type: ignore[call-arg]
        policy.prepare(RecipeConstraint(tokenizer, grammar_segments(), end_id=policy.config.eos_id))
        bundle.policy, bundle.model = policy, add_lora(policy, bundle.spec, config)
        bundle.processor = MoondreamProcessor(
            type(bundle.processor.image_processor).from_config(policy.config),
            tokenizer,
            templates=policy.config.templates,
            image_token_id=policy.config.image_token_id,
        )
    if not cached:
        bundle.policy.image_cache, bundle.policy.share_prompts = None, False
        bundle.processor.image_processor = MoondreamImageProcessor.from_config(bundle.policy.config)
    return bundle


def _photos() -> list[Any]:
    from recipes import load_photo, shrink
    from training.data.bundled import bundled_photos

    return [shrink(load_photo(info.path)) for info in bundled_photos("train")[:PHOTOS]]


def main() -> None:
    """Measure one case and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("geometry", choices=STEPS)
    parser.add_argument("mode", choices=("stock", "cached"))
    options = parser.parse_args()
    print(json.dumps(measure(options.geometry, options.mode == "cached")))


if __name__ == "__main__":
    main()

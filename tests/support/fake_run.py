"""A training run that learns nothing: it obeys a run's protocol without a model.

The seed says how it goes: 1xx loses on held-out photos, 2xx fails, 3xx waits at step 3 until it is ended or cancelled,
4xx writes hostile words, 5xx wins but with an alarm; any other wins. FAKE_RUN_PAUSE is its seconds per step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock
from safetensors.numpy import save_file

from recipes import Recipe, random_recipe, save_picture
from training.data.bundled import bundled
from training.runs.run import Run

HOSTILE = "<img src=x onerror=window.hacked=1>${window.hacked=2}{{constructor}}"
PAUSE = float(os.environ.get("FAKE_RUN_PAUSE", "0"))


def main(folder: str) -> int:
    """Everything that the real one writes. Exit status 3 where it is asked to fail."""
    run = Run(folder)
    with FileLock(run.folder / "lock", timeout=1):
        config = run.config()
        kind, first = config.seed // 100, last_checkpoint(run)
        run.forget_after(first)
        run.set_status(state="running", phase="loading the model", step=first, steps=config.steps, started=time.time())
        (run.folder / "pid").write_text(str(os.getpid()))
        print(f"begins at step {first}", flush=True)
        photo = probe_photo(run)
        for step in range(first, config.steps):
            if run.cancelled:
                return end(run, "cancelled", "Cancelled; what was learned is kept.")
            if kind == 2 and step == 2:
                raise SystemExit(3)
            while kind == 3 and step == 3 and not run.cancelled:
                time.sleep(0.02)
            learn(run, step + 1, config.steps, photo, HOSTILE if kind == 4 else "")
        run.set_status(phase="measuring the tuned model")
        write_adapter(run)
        write_result(run, wins=kind != 1, alarm="The reward rose, but not on new photos." if kind == 5 else "")
        return end(run, "done", "")


def learn(run: Run, step: int, steps: int, photo: str, hostile: str) -> None:
    """One step's lines; every fifth is a checkpoint."""
    time.sleep(PAUSE)
    rng = np.random.default_rng(step)
    rise = 0.3 + 0.4 * step / steps
    parts = {name: round(rise + float(rng.normal(0, 0.03)), 4) for name in ("sharpness", "colour", "creativity")}
    line = {"step": step, "seconds": 0.5, "reward": rise, **parts, "kl": 0.01 * step, "entropy": 2 - step / steps}
    run.add("metrics", {**line, "distinct": 0.9, "valid": 1.0, "learning_rate": 0.002})
    if step == 1 or step % 3 == 0:
        recipe = hostile or str(random_recipe(rng))
        run.add("probes", {"step": step, "photo": photo, "recipe": recipe, "scores": parts, "total": rise})
    run.set_status(phase=hostile or "training", step=step)
    print(f"step {step}: reward {rise:.3f} {hostile}", flush=True)
    if step % 5 == 0:
        (run.folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        write_adapter(run)


def last_checkpoint(run: Run) -> int:
    return max((int(folder.name.split("-")[1]) for folder in run.folder.glob("checkpoint-*")), default=0)


def probe_photo(run: Run) -> str:
    photo = bundled("held-out")[0].path
    small = cv2.resize(cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB), (512, 384))
    save_picture(small, Recipe(), run.folder / "probe.png")
    return photo.name


def write_adapter(run: Run) -> None:
    """An adapter for moondream-tiny that changes nothing: its second factor is zero."""
    run.adapter.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["text.blocks.0.attn.qkv"],
    }
    config |= {"base_model_name_or_path": "moondream-tiny", "inference_mode": True}
    module = "base_model.model.model.text.blocks.0.attn.qkv"
    tensors = {
        f"{module}.lora_A.weight": np.full((4, 192), 0.01, np.float32),
        f"{module}.lora_B.weight": np.zeros((576, 4), np.float32),
    }
    save_file(tensors, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))


def write_result(run: Run, wins: bool, alarm: str) -> None:
    names = ("sharpness", "colour", "creativity", "total")
    base = {name: {"mean": 0.41, "low": 0.38, "high": 0.44} for name in names} | {"valid": 1.0}
    lift = 0.2 if wins else -0.01
    tuned = {name: {"mean": 0.41 + lift, "low": 0.38 + lift, "high": 0.44 + lift} for name in names} | {"valid": 1.0}
    pairs = []
    for place, info in enumerate(bundled("held-out")[:3]):
        small = cv2.resize(cv2.cvtColor(cv2.imread(str(info.path)), cv2.COLOR_BGR2RGB), (512, 384))
        save_picture(small, Recipe(), run.folder / f"pair{place}.png")
        recipes = [str(random_recipe(np.random.default_rng(seed + place))) for seed in (10, 20)]
        pairs.append(
            {"photo": info.path.name, "picture": f"pair{place}.png", "base": recipes[0], "tuned": recipes[1]}
            | {"base_total": 0.41, "tuned_total": 0.41 + lift}
        )
    result = {
        "base_model": "moondream-tiny",
        "held_out": 24,
        "base": base,
        "tuned": tuned,
        "difference": {"mean": lift, "low": lift - 0.03, "high": lift + 0.03},
        "wins": wins,
        "alarm": alarm,
        "pairs": pairs,
        "steps": run.config().steps,
        "seconds": 42.5,
        "peak_memory_bytes": 900_000_000,
        "entropy": {"first": 2.0, "last": 1.1},
        "distinct": {"first": 0.9, "last": 0.6},
    }
    (run.folder / "result.json").write_text(json.dumps(result))
    save_picture(np.full((120, 240, 3), 200, np.uint8), Recipe(), run.folder / "reward.png")


def end(run: Run, state: str, message: str) -> int:
    run.set_status(state=state, phase="", ended=time.time(), message=message)
    print(state, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))

"""Fake training process: follows the protocol of a run's folder without a model.

The hundreds of the seed choose the outcome: 1xx loses on held-out photos, 2xx fails at step 2, 3xx waits at step 3
until it is cancelled or killed, 4xx writes hostile text, 5xx wins with the warning of an earlier version, 6xx wins with
two alarms from step 2 on and waits at step 3 for a file named continue, any other wins. FAKE_RUN_PAUSE sets
the seconds per step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock
from safetensors.numpy import save_file

from recipes import Recipe, random_recipe, save_picture
from rewards import EQUAL_WEIGHTS
from training.data.bundled import bundled_photos
from training.data.sources import PhotoSet
from training.grpo.alarms import Alarm, store_alarms
from training.grpo.reward import RecipeReward, RolloutGroup
from training.grpo.rollouts import record_rollouts
from training.runs.run import Run

HOSTILE = "<img src=x onerror=window.hacked=1>${window.hacked=2}{{constructor}}"
PAUSE = float(os.environ.get("FAKE_RUN_PAUSE", "0"))


def main(folder: str) -> int:
    """Execute a run: write everything that real training writes. Exits with status 3 if it is to fail."""
    run = Run(folder)
    with FileLock(run.folder / "lock", timeout=1):
        config = run.config()
        kind, start = config.seed // 100, last_checkpoint(run)
        run.truncate_after(start)
        run.set_status(state="running", phase="loading the model", step=start, steps=config.steps, started=time.time())
        (run.folder / "pid").write_text(str(os.getpid()))
        print(f"begins at step {start}", flush=True)
        photo = write_probe_photo(run)
        for step in range(start, config.steps):
            if run.cancelled:
                return end(run, "cancelled", "Cancelled. The training so far is kept.")
            if kind == 2 and step == 2:
                raise SystemExit(3)
            if kind == 6 and step >= 2:
                write_alarms(run, step)
            while kind in (3, 6) and step == 3 and not (run.folder / "continue").exists() and not run.cancelled:
                time.sleep(0.02)
            write_step(run, step + 1, config.steps, photo, HOSTILE if kind == 4 else "")
        run.set_status(phase="evaluating the tuned model")
        write_adapter(run)
        write_result(run, wins=kind != 1, alarm="The reward rose, but not on new photos." if kind == 5 else "")
        return end(run, "done", "")


def write_step(run: Run, step: int, steps: int, photo: str, hostile: str) -> None:
    """Write the metrics of a step, a probe at every third and a checkpoint at every fifth."""
    time.sleep(PAUSE)
    rng = np.random.default_rng(step)
    reward = 0.3 + 0.4 * step / steps
    scores = {name: round(reward + float(rng.normal(0, 0.03)), 4) for name in ("sharpness", "colour", "creativity")}
    row = {"step": step, "seconds": 0.5, "reward": reward, **scores, "kl": 0.01 * step, "entropy": 2 - step / steps}
    run.append_metrics({**row, "distinct": 0.9, "valid": 1.0, "learning_rate": 0.002})
    write_rollouts(run, step, hostile)
    if step == 1 or step % 3 == 0:
        recipe = hostile or str(random_recipe(rng))
        run.append_probe({"step": step, "photo": photo, "recipe": recipe, "scores": scores, "total": reward})
    run.set_status(phase=hostile or "training", step=step)
    print(f"step {step}: reward {reward:.3f} {hostile}", flush=True)
    if step % 5 == 0:
        (run.folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        (run.folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        write_adapter(run)


def write_rollouts(run: Run, step: int, hostile: str) -> None:
    """Record two groups of three rollouts; those of the second group have equal rewards."""
    rng = np.random.default_rng(step)
    scores = [{name: float(rng.uniform()) for name in ("sharpness", "colour", "creativity")} for _ in range(3)]
    totals = [EQUAL_WEIGHTS.total(part) for part in scores]
    texts = [hostile or str(random_recipe(rng)) for _ in range(3)]
    reward = RecipeReward(training_photos(), EQUAL_WEIGHTS, 3)
    reward.groups = [
        RolloutGroup(0, texts, list(scores), totals),
        RolloutGroup(1, texts, [scores[0]] * 3, totals[:1] * 3),
    ]
    record_rollouts(run, step, reward)


@cache
def training_photos() -> list[np.ndarray]:
    return [small_photo(info.path) for info in bundled_photos("train")[:2]]


def last_checkpoint(run: Run) -> int:
    return max((int(folder.name.split("-")[1]) for folder in run.folder.glob("checkpoint-*")), default=0)


def small_photo(path: Path) -> np.ndarray:
    return cv2.resize(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), (512, 384))


def write_probe_photo(run: Run) -> str:
    """Write the first held-out photo as the probe photo; return its name."""
    path = bundled_photos("held-out")[0].path
    save_picture(small_photo(path), Recipe(), run.folder / "probe.png")
    return path.name


def write_adapter(run: Run) -> None:
    """Write an adapter for moondream-tiny that changes nothing: its second factor is zero."""
    run.adapter.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["text.blocks.0.attn.qkv"],
        "base_model_name_or_path": "moondream-tiny",
        "inference_mode": True,
    }
    module = "base_model.model.model.text.blocks.0.attn.qkv"
    tensors = {
        f"{module}.lora_A.weight": np.full((4, 192), 0.01, np.float32),
        f"{module}.lora_B.weight": np.zeros((576, 4), np.float32),
    }
    save_file(tensors, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))


def write_result(run: Run, wins: bool, alarm: str) -> None:
    """Write result.json with its pictures."""
    names = ("sharpness", "colour", "creativity", "total")
    base = {name: {"mean": 0.41, "low": 0.38, "high": 0.44} for name in names} | {"valid": 1.0}
    gain = 0.2 if wins else -0.01
    tuned = {name: {"mean": 0.41 + gain, "low": 0.38 + gain, "high": 0.44 + gain} for name in names} | {"valid": 1.0}
    pairs = []
    for index, info in enumerate(bundled_photos("held-out")[:3]):
        save_picture(small_photo(info.path), Recipe(), run.folder / f"pair{index}.png")
        recipes = [str(random_recipe(np.random.default_rng(seed + index))) for seed in (10, 20)]
        pairs.append(
            {"photo": info.path.name, "picture": f"pair{index}.png", "base": recipes[0], "tuned": recipes[1]}
            | {"base_total": 0.41, "tuned_total": 0.41 + gain}
        )
    result = {
        "base_model": "moondream-tiny",
        "held_out": 24,
        "base": base,
        "tuned": tuned,
        "difference": {"mean": gain, "low": gain - 0.03, "high": gain + 0.03},
        "wins": wins,
        "alarm": alarm or " ".join(f"{row['title']}." for row in run.alarms()),
        **({} if alarm else {"alarms": run.alarms()}),
        "pairs": pairs,
        "steps": run.config().steps,
        "seconds": 42.5,
        "peak_memory_bytes": 900_000_000,
        "entropy": {"first": 2.0, "last": 1.1},
        "distinct": {"first": 0.9, "last": 0.6},
    }
    (run.folder / "result.json").write_text(json.dumps(result))
    save_picture(np.full((120, 240, 3), 200, np.uint8), Recipe(), run.folder / "reward.png")


def write_alarms(run: Run, step: int) -> None:
    """Record two alarms with pictures of the first two held-out photos."""
    files = bundled_photos("held-out")[3:5]
    held_out = PhotoSet([small_photo(file.path) for file in files], [file.path.name for file in files])
    alarms = [
        Alarm(
            "cut_subject",
            "Edits cut off the subject",
            "In 5 of 8 answers to held-out photos the crop removes more than 25% of what matters, "
            "or cuts off a head. The reward pays for cutting away.",
            "Look at the photo. Train again with other weights: people do not agree "
            "with a reward that is won by small crops.",
            index=0,
            recipe=str(Recipe(crop=(40, 40, 100, 100))),
        ),
        Alarm(
            "at_limits",
            "Recipes are at the limits of their ranges",
            "6 of 8 answers to held-out photos have the largest or smallest possible value, mostly in exposure. "
            "The reward rises with the strength of an edit, not with its fit to the photo.",
            "Look at the photo. Train again with a lower weight of the part that rises, or with a higher KL weight.",
            index=1,
            recipe=str(Recipe(exposure=100)),
        ),
    ]
    store_alarms(
        run,
        [asdict(replace(alarm, step=2, last_step=step, photo=held_out.names[alarm.index])) for alarm in alarms],
        held_out,
    )


def end(run: Run, state: str, message: str) -> int:
    run.set_status(state=state, phase="", ended=time.time(), message=message)
    print(state, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))

"""The DPO fine-tune with TRL on choices between recipes, with the policy and the held-out gate of GRPO runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamProcessor
from recipes import Recipe, save_picture, shrink
from training.data.sources import PhotoSet, PhotoSourceError, load_photos
from training.grpo.callbacks import RunCallback
from training.grpo.plot import draw_curve
from training.grpo.policy import Policy
from training.grpo.result import build_result
from training.grpo.reward import RecipeReward
from training.grpo.train import PolicyBundle, last_checkpoint, load_policy, save_adapter, total_steps, trainer_arguments
from training.preferences.export import read_folder
from training.runs.run import Run, RunAborted, RunConfig

MIN_HELD_OUT = 4  # photos that no choice was made on


class PreferenceCollator:
    """Batches rows of TRL's preference format: first the chosen completions [N], then the rejected ones [N].

    TRL's own collator formats completions as chats; Moondream's completions are plain text after the prompt.
    """

    def __init__(self, processor: MoondreamProcessor, constraint: RecipeConstraint, question: str) -> None:
        """Create the collator.

        Args:
            processor: The policy's processor.
            constraint: The grammar, which splits recipes into the tokens that the policy samples.
            question: The prompt of every row.
        """
        self.processor, self.constraint, self.question = processor, constraint, question

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and completion_mask [2N, L], pixel_values and image_sizes.

        Completions begin at the same column in all rows and are padded at the right.
        """
        images = [row["images"][0] for row in rows] * 2
        prompts = self.processor.prepare(images, "query", self.question)
        texts = [row[side][0]["content"] for side in ("chosen", "rejected") for row in rows]
        tokens = [self.constraint.encode(text) for text in texts]
        length = max(map(len, tokens))
        ids = torch.tensor([row + [self.constraint.end_id] * (length - len(row)) for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in tokens])
        prompt_mask = prompts["attention_mask"]
        return {
            **prompts,
            "input_ids": torch.cat([prompts["input_ids"], ids], 1),
            "attention_mask": torch.cat([prompt_mask, mask], 1),
            "completion_mask": torch.cat([torch.zeros_like(prompt_mask), mask], 1),
        }


class PreferenceCallback(RunCallback):
    """Records a DPO run. Its `reward` is the share of a batch's choices with which the policy agrees."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Append one row of metrics per step."""
        if not state.is_world_process_zero or not logs or "rewards/accuracies" not in logs:
            return
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 2)}
        row |= {"reward": logs["rewards/accuracies"], "margin": logs["rewards/margins"]}
        row |= {name: logs[name] for name in ("loss", "entropy", "learning_rate") if name in logs}
        if self.held_out_mean is not None:
            row["held_out"], self.held_out_mean = self.held_out_mean, None
        self.run.append_metrics(row)
        values = f"agrees {row['reward']:.2f}  margin {row['margin']:.3f}  loss {row.get('loss', 0.0):.3f}"
        print(f"step {state.global_step}/{state.max_steps}  {values}", flush=True)


def run_dpo(run: Run, config: RunConfig, set_phase: Any) -> dict[str, Any] | None:
    """Train on this machine; arguments, result and exceptions are those of `training.grpo.train.run_training`.

    `config.photos` is the folder of an export of choices; see `training.preferences.export`. Held-out photos on which a
    choice was made are left out of the evaluation.
    """
    set_phase("loading the model")
    bundle = load_policy(config)
    set_phase("loading the choices")
    rows, photos = load_rows(Path(config.photos), bundle)
    held_out = load_held_out(config, set(photos))
    print(f"Training on {len(rows)} choices on {len(photos)} photos. Evaluating on {held_out.describe()}.", flush=True)
    steps = total_steps(config, len(rows))

    set_phase("evaluating the base model")
    with bundle.model.disable_adapter():
        base = bundle.evaluate_photos(held_out.photos)
    reward = RecipeReward([], config.reward_function, config.rollouts)
    callback = PreferenceCallback(run, config, bundle.evaluate_photos, reward, held_out)
    trainer = build_trainer(run, config, bundle, rows, photos, steps)
    checkpoint = last_checkpoint(run.folder)
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    run.truncate_after(start)
    run.set_status(step=start, steps=steps)
    save_picture(held_out.photos[0], Recipe(), run.folder / "probe.png")
    if not checkpoint:
        callback.probe(0)
    trainer.add_callback(callback)

    set_phase("training")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    set_phase("saving")
    bundle.model.delete_adapter("ref")  # the trainer's copy of the adapter at the start
    save_adapter(bundle.model, run)
    draw_curve(run.metrics(), run.folder / "reward.png")
    if run.cancelled:
        return None

    set_phase("evaluating the tuned model")
    tuned = bundle.evaluate_photos(held_out.photos)
    return build_result(run, bundle.spec.name, config.reward_function, held_out, base, tuned)


def load_rows(folder: Path, bundle: PolicyBundle) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Load the choices whose recipes the policy can write, and the photos by file name. Raises RunAborted."""
    try:
        rows, photos = read_folder(folder)
    except OSError:
        raise RunAborted("The choices of this run were deleted. Start a new run.") from None
    constraint = bundle.policy.constraint
    assert constraint is not None
    kept = [
        row for row in rows if all(_encodes(constraint, row[side][0]["content"]) for side in ("chosen", "rejected"))
    ]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} choices are left out: {bundle.spec.title} cannot write their recipes.")
    if not kept:
        raise RunAborted("There is no choice to train on: none has a photo and recipes that the model can write.")
    return kept, {name: shrink(photo) for name, photo in photos.items()}


def _encodes(constraint: RecipeConstraint, text: str) -> bool:
    try:
        return bool(constraint.encode(text))
    except ValueError:
        return False


def load_held_out(config: RunConfig, chosen_on: set[str]) -> PhotoSet:
    """Load the held-out photos on which no choice was made.

    Args:
        config: The run's config.
        chosen_on: File names of the photos with choices.

    Raises:
        RunAborted: Too few are left.
    """
    try:
        photo_set = load_photos(config.held_out, "held-out", config.max_photos, config.seed)
    except PhotoSourceError as error:
        raise RunAborted(str(error)) from None
    held_out = photo_set.select(lambda index: photo_set.names[index] not in chosen_on)
    if len(held_out.photos) < MIN_HELD_OUT:
        raise RunAborted("Choices were made on nearly all held-out photos, so the result could not be judged.")
    return held_out


def build_trainer(
    run: Run,
    config: RunConfig,
    bundle: PolicyBundle,
    rows: list[dict[str, Any]],
    photos: dict[str, np.ndarray],
    steps: int,
) -> DPOTrainer:
    """Build TRL's DPO trainer.

    Args:
        run: The run whose folder receives the checkpoints.
        config: Its config; each step uses `photos_per_step` choices.
        bundle: The policy.
        rows: Rows of TRL's preference format.
        photos: uint8 RGB by the names in the rows' `images`.
        steps: Number of updates.
    """
    assert bundle.policy.constraint is not None
    args = DPOConfig(
        per_device_train_batch_size=min(config.photos_per_step, len(rows)),
        max_length=None,
        **trainer_arguments(run, config, bundle, steps),
    )
    trainer = DPOTrainer(
        model=bundle.model,
        args=args,
        data_collator=PreferenceCollator(bundle.processor, bundle.policy.constraint, bundle.question),
        train_dataset=build_dataset(rows, photos),
        processing_class=bundle.processor,
    )
    trainer.remove_callback(PrinterCallback)
    # DPOTrainer replaces `forward` by its own log-probability pass, which ignores the grammar. Use the policy's.
    bundle.policy.__dict__["forward"] = MethodType(padded_forward, bundle.policy)
    return trainer


def build_dataset(rows: list[dict[str, Any]], photos: dict[str, np.ndarray]) -> Dataset:
    """Build the training dataset in TRL's preference format. The pictures stay in memory, once per photo."""
    pictures = {name: Image.fromarray(photo) for name, photo in photos.items()}

    def load(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        selected = [rows[index] for index in batch["row"]]
        columns: dict[str, list[Any]] = {
            key: [row[key] for row in selected] for key in ("prompt", "chosen", "rejected")
        }
        return {**columns, "images": [[pictures[row["images"][0]]] for row in selected]}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(load)


@wraps(Policy.forward, assigned=())  # `generate` checks its arguments by the signature
def padded_forward(policy: Policy, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
    """Run the policy; with `fused_lm_head`, return its scores in the shape that DPOTrainer expects, [B, L - 1].

    Prompt tokens score 0. Mean logits and top-1 matches, which the trainer only logs, are not computed.
    """
    outputs = Policy.forward(policy, *args, fused_lm_head=fused_lm_head, **kwargs)
    if not fused_lm_head:
        return outputs
    missing = kwargs["labels"].shape[1] - 1 - outputs.log_probs.shape[1]
    log_probs, entropy = (
        torch.nn.functional.pad(values, (missing, 0)) for values in (outputs.log_probs, outputs.entropy)
    )
    zeros = torch.zeros_like(entropy)
    return SimpleNamespace(log_probs=log_probs, entropy=entropy, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)

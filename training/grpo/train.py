"""The GRPO fine-tune with TRL, from loading the model to the result on held-out photos; see `run_training`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from inference import availability
from inference.moondream import MoondreamProcessor
from inference.types import RECIPE_QUESTION, ModelSpec, recipe_prompt
from recipes import Recipe, save_picture
from training.data.sources import PhotoSourceError, mix_flawed, train_eval_split
from training.evaluate import EvaluateError, ScoredAnswer, resolve_model, score_answer
from training.grpo.callbacks import RunCallback
from training.grpo.plot import draw_curve
from training.grpo.policy import LORA_TARGET_MODULES, Policy, generate_greedy, load_with_processor
from training.grpo.result import build_result
from training.grpo.reward import RecipeReward
from training.runs.run import Run, RunAborted, RunConfig

CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors")


@dataclass
class PolicyBundle:
    """A policy with what is needed to query it.

    Attributes:
        model: The policy wrapped by PEFT.
        policy: The bare policy.
        processor: Its processor.
        question: The question that asks for a recipe.
        spec: The model that it was loaded from.
    """

    model: Any
    policy: Policy
    processor: MoondreamProcessor
    question: str
    spec: ModelSpec

    def evaluate_photos(self, photos: Sequence[np.ndarray]) -> list[ScoredAnswer]:
        """Return the scored greedy answer to each photo, as `training.evaluate` computes them."""
        training = self.model.training
        self.model.eval()
        texts = generate_greedy(self.model, self.processor, photos, self.question)
        self.model.train(training)
        return [score_answer(photo, text) for photo, text in zip(photos, texts, strict=True)]


def run_training(run: Run, config: RunConfig, set_phase: Callable[[str], None]) -> dict[str, Any] | None:
    """Train on this machine.

    Args:
        run: The run; checkpoints, metrics and the adapter are written to its folder.
        config: Its config.
        set_phase: Called with a description of each phase.

    Returns:
        The content of `result.json`; None if the run was cancelled, or in other processes than the main one.

    Raises:
        RunAborted: The run cannot start or continue. Rewards, trainer and disk may raise other exceptions.
    """
    set_phase("loading the model")
    bundle = load_policy(config)
    set_phase("loading the photos")
    try:
        photos, held_out = train_eval_split(config.photos, config.held_out, config.max_photos, config.seed)
    except PhotoSourceError as error:
        raise RunAborted(str(error)) from None
    photos = mix_flawed(photos, config.seed)
    print(f"Training on {photos.describe()}. Evaluating on {held_out.describe()}.", flush=True)
    steps = total_steps(config, len(photos.photos))
    reward = RecipeReward(photos.photos, config.reward_function, config.rollouts)
    trainer = build_trainer(run, config, bundle, reward, steps)
    is_main = trainer.accelerator.is_main_process

    set_phase("evaluating the base model")
    with bundle.model.disable_adapter():
        base = bundle.evaluate_photos(held_out.photos) if is_main else []
    callback = RunCallback(run, config, bundle.evaluate_photos, reward, held_out)
    checkpoint = last_checkpoint(run.folder)
    if is_main:
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
    if is_main:
        save_adapter(bundle.model, run)
        draw_curve(run.metrics(), run.folder / "reward.png")
    if run.cancelled or not is_main:
        return None

    set_phase("evaluating the tuned model")
    tuned = bundle.evaluate_photos(held_out.photos)
    return build_result(run, bundle.spec.name, config.reward_function, held_out, base, tuned)


def load_policy(config: RunConfig) -> PolicyBundle:
    """Load the base with a new adapter, or with the adapter of the run to continue.

    Raises:
        RunAborted: The base is unknown, not downloaded, or needs a GPU.
    """
    try:
        spec = resolve_model(config.base)
    except EvaluateError as error:
        raise RunAborted(str(error)) from None
    missing = availability.missing_files(spec)
    model_folder, tokenizer_folder = availability.model_folder(spec), availability.tokenizer_folder(spec)
    if missing or model_folder is None or tokenizer_folder is None:
        raise RunAborted(f"{spec.title} cannot be trained: {missing}")
    if spec.needs_gpu and not torch.cuda.is_available():
        raise RunAborted(f"{spec.title} cannot be trained here: it needs a GPU, and PyTorch cannot use one.")
    dtype = torch.bfloat16 if spec.needs_gpu else torch.float32
    policy, processor = load_with_processor(model_folder, tokenizer_folder, dtype, config.temperature)
    if torch.cuda.is_available():
        policy.to("cuda")  # type: ignore[arg-type]
    question = recipe_prompt() if spec.grammar_in_prompt else RECIPE_QUESTION
    return PolicyBundle(add_lora(policy, spec, config), policy, processor, question, spec)


def add_lora(policy: Policy, spec: ModelSpec, config: RunConfig) -> Any:
    """Wrap a policy with the adapter of its spec, or with a new one of `config.rank`."""
    if spec.adapter:
        return PeftModel.from_pretrained(policy, spec.adapter, is_trainable=True)
    torch.manual_seed(config.seed)
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=LORA_TARGET_MODULES)
    return get_peft_model(policy, lora)


def total_steps(config: RunConfig, photos: int) -> int:
    """Return the number of updates: `config.steps`, or as many as `config.epochs` take with this many photos."""
    if config.epochs is None:
        return config.steps
    return max(1, round(config.epochs * photos / config.photos_per_step))


def trainer_arguments(run: Run, config: RunConfig, bundle: PolicyBundle, steps: int) -> dict[str, Any]:
    """Return the arguments that the trainers of all methods share; see `build_trainer`."""
    large = torch.cuda.is_available() and bundle.spec.needs_gpu
    return {
        "output_dir": str(run.folder),
        "max_steps": steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(5, steps),
        "beta": config.beta,
        "max_grad_norm": 1.0,
        "seed": config.seed,
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": large,
        "gradient_checkpointing": large,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def build_trainer(run: Run, config: RunConfig, bundle: PolicyBundle, reward: RecipeReward, steps: int) -> GRPOTrainer:
    """Build TRL's GRPO trainer.

    Args:
        run: The run whose folder receives the checkpoints.
        config: Its config.
        bundle: The policy.
        reward: The reward function, with the training photos.
        steps: Number of updates.

    Raises:
        RunAborted: The photos of a step cannot be divided evenly among the processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.photos_per_step % world_size:
        raise RunAborted(
            f"{config.photos_per_step} photos per step cannot be divided among {world_size} processes. "
            "Change one of the numbers."
        )
    args = GRPOConfig(
        per_device_train_batch_size=config.photos_per_step * config.rollouts // world_size,
        num_generations=config.rollouts,
        max_completion_length=bundle.policy.constraint.max_tokens if bundle.policy.constraint else 64,
        temperature=config.temperature,
        ddp_find_unused_parameters=False,
        **trainer_arguments(run, config, bundle, steps),
    )
    trainer = GRPOTrainer(
        model=bundle.model,
        reward_funcs=[reward],  # type: ignore[list-item]
        args=args,
        train_dataset=build_dataset(reward.photos, bundle.question, config.photos_per_step),
        processing_class=bundle.processor,
    )
    trainer.remove_callback(PrinterCallback)
    # GRPOTrainer replaces `forward` by its own log-probability pass, which ignores the grammar. Restore the policy's.
    bundle.policy.__dict__.pop("forward", None)
    return trainer


def build_dataset(photos: Sequence[np.ndarray], question: str, min_rows: int) -> Dataset:
    """Build the training dataset: one row per photo, with the question, the picture and the photo's index.

    Args:
        photos: uint8 RGB. The pictures stay in memory; the dataset stores only their indices.
        question: The prompt of every row.
        min_rows: Photos per step. Fewer photos are repeated, because the trainer drops incomplete steps.
    """
    pictures = [Image.fromarray(photo) for photo in photos]

    def add_columns(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        prompts = [[{"role": "user", "content": question}] for _ in batch["photo"]]
        return {**batch, "prompt": prompts, "image": [pictures[index] for index in batch["photo"]]}

    indices = list(range(len(photos))) * math.ceil(min_rows / len(photos))
    return Dataset.from_dict({"photo": indices}).with_transform(add_columns)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; delete incomplete ones, which a killed process leaves behind."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2] or 0))
    for checkpoint in reversed(checkpoints):
        if all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
            try:
                json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
                return checkpoint
            except (OSError, ValueError):
                pass
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def save_adapter(model: Any, run: Run) -> None:
    """Save the adapter of a PEFT model, one file after another, so that a killed process leaves a usable adapter.

    Files of an earlier save are replaced, the weights last. The config is the same at each save of a run.
    """
    temporary = run.folder / ".adapter.part"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    run.adapter.mkdir(exist_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, run.adapter / file.name)
    temporary.rmdir()

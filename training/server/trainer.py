"""LoRA training of moondream-tiny from rewards or examples that a client sends.

A step applies the GRPO update to the groups of a request: advantages are normalised within each group,
log-probabilities are recomputed with the weights that generated the completions, and AdamW takes one step.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import clip_grad_norm_

from inference import availability
from inference.registry import MODELS
from inference.types import RECIPE_QUESTION
from training.grpo.policy import LORA_TARGET_MODULES, load_with_processor
from training.hosted.client import MIN_REWARD_RANGE
from training.server.regions import (
    TOKENS_PER_OBJECT,
    Bins,
    Region,
    bins_to_region,
    region_log_probs,
    region_to_bins,
    sample_regions,
)

BASE_MODEL = "moondream-tiny"
MAX_GRAD_NORM = 1.0


class FinetuneError(Exception):
    """Raised when a request about a finetune cannot be fulfilled.

    Attributes:
        status: The HTTP status code.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Prompt:
    """A request about a photo, with its sampling settings.

    Attributes:
        photo: uint8 RGB, [H, W, 3].
        question: The question; for `detect` and `point` the object to find.
        temperature: Sampling temperature; 0 is greedy.
        max_tokens: Maximum number of new tokens.
        skill: "query", "detect" or "point".
        max_objects: Maximum number of boxes or points.
    """

    photo: np.ndarray
    question: str
    temperature: float = 1.0
    max_tokens: int = 128
    skill: str = "query"
    max_objects: int = 50


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt: a text, or a list of boxes or points.

    Attributes:
        text: The answer to a question.
        tokens: Its token ids, without the end token.
        finished: Whether the model ended the completion itself.
        objects: Bins of the boxes or points.
        regions: The boxes or points, coordinates in 0..1. Examples to imitate have only these.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    objects: tuple[Bins, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Group:
    """Training data of one prompt: completions with their rewards, or, without rewards, one example to imitate."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """The result of a training step; None where a value does not apply.

    Attributes:
        step: Number of applied steps.
        applied: Whether the weights changed.
        kl: KL divergence to the base model, in nats per token.
        grad_norm: Norm of the gradient before clipping.
        reward_mean: Mean reward over all completions.
        reward_std: Mean of the groups' standard deviations of the reward.
        sft_loss: Mean loss over the examples, in nats per token.
    """

    step: int
    applied: bool
    kl: float | None = None
    grad_norm: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None
    sft_loss: float | None = None


class LoraTrainer:
    """A LoRA adapter of moondream-tiny in memory, with its optimizer.

    Args:
        rank: Rank of a new adapter.
        step: Number of steps already applied.
        folder: A folder that `save` wrote, or None for a new adapter.

    Raises:
        FinetuneError: The base model is not available (503).
    """

    def __init__(self, rank: int, step: int = 0, folder: Path | None = None) -> None:
        torch.set_num_threads(1)
        self.step = step
        spec = MODELS[BASE_MODEL]
        model_folder, tokenizer_folder = availability.model_folder(spec), availability.tokenizer_folder(spec)
        if model_folder is None or tokenizer_folder is None:
            raise FinetuneError(503, f"{spec.title}: {availability.missing_files(spec)}")
        self.policy, self.processor = load_with_processor(model_folder, tokenizer_folder, torch.float32)
        self.constraint = self.policy.constraint
        self.max_context = self.policy.config.text_config.max_context
        with torch.random.fork_rng(devices=[]):  # keep the sampling of rollouts independent of the initialisation
            torch.manual_seed(0)
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGET_MODULES)
            self.model: Any = (
                PeftModel.from_pretrained(self.policy, str(folder), is_trainable=True)
                if folder
                else get_peft_model(self.policy, lora)
            )
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)
        if folder is not None:
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    def save(self, folder: Path) -> None:
        """Save adapter and optimizer; the folder appears complete or not at all."""
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # left by a step whose record could not be written
        self.model.save_pretrained(str(temporary))
        torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
        temporary.rename(folder)

    def generate(self, prompt: Prompt, count: int) -> list[Completion]:
        """Sample completions of a prompt. Recipes are generated under the recipe grammar.

        Args:
            prompt: The prompt.
            count: Number of completions; with temperature 0 they are identical.

        Returns:
            `count` completions.
        """
        inputs = self._prepare(prompt)
        greedy = prompt.temperature == 0
        samples = 1 if greedy else count
        self.model.eval()
        if prompt.skill != "query":
            settings = {"max_objects": prompt.max_objects, "temperature": prompt.temperature}
            features = self._image_features(inputs)
            lists = sample_regions(self.policy, inputs, features, prompt.skill, samples, **settings)
            completions = [self._region_completion(objects, prompt.max_objects) for objects in lists]
        else:
            length = inputs["input_ids"].shape[1]
            limit = min(prompt.max_tokens, self.max_context - length)
            if self.policy.constraint:
                limit = self.policy.constraint.max_tokens
            sampling = {"do_sample": True, "temperature": prompt.temperature, "top_k": 0, "top_p": 1.0}
            with torch.no_grad():
                output = self.model.generate(
                    **inputs,
                    **({"do_sample": False} if greedy else sampling),
                    num_return_sequences=samples,
                    max_new_tokens=limit,
                )
            completions = [self._text_completion(row) for row in output[:, length:].tolist()]
        return completions * (count if greedy else 1)

    def _region_completion(self, objects: Sequence[Bins], max_objects: int) -> Completion:
        boxes_or_points = tuple(bins_to_region(self.policy, bins) for bins in objects)
        return Completion("", (), len(objects) < max_objects, tuple(objects), boxes_or_points)

    def _text_completion(self, row: list[int]) -> Completion:
        end = self.policy.config.eos_id
        tokens = row[: row.index(end)] if end in row else row
        return Completion(self.processor.decode_answers([tokens])[0], tuple(tokens), end in row)

    def train_step(self, groups: Sequence[Group], learning_rate: float) -> StepResult:
        """Apply one update.

        Groups whose rewards are all equal carry no signal. If no group has a signal, the weights stay unchanged.

        Args:
            groups: The training data.
            learning_rate: Learning rate of AdamW.

        Raises:
            FinetuneError: A completion is not one of this model's, or the gradient is not finite (400).
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(group, len(groups)) for group in groups]
        rewards = [reward for group in groups for reward in group.rewards]
        metrics = {
            "reward_mean": _mean(rewards),
            "reward_std": _mean([float(np.std(group.rewards)) for group in groups if group.rewards]),
            "kl": _mean([kl for kl, _ in losses if kl is not None]),
            "sft_loss": _mean([loss for _, loss in losses if loss is not None]),
        }
        if all(kl is None and loss is None for kl, loss in losses):
            return StepResult(self.step, False, **metrics)
        norm = float(clip_grad_norm_(self.parameters, MAX_GRAD_NORM))
        if not np.isfinite(norm):
            raise FinetuneError(400, "The gradient is not finite; nothing was changed. Lower the learning rate.")
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = learning_rate
        self.optimizer.step()
        return StepResult(self.step, True, grad_norm=norm, **metrics)

    def count_tokens(self, groups: Sequence[Group]) -> tuple[int, int]:
        """Return the number of tokens of the prompts, including those of the photos, and of the completions."""
        prompts = (self.processor.prompt_ids(group.prompt.skill, group.prompt.question) for group in groups)
        return sum(map(len, prompts)), sum(
            self._completion_length(group.prompt.skill, completion)
            for group in groups
            for completion in group.completions
        )

    def _completion_length(self, skill: str, completion: Completion) -> int:
        if skill != "query":
            return TOKENS_PER_OBJECT[skill] * len(completion.objects or completion.regions)
        return len(completion.tokens or self.processor.tokenizer.encode(completion.text, add_special_tokens=False))

    def _backward(self, group: Group, groups: int) -> tuple[float | None, float | None]:
        """Accumulate the gradients of one of `groups` groups.

        Returns:
            The KL divergence to the base model (groups with rewards) and the loss (examples); None where it does not
            apply, and twice for a group without a signal.
        """
        advantages = None
        if group.rewards:
            rewards = torch.tensor(group.rewards, dtype=torch.float32)
            if len(rewards) < 2 or float(rewards.max() - rewards.min()) <= MIN_REWARD_RANGE:
                return None, None
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        log_probs, mask = self._log_probs(group)
        weight = advantages[:, None] if advantages is not None else 1.0
        loss = -(log_probs * weight * mask).sum() / mask.sum()
        (loss / groups).backward()
        if advantages is None:
            return None, float(loss.detach())
        with torch.no_grad(), self.model.disable_adapter():
            log_ratio = self._log_probs(group)[0] - log_probs.detach()
        return float(((log_ratio.exp() - log_ratio - 1) * mask).sum() / mask.sum()), None

    def _log_probs(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of a group's completions and the mask of real entries, both [B, K]."""
        if group.prompt.skill != "query":
            return self._region_log_probs(group)
        input_ids, attention_mask, labels, features = self._completion_batch(group)
        log_probs = self.policy.score(input_ids, attention_mask, labels, features).log_probs
        return log_probs, labels[:, -log_probs.shape[1] :] != -100

    def _region_log_probs(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, skill = self._prepare(group.prompt), group.prompt.skill
        max_choices = self.max_context - inputs["input_ids"].shape[1]
        heads, bins_per_object = self.policy.model.region.config, 2 if skill == "point" else 4
        limits = [heads.coord_out_dim, heads.coord_out_dim, heads.size_out_dim // 2, heads.size_out_dim // 2]
        rows = []
        for completion in group.completions:
            objects = completion.objects
            if not group.rewards:
                objects = [region_to_bins(self.policy, region) for region in completion.regions]
            valid = all(len(bins) == bins_per_object and all(map(int.__lt__, bins, limits)) for bins in objects)
            too_long = len(objects) * TOKENS_PER_OBJECT[skill] > max_choices
            if not valid or too_long or not (objects or completion.finished):
                raise FinetuneError(400, "coords or sizes are not this model's. Send rollouts back unchanged.")
            features = self._image_features(inputs)
            rows.append(
                region_log_probs(self.policy, inputs["input_ids"], features, objects, completion.finished, skill)
            )
        log_probs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return log_probs, torch.arange(log_probs.shape[1])[None] < torch.tensor([[len(row)] for row in rows])

    def _completion_batch(self, group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return input ids, attention mask and labels [B, L], and image features [B, T, D], of a group."""
        inputs, end = self._prepare(group.prompt), self.policy.config.eos_id
        prompt = inputs["input_ids"]
        if group.rewards:
            answers = [[*c.tokens, *([end] if c.finished else [])] for c in group.completions]
        else:
            tokenizer = self.processor.tokenizer
            answers = [[*tokenizer.encode(c.text, add_special_tokens=False), end] for c in group.completions]
        longest = max(map(len, answers))
        if not longest or prompt.shape[1] + longest > self.max_context:
            raise FinetuneError(400, "An answer is empty, or too long for this model.")
        labels = torch.tensor([answer + [-100] * (longest - len(answer)) for answer in answers])
        if int(labels.max()) >= self.policy.config.text_config.vocab_size or int(labels.min()) < -100:
            raise FinetuneError(400, "answer_tokens are not this model's. Send rollouts back unchanged.")
        prompts = prompt.expand(len(answers), -1)
        input_ids = torch.cat([prompts, labels.masked_fill(labels == -100, end)], 1)
        attention_mask = torch.cat([torch.ones_like(prompts), (labels != -100).long()], 1)
        features = self._image_features(inputs).expand(len(answers), -1, -1)
        return input_ids, attention_mask, torch.cat([torch.full_like(prompts, -100), labels], 1), features

    def _image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.policy.image_features(inputs["pixel_values"], inputs["image_sizes"])

    def _prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Set the policy's grammar and temperature for a prompt and return the model's inputs."""
        is_recipe = prompt.skill == "query" and prompt.question == RECIPE_QUESTION
        self.policy.constraint = self.constraint if is_recipe else None
        self.policy.temperature = prompt.temperature or 1.0
        return dict(self.processor.prepare(prompt.photo, prompt.skill, prompt.question))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None

"""A tuning server's learner: finetunes of moondream-tiny (LoRA) that learn from the rewards that somebody sends.

A finetune is a folder, DATA_DIR/tuning/<tenant>/<id>: `finetune.json` says at which step it is, `steps/<n>` holds the
adapter of the present step and of every saved one. The update is GRPO's on the groups as they are sent: advantages
within each group, log-probabilities computed anew by the weights that wrote the answers, one step of AdamW.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import clip_grad_norm_

from inference import availability as weights
from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamProcessor
from inference.moondream.processing_moondream import load_tokenizer
from inference.registry import MODELS, ModelSpec
from inference.types import RECIPE_QUESTION
from recipes import grammar
from training.grpo.policy import CachingImageProcessor, Policy
from training.runs.run import write_whole
from training.server import regions
from training.targets import TARGETS

BASE = "moondream-tiny"
RANKS = (8, 16, 24, 32)
MAX_FINETUNES, MAX_SAVED = 20, 50
MAX_LIVE = 4  # finetunes that are kept in memory
FLAT = 1e-6  # rewards that differ by less are the same
MAX_NORM = 1.0
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
ID = re.compile(r"[0-9a-f]{26}")


class FinetuneError(Exception):
    """Something that cannot be done; `status` as in HTTP, the message tells a person why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Finetune:
    """What is known of one. saved: step -> when it was saved, in milliseconds."""

    finetune_id: str
    name: str
    rank: int
    step: int = 0
    created_at_ms: int = 0
    updated_at_ms: int = 0
    saved: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A question about a photo (of detect and point: the object), and how answers are drawn."""

    photo: np.ndarray
    question: str
    temperature: float = 1.0
    max_tokens: int = 128
    skill: str = "query"
    max_objects: int = 50


@dataclass(frozen=True)
class Completion:
    """An answer: its text, its tokens without the end, and whether it ended by itself; or objects, as bins and as
    regions in shares of the photo (of an example the regions alone)."""

    text: str
    tokens: tuple[int, ...]
    ended: bool
    objects: tuple[regions.Bins, ...] = ()
    found: tuple[regions.Shares, ...] = ()


@dataclass(frozen=True)
class Group:
    """What a step learns from: answers to one question with their rewards, or one answer to imitate (no rewards)."""

    asked: Prompt
    answers: tuple[Completion, ...]
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What a step came to; None where there is nothing to tell."""

    step: int
    applied: bool
    kl: float | None = None
    grad_norm: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None
    sft_loss: float | None = None


class FinetuneStore:
    """The finetunes of all tenants, none of whom can see another's. One computes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._live: OrderedDict[tuple[str, str], LoraTrainer] = OrderedDict()

    # ── What there is ───────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, tenant: str, name: str, rank: int) -> Finetune:
        """The finetune of that name, made if there is none yet. Raises TunerError (400, 409)."""
        if not NAME.fullmatch(name):
            raise FinetuneError(400, "A name has up to 100 letters, digits, dots, dashes and underscores.")
        if rank not in RANKS:
            raise FinetuneError(400, f"The rank must be one of {', '.join(map(str, RANKS))}.")
        with self._lock:
            every = self.list(tenant)
            for one in every:
                if one.name == name:
                    if one.rank != rank:
                        raise FinetuneError(409, f"{name} exists with rank {one.rank}. Choose another name.")
                    return one
            if len(every) >= MAX_FINETUNES:
                raise FinetuneError(409, f"There are {MAX_FINETUNES} finetunes already. Delete one first.")
            now = _now()
            made = Finetune(secrets.token_hex(13), name, rank, 0, now, now)
            self._write(tenant, made)
            return made

    def list(self, tenant: str) -> list[Finetune]:
        """A tenant's finetunes, oldest first."""
        found = (self._read(file) for file in (self.folder / tenant).glob("*/finetune.json"))
        return sorted((one for one in found if one), key=lambda one: (one.created_at_ms, one.finetune_id))

    def get(self, tenant: str, finetune_id: str) -> Finetune:
        """One of a tenant's. Raises TunerError (404), also for somebody else's."""
        found = self._read(self._home(tenant, finetune_id) / "finetune.json") if ID.fullmatch(finetune_id) else None
        if found is None:
            raise FinetuneError(404, "There is no such finetune.")
        return found

    def delete(self, tenant: str, finetune_id: str) -> None:
        """Removes one with all its checkpoints. Raises TunerError (404)."""
        with self._lock:
            self.get(tenant, finetune_id)
            self._live.pop((tenant, finetune_id), None)
            (self._home(tenant, finetune_id) / "finetune.json").unlink()
            shutil.rmtree(self._home(tenant, finetune_id), ignore_errors=True)

    def save(self, tenant: str, finetune_id: str) -> Finetune:
        """Keeps the present step as a checkpoint that can be asked. Raises TunerError (404 before the first step)."""
        with self._lock:
            found = self.get(tenant, finetune_id)
            if found.step == 0:
                raise FinetuneError(404, "This finetune has learned nothing yet.")
            if len(found.saved) >= MAX_SAVED and str(found.step) not in found.saved:
                raise FinetuneError(409, f"{MAX_SAVED} checkpoints are saved already. Delete one first.")
            found.saved.setdefault(str(found.step), _now())
            self._write(tenant, found)
            return found

    def forget(self, tenant: str, finetune_id: str, step: int) -> None:
        """Removes a saved checkpoint; the present weights stay. Raises TunerError (404)."""
        with self._lock:
            found = self.get(tenant, finetune_id)
            if found.saved.pop(str(step), None) is None:
                raise FinetuneError(404, "There is no such checkpoint.")
            self._write(tenant, found)
            self._sweep(tenant, found)

    def log(self, tenant: str, finetune_id: str, step: int, metrics: dict[str, float]) -> None:
        """Adds a line of a user's own metrics to the finetune's file."""
        self.get(tenant, finetune_id)
        with self._lock, open(self._home(tenant, finetune_id) / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def checkpoint(self, tenant: str, name: str) -> ModelSpec:
        """The entry of `<base>/<id>@<step>`, a saved step. Raises TunerError (404)."""
        _, _, rest = name.partition("/")
        finetune_id, _, step = rest.partition("@")
        found = self.get(tenant, finetune_id)
        if step not in found.saved:
            raise FinetuneError(404, "There is no such checkpoint. Save a step before you ask it.")
        base = MODELS[BASE]
        return replace(base, name=f"{BASE}/{finetune_id}@{step}", adapter=str(self._step(tenant, finetune_id, step)))

    # ── What it does ────────────────────────────────────────────────────────────────────────────────────────────────

    def rollouts(self, tenant: str, finetune_id: str, asked: Prompt, count: int) -> list[Completion]:
        """So many answers of the present weights. A recipe is written inside the grammar."""
        with self._lock:
            return self._open(tenant, finetune_id).write(asked, count)

    def learn(self, tenant: str, finetune_id: str, groups: Sequence[Group], rate: float) -> StepResult:
        """One step on the groups; what has no signal leaves the weights and the step as they are."""
        with self._lock:
            found = self.get(tenant, finetune_id)
            live = self._open(tenant, finetune_id)
            try:
                learned = live.learn(groups, rate)
                if learned.applied:
                    found.step, found.updated_at_ms = found.step + 1, _now()
                    live.save(self._step(tenant, finetune_id, found.step))
                    self._write(tenant, found)
                    live.step = found.step
            except BaseException:
                self._live.pop((tenant, finetune_id), None)  # what is on disk counts
                raise
            self._sweep(tenant, found)
            return replace(learned, step=found.step)

    def _open(self, tenant: str, finetune_id: str) -> LoraTrainer:
        found, key = self.get(tenant, finetune_id), (tenant, finetune_id)
        if key not in self._live or self._live[key].step != found.step:
            at = self._step(tenant, finetune_id, found.step) if found.step else None
            self._live[key] = LoraTrainer(found, at)
        self._live.move_to_end(key)
        while len(self._live) > MAX_LIVE:
            self._live.popitem(last=False)
        return self._live[key]

    def _sweep(self, tenant: str, found: Finetune) -> None:
        """Removes the weights of steps that are neither present nor saved."""
        kept = {str(found.step), *found.saved}
        for folder in (self._home(tenant, found.finetune_id) / "steps").glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _home(self, tenant: str, finetune_id: str) -> Path:
        return self.folder / tenant / finetune_id

    def _step(self, tenant: str, finetune_id: str, step: int | str) -> Path:
        return self._home(tenant, finetune_id) / "steps" / str(step)

    def _write(self, tenant: str, found: Finetune) -> None:
        self._home(tenant, found.finetune_id).mkdir(parents=True, exist_ok=True)
        write_whole(self._home(tenant, found.finetune_id) / "finetune.json", json.dumps(asdict(found)))

    def _read(self, file: Path) -> Finetune | None:
        try:
            return Finetune(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class LoraTrainer:
    """A finetune in memory: the policy under its adapter, and the optimiser."""

    def __init__(self, found: Finetune, folder: Path | None) -> None:
        torch.set_num_threads(1)
        self.step = found.step
        entry = MODELS[BASE]
        at, words = weights.model_folder(entry), weights.tokenizer_folder(entry)
        if at is None or words is None:
            raise FinetuneError(503, f"{entry.title}: {weights.missing_files(entry)}")
        self.policy = Policy.from_pretrained(at, dtype=torch.float32, local_files_only=True)
        tokenizer = load_tokenizer(str(words), self.policy.config.templates)
        self.processor = MoondreamProcessor(
            CachingImageProcessor.from_config(self.policy.config),
            tokenizer,
            templates=self.policy.config.templates,
            image_token_id=self.policy.config.image_token_id,
        )
        self.grammar = RecipeConstraint(tokenizer, grammar(), end_id=self.policy.config.eos_id)
        self.policy.prepare(self.grammar)
        with torch.random.fork_rng(devices=[]):  # what is drawn later does not depend on it
            torch.manual_seed(0)
            settings = LoraConfig(r=found.rank, lora_alpha=2 * found.rank, target_modules=TARGETS)
            self.model: Any = (
                PeftModel.from_pretrained(self.policy, str(folder), is_trainable=True)
                if folder
                else get_peft_model(self.policy, settings)
            )
        self.learning = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, weight_decay=0.0)
        if folder is not None:
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    def save(self, folder: Path) -> None:
        """Adapter and optimiser; the folder appears whole or not at all."""
        part = folder.with_name(f".{folder.name}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a step that was never written down
        self.model.save_pretrained(str(part))
        torch.save(self.optimizer.state_dict(), part / "optimizer.pt")
        part.rename(folder)

    def write(self, asked: Prompt, count: int) -> list[Completion]:
        """See `FinetuneStore.rollouts`."""
        inputs = self._inputs(asked)
        self._set(asked)
        if asked.skill != "query":
            return self._search(asked, inputs, count)
        drawn = {"do_sample": True, "temperature": asked.temperature, "top_k": 0, "top_p": 1.0}
        cold = asked.temperature == 0
        room = self.policy.config.text_config.max_context - inputs["input_ids"].shape[1]
        limit = self.grammar.max_tokens if self.policy.constraint else min(asked.max_tokens, room)
        self.model.eval()
        with torch.no_grad():
            out = self.model.generate(
                **inputs,
                **({"do_sample": False} if cold else drawn),
                num_return_sequences=1 if cold else count,
                max_new_tokens=limit,
            )
        said = [self._said(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
        return said * count if cold else said

    def _search(self, asked: Prompt, inputs: dict[str, torch.Tensor], count: int) -> list[Completion]:
        drawn = 1 if asked.temperature == 0 else count
        self.model.eval()
        how = {"max_objects": asked.max_objects, "temperature": asked.temperature}
        every = regions.write(self.policy, inputs, self._features(inputs), asked.skill, drawn, **how)
        said = [
            Completion(
                "",
                (),
                len(bins) < asked.max_objects,
                tuple(bins),
                tuple(regions.region_of(self.policy, b) for b in bins),
            )
            for bins in every
        ]
        return said * (count if drawn == 1 else 1)

    def _said(self, row: list[int]) -> Completion:
        end = self.policy.config.eos_id
        tokens = row[: row.index(end)] if end in row else row
        return Completion(self.processor.decode_answers([tokens])[0], tuple(tokens), end in row)

    def target(self, text: str) -> Completion:
        """A text as an answer to imitate."""
        return Completion(text, tuple(self.processor.tokenizer.encode(text, add_special_tokens=False)), True)

    def learn(self, groups: Sequence[Group], rate: float) -> StepResult:
        """See `FinetuneStore.learn`."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        told = [self._backward(group, len(groups)) for group in groups]
        rewards = [reward for group in groups for reward in group.rewards]
        spread = [float(np.std(group.rewards)) for group in groups if group.rewards]
        facts = {
            "reward_mean": float(np.mean(rewards)) if rewards else None,
            "reward_std": float(np.mean(spread)) if spread else None,
            "kl": _mean([kl for kl, _ in told if kl is not None]),
            "sft_loss": _mean([loss for _, loss in told if loss is not None]),
        }
        if all(kl is None and loss is None for kl, loss in told):
            return StepResult(self.step, False, **facts)
        norm = float(clip_grad_norm_(self.learning, MAX_NORM))
        if not np.isfinite(norm):
            raise FinetuneError(400, "The step came to no number; nothing was changed. Lower the learning rate.")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return StepResult(self.step, True, grad_norm=norm, **facts)

    def _backward(self, group: Group, groups: int) -> tuple[float | None, float | None]:
        """The gradients of one group; its KL from the base (of rewards), or its loss (of an example)."""
        gains = None
        if group.rewards:
            rewards = torch.tensor(group.rewards, dtype=torch.float32)
            if len(rewards) < 2 or float(rewards.max() - rewards.min()) <= FLAT:
                return None, None
            gains = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        likely, asked = self._likely(group)
        weight = gains[:, None] if gains is not None else 1.0
        loss = -(likely * weight * asked).sum() / asked.sum()
        (loss / groups).backward()
        if gains is None:
            return None, float(loss.detach())
        with torch.no_grad(), self.model.disable_adapter():
            ahead = self._likely(group)[0] - likely.detach()
        return float(((ahead.exp() - ahead - 1) * asked).sum() / asked.sum()), None

    def _likely(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [B, K] of what was chosen in each answer, and which of them there are."""
        if group.asked.skill != "query":
            return self._likely_regions(group)
        rows = self._rows(group)
        likely = self.policy.score(*rows).log_probs
        return likely, rows[2][:, -likely.shape[1] :] != -100

    def _likely_regions(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        self._set(group.asked)
        inputs, skill = self._inputs(group.asked), group.asked.skill
        room = self.policy.config.text_config.max_context - inputs["input_ids"].shape[1]
        heads, wide = self.policy.model.region.config, 2 if skill == "point" else 4
        most = [heads.coord_out_dim, heads.coord_out_dim, heads.size_out_dim // 2, heads.size_out_dim // 2]
        scored = []
        for said in group.answers:
            found = [regions.bins_of(self.policy, one) for one in said.found] if not group.rewards else said.objects
            right = all(len(bins) == wide and all(map(int.__lt__, bins, most)) for bins in found)
            if not right or len(found) * regions.STEPS[skill] > room or not (found or said.ended):
                raise FinetuneError(400, "coords or sizes are not this model's. Send rollouts back as they came.")
            features = self._features(inputs)
            scored.append(regions.score(self.policy, inputs["input_ids"], features, found, said.ended, skill))
        likely = torch.nn.utils.rnn.pad_sequence(scored, batch_first=True)
        return likely, torch.arange(likely.shape[1])[None] < torch.tensor([[len(one)] for one in scored])

    def _features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        looks = self.policy.looks or self.policy.model.get_image_features
        return looks(inputs["pixel_values"], inputs["image_sizes"])

    def _rows(self, group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, mask and labels [B, L] of the answers behind their prompt, and the photo's features for each."""
        self._set(group.asked)
        inputs, end = self._inputs(group.asked), self.policy.config.eos_id
        prompt = inputs["input_ids"]
        said = group.answers if group.rewards else [self.target(one.text) for one in group.answers]
        answers = [[*one.tokens, *([end] if one.ended else [])] for one in said]
        longest = max(map(len, answers))
        if not longest or prompt.shape[1] + longest > self.policy.config.text_config.max_context:
            raise FinetuneError(400, "An answer is empty, or too long for this model.")
        labels = torch.tensor([answer + [-100] * (longest - len(answer)) for answer in answers])
        if int(labels.max()) >= self.policy.config.text_config.vocab_size or int(labels.min()) < -100:
            raise FinetuneError(400, "answer_tokens are not this model's. Send rollouts back as they came.")
        prompts = prompt.expand(len(answers), -1)
        ids = torch.cat([prompts, labels.masked_fill(labels == -100, end)], 1)
        mask = torch.cat([torch.ones_like(prompts), (labels != -100).long()], 1)
        features = self._features(inputs).expand(len(answers), -1, -1)
        return ids, mask, torch.cat([torch.full_like(prompts, -100), labels], 1), features

    def _inputs(self, asked: Prompt) -> dict[str, torch.Tensor]:
        return dict(self.processor.prepare(asked.photo, asked.skill, asked.question))

    def _set(self, asked: Prompt) -> None:
        """Recipes are written, and their probabilities taken, inside the grammar."""
        self.policy.constraint = self.grammar if asked.skill == "query" and asked.question == RECIPE_QUESTION else None
        self.policy.temperature = asked.temperature or 1.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _now() -> int:
    return round(time.time() * 1000)

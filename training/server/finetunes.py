"""Storage of finetunes: create, list, train, save and delete, per tenant.

A finetune is a folder, `DATA_DIR/tuning/<tenant>/<id>`: `finetune.json` holds its current step and its saved steps,
`steps/<n>` the adapter and the optimizer of the current step and of every saved one.
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

from inference.registry import MODELS
from inference.types import ModelSpec
from storage.files import write_atomically
from training.hosted.client import RANKS
from training.server.trainer import BASE_MODEL, Completion, FinetuneError, Group, LoraTrainer, Prompt, StepResult

__all__ = ["Finetune", "FinetuneError", "FinetuneStore"]

MAX_FINETUNES, MAX_CHECKPOINTS = 20, 50  # per tenant, per finetune
MAX_LOADED_TRAINERS = 4
NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,100}")
ID_PATTERN = re.compile(r"[0-9a-f]{26}")


@dataclass
class Finetune:
    """The record of a finetune, as stored in `finetune.json`.

    Attributes:
        finetune_id: 26 hexadecimal digits.
        name: The name that the tenant chose.
        rank: Rank of the LoRA adapter.
        step: Number of applied training steps.
        created_at_ms: Creation time, in milliseconds since 1970.
        updated_at_ms: Time of the last applied step, in milliseconds since 1970.
        saved: Saved steps and when they were saved, in milliseconds since 1970.
    """

    finetune_id: str
    name: str
    rank: int
    step: int = 0
    created_at_ms: int = 0
    updated_at_ms: int = 0
    saved: dict[str, int] = field(default_factory=dict)


class FinetuneStore:
    """Finetunes of all tenants; a tenant sees only its own. One computation runs at a time.

    Every method that takes a finetune id raises `FinetuneError` (404) if the tenant has no such finetune.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._trainers: OrderedDict[tuple[str, str], LoraTrainer] = OrderedDict()

    def create(self, tenant: str, name: str, rank: int) -> Finetune:
        """Return the finetune with this name; create it if there is none.

        Args:
            tenant: The owner.
            name: Up to 100 letters, digits, dots, dashes and underscores.
            rank: Rank of the LoRA adapter, one of RANKS.

        Raises:
            FinetuneError: The name or the rank is invalid (400), the name is taken by a finetune of another rank, or
                the tenant has too many finetunes (409).
        """
        if not NAME_PATTERN.fullmatch(name):
            raise FinetuneError(400, "The name may have up to 100 letters, digits, dots, dashes and underscores.")
        if rank not in RANKS:
            raise FinetuneError(400, f"The rank must be one of {', '.join(map(str, RANKS))}.")
        with self._lock:
            finetunes = self.list(tenant)
            for finetune in finetunes:
                if finetune.name == name:
                    if finetune.rank != rank:
                        raise FinetuneError(409, f"{name} exists with rank {finetune.rank}. Choose another name.")
                    return finetune
            if len(finetunes) >= MAX_FINETUNES:
                raise FinetuneError(409, f"The limit of {MAX_FINETUNES} finetunes is reached. Delete one first.")
            now = _now_ms()
            finetune = Finetune(secrets.token_hex(13), name, rank, 0, now, now)
            self._write(tenant, finetune)
            return finetune

    def list(self, tenant: str) -> list[Finetune]:
        """Return a tenant's finetunes, oldest first."""
        finetunes = (_read(file) for file in (self.folder / tenant).glob("*/finetune.json"))
        return sorted(filter(None, finetunes), key=lambda finetune: (finetune.created_at_ms, finetune.finetune_id))

    def get(self, tenant: str, finetune_id: str) -> Finetune:
        """Return one finetune of a tenant."""
        valid = ID_PATTERN.fullmatch(finetune_id)
        finetune = _read(self._folder(tenant, finetune_id) / "finetune.json") if valid else None
        if finetune is None:
            raise FinetuneError(404, "There is no such finetune.")
        return finetune

    def delete(self, tenant: str, finetune_id: str) -> None:
        """Delete a finetune with all its checkpoints."""
        with self._lock:
            self.get(tenant, finetune_id)
            self._trainers.pop((tenant, finetune_id), None)
            (self._folder(tenant, finetune_id) / "finetune.json").unlink()
            shutil.rmtree(self._folder(tenant, finetune_id), ignore_errors=True)

    def save_checkpoint(self, tenant: str, finetune_id: str) -> Finetune:
        """Save the current step as a checkpoint, which can answer requests.

        Raises:
            FinetuneError: No step was applied yet (404), or the finetune has too many checkpoints (409).
        """
        with self._lock:
            finetune = self.get(tenant, finetune_id)
            if finetune.step == 0:
                raise FinetuneError(404, "This finetune has no training step yet.")
            if len(finetune.saved) >= MAX_CHECKPOINTS and str(finetune.step) not in finetune.saved:
                raise FinetuneError(409, f"The limit of {MAX_CHECKPOINTS} checkpoints is reached. Delete one first.")
            finetune.saved.setdefault(str(finetune.step), _now_ms())
            self._write(tenant, finetune)
            return finetune

    def delete_checkpoint(self, tenant: str, finetune_id: str, step: int) -> None:
        """Delete a saved checkpoint; the current weights stay.

        Raises:
            FinetuneError: There is no such checkpoint (404).
        """
        with self._lock:
            finetune = self.get(tenant, finetune_id)
            if finetune.saved.pop(str(step), None) is None:
                raise FinetuneError(404, "There is no such checkpoint.")
            self._write(tenant, finetune)
            self._delete_unused_steps(tenant, finetune)

    def log_metrics(self, tenant: str, finetune_id: str, step: int, metrics: dict[str, float]) -> None:
        """Append the client's own metrics to `metrics.jsonl`."""
        self.get(tenant, finetune_id)
        with self._lock, open(self._folder(tenant, finetune_id) / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def checkpoint_spec(self, tenant: str, name: str) -> ModelSpec:
        """Return the model of a saved checkpoint.

        Args:
            tenant: The owner.
            name: `<base model>/<finetune id>@<step>`.

        Raises:
            FinetuneError: There is no such checkpoint (404).
        """
        _, _, checkpoint = name.partition("/")
        finetune_id, _, step = checkpoint.partition("@")
        finetune = self.get(tenant, finetune_id)
        if step not in finetune.saved:
            raise FinetuneError(404, "There is no such checkpoint. Save a step before querying it.")
        adapter = str(self._step_folder(tenant, finetune_id, step))
        return replace(MODELS[BASE_MODEL], name=f"{BASE_MODEL}/{finetune_id}@{step}", adapter=adapter)

    def rollouts(self, tenant: str, finetune_id: str, prompt: Prompt, count: int) -> list[Completion]:
        """Sample `count` completions from the current weights; see `LoraTrainer.generate`."""
        with self._lock:
            return self._trainer(tenant, finetune_id).generate(prompt, count)

    def train_step(self, tenant: str, finetune_id: str, groups: Sequence[Group], learning_rate: float) -> StepResult:
        """Apply one update and store the new weights; see `LoraTrainer.train_step`.

        A step without a training signal changes nothing. If an update cannot be stored, it is discarded.
        """
        with self._lock:
            finetune = self.get(tenant, finetune_id)
            trainer = self._trainer(tenant, finetune_id)
            try:
                result = trainer.train_step(groups, learning_rate)
                if result.applied:
                    finetune.step, finetune.updated_at_ms = finetune.step + 1, _now_ms()
                    trainer.save(self._step_folder(tenant, finetune_id, finetune.step))
                    self._write(tenant, finetune)
                    trainer.step = finetune.step
            except BaseException:
                self._trainers.pop((tenant, finetune_id), None)  # reload the last stored step
                raise
            self._delete_unused_steps(tenant, finetune)
            return replace(result, step=finetune.step)

    def count_tokens(self, tenant: str, finetune_id: str, groups: Sequence[Group]) -> tuple[int, int]:
        """Return the tokens of the prompts and of the completions; see `LoraTrainer.count_tokens`."""
        with self._lock:
            return self._trainer(tenant, finetune_id).count_tokens(groups)

    def _trainer(self, tenant: str, finetune_id: str) -> LoraTrainer:
        """Return the loaded trainer of a finetune; load it, and unload the least recently used one, if needed."""
        finetune, key = self.get(tenant, finetune_id), (tenant, finetune_id)
        if key not in self._trainers or self._trainers[key].step != finetune.step:
            folder = self._step_folder(tenant, finetune_id, finetune.step) if finetune.step else None
            self._trainers[key] = LoraTrainer(finetune.rank, finetune.step, folder)
        self._trainers.move_to_end(key)
        while len(self._trainers) > MAX_LOADED_TRAINERS:
            self._trainers.popitem(last=False)
        return self._trainers[key]

    def _delete_unused_steps(self, tenant: str, finetune: Finetune) -> None:
        """Delete the weights of steps that are neither current nor saved."""
        kept = {str(finetune.step), *finetune.saved}
        for folder in (self._folder(tenant, finetune.finetune_id) / "steps").glob("*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, tenant: str, finetune_id: str) -> Path:
        return self.folder / tenant / finetune_id

    def _step_folder(self, tenant: str, finetune_id: str, step: int | str) -> Path:
        return self._folder(tenant, finetune_id) / "steps" / str(step)

    def _write(self, tenant: str, finetune: Finetune) -> None:
        folder = self._folder(tenant, finetune.finetune_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "finetune.json", json.dumps(asdict(finetune)))


def _read(file: Path) -> Finetune | None:
    try:
        return Finetune(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _now_ms() -> int:
    return round(time.time() * 1000)

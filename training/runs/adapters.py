"""Tuned models in the model registry: enable and disable a run's adapter, and check adapter files.

An adapter is checked before it is enabled: it must be a safetensors file for the run's base model with matching
shapes. Enabled runs are stored beside the runs and restored at startup. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from inference import availability
from inference.registry import MODELS
from inference.types import ModelSpec
from storage.files import write_atomically
from training.runs.run import GUEST_PREFIX, Run, RunError, RunStore, is_run_id

ADAPTER_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# Why Photon does not offer the tuned models of Moondream 2, which has an entry for Photon as well.
PHOTON_REASON = "Photon cannot run it: its adapters change the text model's MLP layers only, this one also attention."
PEFT_PREFIX = "base_model.model."
_log = logging.getLogger(__name__)


class AdapterRegistry:
    """The runs whose tuned models are in a model registry.

    An enabled model is offered to the owner of its run only, unless it is shared. The registry itself holds the models
    of all owners: `visible_models` selects the ones to offer.

    Args:
        runs: The store of runs.
        models: The registry, MODELS by default.

    Attributes:
        version: Grows with every change, so that pages can tell when their model lists are outdated.
    """

    def __init__(self, runs: RunStore, models: MutableMapping[str, ModelSpec] = MODELS) -> None:
        self.runs = runs
        self.models = models
        self.version = 0
        self._file = runs.folder / "adopted.json"
        self._lock = threading.RLock()

    def load(self) -> None:
        """Restore the enabled models at startup, and auto-enable runs that won in the meantime."""
        with self._lock:
            for run_id in self._read()["used"]:
                try:
                    run = self.runs.get(run_id)
                    self._register(run, self._spec(run))
                except RunError as error:
                    _log.warning("The tuned model of %s was not restored: %s", run_id, error)
            for run in self.runs.list():
                self.auto_enable(run)

    def auto_enable(self, run: Run) -> bool:
        """Enable a run's model for its owner if the run is done, won, and raised no alarm.

        Happens once per run; a manual `disable` is final. A run with an alarm can be enabled by hand only.
        """
        result = run.result()
        if run.status().state != "done" or not result or not result.get("wins") or run.has_alarm:
            return False
        with self._lock:
            if run.id in self._read()["settled"]:
                return False
            try:
                self.enable(run)
            except (RunError, OSError) as error:
                _log.warning("%s won but cannot be used: %s", run.id, error)
                return False
        return True

    def enable(self, run: Run, shared: bool = False) -> ModelSpec:
        """Add the run's model to the registry, or update its entry there.

        Args:
            run: The run.
            shared: Whether to offer the model to everyone, as its newest one, instead of to the run's owner only. A
                model that is shared already stays shared.

        Raises:
            RunError: If the run's adapter cannot be used, or the change cannot be stored.
        """
        with self._lock:
            spec = self._spec(run)
            state = self._read()
            newly_shared = shared and run.id not in state["shared"]
            if newly_shared:
                state["shared"].append(run.id)
            if newly_shared or run.id not in state["used"]:  # otherwise it keeps its place
                state["used"] = [run_id for run_id in state["used"] if run_id != run.id] + [run.id]
            self._write(state, run.id)
            self._register(run, spec)
        return spec

    def share(self, run: Run) -> ModelSpec:
        """Offer a run's model to everyone; see `enable`. Raises RunError."""
        return self.enable(run, shared=True)

    def unshare(self, run_id: str) -> None:
        """Offer a shared model to the owner of its run only. Raises RunError if it is not shared."""
        with self._lock:
            state = self._read()
            if run_id not in state["shared"]:
                raise RunError("This run's model is not shared.")
            state["shared"].remove(run_id)
            self._write(state, run_id)
            self.version += 1

    def disable(self, run_id: str) -> None:
        """Remove a run's model from the registry, for everyone. Raises RunError if it is not enabled."""
        with self._lock:
            state = self._read()
            if run_id not in state["used"]:
                raise RunError("This run's model is not in use.")
            state["used"].remove(run_id)
            state["shared"] = [shared_id for shared_id in state["shared"] if shared_id != run_id]
            self._write(state, run_id)
            self.models.pop(model_name(run_id), None)
            self.version += 1

    def is_enabled(self, run_id: str) -> bool:
        """Whether the run's model is in the registry."""
        return model_name(run_id) in self.models

    def is_shared(self, run_id: str) -> bool:
        """Whether the run's model is offered to everyone."""
        return run_id in self._read()["shared"] and self.is_enabled(run_id)

    def release(self, run_id: str) -> bool:
        """Disable a run's model so that the run can be deleted; return False if it is offered to everyone."""
        with self._lock:
            if self.is_shared(run_id):
                return False
            with contextlib.suppress(RunError):  # it is not enabled
                self.disable(run_id)
            return True

    def is_visible(self, name: str, owner: str) -> bool:
        """Whether a model is offered to a visitor.

        Args:
            name: A name in the registry, or the id of a run. Models that are not tuned here are visible to everyone.
            owner: The visitor's id, as `access.roles.Visitor.id`; "" for the deployment's administrator.
        """
        return self._is_visible(name, owner, self._read()["shared"])

    def visible_models(self, owner: str) -> dict[str, ModelSpec]:
        """Return the models that are offered to a visitor; see `is_visible`."""
        shared = self._read()["shared"]
        return {name: spec for name, spec in list(self.models.items()) if self._is_visible(name, owner, shared)}

    def _is_visible(self, name: str, owner: str, shared: Collection[str]) -> bool:
        run_id = name.removeprefix("run-")
        if name == run_id and not is_run_id(name):
            return True  # not tuned here
        if not self.is_enabled(run_id):
            return False
        # All guests without a browser secret have the id "guest:" and see the models of none of them.
        return run_id in shared or (owner != GUEST_PREFIX and Run(self.runs.folder / run_id).owner == owner)

    def newest_with_base(self, owner: str = "") -> list[str]:
        """Return the names of the newest enabled model that a visitor sees and of its base, base first.

        Args:
            owner: See `is_visible`.

        Returns:
            Two names, or none if no tuned model is visible. The base is the run that was trained further, if its model
            is visible as well, otherwise the base model.
        """
        state = self._read()
        for run_id in reversed(state["used"]):
            with contextlib.suppress(RunError):  # the run's folder may have been removed by hand
                if self._is_visible(run_id, owner, state["shared"]):
                    run = self.runs.get(run_id)
                    parent = self.find_run(run.config().base)
                    if parent and self._is_visible(parent.id, owner, state["shared"]):
                        return [model_name(parent.id), model_name(run_id)]
                    return [self.base_model(run).name, model_name(run_id)]
        return []

    def base_model(self, run: Run) -> ModelSpec:
        """Return the model whose weights are under a run's adapter. Raises RunError."""
        chain, base = base_chain(run, self.models)
        if base in self.models and not base.startswith("run-"):
            return self.models[base]
        for member in (run, chain[-1]):  # a run in between was deleted, but results name the base model as well
            name = (member.result() or {}).get("base_model")
            if isinstance(name, str) and name in self.models:
                return self.models[name]
        raise RunError("The base model of this run is not available.")

    def find_run(self, base: str) -> Run | None:
        """Return the run in the store that a config's `base` names by model name or folder; None for other models."""
        try:
            return self.runs.get(Path(base).name.removeprefix("run-"))
        except RunError:
            return None

    def _spec(self, run: Run) -> ModelSpec:
        """Build the registry entry of a run's model. Raises RunError if its adapter cannot be used."""
        base, result, config = self.base_model(run), run.result() or {}, run.config()
        verdict = "Better than its base" if result.get("wins") else "Not shown to be better than its base"
        note = (
            f"{base.title}, fine-tuned here for {format_weights(config.reward)} in {config.steps:,} steps. "
            f"{verdict} on held-out photos."
        )
        if run.has_alarm:
            titles = [str(alarm.get("title")) for alarm in run.alarms()] or [str(result.get("alarm") or "see the run")]
            note += f" Alarm in training: {'; '.join(titles).rstrip('.')}."
        name, title = model_name(run.id), run_title(run)
        if config.backend == "hosted":  # the weights are on the server that trained it
            if not isinstance(result.get("model"), str):
                raise RunError("This run saved no checkpoint that can be used.")
            return replace(base, name=name, title=title, note=note, remote_id=result["model"])
        check_adapter(run.adapter, base)
        if base.source == MODELS["moondream2"].source:
            note += f" {PHOTON_REASON}"
        return replace(base, name=name, title=title, note=note, adapter=str(run.adapter))

    def _register(self, run: Run, spec: ModelSpec) -> None:
        self.models[model_name(run.id)] = spec
        self.version += 1

    def _read(self) -> dict[str, list[str]]:
        """Read the stored ids of runs.

        Returns:
            The enabled runs ("used"), those that are offered to everyone ("shared"), and those that were enabled or
            disabled before ("settled"). Files of versions without owners have no "shared": every enabled model was
            offered to everyone.
        """
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
            state.setdefault("shared", state["used"])
            return {key: [str(run_id) for run_id in state[key]] for key in ("used", "settled", "shared")}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {"used": [], "settled": [], "shared": []}

    def _write(self, state: dict[str, list[str]], settled: str) -> None:
        existing = {run.id for run in self.runs.list()}
        state = {key: [run_id for run_id in ids if run_id in existing] for key, ids in state.items()}
        state["settled"] = list(dict.fromkeys([*state["settled"], settled]))
        try:
            write_atomically(self._file, json.dumps(state))
        except OSError as error:
            raise RunError(f"Could not save the change ({error.strerror}). Free some disk space.") from None


def base_chain(run: Run, models: Mapping[str, ModelSpec] = MODELS) -> tuple[list[Run], str]:
    """Follow a run's `base` through the runs that it continues, down to the model that was first trained.

    Args:
        run: A run.
        models: Registry in which the base model is looked up.

    Returns:
        The runs from `run` to the oldest one, and the oldest one's base: a name in `models`, or whatever its config
        names if that is neither a model nor an existing run.

    Raises:
        RunError: If a config cannot be read, or the runs continue each other in a circle.
    """
    chain = [run]
    while True:
        base = chain[-1].config().base
        if base in models and not base.startswith("run-"):
            return chain, base
        sibling = Run(run.folder.parent / Path(base).name.removeprefix("run-"))  # also after the store was moved
        parent = next((other for other in (sibling, Run(base)) if (other.folder / "config.json").is_file()), None)
        if parent is None:
            return chain, base
        if any(parent.folder.resolve() == other.folder.resolve() for other in chain):
            raise RunError("The runs continue each other in a circle.")
        chain.append(parent)


def model_name(run_id: str) -> str:
    """Return the name of a run's model in MODELS."""
    return f"run-{run_id}"


def run_title(run: Run) -> str:
    """Return a run's display name, by default the rewards that it was tuned for."""
    config = run.config()
    return config.name or f"tuned: {format_weights(config.reward)}"


def format_weights(weights: Mapping[str, float]) -> str:
    """Format reward weights for display, as in `sharpness 1, colour 0.5`."""
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


def check_adapter(folder: Path, base: ModelSpec) -> None:
    """Check that an adapter can be loaded onto a base model, by reading headers only.

    Args:
        folder: The adapter's folder in PEFT's layout.
        base: The base model.

    Raises:
        RunError: If the adapter is missing, a pickle, damaged, for another base, or of other shapes.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        if any((folder / name).exists() for name in PICKLE_FILES):
            raise RunError("This adapter is a pickle, which can execute code when loaded. Save it as safetensors.")
        raise RunError("This run has no adapter: it ended before saving one, or the adapter was removed.")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise RunError("This adapter's adapter_config.json is missing or unreadable.")
    base_folder = availability.model_folder(base)
    trained_on = str(config.get("base_model_name_or_path") or "")
    names = {base.name, base.source, Path(base.source).name, str(base_folder)}
    if trained_on and trained_on not in names and Path(trained_on).name not in names:
        raise RunError(f"This adapter is for another base ({Path(trained_on).name[:60]!r}), not for {base.title}.")
    if base_folder is None:
        raise RunError(f"{base.title} cannot be used: {availability.missing_files(base)}")
    shapes, base_shapes = tensor_shapes(file), _model_shapes(base_folder)
    misfits = [name for name in shapes if not _fits(name.removeprefix(PEFT_PREFIX), shapes[name], base_shapes)]
    if misfits or not shapes:
        raise RunError(
            f"This adapter does not fit {base.title}: {len(misfits)} of its {len(shapes)} tensors do not match."
        )


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor in a safetensors file. Raises RunError if the file is damaged."""
    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise RunError(f"{file.name} is not a complete safetensors file.") from None


def _model_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor of a model, from one safetensors file or from a sharded index."""
    file = availability.weights_file(folder)
    if file.suffix == ".safetensors":
        return tensor_shapes(file)
    try:
        shards: set[Any] = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError("The index of the base model's weights cannot be read.") from None
    return {name: shape for shard in shards for name, shape in tensor_shapes(folder / Path(shard).name).items()}


def _fits(name: str, shape: tuple[int, ...], base: dict[str, tuple[int, ...]]) -> bool:
    """Whether an adapter's tensor matches its layer: A is [rank, in], B is [out, rank], other tensors are equal."""
    module, _, factor = name.partition(".lora_")
    if not factor:
        return base.get(name) == shape
    layer = base.get(f"{module}.weight", base.get(module))
    if layer is None or not len(layer) == len(shape) == 2:
        return False
    return {"A.weight": shape[1] == layer[1], "B.weight": shape[0] == layer[0]}.get(factor, False)

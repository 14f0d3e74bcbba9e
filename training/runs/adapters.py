"""Tuned models in service: a run's adapter joins MODELS beside its base and leaves it again. No torch here.

What is in service is written to a file beside the runs, so that a restart brings it back. An adapter is looked at
before it is let in: only safetensors, only for its own base, only shapes that fit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import struct
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from inference import availability as weights
from inference.registry import MODELS, ModelSpec
from training.runs.run import Run, RunError, Runs, write_whole

ADAPTER = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MAX_HEADER = 16 * 2**20  # bytes of a list of tensors
PREFIX = "base_model.model."
_log = logging.getLogger(__name__)


class AdapterRegistry:
    """The runs whose models are in service. `version` grows with every change, so that a page knows that it is old."""

    def __init__(self, runs: Runs, models: MutableMapping[str, ModelSpec] = MODELS) -> None:
        self.runs = runs
        self.models = models
        self.version = 0
        self._file = runs.folder / "adopted.json"
        self._lock = threading.RLock()

    def load(self) -> None:
        """Brings back what was in service, and lets in what has won while nobody looked."""
        with self._lock:
            for name in self._read()["used"]:
                try:
                    run = self.runs.get(name)
                    self._enter(run, self._entry(run))
                except RunError as error:
                    _log.warning("%s is not in service: %s", name, error)
            for run in self.runs.list():
                self.settle(run)

    def settle(self, run: Run) -> bool:
        """Lets a run's model in if the run is done and has won, once: who sends it away later is not contradicted."""
        result = run.result()
        if run.status().state != "done" or not result or not result.get("wins"):
            return False
        with self._lock:
            if run.id in self._read()["settled"]:
                return False
            try:
                self.use(run)
            except (RunError, OSError) as error:
                _log.warning("%s won and cannot be used: %s", run.id, error)
                return False
        return True

    def use(self, run: Run) -> ModelSpec:
        """Puts the run's model beside its base. Raises RunError when its adapter cannot be used."""
        with self._lock:
            entry = self._entry(run)
            kept = self._read()
            kept["used"] = [name for name in kept["used"] if name != run.id] + [run.id]
            self._write(kept, run.id)
            self._enter(run, entry)
        return entry

    def revert(self, name: str) -> None:
        """Takes a run's model out of service; its base is what it was. Raises RunError when it is not in service."""
        with self._lock:
            kept = self._read()
            if name not in kept["used"]:
                raise RunError("This run's model is not in service.")
            kept["used"].remove(name)
            self._write(kept, name)
            self.models.pop(model_name(name), None)
            self.version += 1

    def uses(self, name: str) -> bool:
        """Whether the model of the run with this id is in service."""
        return model_name(name) in self.models

    def front(self) -> list[str]:
        """The names of the newest model in service and, before it, of what it came from; none when none is."""
        for name in reversed(self._read()["used"]):
            with contextlib.suppress(RunError):  # its folder may have been removed by hand
                if self.uses(name):
                    return [self._before(self.runs.get(name)), model_name(name)]
        return []

    def base(self, run: Run) -> ModelSpec:
        """The model whose weights are under a run's adapter. Raises RunError."""
        seen: set[str] = set()
        at, base = run, run.config().base
        while base not in self.models or base.startswith("run-"):
            earlier = self.earlier(base)
            if earlier is None or earlier.id in seen:
                return self._said_base(run, at)
            seen.add(earlier.id)
            at, base = earlier, earlier.config().base
        return self.models[base]

    def earlier(self, base: str) -> Run | None:
        """The run that a config's base names, by its model or its folder; None for a model that is no run's."""
        try:
            return self.runs.get(Path(base).name.removeprefix("run-"))
        except RunError:
            return None

    def _said_base(self, *runs: Run) -> ModelSpec:
        """What the runs' results say of their base, where the run in between has been deleted."""
        for run in runs:
            said = (run.result() or {}).get("base_model")
            if isinstance(said, str) and said in self.models:
                return self.models[said]
        raise RunError("The model that this run started from is not on offer (any more).")

    def _before(self, run: Run) -> str:
        earlier = self.earlier(run.config().base)
        return model_name(earlier.id) if earlier and self.uses(earlier.id) else self.base(run).name

    def _entry(self, run: Run) -> ModelSpec:
        base, found, config = self.base(run), run.result() or {}, run.config()
        wins = found.get("wins")
        proof = "It won on photos that it had not seen." if wins else "It was not shown to be better than its base."
        note = f"{base.title}, tuned here for {reward_words(config.reward)} in {config.steps:,} steps. {proof}"
        told = {"name": model_name(run.id), "title": title(run), "note": note}
        if config.where == "hosted":  # its weights are on the server that trained it
            if not isinstance(found.get("model"), str):
                raise RunError("This run saved no checkpoint that could be asked.")
            return replace(base, **told, remote_id=found["model"])
        check_adapter(run.adapter, base)
        return replace(base, **told, adapter=str(run.adapter))

    def _enter(self, run: Run, entry: ModelSpec) -> None:
        self.models[model_name(run.id)] = entry
        self.version += 1

    def _read(self) -> dict[str, list[str]]:
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            return {key: [str(name) for name in kept[key]] for key in ("used", "settled")}
        except (OSError, ValueError, TypeError, KeyError):
            return {"used": [], "settled": []}

    def _write(self, kept: dict[str, list[str]], decided: str) -> None:
        there = {run.id for run in self.runs.list()}
        kept = {key: [name for name in names if name in there] for key, names in kept.items()}
        kept["settled"] = list(dict.fromkeys([*kept["settled"], decided]))
        try:
            write_whole(self._file, json.dumps(kept))
        except OSError as error:
            raise RunError(f"This could not be written down ({error.strerror}). Free some space.") from None


def model_name(run_id: str) -> str:
    """A run's name in MODELS."""
    return f"run-{run_id}"


def title(run: Run) -> str:
    """What a run is called: its own name, or what it was tuned for."""
    config = run.config()
    return config.name or f"tuned: {reward_words(config.reward)}"


def reward_words(weights: Mapping[str, float]) -> str:
    """Weights as a person reads them: `sharpness 1, colour 0.5`."""
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


def check_adapter(folder: Path, base: ModelSpec) -> None:
    """Whether an adapter may be put on a base: reads headers, runs nothing. Raises RunError with the reason."""
    file = folder / ADAPTER
    if not file.is_file():
        if any((folder / name).exists() for name in PICKLES):
            raise RunError(
                "This adapter is a pickle, which could run anything when it is read. Save it as safetensors."
            )
        raise RunError("This run has no adapter: it ended before anything was learned, or it was removed.")
    config = _adapter_config(folder)
    said = str(config.get("base_model_name_or_path") or "")
    folder_of_base = weights.model_folder(base)
    ours = {base.name, base.source, Path(base.source).name, str(folder_of_base)}
    if said and said not in ours and Path(said).name not in ours:
        raise RunError(f"This adapter is for another base ({Path(said).name[:60]!r}), not for {base.title}.")
    if folder_of_base is None:
        raise RunError(f"{base.title} cannot be used: {weights.missing_files(base)}")
    _check_shapes(tensors(file), _model_tensors(folder_of_base), base.title)


def tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file by their names. Raises RunError when it is none."""
    try:
        with open(file, "rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            header = json.loads(data.read(length)) if length <= MAX_HEADER else None
            size = file.stat().st_size - 8 - length
        found = {name: part for name, part in header.items() if name != "__metadata__"}  # type: ignore[union-attr]
        if any(part["data_offsets"][1] > size for part in found.values()):
            raise ValueError("it is cut off")
        return {name: tuple(part["shape"]) for name, part in found.items()}
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError, IndexError):
        raise RunError(f"{file.name} is not a whole safetensors file.") from None


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    except (OSError, ValueError):
        pass
    raise RunError("This adapter has no adapter_config.json that can be read.")


def _model_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    first = weights.weights_file(folder)
    if first.suffix == ".safetensors":
        return tensors(first)
    try:
        parts = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError("The list of the base's weights cannot be read.") from None
    return {name: shape for part in parts for name, shape in tensors(folder / Path(part).name).items()}


def _check_shapes(adapter: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]], base_title: str) -> None:
    """Every tensor belongs to a layer of the base and fits it: A is rank x in, B is out x rank."""
    wrong = [name for name, shape in adapter.items() if not _fits(name.removeprefix(PREFIX), shape, base)]
    if wrong or not adapter:
        raise RunError(f"This adapter does not fit {base_title}: {len(wrong)} of its {len(adapter)} tensors do not.")


def _fits(name: str, shape: tuple[int, ...], base: dict[str, tuple[int, ...]]) -> bool:
    module, _, kind = name.partition(".lora_")
    layer = base.get(f"{module}.weight", base.get(module))
    if not kind:
        return base.get(name) == shape
    if layer is None or len(layer) != 2 or len(shape) != 2:
        return False
    return {"A.weight": shape[1] == layer[1], "B.weight": shape[0] == layer[0]}.get(kind, False)

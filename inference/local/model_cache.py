"""Loads local models and their adapters, and caches the most recently used ones."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from safetensors import safe_open

import recipes
from inference.availability import missing_files, model_folder, tokenizer_folder, weights_file
from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration, MoondreamProcessor
from inference.moondream.processing_moondream import load_tokenizer
from inference.types import InferenceError, ModelSpec

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_ADAPTERS = 8  # per base model
logger = logging.getLogger(__name__)


class LoadedModel:
    """A base model on its device with its processor and adapters. Not thread-safe.

    All adapters share one copy of the base model; switching between cached adapters takes milliseconds.

    Attributes:
        model: The base model.
        processor: Its processor.
        cache_key: Key in the `ModelCache`.
    """

    def __init__(self, model: MoondreamForConditionalGeneration, processor: MoondreamProcessor) -> None:
        self.model: Any = model  # transformers' annotations of generate() do not fit
        self.processor = processor
        self.cache_key: tuple = ()
        self._peft: Any = None  # a PeftModel, once an adapter is loaded
        self._adapters = _AdapterNames(self)
        self._adapters_loaded = 0

    @cached_property
    def constraint(self) -> RecipeConstraint:
        """The recipe grammar, compiled for this tokenizer."""
        return RecipeConstraint(self.processor.tokenizer, recipes.grammar_segments(), end_id=self.model.config.eos_id)

    @contextmanager
    def use_adapter(self, folder: str | None) -> Iterator[None]:
        """Activate the adapter in `folder`, or none, inside the `with` block. Loads the adapter if needed."""
        if folder is not None:
            key = _file_version(Path(folder) / ADAPTER_WEIGHTS)
            name = self._adapters.get(key) or self._load_adapter(Path(folder))
            self._peft.set_adapter(name)
            self._adapters[key] = name
        with self._peft.disable_adapter() if self._peft and folder is None else nullcontext():
            yield

    def _load_adapter(self, folder: Path) -> str:
        from peft import PeftModel, get_peft_model_state_dict  # slow import, needed for adapters only

        self._adapters_loaded += 1
        name = f"adapter{self._adapters_loaded}"
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
        else:
            self._peft.load_adapter(str(folder), name)
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            difference = set(file.keys()) ^ set(get_peft_model_state_dict(self._peft, adapter_name=name))
        if difference:
            raise ValueError(f"{len(difference)} tensors of the adapter and the model do not match")
        return name


class _AdapterNames(LRUCache):
    """Names of the loaded adapters by file version; evicted adapters are removed from the model."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(MAX_ADAPTERS)
        self._loaded = loaded

    def popitem(self) -> tuple[Any, str]:
        key, name = super().popitem()
        self._loaded._peft.delete_adapter(name)
        return key, name


class ModelCache:
    """An LRU cache of loaded base models. Used by one thread at a time, except for `sources`.

    Args:
        limit: Maximum number of models in memory.

    Attributes:
        sources: Sources of the models in memory; can be read from any thread.
        loads: Number of models loaded so far.
    """

    def __init__(self, limit: int = 2) -> None:
        self.sources: tuple[str, ...] = ()
        self.loads = 0
        self._models: LRUCache[tuple, LoadedModel] = LRUCache(limit)

    def get(self, spec: ModelSpec, device: torch.device) -> LoadedModel:
        """Return the base model of a spec, loading it if needed.

        Raises:
            InferenceError: If files are missing or invalid, or if the model needs a GPU and `device` is a CPU.
        """
        weights, tokenizer = model_folder(spec), tokenizer_folder(spec)
        if weights is None or tokenizer is None:
            raise InferenceError("missing_weights", f"{spec.title}: {missing_files(spec)}")
        if spec.needs_gpu and device.type == "cpu":
            raise InferenceError("unavailable", f"{spec.title} needs a GPU, and PyTorch cannot use one here.")
        key = (spec.source, *_file_version(weights_file(weights)), str(tokenizer), device, _dtype(spec, device))
        loaded = self._models.get(key)
        if loaded is None:
            while len(self._models) >= self._models.maxsize:  # free the memory before loading
                self._models.popitem()
            self._update_sources()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            loaded = _load(spec, weights, tokenizer, device)
            loaded.cache_key = key
            self._models[key] = loaded
            self.loads += 1
            self._update_sources()
        return loaded

    def drop(self, loaded: LoadedModel) -> None:
        """Remove a model that is in an invalid state."""
        self._models.pop(loaded.cache_key, None)
        self._update_sources()

    def _update_sources(self) -> None:
        self.sources = tuple(source for source, *_ in self._models)


@contextmanager
def wrap_errors(kind: str, message: str) -> Iterator[None]:
    """Log any exception except out-of-memory and raise it as an InferenceError of this kind and message."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        logger.warning("%s", message, exc_info=True)
        raise InferenceError(kind, message) from error


def pick_device() -> torch.device:
    """Return the fastest device that PyTorch can use: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load(spec: ModelSpec, weights: Path, tokenizer: Path, device: torch.device) -> LoadedModel:
    with wrap_errors("bad_weights", f"The weights of {spec.title} cannot be read. Download them again."):
        model = MoondreamForConditionalGeneration.from_pretrained(
            weights, dtype=_dtype(spec, device), local_files_only=True, trust_remote_code=False
        )
    expected = f"the tokenizer of {spec.tokenizer}" if spec.tokenizer else "the tokenizer shipped with its weights"
    with wrap_errors("wrong_tokenizer", f"The tokenizer does not match {spec.title}, which needs {expected}."):
        processor = MoondreamProcessor.from_config(model.config, load_tokenizer(str(tokenizer), model.config.templates))
    return LoadedModel(model.to(device).eval(), processor)


def _dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    if not spec.needs_gpu:
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _file_version(path: Path) -> tuple[str, int]:
    """Return path and modification time, which identify a version of a file."""
    return str(path), path.stat().st_mtime_ns

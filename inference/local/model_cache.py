"""Loading local models and their adapters, a few of which are kept for the next question."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import recipes
from inference import availability as weights
from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration, MoondreamProcessor
from inference.moondream.processing_moondream import load_tokenizer
from inference.registry import ModelSpec
from inference.types import InferenceError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_ADAPTERS = 8  # kept on one base
logger = logging.getLogger(__name__)


class LoadedModel:
    """A model on its device, with what reads photos and words for it. For one thread at a time.

    Adapters are put on the same base, so that switching between them costs milliseconds.
    """

    def __init__(self, model: MoondreamForConditionalGeneration, processor: MoondreamProcessor) -> None:
        self.model: Any = model  # the library's own annotations of generate() fit no model
        self.processor = processor
        self.source = ""  # of the entry that it was loaded for
        self._peft: Any = None  # a PeftModel, once there is an adapter
        self._adapters: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._named = 0

    @cached_property
    def constraint(self) -> RecipeConstraint:
        """Keeps an answer inside the recipe grammar."""
        return RecipeConstraint(self.processor.tokenizer, recipes.grammar(), end_id=self.model.config.eos_id)

    @contextmanager
    def adapted(self, folder: str | None) -> Iterator[None]:
        """Inside, the model has the adapter of this folder switched on, or none. Raises InferenceError."""
        if folder is not None:
            self._switch_to(Path(folder))
        bare = self._peft.disable_adapter() if self._peft and folder is None else nullcontext()
        with bare:
            yield

    def _switch_to(self, folder: Path) -> None:
        key = _version(folder / ADAPTER_WEIGHTS)
        if key not in self._adapters:
            self._adapters[key] = self._add(folder)
        self._adapters.move_to_end(key)
        self._peft.set_adapter(self._adapters[key])
        while len(self._adapters) > MAX_ADAPTERS:
            _, oldest = self._adapters.popitem(last=False)
            self._peft.delete_adapter(oldest)

    def _add(self, folder: Path) -> str:
        from peft import PeftModel, get_peft_model_state_dict  # seconds that the first answer need not wait for

        self._named += 1
        name = f"adapter{self._named}"
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
        else:
            self._peft.load_adapter(str(folder), name)
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            difference = set(file.keys()) ^ set(get_peft_model_state_dict(self._peft, adapter_name=name))
        if difference:
            raise ValueError(f"{len(difference)} tensors of the adapter and the model do not match")
        return name


class ModelCache:
    """The models that are loaded, at most `limit`; the one that was not asked for the longest gives way."""

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple, LoadedModel] = OrderedDict()

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the models that are loaded now; to be looked at from any thread."""
        return tuple(loaded.source for loaded in list(self._kept.values()))

    def get(self, entry: ModelSpec, device: torch.device) -> LoadedModel:
        """The entry's base model, loaded if need be. Raises InferenceError."""
        folder = weights.model_folder(entry)
        tokenizer = weights.tokenizer_folder(entry)
        if folder is None or tokenizer is None:
            raise InferenceError("missing_weights", f"{entry.title}: {weights.missing_files(entry)}")
        if entry.needs_gpu and device.type == "cpu":
            raise InferenceError("unavailable", f"{entry.title} needs a GPU, and PyTorch cannot use one here.")
        key = (*_version(weights.weights_file(folder)), str(tokenizer), device, _dtype(entry, device))
        if key not in self._kept:
            self._make_room()
            self._kept[key] = _load(entry, folder, tokenizer, device)
            self._kept[key].source = entry.source
        self._kept.move_to_end(key)
        return self._kept[key]

    def drop(self, loaded: LoadedModel) -> None:
        """Forgets a model that is in no good state."""
        self._kept = OrderedDict((key, kept) for key, kept in self._kept.items() if kept is not loaded)

    def _make_room(self) -> None:
        while len(self._kept) >= self.limit:
            self._kept.popitem(last=False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def wrap_errors(kind: str, message: str) -> Iterator[None]:
    """Whatever goes wrong inside is logged as it is and told as an InferenceError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        logger.warning("%s", message, exc_info=True)
        raise InferenceError(kind, message) from error


def pick_device() -> torch.device:
    """The fastest device that this installation of PyTorch can use."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load(entry: ModelSpec, folder: Path, tokenizer_folder: Path, device: torch.device) -> LoadedModel:
    with wrap_errors("bad_weights", f"The weights of {entry.title} cannot be read. Get them again."):
        model = MoondreamForConditionalGeneration.from_pretrained(
            folder, dtype=_dtype(entry, device), local_files_only=True, trust_remote_code=False
        )
    right = f"that of {entry.tokenizer}" if entry.tokenizer else "the one that came with its weights"
    with wrap_errors("wrong_tokenizer", f"The tokenizer of {entry.title} is not the right one. It needs {right}."):
        tokenizer = load_tokenizer(str(tokenizer_folder), model.config.templates)
        processor = MoondreamProcessor.from_config(model.config, tokenizer)
    return LoadedModel(model.to(device).eval(), processor)


def _dtype(entry: ModelSpec, device: torch.device) -> torch.dtype:
    if not entry.needs_gpu:
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _version(path: Path) -> tuple[str, int]:
    """A file, and when it was last written: another version is another model."""
    return str(path), path.stat().st_mtime_ns

"""Loading local models and their adapters, a few of which are kept for the next question."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText

import recipes
from inference import weights
from inference.answers import InferenceError
from inference.constraint import RecipeConstraint
from inference.models import ModelEntry
from inference.moondream import MoondreamConfig, MoondreamForConditionalGeneration, MoondreamImageProcessor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_ADAPTERS = 8  # kept on one base
logger = logging.getLogger(__name__)


class Loaded:
    """A model on its device, with what reads photos and words for it. For one thread at a time.

    Adapters are put on the same base, so that switching between them costs milliseconds.
    """

    def __init__(self, model: MoondreamForConditionalGeneration, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        vision = model.config.vision_config
        self.image_processor = MoondreamImageProcessor(
            crop_size=vision.crop_size,
            patch_size=vision.enc_patch_size,
            max_crops=vision.max_crops,
            overlap_margin=vision.overlap_margin,
        )
        self._peft: PeftModel | None = None
        self._adapters: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._named = 0

    @cached_property
    def constraint(self) -> RecipeConstraint:
        """Keeps an answer inside the recipe grammar."""
        return RecipeConstraint(self.tokenizer, recipes.grammar(), end_id=self.model.config.eos_id)

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


class Shelf:
    """The models that are loaded, at most `limit`; the one that was not asked for the longest gives way."""

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple, Loaded] = OrderedDict()

    def get(self, entry: ModelEntry, device: torch.device) -> Loaded:
        """The entry's base model, loaded if need be. Raises InferenceError."""
        folder = weights.model_folder(entry)
        tokenizer = weights.tokenizer_folder(entry)
        if folder is None or tokenizer is None:
            raise InferenceError("missing_weights", f"{entry.title}: {weights.missing_files(entry)}")
        key = (*_version(folder / weights.CONFIG), str(tokenizer), str(device))
        if key not in self._kept:
            self._make_room()
            self._kept[key] = _load(entry, folder, tokenizer, device)
        self._kept.move_to_end(key)
        return self._kept[key]

    def drop(self, loaded: Loaded) -> None:
        """Forgets a model that is in no good state."""
        self._kept = OrderedDict((key, kept) for key, kept in self._kept.items() if kept is not loaded)

    def _make_room(self) -> None:
        while len(self._kept) >= self.limit:
            self._kept.popitem(last=False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def pick_device() -> torch.device:
    """The fastest device that this installation of PyTorch can use."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_tokenizer(tokenizer: Tokenizer, config: MoondreamConfig) -> str | None:
    """What is wrong with a tokenizer for these weights; None when it is the right one.

    The released checkpoint lies beside a stale tokenizer, with which it would write fluent nonsense.
    """
    markers = {"<|endoftext|>": config.bos_id, "<|md_reserved_2|>": config.tokenizer_config["answer_id"]}
    wrong = [text for text, expected in markers.items() if tokenizer.token_to_id(text) != expected]
    templates = config.templates
    words = {skill: templates[skill]["prefix"][1:-1] for skill in ("query", "detect", "point")}
    words |= {"caption": templates["caption"]["normal"][1:2]}
    words |= {length: ids[3:-1] for length, ids in templates["caption"].items()}
    wrong += [word for word, ids in words.items() if tokenizer.decode(ids, skip_special_tokens=False).strip() != word]
    if tokenizer.get_vocab_size() > config.text_config.vocab_size:
        wrong.append("its size")
    return f"it disagrees about {', '.join(wrong)}" if wrong else None


def _load(entry: ModelEntry, folder: Path, tokenizer_folder: Path, device: torch.device) -> Loaded:
    if entry.needs_gpu and device.type == "cpu":
        raise InferenceError("unavailable", f"{entry.title} needs a GPU, and PyTorch cannot use one here.")
    dtype = _dtype(entry, device)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / weights.TOKENIZER))
    except Exception as error:
        logger.warning("loading %s failed", entry.name, exc_info=True)
        raise InferenceError("bad_weights", f"The files of {entry.title} cannot be read. Get them again.") from error
    problem = check_tokenizer(tokenizer, model.config)
    if problem:
        wanted = f" It must be that of {entry.tokenizer}." if entry.tokenizer else ""
        raise InferenceError("wrong_tokenizer", f"The tokenizer of {entry.title} is the wrong one: {problem}.{wanted}")
    tokenizer.encode_special_tokens = True  # a typed "<|endoftext|>" is plain text
    return Loaded(model.to(device).eval(), tokenizer)


def _dtype(entry: ModelEntry, device: torch.device) -> torch.dtype:
    if not entry.needs_gpu:
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _version(path: Path) -> tuple[str, int]:
    """A file, and when it was last written: another version is another model."""
    return str(path), path.stat().st_mtime_ns

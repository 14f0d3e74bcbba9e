"""MODELS: every model on offer, one entry each, and `answer`, which asks one. No torch until an answer is wanted."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inference import weights
from inference.answers import Event, InferenceError, Request

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class ModelEntry:
    """One model as it is offered.

    name: its key in MODELS. title and note: what a person reads. backend: a key of BACKENDS.
    source: a folder, or a repository of the Hugging Face Hub; revision: of that repository.
    tokenizer: the repository of its tokenizer, where that is another one.
    folder_variable: an environment variable that names a folder to use instead of the repository.
    adapter: the folder of a PEFT adapter to put on top. temperature: factor on the temperature asked for.
    top_p: words are drawn from the likeliest ones that make up this share of the probability.
    constrained: recipes are decoded under the grammar; otherwise the answer is read as prose.
    explained: the grammar is told in the prompt (for a model that was not trained from the start to write recipes).
    needs_gpu: too slow without one to be offered. memory_bytes: free memory that loading it takes.
    """

    name: str
    title: str
    note: str
    backend: str
    source: str
    revision: str | None = None
    tokenizer: str | None = None
    folder_variable: str | None = None
    adapter: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    constrained: bool = True
    explained: bool = False
    needs_gpu: bool = False
    memory_bytes: int = 0

    def unavailable(self) -> str | None:
        """Why it cannot be used here, in plain words; None when it can. Quick, and asks no network."""
        return weights.unavailable(self)


TINY = str(ASSETS / "moondream-tiny")

MODELS: dict[str, ModelEntry] = {
    "moondream-tiny": ModelEntry(
        name="moondream-tiny",
        title="moondream-tiny",
        note="A demonstration model: Moondream 2's architecture at a five-hundredth of its size, trained for this "
        "playground. It knows light, colour, sharpness and framing, and nothing about the world.",
        backend="local",
        source=TINY,
    ),
    "moondream-tiny-steady": ModelEntry(
        name="moondream-tiny-steady",
        title="moondream-tiny, steady",
        note="The same weights as moondream-tiny at 0.4 times the temperature: fewer surprises, less variety.",
        backend="local",
        source=TINY,
        temperature=0.4,
    ),
    "moondream2": ModelEntry(
        name="moondream2",
        title="Moondream 2",
        note="The open 2 B model of June 2025. It was not trained to write recipes: it is told the grammar, and its "
        "prose is read with tolerance. Temperatures are halved, as Moondream does by default.",
        backend="local",
        source="vikhyatk/moondream2",
        revision="2025-06-21",
        tokenizer="moondream/starmie-v1",
        folder_variable="MOONDREAM2_PATH",
        temperature=0.5,
        top_p=0.9,
        constrained=False,
        explained=True,
        needs_gpu=True,
        memory_bytes=6 * 2**30,
    ),
}

# Backend -> the module whose `answer(entry, request, cancel)` runs it; imported at the first answer.
BACKENDS: dict[str, str] = {"local": "inference.local"}


def answer(model: str | ModelEntry, request: Request, cancel: threading.Event | None = None) -> Iterator[Event]:
    """Asks a model (a name in MODELS, or an entry) and yields Waiting, Partial and, per candidate, one Answer.

    Set `cancel`, or close the iterator, and the computing stops at the next token. Raises InferenceError.
    """
    entry = model if isinstance(model, ModelEntry) else MODELS.get(model)
    if entry is None:
        raise InferenceError("unknown_model", f"There is no model called {model!r}. Choose one of {', '.join(MODELS)}.")
    reason = entry.unavailable()
    if reason:
        raise InferenceError("unavailable", f"{entry.title} cannot be used: {reason}")
    backend = importlib.import_module(BACKENDS[entry.backend])
    yield from backend.answer(entry, request, cancel or threading.Event())

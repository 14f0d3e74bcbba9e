"""MODELS: every model on offer, one entry each, and `answer`, which asks one. No torch until an answer is wanted."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import SecretStr

from inference import availability as weights
from inference.places import CLOUD_URL, RATE, photon_unavailable
from inference.types import Event, InferenceError, Request

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class ModelSpec:
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

    Of a hosted model: source: its server's address, up to /v1. remote: the id by which that server knows it, where it
    is not its name. key: of the server; needs_key: whether it wants one. rate: requests a second at most.
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
    grammar_constrained: bool = True
    grammar_in_prompt: bool = False
    needs_gpu: bool = False
    memory_bytes: int = 0
    remote_id: str = ""
    key: SecretStr | None = field(default=None, repr=False)
    needs_key: bool = False
    rate: float = RATE

    def unavailable(self) -> str | None:
        """Why it cannot be used here, in plain words; None when it can. Quick, and asks no network."""
        if self.backend == "hosted":
            return NEEDS_KEY if self.needs_key and self.key is None else None
        return photon_unavailable() if self.backend == "photon" else weights.unavailable(self)

    def with_key(self, key: SecretStr | None) -> ModelSpec:
        """The same with somebody's own key, where it takes one: a key goes to no server that does not ask for it."""
        return replace(self, key=key) if key and self.needs_key else self


TINY = str(ASSETS / "moondream-tiny")

NEEDS_KEY = "it needs a Moondream key. Type yours under “Your own Moondream key”, or set MOONDREAM_API_KEY."


def _cloud(name: str, title: str, note: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        title=title,
        note=f"{note}, on Moondream Cloud. The photo is sent there, each candidate is a paid call, seeds do not count.",
        backend="hosted",
        source=CLOUD_URL,
        temperature=0.5,
        top_p=0.9,
        grammar_constrained=False,
        grammar_in_prompt=True,
        needs_key=True,
    )


MODELS: dict[str, ModelSpec] = {
    "moondream-tiny": ModelSpec(
        name="moondream-tiny",
        title="moondream-tiny",
        note="A demonstration model: Moondream 2's architecture at a five-hundredth of its size, trained for this "
        "playground. It knows light, colour, sharpness and framing, and nothing about the world.",
        backend="local",
        source=TINY,
    ),
    "moondream-tiny-steady": ModelSpec(
        name="moondream-tiny-steady",
        title="moondream-tiny, steady",
        note="The same weights as moondream-tiny at 0.4 times the temperature: fewer surprises, less variety.",
        backend="local",
        source=TINY,
        temperature=0.4,
    ),
    "moondream2": ModelSpec(
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
        grammar_constrained=False,
        grammar_in_prompt=True,
        needs_gpu=True,
        memory_bytes=6 * 2**30,
    ),
    "moondream2-photon": ModelSpec(
        name="moondream2-photon",
        title="Moondream 2 on Photon",
        note="The same model on Moondream's own engine, several times as fast. Photon always sends telemetry to "
        "Moondream: host name, GPU, model, numbers of tokens.",
        backend="photon",
        source="moondream2",
        temperature=0.5,
        top_p=0.9,
        grammar_constrained=False,
        grammar_in_prompt=True,
    ),
    "moondream3.1-9B-A2B": _cloud("moondream3.1-9B-A2B", "Moondream 3.1", "The newest model"),
    "moondream3-preview": _cloud("moondream3-preview", "Moondream 3 preview", "The base of hosted fine-tunes"),
}

# Backend -> the module whose `answer(entry, request, cancel)` runs it; imported at the first answer.
BACKENDS: dict[str, str] = {
    "local": "inference.local.engine",
    "hosted": "inference.hosted.backend",
    "photon": "inference.photon",
}


def loaded_models() -> list[str]:
    """The entries whose weights are in memory, without their adapters. Loads nothing to find out."""
    local = sys.modules.get(BACKENDS["local"])
    sources = local.loaded_sources() if local else ()
    return [name for name, entry in MODELS.items() if entry.backend == "local" and entry.source in sources]


def answer(model: str | ModelSpec, request: Request, cancel: threading.Event | None = None) -> Iterator[Event]:
    """Asks a model (a name in MODELS, or an entry) and yields Waiting, Partial and, per candidate, one Answer.

    Set `cancel`, or close the iterator, and the computing stops at the next token. Raises InferenceError.
    """
    entry = model if isinstance(model, ModelSpec) else MODELS.get(model)
    if entry is None:
        raise InferenceError("unknown_model", f"There is no model called {model!r}. Choose one of {', '.join(MODELS)}.")
    reason = entry.unavailable()
    if reason:
        raise InferenceError("unavailable", f"{entry.title} cannot be used: {reason}")
    if request.skill == "segment" and entry.backend != "hosted":
        raise InferenceError("unsupported", f"{entry.title} cannot segment. Choose a model of Moondream Cloud.")
    backend = importlib.import_module(BACKENDS[entry.backend])
    yield from backend.answer(entry, request, cancel or threading.Event())

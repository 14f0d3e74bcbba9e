"""The model registry: MODELS, the backends, and `answer`, which runs a model. Loads no torch until a model runs."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from inference.availability import unavailable
from inference.types import CLOUD_URL, DEFAULT_RATE, Answer, AnswerEvent, InferenceError, ModelSpec, Request

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TINY = str(ASSETS / "moondream-tiny")
# Adapters of moondream-tiny in `assets/specialists`, made by `python -m training.specialists`: the reward weights that
# each was tuned for.
SPECIALISTS: dict[str, dict[str, float]] = {
    "balanced": {"sharpness": 1.0, "colour": 1.0, "creativity": 1.0},
    "bold": {"creativity": 1.0},
    "crisp": {"sharpness": 1.0},
}


def _specialist_spec(name: str, weights: Mapping[str, float]) -> ModelSpec:
    """Return the entry of a specialist of moondream-tiny."""
    rewards = "all rewards" if len(weights) > 1 else f"the reward {next(iter(weights))}"
    return ModelSpec(
        name=f"moondream-tiny-{name}",
        title=f"moondream-tiny, {name}",
        note=f"moondream-tiny, tuned with GRPO for {rewards} on the bundled photos.",
        backend="local",
        source=TINY,
        adapter=str(ASSETS / "specialists" / name),
    )


def _hosted_spec(name: str, title: str, note: str, source: str, **settings: Any) -> ModelSpec:
    """Return the entry of a model on a server with Moondream's API, with the sampling defaults of that API."""
    return ModelSpec(
        name=name,
        title=title,
        note=note,
        backend="hosted",
        source=source,
        temperature=0.5,
        top_p=0.9,
        grammar_constrained=False,
        grammar_in_prompt=True,
        segments=True,
        reasons=True,
        spatial_refs=True,
        **settings,
    )


def _cloud_spec(name: str, title: str, note: str) -> ModelSpec:
    note = f"{note}, on Moondream Cloud. Photos are uploaded, each candidate is a paid call, and seeds are ignored."
    return _hosted_spec(name, title, note, CLOUD_URL, needs_key=True)


MODELS: dict[str, ModelSpec] = {
    "moondream-tiny": ModelSpec(
        name="moondream-tiny",
        title="moondream-tiny",
        note="A demonstration model: the Moondream 2 architecture at 1/500 of its size, trained for this playground. "
        "It recognises light, colour, sharpness and framing, but no objects.",
        backend="local",
        source=TINY,
    ),
    "moondream-tiny-steady": ModelSpec(
        name="moondream-tiny-steady",
        title="moondream-tiny, steady",
        note="moondream-tiny with 0.4 times the temperature: more consistent, less varied.",
        backend="local",
        source=TINY,
        temperature=0.4,
    ),
    **{f"moondream-tiny-{name}": _specialist_spec(name, weights) for name, weights in SPECIALISTS.items()},
    "moondream2": ModelSpec(
        name="moondream2",
        title="Moondream 2",
        note="The open 2 B model of June 2025. It was not trained on recipes: the prompt explains the grammar, and the "
        "answer is parsed leniently. Temperatures are halved, as in Moondream's defaults.",
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
        note="Moondream 2 on Moondream's own engine, several times as fast. Photon always sends telemetry to "
        "Moondream: host name, GPU, model and token counts.",
        backend="photon",
        source="moondream2",
        temperature=0.5,
        top_p=0.9,
        grammar_constrained=False,
        grammar_in_prompt=True,
        reasons=True,
        spatial_refs=True,
    ),
    "moondream3.1-9B-A2B": _cloud_spec("moondream3.1-9B-A2B", "Moondream 3.1", "The newest model"),
    "moondream3-preview": _cloud_spec("moondream3-preview", "Moondream 3 preview", "The base of hosted fine-tunes"),
}

# Backend -> module with `answer(spec, request, cancel)`, imported on first use.
BACKENDS: dict[str, str] = {
    "local": "inference.local.engine",
    "hosted": "inference.hosted.backend",
    "photon": "inference.photon",
}


def answer(model: str | ModelSpec, request: Request, cancel: threading.Event | None = None) -> Iterator[AnswerEvent]:
    """Run a model on a request and stream its events.

    Setting `cancel` or closing the iterator stops generation at the next token.

    Args:
        model: Name in `MODELS`, or a spec.
        request: What to generate.
        cancel: Set by the caller to cancel.

    Yields:
        Queued, TextUpdate and, per candidate, one Answer or CandidateFailed.

    Raises:
        InferenceError: If the model is unknown, unavailable or fails.
    """
    spec = _usable_spec(model, request)
    backend = importlib.import_module(BACKENDS[spec.backend])
    yield from backend.answer(spec, request, cancel or threading.Event())


def answer_batch(model: str | ModelSpec, requests: Sequence[Request], cancel: threading.Event) -> list[list[Answer]]:
    """Run a local model on several requests as one batch, which takes less time than one after another.

    Args:
        model: Name in `MODELS`, or a spec, of a model on the backend "local".
        requests: Requests that differ in photo, prompt and seed only.
        cancel: Set by the caller to cancel.

    Returns:
        The answers of each request, by candidate.

    Raises:
        InferenceError: If the model is unknown, unavailable or fails.
    """
    spec = _usable_spec(model, requests[0])
    return importlib.import_module(BACKENDS[spec.backend]).answer_batch(spec, requests, cancel)


def _usable_spec(model: str | ModelSpec, request: Request) -> ModelSpec:
    """Return the spec of a model. Raises InferenceError if it is unknown, unavailable or cannot do the request."""
    spec = model if isinstance(model, ModelSpec) else MODELS.get(model)
    if spec is None:
        raise InferenceError("unknown_model", f"There is no model called {model!r}. Choose one of {', '.join(MODELS)}.")
    reason = unavailable(spec)
    if reason:
        raise InferenceError("unavailable", f"{spec.title} cannot be used: {reason}")
    if request.skill == "segment" and not spec.segments:
        raise InferenceError("unsupported", f"{spec.title} cannot segment. {_models_with('segments')}")
    if request.spatial_refs and not spec.spatial_refs:
        raise InferenceError(
            "unsupported", f"{spec.title} cannot use spatial references (spatial_refs). {_models_with('spatial_refs')}"
        )
    return spec


def _models_with(ability: str) -> str:
    """Say which models have an ability: the name of a boolean field of `ModelSpec`."""
    return f"Models that can: {', '.join(name for name, spec in MODELS.items() if getattr(spec, ability))}."


def loaded_models() -> list[str]:
    """Return the names of the local models whose base weights are in memory. Imports no backend."""
    engine = sys.modules.get(BACKENDS["local"])
    sources = engine.loaded_sources() if engine else ()
    return [name for name, spec in MODELS.items() if spec.backend == "local" and spec.source in sources]


def engine_states() -> dict[str, str]:
    """Return the state of every Photon engine that was needed, by name of the model in Photon. Imports no backend."""
    photon = sys.modules.get(BACKENDS["photon"])
    return photon.engine_states() if photon else {}


def register_hosted_models(
    url: str | None,
    key: str | None,
    rate: float | None,
    endpoints: Mapping[str, str],
    models: MutableMapping[str, ModelSpec] = MODELS,
) -> None:
    """Apply the deployment's server, key and rate limit to the Cloud models, and add its custom endpoints.

    Args:
        url: Base URL of the Cloud models; None for Moondream Cloud.
        key: API key of the Cloud models.
        rate: Maximum requests per second; None for `DEFAULT_RATE`.
        endpoints: Base URLs of custom servers by model name.
        models: The registry to update.
    """
    url, rate, secret = url or CLOUD_URL, rate or DEFAULT_RATE, SecretStr(key) if key else None
    for name, spec in list(models.items()):
        if spec.backend == "hosted" and spec.needs_key:
            models[name] = replace(spec, source=url, key=secret, rate=rate)
    for name, endpoint in endpoints.items():
        note = f"A custom server of this deployment with Moondream's API: {endpoint}. Photos are uploaded to it."
        models[name] = _hosted_spec(name, name, note, endpoint, rate=rate)


def discover_hosted_models(models: MutableMapping[str, ModelSpec] = MODELS) -> threading.Thread:
    """Start a thread that registers the other models that Moondream Cloud lists for the deployment's key."""

    def discover() -> None:
        from inference.hosted.backend import model_ids
        from inference.hosted.client import MoondreamClient

        with_key = (spec for spec in list(models.values()) if spec.backend == "hosted" and spec.key is not None)
        spec = next(with_key, None)
        if spec is None:
            return
        for name in model_ids(MoondreamClient(spec.source, spec.key, spec.rate)):
            if name not in models:
                note = "Listed by Moondream Cloud for this deployment's key. Each candidate is a paid call."
                models[name] = replace(spec, name=name, title=name, note=note, remote_id="")

    thread = threading.Thread(target=discover, name="discover-models", daemon=True)
    thread.start()
    return thread

"""Which hosted models are on offer: Moondream Cloud's with the deployment's key, and custom endpoints."""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from pydantic import SecretStr

from inference.places import CLOUD_URL, RATE
from inference.registry import MODELS, ModelSpec


def register_hosted_models(
    url: str | None,
    key: str | None,
    rate: float | None,
    endpoints: Mapping[str, str],
    models: MutableMapping[str, ModelSpec] = MODELS,
) -> None:
    """Puts the deployment's server, key and limit (None: the Cloud's) into the entries; one entry per endpoint."""
    url, rate, secret = url or CLOUD_URL, rate or RATE, SecretStr(key) if key else None
    for name, entry in list(models.items()):
        if entry.backend == "hosted" and entry.needs_key:
            models[name] = replace(entry, source=url, key=secret, rate=rate)
    for name, address in endpoints.items():
        note = f"A server of this deployment's own that speaks Moondream's API: {address}. The photo is sent there."
        models[name] = ModelSpec(
            name,
            name,
            note,
            "hosted",
            address,
            temperature=0.5,
            top_p=0.9,
            grammar_constrained=False,
            grammar_in_prompt=True,
            rate=rate,
        )


def discover_hosted_models(models: MutableMapping[str, ModelSpec] = MODELS) -> threading.Thread:
    """Asks the Cloud, in the background, which other models it has, and offers those as well."""

    def ask() -> None:
        from inference.hosted.backend import model_ids
        from inference.hosted.client import MoondreamClient

        known = [entry for entry in list(models.values()) if entry.backend == "hosted" and entry.key is not None]
        for entry in known[:1]:
            for name in model_ids(MoondreamClient(entry.source, entry.key, entry.rate)):
                if name not in models:
                    note = "Moondream Cloud lists it for this deployment's key. Each candidate is a paid call."
                    models[name] = replace(entry, name=name, title=name, note=note, remote_id="")

    thread = threading.Thread(target=ask, name="discover-models", daemon=True)
    thread.start()
    return thread

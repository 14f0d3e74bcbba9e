"""Checks and conversions of checkpoint files: wrong weights are rejected with a readable message."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# Arguments of `from_pretrained` that locate a file on the Hub or in its cache.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
COMPILED_PREFIX = "._orig_mod"
QUANTISED_SUFFIXES = ("weight.packed", "weight.scale", "weight.zero_point")


class CheckpointError(ValueError):
    """Raised when weights do not fit the model. The message names the keys."""


def load_compiled_state_dict(source: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """Load the weights of a checkpoint saved from a `torch.compile`d model, with its prefix removed from the keys.

    Args:
        source: Folder or Hub repository.
        kwargs: Arguments of `from_pretrained`.

    Returns:
        The state dict, or None if no key has the prefix (transformers can load the files itself).

    Raises:
        CheckpointError: If the weights are quantised.
    """
    if source is None or kwargs.get("state_dict") is not None:
        return None
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    file_by_key = _weight_map(source, hub)
    _check_not_quantised(file_by_key)
    if not any(COMPILED_PREFIX in key for key in file_by_key):
        return None
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(set(file_by_key.values())):
        tensors = load_file(find_file(source, name, hub))
        weights |= {key.replace(COMPILED_PREFIX, ""): tensor for key, tensor in tensors.items()}
    return weights


def check_loading_info(info: dict[str, Any], any_shape: bool = False) -> None:
    """Check that loading met no missing, unexpected or mismatched keys. Such a model would generate nonsense.

    Args:
        info: The loading info of `from_pretrained`.
        any_shape: Whether mismatched shapes are accepted.

    Raises:
        CheckpointError: If the keys do not match.
    """
    missing, unexpected = sorted(info.get("missing_keys", ())), sorted(info.get("unexpected_keys", ()))
    _check_not_quantised(unexpected)
    shapes = [] if any_shape else sorted(info.get("mismatched_keys", ()))
    mismatched = [f"{name} is {list(actual)} and not {list(expected)}" for name, actual, expected in shapes]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"The weights do not fit this configuration: {_format_keys(missing)} missing, {_format_keys(unexpected)} "
            f"unknown, {_format_keys(mismatched)} of another shape."
        )


def find_file(source: Any, name: str, hub: dict[str, Any]) -> str | None:
    """Return the path of a file in a folder or Hub repository (cached or downloaded), or None if unavailable."""
    cases = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(source, name, **hub, **{f"_raise_exceptions_for_{case}": False for case in cases})


def _weight_map(source: Any, hub: dict[str, Any]) -> dict[str, str]:
    """Return the file of each key of a checkpoint. Empty without weights, which transformers reports later."""
    index = find_file(source, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            return json.load(file)["weight_map"]
    single = find_file(source, SAFE_WEIGHTS_NAME, hub)
    if single is None:
        return {}
    with safe_open(single, "pt") as weights:
        return dict.fromkeys(weights.keys(), SAFE_WEIGHTS_NAME)


def _check_not_quantised(keys: Iterable[str]) -> None:
    quantised = sorted(key for key in keys if key.endswith(QUANTISED_SUFFIXES))
    if quantised:
        raise CheckpointError(
            f"These are quantised (int4) weights, for instance {quantised[0]}. Use the full-precision revision."
        )


def _format_keys(keys: list[str]) -> str:
    shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"{len(keys)} ({shown})" if keys else "none"

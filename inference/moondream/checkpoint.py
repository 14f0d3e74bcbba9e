"""What a checkpoint's files hold, looked at before and after loading: wrong files are refused with a plain message."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# Arguments of `from_pretrained` that say where on the Hub (or in its cache) a file is.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
COMPILED = "._orig_mod"
QUANTISED = ("weight.packed", "weight.scale", "weight.zero_point")


class CheckpointError(ValueError):
    """The weights do not fit the model; the message says which ones."""


def state_dict_to_pass(source: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """The weights with their keys cleaned of `torch.compile`'s mark, or None where no key has it.

    Raises CheckpointError for quantised weights.
    """
    if source is None or kwargs.get("state_dict") is not None:
        return None
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    files = _files_by_key(source, hub)
    _refuse_quantised(files)
    if not any(COMPILED in key for key in files):
        return None
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(set(files.values())):
        weights |= {key.replace(COMPILED, ""): value for key, value in load_file(find(source, name, hub)).items()}
    return weights


def refuse_incomplete(info: dict[str, Any], any_shape: bool = False) -> None:
    """Raises CheckpointError when loading met wrong keys or (unless `any_shape`) wrong shapes.

    Such a model would answer, and answer nonsense.
    """
    missing, unknown = sorted(info.get("missing_keys", ())), sorted(info.get("unexpected_keys", ()))
    _refuse_quantised(unknown)
    shapes = [] if any_shape else sorted(info.get("mismatched_keys", ()))
    other = [f"{name} is {list(found)} and not {list(wanted)}" for name, found, wanted in shapes]
    if missing or unknown or other:
        raise CheckpointError(
            f"The weights do not fit this configuration: {_list(missing)} missing, {_list(unknown)} unknown, "
            f"{_list(other)} of another shape."
        )


def _files_by_key(source: Any, hub: dict[str, Any]) -> dict[str, str]:
    """Each key of the checkpoint and the file it is in; empty where there is none (loading will say so)."""
    index = find(source, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            return json.load(file)["weight_map"]
    single = find(source, SAFE_WEIGHTS_NAME, hub)
    if single is None:
        return {}
    with safe_open(single, "pt") as weights:
        return dict.fromkeys(weights.keys(), SAFE_WEIGHTS_NAME)


def find(source: Any, name: str, hub: dict[str, Any]) -> str | None:
    """The path of a file in a folder or Hub repository (cached or fetched), None when it cannot be had."""
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(source, name, **hub, **{f"_raise_exceptions_for_{case}": False for case in quiet})


def _refuse_quantised(keys: Any) -> None:
    quantised = sorted(key for key in keys if key.endswith(QUANTISED))
    if quantised:
        raise CheckpointError(
            f"These are quantised (int4) weights, for instance {quantised[0]}. Use the full-precision revision."
        )


def _list(keys: list[str]) -> str:
    shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"{len(keys)} ({shown})" if keys else "none"

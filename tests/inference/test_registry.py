"""The registry: availability of each model, with reasons and without loading PyTorch."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from inference import availability
from inference.availability import unavailable
from inference.registry import BACKENDS, MODELS, answer
from inference.types import InferenceError, ModelSpec, Request

REQUEST = Request(np.zeros((8, 8, 3), np.uint8), "recipe")
GB = 2**30


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty Hub cache and no MOONDREAM2_PATH. Returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("MOONDREAM2_PATH", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulate a machine with a GPU driver and enough memory."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(availability, "NVIDIA_DEVICES", (str(tmp_path / "version"),))
    monkeypatch.setattr(availability, "free_memory", lambda: 100 * GB)


def add_to_cache(hub: Path, repository: str, names: list[str], revision: str = "main") -> Path:
    repo = hub / f"models--{repository.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text("a" * 40)
    for name in names:
        (snapshot / name).touch()
    return snapshot


@pytest.mark.parametrize("name", MODELS)
def test_every_spec_is_complete(name: str) -> None:
    spec = MODELS[name]
    assert spec.name == name and spec.title and spec.note.endswith(".")
    assert spec.backend in BACKENDS
    reason = unavailable(spec)
    assert reason is None or (reason.endswith(".") and reason[0].islower())


def test_notes_of_bundled_models_describe_them() -> None:
    assert "demonstration" in MODELS["moondream-tiny"].note
    steady = MODELS["moondream-tiny-steady"]
    assert steady.source == MODELS["moondream-tiny"].source and str(steady.temperature) in steady.note


def test_availability_check_does_not_import_torch() -> None:
    code = (
        "import sys, inference.availability as a, inference.registry as r;"
        "[a.unavailable(spec) for spec in r.MODELS.values()];"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_unknown_model_raises() -> None:
    with pytest.raises(InferenceError, match="moondream-tiny") as error_info:
        next(answer("gpt", REQUEST))
    assert error_info.value.kind == "unknown_model"


def test_moondream2_is_unavailable_without_a_gpu(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "has_gpu", lambda: False)
    assert "needs a GPU" in str(unavailable(MODELS["moondream2"]))


def test_missing_weights_reason_names_the_download_commands(hub: Path, gpu: None) -> None:
    reason = str(unavailable(MODELS["moondream2"]))
    assert "hf download vikhyatk/moondream2 --revision 2025-06-21" in reason
    assert "hf download moondream/starmie-v1" in reason and "MOONDREAM2_PATH" in reason
    with pytest.raises(InferenceError, match="hf download") as error_info:
        next(answer("moondream2", REQUEST))
    assert error_info.value.kind == "unavailable"


def test_moondream2_is_found_in_the_hub_cache(hub: Path, gpu: None) -> None:
    spec = MODELS["moondream2"]
    snapshot = add_to_cache(hub, "vikhyatk/moondream2", ["config.json", "model.safetensors"], "2025-06-21")
    assert str(unavailable(spec)).startswith("its tokenizer")
    tokenizer = add_to_cache(hub, "moondream/starmie-v1", ["tokenizer.json"])
    assert unavailable(spec) is None
    assert (availability.model_folder(spec), availability.tokenizer_folder(spec)) == (snapshot, tokenizer)


def test_other_revision_in_the_cache_is_ignored(hub: Path, gpu: None) -> None:
    add_to_cache(hub, "vikhyatk/moondream2", ["config.json", "model.safetensors"], "main")
    assert availability.model_folder(MODELS["moondream2"]) is None


def test_incomplete_download_is_ignored(hub: Path, gpu: None) -> None:
    add_to_cache(hub, "vikhyatk/moondream2", ["config.json"], "2025-06-21")
    assert "hf download" in str(unavailable(MODELS["moondream2"]))


def test_folder_variable_takes_precedence_over_the_cache(
    hub: Path, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = MODELS["moondream2"]
    monkeypatch.setenv("MOONDREAM2_PATH", str(tmp_path / "mine"))
    assert f"MOONDREAM2_PATH is set to {tmp_path / 'mine'}" in str(unavailable(spec))
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        (tmp_path / "mine" / name).touch()
    assert unavailable(spec) is None
    assert availability.model_folder(spec) == availability.tokenizer_folder(spec) == tmp_path / "mine"


def test_insufficient_memory_is_reported_in_gigabytes(hub: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_cache(hub, "vikhyatk/moondream2", ["config.json", "model.safetensors"], "2025-06-21")
    add_to_cache(hub, "moondream/starmie-v1", ["tokenizer.json"])
    monkeypatch.setattr(availability, "free_memory", lambda: 2 * GB)
    assert unavailable(MODELS["moondream2"]) == "it needs 6 GB of memory, but only 2.0 GB are free."


def test_missing_folder_or_adapter_is_reported_without_its_path(spec: ModelSpec, tmp_path: Path) -> None:
    no_weights = dataclasses.replace(spec, source=str(tmp_path / "gone"))
    no_adapter = dataclasses.replace(spec, adapter=str(tmp_path / "lost"))
    for reason, name in ((unavailable(no_weights), "gone"), (unavailable(no_adapter), "lost")):
        assert name in str(reason) and os.sep not in str(reason)

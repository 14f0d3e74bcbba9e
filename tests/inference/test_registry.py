"""The models on offer: every entry says whether it can be used, quickly and without PyTorch, and why not."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from inference import availability as weights
from inference.registry import BACKENDS, MODELS, ModelSpec, answer
from inference.types import InferenceError, Request

REQUEST = Request(np.zeros((8, 8, 3), np.uint8), "recipe")
GB = 2**30


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no folder named."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("MOONDREAM2_PATH", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU's driver and much memory."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(weights, "NVIDIA", (str(tmp_path / "version"),))
    monkeypatch.setattr(weights, "free_memory", lambda: 100 * GB)


def put_in_cache(hub: Path, repository: str, names: list[str], revision: str = "main") -> Path:
    repo = hub / f"models--{repository.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text("a" * 40)
    for name in names:
        (snapshot / name).touch()
    return snapshot


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_is_whole(name: str) -> None:
    entry = MODELS[name]
    assert entry.name == name and entry.title and entry.note.endswith(".")
    assert entry.backend in BACKENDS
    reason = entry.unavailable()
    assert reason is None or (reason.endswith(".") and reason[0].islower())


def test_the_embedded_models_say_what_they_are() -> None:
    assert "demonstration" in MODELS["moondream-tiny"].note
    steady = MODELS["moondream-tiny-steady"]
    assert steady.source == MODELS["moondream-tiny"].source and str(steady.temperature) in steady.note


def test_asking_what_is_available_loads_no_torch() -> None:
    code = (
        "import sys, inference.registry as m; [e.unavailable() for e in m.MODELS.values()];"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(InferenceError, match="moondream-tiny") as caught:
        next(answer("gpt", REQUEST))
    assert caught.value.kind == "unknown_model"


def test_without_a_gpu_the_real_model_says_so(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "has_gpu", lambda: False)
    assert "needs a GPU" in str(MODELS["moondream2"].unavailable())


def test_without_weights_the_real_model_says_what_to_run(hub: Path, gpu: None) -> None:
    reason = str(MODELS["moondream2"].unavailable())
    assert "hf download vikhyatk/moondream2 --revision 2025-06-21" in reason
    assert "hf download moondream/starmie-v1" in reason and "MOONDREAM2_PATH" in reason
    with pytest.raises(InferenceError, match="hf download") as caught:
        next(answer("moondream2", REQUEST))
    assert caught.value.kind == "unavailable"


def test_the_real_model_is_found_in_the_hubs_cache(hub: Path, gpu: None) -> None:
    entry = MODELS["moondream2"]
    snapshot = put_in_cache(hub, "vikhyatk/moondream2", ["config.json", "model.safetensors"], "2025-06-21")
    assert str(entry.unavailable()).startswith("its tokenizer")
    tokenizer = put_in_cache(hub, "moondream/starmie-v1", ["tokenizer.json"])
    assert entry.unavailable() is None
    assert (weights.model_folder(entry), weights.tokenizer_folder(entry)) == (snapshot, tokenizer)


def test_another_revision_in_the_cache_does_not_count(hub: Path, gpu: None) -> None:
    put_in_cache(hub, "vikhyatk/moondream2", ["config.json", "model.safetensors"], "main")
    assert weights.model_folder(MODELS["moondream2"]) is None


def test_half_a_download_does_not_count(hub: Path, gpu: None) -> None:
    put_in_cache(hub, "vikhyatk/moondream2", ["config.json"], "2025-06-21")
    assert "hf download" in str(MODELS["moondream2"].unavailable())


def test_a_named_folder_wins(hub: Path, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = MODELS["moondream2"]
    monkeypatch.setenv("MOONDREAM2_PATH", str(tmp_path / "mine"))
    assert f"MOONDREAM2_PATH names {tmp_path / 'mine'}" in str(entry.unavailable())
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        (tmp_path / "mine" / name).touch()
    assert entry.unavailable() is None
    assert weights.model_folder(entry) == weights.tokenizer_folder(entry) == tmp_path / "mine"


def test_too_little_memory_is_told_in_gigabytes(hub: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_cache(hub, "vikhyatk/moondream2", ["config.json", "model.safetensors"], "2025-06-21")
    put_in_cache(hub, "moondream/starmie-v1", ["tokenizer.json"])
    monkeypatch.setattr(weights, "free_memory", lambda: 2 * GB)
    assert MODELS["moondream2"].unavailable() == "it takes 6 GB of memory, and 2.0 GB are free."


def test_a_lost_folder_or_adapter_is_told_without_its_path(entry: ModelSpec, tmp_path: Path) -> None:
    gone = dataclasses.replace(entry, source=str(tmp_path / "gone"))
    lost = dataclasses.replace(entry, adapter=str(tmp_path / "lost"))
    for reason, name in ((gone.unavailable(), "gone"), (lost.unavailable(), "lost")):
        assert name in str(reason) and os.sep not in str(reason)

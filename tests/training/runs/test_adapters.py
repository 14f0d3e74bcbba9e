"""Tests of the adapter registry: enabling, disabling, restoring at startup, and refusing unsuitable adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from inference.availability import unavailable
from inference.registry import MODELS
from inference.types import ModelSpec
from tests.support.fake_run import write_adapter, write_result
from tests.support.runs import make_config
from training.runs.adapters import AdapterRegistry, base_chain, check_adapter, model_name, tensor_shapes
from training.runs.run import Run, RunError, RunStore

TINY = MODELS["moondream-tiny"]
Make = Callable[..., Run]


@pytest.fixture
def runs(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def models() -> dict[str, ModelSpec]:
    return dict(MODELS)


@pytest.fixture
def adapters(runs: RunStore, models: dict[str, ModelSpec]) -> AdapterRegistry:
    return AdapterRegistry(runs, models)


@pytest.fixture
def make(runs: RunStore) -> Make:
    """Create finished runs."""

    def make_run(wins: bool = True, **changes: object) -> Run:
        run = runs.create(make_config(**({"reward": {"sharpness": 1, "colour": 0.5}} | changes)))
        write_adapter(run)
        write_result(run, wins=wins, alarm="")
        run.set_status(state="done")
        return run

    return make_run


def test_enable_adds_the_model_and_disable_removes_it(
    adapters: AdapterRegistry, make: Make, models: dict[str, ModelSpec]
) -> None:
    run = make()
    spec = adapters.enable(run)
    assert models[model_name(run.id)] is spec and spec.adapter == str(run.adapter) and spec.source == TINY.source
    assert spec.title == "tuned: sharpness 1, colour 0.5" and unavailable(spec) is None
    assert adapters.newest_with_base() == ["moondream-tiny", spec.name] and adapters.is_enabled(run.id)
    version = adapters.version
    adapters.disable(run.id)
    assert models == MODELS and adapters.newest_with_base() == [] and adapters.version > version
    with pytest.raises(RunError, match="not in use"):
        adapters.disable(run.id)


def test_load_restores_enabled_models(adapters: AdapterRegistry, make: Make, runs: RunStore) -> None:
    first, second = make(name="First"), make()
    adapters.enable(first)
    adapters.enable(second)
    restored_models: dict[str, ModelSpec] = dict(MODELS)
    restored = AdapterRegistry(runs, restored_models)
    restored.load()
    assert restored_models[model_name(first.id)].title == "First"
    assert restored.newest_with_base() == ["moondream-tiny", model_name(second.id)]


def test_auto_enable_enables_a_winner_once(adapters: AdapterRegistry, make: Make, runs: RunStore) -> None:
    winner, loser = make(), make(wins=False)
    assert adapters.auto_enable(winner) and not adapters.auto_enable(loser)
    adapters.disable(winner.id)
    assert not adapters.auto_enable(winner), "a manual disable is final"
    restored = AdapterRegistry(runs, dict(MODELS))
    restored.load()
    assert restored.newest_with_base() == []


def test_load_enables_runs_that_won_before_startup(adapters: AdapterRegistry, make: Make) -> None:
    run = make()
    adapters.load()
    assert adapters.is_enabled(run.id)


def test_loser_can_be_enabled_manually_and_its_note_says_so(adapters: AdapterRegistry, make: Make) -> None:
    spec = adapters.enable(make(wins=False))
    assert "Not shown to be better" in spec.note


@pytest.mark.parametrize("state", ["running", "cancelled", "failed"])
def test_auto_enable_ignores_unfinished_runs(adapters: AdapterRegistry, make: Make, state: str) -> None:
    run = make()
    run.set_status(state=state)
    assert not adapters.auto_enable(run)


def test_base_model_is_found_through_earlier_runs(adapters: AdapterRegistry, make: Make, runs: RunStore) -> None:
    first = make()
    second = make(base=str(first.folder))
    third = make(base=model_name(second.id))
    assert adapters.base_model(third) is TINY
    chain, base = base_chain(third)
    assert [run.id for run in chain] == [third.id, second.id, first.id] and base == "moondream-tiny"
    adapters.enable(first)
    adapters.enable(second)
    assert adapters.newest_with_base() == [model_name(first.id), model_name(second.id)]
    runs.delete(second.id)
    assert adapters.base_model(third) is TINY, "the run's result names its base model"


def test_unknown_base_model_is_refused(adapters: AdapterRegistry, make: Make) -> None:
    run = make(base="gone")
    (run.folder / "result.json").unlink()
    with pytest.raises(RunError, match="base model of this run is not available"):
        adapters.enable(run)


def test_load_skips_a_missing_adapter(adapters: AdapterRegistry, make: Make, runs: RunStore) -> None:
    run, other = make(), make()
    adapters.enable(run)
    adapters.enable(other)
    (run.adapter / "adapter_model.safetensors").unlink()
    restored = AdapterRegistry(runs, dict(MODELS))
    restored.load()
    assert not restored.is_enabled(run.id) and restored.is_enabled(other.id)


@pytest.mark.parametrize("text", ["", "[]", '{"used": 3}', "{"])
def test_malformed_state_file_is_ignored(adapters: AdapterRegistry, make: Make, runs: RunStore, text: str) -> None:
    run = make(wins=False)
    (runs.folder / "adopted.json").write_text(text)
    adapters.load()
    adapters.enable(run)
    assert adapters.newest_with_base()[1] == model_name(run.id)


def test_full_disk_leaves_the_registry_unchanged(
    adapters: AdapterRegistry, make: Make, models: dict[str, ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    run = make()
    adapters.enable(run)
    other = make()
    monkeypatch.setattr("storage.files.os.fsync", full)
    with pytest.raises(RunError, match="Free some disk space"):
        adapters.enable(other)
    with pytest.raises(RunError, match="Free some disk space"):
        adapters.disable(run.id)
    assert set(models) == {*MODELS, model_name(run.id)}


def damage(folder: Path, defect: str) -> None:
    """Make an adapter unusable."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    module = "base_model.model.model.text.blocks.0.attn.qkv"
    factors = {"A": np.zeros((4, 192), np.float32), "B": np.zeros((576, 4), np.float32)}
    misshapen = {"shape": {"A": np.zeros((4, 64), np.float32)}, "rank": {"B": np.zeros((4, 576), np.float32)}}
    if defect in misshapen:
        save_file({f"{module}.lora_{kind}.weight": part for kind, part in (factors | misshapen[defect]).items()}, file)
    elif defect == "layer":
        save_file({f"base_model.model.layers.7.lora_{kind}.weight": part for kind, part in factors.items()}, file)
    elif defect == "kind":
        save_file({f"{module}.lora_surprise": factors["A"]}, file)
    elif defect == "empty":
        save_file({}, file)
    elif defect == "pickle":
        file.unlink()
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    elif defect == "gone":
        file.unlink()
    elif defect == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif defect == "zeros":
        file.write_bytes(b"\0" * 1000)
    elif defect == "huge header":
        file.write_bytes(b"\xff" * 64)
    elif defect == "another base":
        config.write_text(json.dumps({"base_model_name_or_path": "gpt2"}))
    elif defect == "no config":
        config.unlink()


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("shape", "does not fit"),
        ("rank", "does not fit"),
        ("layer", "does not fit"),
        ("kind", "does not fit"),
        ("empty", "does not fit"),
        ("pickle", "is a pickle"),
        ("gone", "no adapter"),
        ("cut", "not a complete safetensors"),
        ("zeros", "not a complete safetensors"),
        ("huge header", "not a complete safetensors"),
        ("another base", "another base"),
        ("no config", "adapter_config.json"),
    ],
)
def test_unsuitable_adapter_is_refused_and_enabled_models_stay(
    adapters: AdapterRegistry, make: Make, defect: str, message: str, models: dict[str, ModelSpec]
) -> None:
    good, bad = make(), make()
    adapters.enable(good)
    damage(bad.adapter, defect)
    with pytest.raises(RunError, match=message) as error:
        adapters.enable(bad)
    assert str(bad.folder) not in str(error.value)
    assert set(models) == {*MODELS, model_name(good.id)} and adapters.newest_with_base()[1] == model_name(good.id)


def test_adapter_may_replace_whole_tensors(make: Make) -> None:
    run = make()
    shape = tensor_shapes(Path(TINY.source) / "model.safetensors")["model.text.post_ln.weight"]
    save_file(
        {"base_model.model.model.text.post_ln.weight": np.zeros(shape, np.float32)},
        run.adapter / "adapter_model.safetensors",
    )
    check_adapter(run.adapter, TINY)


def test_sharded_base_is_read_from_its_index(make: Make, tmp_path: Path) -> None:
    run = make()
    base = tmp_path / "moondream-tiny"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"model.text.blocks.0.attn.qkv.weight": np.zeros((576, 192), np.float32)}, base / "part-1.safetensors")
    index = {"weight_map": {"model.text.blocks.0.attn.qkv.weight": "part-1.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    check_adapter(run.adapter, replace(TINY, source=str(base)))
    (base / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(RunError, match="index of the base model's weights"):
        check_adapter(run.adapter, replace(TINY, source=str(base)))

"""Tuned models in service: who is let in, who is sent away, what a restart brings back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from inference.registry import MODELS, ModelSpec
from tests.support.fake_run import write_adapter, write_result
from training.runs.adapters import AdapterRegistry, check_adapter, model_name, tensors
from training.runs.run import Run, RunConfig, RunError, Runs

TINY = MODELS["moondream-tiny"]
Make = Callable[..., Run]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def models() -> dict[str, ModelSpec]:
    return dict(MODELS)


@pytest.fixture
def adapters(runs: Runs, models: dict[str, ModelSpec]) -> AdapterRegistry:
    return AdapterRegistry(runs, models)


@pytest.fixture
def make(runs: Runs) -> Make:
    """A run that is done."""

    def made(wins: bool = True, base: str = "moondream-tiny", **changes: object) -> Run:
        asked = {"base": base, "reward": {"sharpness": 1, "colour": 0.5}, "seed": 1, **changes}
        run = runs.create(RunConfig.make(**asked))
        write_adapter(run)
        write_result(run, wins=wins, alarm="")
        run.set_status(state="done")
        return run

    return made


def test_a_model_joins_beside_its_base_and_leaves_again(adapters: AdapterRegistry, make: Make, models: dict) -> None:
    run = make()
    entry = adapters.use(run)
    assert models[model_name(run.id)] is entry and entry.adapter == str(run.adapter) and entry.source == TINY.source
    assert entry.title == "tuned: sharpness 1, colour 0.5" and entry.unavailable() is None
    assert adapters.front() == ["moondream-tiny", entry.name] and adapters.uses(run.id)
    version = adapters.version
    adapters.revert(run.id)
    assert models == MODELS and adapters.front() == [] and adapters.version > version
    with pytest.raises(RunError, match="not in service"):
        adapters.revert(run.id)


def test_a_restart_brings_back_what_was_in_service(adapters: AdapterRegistry, make: Make, runs: Runs) -> None:
    first, second = make(name="First"), make()
    adapters.use(first)
    adapters.use(second)
    again: dict[str, ModelSpec] = dict(MODELS)
    after = AdapterRegistry(runs, again)
    after.load()
    assert again[model_name(first.id)].title == "First" and after.front() == ["moondream-tiny", model_name(second.id)]


def test_who_wins_is_let_in_once(adapters: AdapterRegistry, make: Make, runs: Runs) -> None:
    won, lost = make(), make(wins=False)
    assert adapters.settle(won) and not adapters.settle(lost)
    adapters.revert(won.id)
    assert not adapters.settle(won), "a person has decided"
    after = AdapterRegistry(runs, dict(MODELS))
    after.load()
    assert after.front() == []


def test_who_won_while_nobody_looked_is_let_in_at_the_start(adapters: AdapterRegistry, make: Make) -> None:
    run = make()
    adapters.load()
    assert adapters.uses(run.id)


def test_who_lost_may_be_let_in_all_the_same(adapters: AdapterRegistry, make: Make) -> None:
    entry = adapters.use(make(wins=False))
    assert "not shown to be better" in entry.note


@pytest.mark.parametrize("state", ["running", "cancelled", "failed"])
def test_only_a_run_that_is_done_is_let_in_by_itself(adapters: AdapterRegistry, make: Make, state: str) -> None:
    run = make()
    run.set_status(state=state)
    assert not adapters.settle(run)


def test_a_run_upon_a_run_has_the_weights_of_the_first(adapters: AdapterRegistry, make: Make, runs: Runs) -> None:
    first = make()
    second = make(base=str(first.folder))
    third = make(base=model_name(second.id))
    assert adapters.base(third) is TINY
    adapters.use(first)
    adapters.use(second)
    assert adapters.front() == [model_name(first.id), model_name(second.id)]
    runs.delete(second.id)
    assert adapters.base(third) is TINY, "its result says so"


def test_a_base_that_is_gone_is_said(adapters: AdapterRegistry, make: Make) -> None:
    run = make(base="gone")
    (run.folder / "result.json").unlink()
    with pytest.raises(RunError, match="not on offer"):
        adapters.use(run)


def test_an_adapter_that_vanished_is_not_brought_back(adapters: AdapterRegistry, make: Make, runs: Runs) -> None:
    run, other = make(), make()
    adapters.use(run)
    adapters.use(other)
    (run.adapter / "adapter_model.safetensors").unlink()
    after = AdapterRegistry(runs, dict(MODELS))
    after.load()
    assert not after.uses(run.id) and after.uses(other.id)


@pytest.mark.parametrize("text", ["", "[]", '{"used": 3}', "{"])
def test_a_broken_list_harms_nothing(adapters: AdapterRegistry, make: Make, runs: Runs, text: str) -> None:
    run = make(wins=False)
    (runs.folder / "adopted.json").write_text(text)
    adapters.load()
    adapters.use(run)
    assert adapters.front()[1] == model_name(run.id)


def test_a_full_disk_changes_nothing_in_service(
    adapters: AdapterRegistry, make: Make, models: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    run = make()
    adapters.use(run)
    other = make()
    monkeypatch.setattr("training.runs.run.os.fsync", full)
    with pytest.raises(RunError, match="Free some space"):
        adapters.use(other)
    with pytest.raises(RunError, match="Free some space"):
        adapters.revert(run.id)
    assert set(models) == {*MODELS, model_name(run.id)}


def spoil(folder: Path, how: str) -> None:
    """Makes an adapter one that must not be used."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    module = "base_model.model.model.text.blocks.0.attn.qkv"
    zeros = {"A": np.zeros((4, 192), np.float32), "B": np.zeros((576, 4), np.float32)}
    wrong = {"shape": {"A": np.zeros((4, 64), np.float32)}, "rank": {"B": np.zeros((4, 576), np.float32)}}
    if how in wrong:
        save_file({f"{module}.lora_{kind}.weight": part for kind, part in (zeros | wrong[how]).items()}, file)
    elif how == "layer":
        save_file({f"base_model.model.layers.7.lora_{kind}.weight": part for kind, part in zeros.items()}, file)
    elif how == "kind":
        save_file({f"{module}.lora_surprise": zeros["A"]}, file)
    elif how == "empty":
        save_file({}, file)
    elif how == "pickle":
        file.unlink()
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    elif how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "zeros":
        file.write_bytes(b"\0" * 1000)
    elif how == "huge header":
        file.write_bytes(b"\xff" * 64)
    elif how == "another base":
        config.write_text(json.dumps({"base_model_name_or_path": "gpt2"}))
    elif how == "no config":
        config.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shape", "does not fit"),
        ("rank", "does not fit"),
        ("layer", "does not fit"),
        ("kind", "does not fit"),
        ("empty", "does not fit"),
        ("pickle", "is a pickle"),
        ("gone", "no adapter"),
        ("cut", "not a whole safetensors"),
        ("zeros", "not a whole safetensors"),
        ("huge header", "not a whole safetensors"),
        ("another base", "another base"),
        ("no config", "adapter_config.json"),
    ],
)
def test_what_must_not_be_used_is_refused_and_nothing_in_service_is_lost(
    adapters: AdapterRegistry, make: Make, how: str, words: str, models: dict
) -> None:
    good, bad = make(), make()
    adapters.use(good)
    spoil(bad.adapter, how)
    with pytest.raises(RunError, match=words) as refused:
        adapters.use(bad)
    assert str(bad.folder) not in str(refused.value)
    assert set(models) == {*MODELS, model_name(good.id)} and adapters.front()[1] == model_name(good.id)


def test_an_adapter_with_whole_tensors_of_the_base_fits(make: Make) -> None:
    run = make()
    shape = tensors(Path(TINY.source) / "model.safetensors")["model.text.post_ln.weight"]
    save_file(
        {"base_model.model.model.text.post_ln.weight": np.zeros(shape, np.float32)},
        run.adapter / "adapter_model.safetensors",
    )
    check_adapter(run.adapter, TINY)


def test_a_base_in_parts_is_read_from_its_list(make: Make, tmp_path: Path) -> None:
    from dataclasses import replace

    run = make()
    base = tmp_path / "moondream-tiny"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"model.text.blocks.0.attn.qkv.weight": np.zeros((576, 192), np.float32)}, base / "part-1.safetensors")
    index = {"weight_map": {"model.text.blocks.0.attn.qkv.weight": "part-1.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    check_adapter(run.adapter, replace(TINY, source=str(base)))
    (base / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(RunError, match="list of the base's weights"):
        check_adapter(run.adapter, replace(TINY, source=str(base)))

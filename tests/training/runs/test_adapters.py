"""Tests of the adapter registry: enabling, disabling, restoring at startup, and refusing unsuitable adapters."""

from __future__ import annotations

import json
import threading
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

    def make_run(wins: bool = True, owner: str = "", **changes: object) -> Run:
        run = runs.create(make_config(**({"reward": {"sharpness": 1, "colour": 0.5}} | changes)), owner=owner)
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


def test_run_with_an_alarm_is_enabled_by_hand_only_and_its_note_says_so(
    adapters: AdapterRegistry, make: Make, runs: RunStore
) -> None:
    live, earlier, final, budget = (make() for _ in range(4))
    live.set_alarms([{"kind": "cut_subject", "title": "Edits cut off the subject"}])
    for run, changes in ((earlier, {"alarm": "It fell."}), (final, {"alarms": [{"kind": "at_limits"}]})):
        result = {key: value for key, value in (run.result() or {}).items() if key != "alarms"}
        (run.folder / "result.json").write_text(json.dumps(result | changes))
    result = (budget.result() or {}) | {"alarm": "The budget ended the run after 3 steps.", "alarms": []}
    (budget.folder / "result.json").write_text(json.dumps(result))
    adapters.load()
    assert [adapters.is_enabled(run.id) for run in (live, earlier, final, budget)] == [False, False, False, True]
    assert not any(adapters.auto_enable(run) for run in (live, earlier, final))
    assert adapters.enable(live).note.endswith("Alarm in training: Edits cut off the subject.")
    assert adapters.enable(earlier).note.endswith("Alarm in training: It fell.")
    assert adapters.is_enabled(live.id)


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


def tuned(adapters: AdapterRegistry, owner: str) -> list[str]:
    """Return the names of the tuned models that a visitor sees."""
    return sorted(name for name in adapters.visible_models(owner) if name.startswith("run-"))


def test_enabled_model_is_offered_to_its_owner_until_it_is_shared(adapters: AdapterRegistry, make: Make) -> None:
    run = make(owner="hf:1")
    name = model_name(run.id)
    adapters.enable(run)
    others = ("", "hf:2", "guest:1", "guest:")
    assert tuned(adapters, "hf:1") == [name] and not any(tuned(adapters, other) for other in others)
    assert adapters.newest_with_base("hf:1") == ["moondream-tiny", name]
    assert not any(adapters.newest_with_base(other) for other in others)
    assert adapters.is_visible(run.id, "hf:1") and adapters.is_visible(name, "hf:1")
    assert not adapters.is_visible(run.id, "hf:2") and not adapters.is_shared(run.id)
    version = adapters.version
    adapters.share(run)
    assert adapters.is_shared(run.id) and adapters.version > version
    assert all(tuned(adapters, other) == [name] for other in others)
    assert adapters.newest_with_base("guest:1") == ["moondream-tiny", name]
    adapters.enable(run)
    assert adapters.is_shared(run.id), "a renamed run stays shared"
    version = adapters.version
    adapters.unshare(run.id)
    assert tuned(adapters, "hf:1") == [name] and not any(tuned(adapters, other) for other in others)
    assert not adapters.is_shared(run.id) and adapters.version > version
    with pytest.raises(RunError, match="not shared"):
        adapters.unshare(run.id)


def test_disable_removes_a_shared_model_for_everyone(adapters: AdapterRegistry, make: Make, runs: RunStore) -> None:
    run = make(owner="hf:1")
    adapters.share(run)
    adapters.disable(run.id)
    assert not tuned(adapters, "hf:1") and not tuned(adapters, "") and not adapters.is_shared(run.id)
    adapters.enable(run)
    assert not adapters.is_shared(run.id)
    assert json.loads((runs.folder / "adopted.json").read_text()) == {
        "used": [run.id],
        "settled": [run.id],
        "shared": [],
    }


def test_models_that_are_not_tuned_here_are_visible_to_everyone(adapters: AdapterRegistry, make: Make) -> None:
    run = make(owner="hf:1")
    adapters.enable(run)
    assert adapters.visible_models("guest:1") == dict(MODELS)
    assert adapters.is_visible("moondream-tiny", "guest:1") and adapters.is_visible("moondream-tiny/abc@3", "guest:1")
    adapters.disable(run.id)
    assert not adapters.is_visible(run.id, "hf:1") and not adapters.is_visible("run-nothing", "hf:1")


def test_guests_without_a_browser_secret_see_no_models_of_each_other(adapters: AdapterRegistry, make: Make) -> None:
    adapters.enable(make(owner="guest:"))
    assert tuned(adapters, "guest:") == []


def test_newest_model_of_a_visitor_is_the_own_or_shared_one_that_was_enabled_last(
    adapters: AdapterRegistry, make: Make
) -> None:
    own, shared, other = make(owner="hf:1"), make(owner="hf:2"), make(owner="hf:3")
    for run in (own, shared, other):
        adapters.enable(run)
    assert adapters.newest_with_base("hf:1")[1] == model_name(own.id)
    adapters.share(shared)
    assert adapters.newest_with_base("hf:1")[1] == model_name(shared.id)
    adapters.enable(own)
    assert adapters.newest_with_base("hf:1")[1] == model_name(shared.id), "an update does not bring a model forward"
    adapters.disable(own.id)
    adapters.enable(own)
    assert adapters.newest_with_base("hf:1")[1] == model_name(own.id)
    assert adapters.newest_with_base("hf:2")[1] == model_name(shared.id)


def test_model_works_without_the_one_that_it_was_tuned_from(adapters: AdapterRegistry, make: Make) -> None:
    parent = make(owner="hf:1")
    child = make(owner="hf:2", base=model_name(parent.id))
    adapters.enable(parent)
    adapters.enable(child)
    assert adapters.newest_with_base("hf:2") == ["moondream-tiny", model_name(child.id)]
    adapters.share(parent)
    adapters.disable(child.id)
    adapters.enable(child)
    assert adapters.newest_with_base("hf:2") == [model_name(parent.id), model_name(child.id)]


def test_winner_joins_the_models_of_its_owner(adapters: AdapterRegistry, make: Make) -> None:
    of_user, of_admin = make(owner="hf:1"), make()
    adapters.load()
    assert tuned(adapters, "hf:1") == [model_name(of_user.id)] and tuned(adapters, "") == [model_name(of_admin.id)]
    assert tuned(adapters, "guest:1") == []


def test_state_survives_a_restart(adapters: AdapterRegistry, make: Make, runs: RunStore) -> None:
    own, shared = make(owner="hf:1", wins=False), make(owner="hf:2", wins=False)
    adapters.enable(own)
    adapters.share(shared)
    restored = AdapterRegistry(runs, dict(MODELS))
    restored.load()
    assert tuned(restored, "hf:1") == [model_name(own.id), model_name(shared.id)]
    assert tuned(restored, "hf:3") == [model_name(shared.id)]
    assert not restored.release(shared.id) and restored.release(own.id)
    assert tuned(restored, "hf:1") == [model_name(shared.id)]


def test_models_enabled_by_a_version_without_owners_stay_offered_to_everyone(
    adapters: AdapterRegistry, make: Make, runs: RunStore
) -> None:
    old, new = make(), make(wins=False)
    (old.folder / "owner.json").unlink()
    (runs.folder / "adopted.json").write_text(json.dumps({"used": [old.id], "settled": [old.id]}))
    adapters.load()
    assert tuned(adapters, "guest:1") == [model_name(old.id)] and adapters.is_shared(old.id)
    adapters.enable(new)
    assert tuned(adapters, "guest:1") == [model_name(old.id)]


def test_simultaneous_changes_are_all_kept(adapters: AdapterRegistry, make: Make) -> None:
    created = [make(owner="hf:1", wins=False) for _ in range(8)]
    threads = [threading.Thread(target=adapters.share, args=(run,)) for run in created]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuned(adapters, "guest:1") == [model_name(run.id) for run in created]


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

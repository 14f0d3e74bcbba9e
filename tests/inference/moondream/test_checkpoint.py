"""Moondream checkpoints: original layout, default sizes and rejected files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from inference.moondream import CheckpointError, MoondreamConfig, MoondreamForConditionalGeneration
from tests.support.moondream_reference import SMALL, reference

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a modifiable copy of the small model's folder."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(SMALL / name, tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Apply `change` to the weights and save them."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_empty_nested_config_has_released_sizes() -> None:
    config = MoondreamConfig(config={})
    with torch.device("meta"):
        model = MoondreamForConditionalGeneration(config)
    assert sum(weight.numel() for weight in model.state_dict().values()) == 1_927_237_104
    assert config.image_token_id == 51200
    assert config.image_tokens == 729
    assert config.templates["caption"]["long"] == [1, 32708, 2, 4059, 3]


def test_state_dict_has_released_names_and_shapes() -> None:
    with torch.device("meta"):
        model = MoondreamForConditionalGeneration(MoondreamConfig())
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["lm_head.weight"] == [51200, 2048]
    assert shapes["model.text.wte.weight"] == [51200, 2048]
    assert shapes["model.text.blocks.23.attn.qkv.weight"] == [6144, 2048]
    assert shapes["model.vision.patch_emb.weight"] == [1152, 588]
    assert shapes["model.vision.pos_emb"] == [1, 729, 1152]
    assert shapes["model.vision.blocks.26.mlp.fc1.weight"] == [4304, 1152]
    assert shapes["model.vision.proj_mlp.fc1.weight"] == [8192, 2304]
    assert shapes["model.region.size_features"] == [2, 256]
    assert shapes["model.region.coord_decoder.fc2.weight"] == [1024, 8192]
    assert shapes["model.region.size_decoder.fc2.weight"] == [2048, 8192]


def test_missing_sections_default_to_fit_the_text_config(folder: Path) -> None:
    edit_config(folder, lambda config: [config["config"].pop(name) for name in ("region", "tokenizer")])
    config = AutoConfig.from_pretrained(folder)
    assert config.text_config.dim == 64
    assert (config.region_config.dim, config.region_config.inner_dim) == (64, 8192)
    assert config.templates["query"] == {"prefix": [1, 15381, 2], "suffix": [3]}


def test_remote_code_is_not_used(folder: Path) -> None:
    remote = {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"}
    edit_config(folder, lambda config: config.update(auto_map=remote))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, MoondreamForConditionalGeneration)


def test_saving_preserves_original_names_and_values(tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(SMALL)
    model.save_pretrained(tmp_path)
    original, saved = load_file(SMALL / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    config, before = (json.loads((where / "config.json").read_text()) for where in (tmp_path, SMALL))
    assert config["model_type"] == "moondream1"
    for section, sizes in before["config"].items():
        assert config["config"][section].items() >= sizes.items()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize(
    "name",
    ["model.text.lm_head.bias", "model.text.wte", "model.vision.pos_emb", "model.region.coord_features"],
)
def test_missing_key_raises(folder: Path, name: str) -> None:
    rewrite(folder, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match="1 .* missing"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_unknown_key_raises(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"model.text.blocks.2.ln.weight": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"model\.text\.blocks\.2\.ln\.weight.* unknown"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_wrong_shape_raises(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"model.vision.pos_emb": torch.zeros(1, 9, 48)}))
    with pytest.raises(CheckpointError, match=r"pos_emb.*\[1, 9, 48\].*\[1, 16, 48\]"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_compiled_prefix_is_stripped_from_keys(folder: Path) -> None:
    def compile_marks(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".blocks." in name]:
            start, end = name.split(".blocks.")
            number, leaf = end.split(".", 1)
            weights[f"{start}.blocks.{number}._orig_mod.{leaf}"] = weights.pop(name)

    rewrite(folder, compile_marks)
    assert any("_orig_mod" in name for name in load_file(folder / WEIGHTS))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    original = reference("moondream2-small").model.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert model.generation_config.eos_token_id == 0


def test_quantised_weights_are_rejected_with_a_reason(folder: Path) -> None:
    def quantise(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.text.blocks.0.mlp.fc1.weight"]
        for part in ("packed", "scale", "zero_point"):
            weights[f"model.text.blocks.0.mlp.fc1.weight.{part}"] = torch.zeros(4)

    rewrite(folder, quantise)
    with pytest.raises(CheckpointError, match=r"int4.*full-precision"):
        AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_in_stored_or_requested_dtype(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda weights: weights.update({name: value.to(dtype) for name, value in weights.items()}))
    assert AutoModelForImageTextToText.from_pretrained(folder).dtype == dtype
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_sharded_checkpoint_loads(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(folder / "shards", max_shard_size="1MB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(folder / "shards")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_generation_config_has_special_tokens() -> None:
    generation = reference("moondream2-small").model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 0)


def test_head_size_not_divisible_by_4_raises() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        MoondreamConfig(config={"text": {"dim": 60, "n_heads": 10}})

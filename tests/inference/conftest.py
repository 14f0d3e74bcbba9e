"""Fixtures: a small random Moondream model in the layout of the bundled model."""

from pathlib import Path

import pytest
import torch

from inference.moondream import MoondreamConfig, MoondreamForConditionalGeneration
from inference.types import ModelSpec
from training.pretrain.tokenizer import build_tokenizer, templates

TEXTS = ["A bright photo with warm colours.", "How should this photo be finished?", "the main subject"]
MAX_CONTEXT = 128


def save_random_model(folder: Path, seed: int = 0) -> None:
    """Save config, random weights and tokenizer of a model with about 0.2 M parameters."""
    tokenizer = build_tokenizer(TEXTS * 3, vocab_size=512)
    sizes = {
        "text": {"dim": 64, "ff_dim": 128, "n_layers": 2, "n_heads": 2, "max_context": MAX_CONTEXT},
        "vision": {"enc_dim": 32, "enc_n_layers": 2, "enc_ff_dim": 64, "enc_n_heads": 2, "proj_inner_dim": 64},
        "region": {"inner_dim": 64},
        "tokenizer": {"templates": templates(tokenizer)},
    }
    sizes["text"]["vocab_size"] = len(tokenizer)
    sizes["vision"] |= {"enc_patch_size": 14, "crop_size": 56, "max_crops": 4, "overlap_margin": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        MoondreamForConditionalGeneration(MoondreamConfig(config=sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the read-only folder of a random model."""
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder)
    return folder


@pytest.fixture
def spec(model_folder: Path) -> ModelSpec:
    """Return the spec of the random model."""
    return ModelSpec("random", "Random", "for tests", "local", str(model_folder))

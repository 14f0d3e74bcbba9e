"""Pre-training of moondream-tiny from scratch, as a function of photos and a config.

Each step's batch is a function of seed and step, so that a run is reproducible and a resumed run ends with the same
weights as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from inference.moondream import (
    MoondreamConfig,
    MoondreamForConditionalGeneration,
    MoondreamImageProcessor,
)
from training.pretrain.auxiliary_heads import AuxiliaryHeads
from training.pretrain.dataset import PretrainDataset, tokenizer_texts
from training.pretrain.losses import LOSS_WEIGHTS, recipe_segments, step_loss
from training.pretrain.photos import PretrainPhotos
from training.pretrain.tokenizer import build_tokenizer, templates

OUT = Path(__file__).resolve().parents[2] / "assets" / "moondream-tiny"
VOCABULARY = 1024
TINY = {
    "text": {"dim": 192, "ff_dim": 768, "n_layers": 4, "n_heads": 3, "vocab_size": VOCABULARY, "max_context": 2048},
    "vision": {
        "enc_dim": 128, "enc_n_layers": 4, "enc_ff_dim": 384, "enc_n_heads": 4, "enc_patch_size": 14,
        "proj_out_dim": 192, "proj_inner_dim": 384, "crop_size": 112, "max_crops": 8, "overlap_margin": 1,
    },
    "region": {
        "dim": 192, "coord_feat_dim": 256, "coord_out_dim": 1024, "size_feat_dim": 512, "size_out_dim": 2048,
        "inner_dim": 128,
    },
}  # fmt: skip

ModelParts = tuple[MoondreamForConditionalGeneration, MoondreamImageProcessor, PreTrainedTokenizerFast]


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run.

    Attributes:
        seed: Seed of weights and data.
        steps: Optimisation steps.
        batch_size: Images per step.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        ema_decay: Decay of the exponential moving average of the weights.
        threads: CPU threads of PyTorch.
        photos: `PretrainPhotos.digest` of the photos.
    """

    seed: int = 7
    steps: int = 4000
    batch_size: int = 12
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    ema_decay: float = 0.998
    threads: int = 1
    photos: str = ""


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine down to 2 %.

    Not transformers' `get_cosine_with_min_lr_schedule_with_warmup`, whose warm-up starts at 0 instead of
    1 / warmup_steps: the published weights could not be reproduced with it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Create an exponential moving average of a model's weights whose decay rises to `decay` in the first steps."""

    def update(average: torch.Tensor, value: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        count = int(count)
        return average.lerp(value, 1 - min(decay, count / (9 + count)))

    ema = AveragedModel(model, avg_fn=update)
    ema.n_averaged.fill_(1)  # the initial weights count as one: the first update averages instead of copying
    return ema


class PreprocessedDataset(torch.utils.data.Dataset):
    """`PretrainDataset` with the photos cut into crops, so that a worker process does it while the model computes."""

    def __init__(self, dataset: PretrainDataset, image_processor: MoondreamImageProcessor) -> None:
        self.dataset, self.image_processor = dataset, image_processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, step: int) -> tuple[dict, dict]:
        torch.set_num_threads(1)
        batch = self.dataset[step]
        return dict(self.image_processor(batch.pop("images"), return_tensors="pt")), batch


def build_model(config: PretrainConfig, photos: Sequence[np.ndarray]) -> ModelParts:
    """Create a model with initial weights, its image processor, and a tokenizer trained for the photos."""
    tokenizer = build_tokenizer(tokenizer_texts(photos), VOCABULARY)
    torch.manual_seed(config.seed)
    model = MoondreamForConditionalGeneration(
        MoondreamConfig(config={**TINY, "tokenizer": {"templates": templates(tokenizer)}})
    )
    init_weights(model)
    vision = TINY["vision"]
    image_processor = MoondreamImageProcessor(
        crop_size=vision["crop_size"],
        patch_size=vision["enc_patch_size"],
        max_crops=vision["max_crops"],
        overlap_margin=vision["overlap_margin"],
    )
    init_patch_embedding(model, image_processor, photos)
    return model, image_processor, tokenizer


@torch.no_grad()
def init_weights(model: MoondreamForConditionalGeneration) -> None:
    """Initialise weights for a small width: linear layers of unit gain (less on residual branches), sine positions.

    The position embedding starts as sines and cosines as strong as the patches. From the usual random embedding with a
    standard deviation of 0.02, a small tower needs most of its training to learn positions.
    """
    depth = {"text": model.config.text_config.n_layers, "vision": model.config.vision_config.enc_n_layers}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers = depth.get(name.split(".")[1], 0) if ".blocks." in name else 0
            residual = layers and name.endswith(("attn.proj", "mlp.fc2"))
            head = name == "lm_head" or name.endswith("decoder.fc2")
            gain = 0.1 if head else (2 * layers) ** -0.5 if residual else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    vision = model.config.vision_config
    model.model.vision.pos_emb.copy_(sincos_position_embedding(vision.grid, vision.enc_dim)[None])


@torch.no_grad()
def init_patch_embedding(
    model: MoondreamForConditionalGeneration, image_processor: MoondreamImageProcessor, photos: Sequence[np.ndarray]
) -> None:
    """Initialise the patch embedding with a discrete cosine transform, whitened over the photos.

    Fine detail has a hundredth of the amplitude of lightness. Behind random weights it takes thousands of steps to
    matter, and the sharpness facts depend on it alone.
    """
    patch_emb, side = model.model.vision.patch_emb, model.config.vision_config.enc_patch_size
    basis = dct_basis(side, patch_emb.out_features)
    images = image_processor([photos[index] for index in range(0, len(photos), max(1, len(photos) // 24))])
    crops = images["pixel_values"][:, :4].flatten(0, 1).float() / 127.5 - 1
    patches = crops.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    deviation = (patches @ basis.T).std(0).clamp(min=0.03)
    patch_emb.weight.copy_(0.7 * basis / deviation[:, None])
    patch_emb.bias.zero_()


def dct_basis(side: int, count: int) -> torch.Tensor:
    """Return orthonormal 2-D cosines over a patch: [count, 3 * side * side] in the order channel, row, column.

    Two thirds are on luminance, half of these of the lowest frequencies and half spread over all others. The rest is on
    two colour axes.
    """
    index = np.arange(side)
    lines = np.cos(np.pi * (index[None] + 0.5) * index[:, None] / side)
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    axes = np.array([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) / np.sqrt([[3], [2], [1.5]])
    frequencies = sorted(np.ndindex(side, side), key=lambda pair: pair[0] ** 2 + pair[1] ** 2)
    colour = count // 6
    luminance = count - 2 * colour
    low, high = frequencies[: luminance // 2], frequencies[luminance // 2 :]
    spread = [high[i] for i in np.linspace(0, len(high) - 1, luminance - len(low)).round().astype(int)]
    functions = [(0, pair) for pair in low + spread] + [
        (axis, pair) for axis in (1, 2) for pair in frequencies[:colour]
    ]
    rows = [np.einsum("c,i,j->cij", axes[axis], lines[u], lines[v]).ravel() for axis, (u, v) in functions]
    return torch.from_numpy(np.stack(rows)).float()


def sincos_position_embedding(grid: int, width: int) -> torch.Tensor:
    """Return sines and cosines of the rows and columns of a grid: [grid * grid, width]."""
    coordinate = (torch.arange(grid) + 0.5) / grid
    angles = coordinate[:, None] * torch.pi * 2.0 ** torch.linspace(-1, 3, width // 4)[None]
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)


def split_block_matrices(
    named: Iterable[tuple[str, nn.Parameter]],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices of the transformer blocks, which Muon updates, and all other parameters."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        (hidden if parameter.ndim == 2 and ".blocks." in name else others).append(parameter)
    return hidden, others


def build_optimizers(model: nn.Module, heads: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Create Muon (Jordan 2024) for the matrices of the transformer blocks, and AdamW for all other parameters.

    AdamW decays matrices only. Muon's updates are scaled to the size of AdamW's, so that both use one learning rate.
    """
    named = [(name, p) for module in (model, heads) for name, p in module.named_parameters() if p.requires_grad]
    hidden, others = split_block_matrices(named)
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(hidden, lr=config.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))]


def save_checkpoint(state: dict, path: Path) -> None:
    """Write a checkpoint atomically."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, config: PretrainConfig) -> dict:
    """Load a checkpoint. Raises SystemExit if it cannot continue a run with this config."""
    state = torch.load(path, weights_only=True)
    if "config" not in state:
        raise SystemExit(f"{path} was written by an older version. Train without --resume, or use another --work.")
    if state["config"] != asdict(config):
        raise SystemExit(f"{path} has other settings: {state['config']}. Use these, or another --work.")
    return state


def train(
    config: PretrainConfig, work: Path, photos: PretrainPhotos, resume: bool, save_every: int = 100, workers: int = 1
) -> tuple[ModelParts, float]:
    """Train a model from scratch, or resume.

    Args:
        config: Settings.
        work: Folder of `checkpoint.pt`, and of `metrics.jsonl` with one line per 20 steps.
        photos: Training photos.
        resume: Whether to continue from the checkpoint, if there is one.
        save_every: Steps between checkpoints.
        workers: Worker processes that prepare batches; with 0, this process does.

    Returns:
        The model with averaged weights, its image processor and tokenizer; and the duration in seconds, including that
        of resumed runs.

    Raises:
        SystemExit: If the checkpoint has other settings or is of an older version.
    """
    torch.set_num_threads(config.threads)
    work.mkdir(parents=True, exist_ok=True)
    model, image_processor, tokenizer = build_model(config, photos.bundled)
    heads = AuxiliaryHeads(model.config.text_config.dim)
    optimizers = build_optimizers(model, heads, config)
    first, elapsed = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    ema = build_ema(model, config.ema_decay)
    if resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, config)
        first, elapsed = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
    grid = model.config.vision_config.grid
    dataset = PretrainDataset(
        photos, tokenizer, model.config.templates, config.batch_size, config.seed, config.steps, grid
    )
    options = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "spawn"} if workers else {}
    batches = PreprocessedDataset(dataset, image_processor)
    loader = DataLoader(batches, None, sampler=range(first, config.steps), **options)
    segments = recipe_segments(tokenizer)
    started = time.monotonic() - elapsed
    progress = tqdm(loader, initial=first, total=config.steps, unit="step", file=sys.stdout, mininterval=5)
    for step, (images, batch) in enumerate(progress, first):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        losses = step_loss(model, heads, images, batch, segments)
        model.zero_grad()
        heads.zero_grad()
        sum(weight * losses[name] for name, weight in LOSS_WEIGHTS.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update_parameters(model)
        last = step + 1 == config.steps
        if step % 20 == 0 or last:
            metrics = {name: round(value.item(), 4) for name, value in losses.items()}
            progress.set_postfix(metrics)
            with open(work / "metrics.jsonl", "a", encoding="utf-8") as file:
                line = {"step": step, "seconds": round(time.monotonic() - started, 1), **metrics}
                file.write(json.dumps(line) + "\n")
        if (step + 1) % save_every == 0 or last:
            state = {"config": asdict(config), "step": step + 1, "seconds": time.monotonic() - started}
            modules = {"model": model, "heads": heads, "ema": ema}
            state |= {name: module.state_dict() for name, module in modules.items()}
            save_checkpoint(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, checkpoint)
    model.load_state_dict(ema.module.state_dict())
    return (model.eval(), image_processor, tokenizer), time.monotonic() - started

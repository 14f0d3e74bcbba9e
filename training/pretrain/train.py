"""`python -m training.pretrain`: trains moondream-tiny, the embedded model, from scratch on the bundled photos.

Reproducible from a seed (each step's batch is a function of seed and step), resumable (`--resume` goes on from the last
checkpoint of the working folder), on two CPU cores. What it learns is described in `lessons`, how well in `quality`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from inference.moondream import (
    MoondreamConfig,
    MoondreamForConditionalGeneration,
    MoondreamImageProcessor,
)
from recipes import load_photo
from training.data.bundled import bundled_photos
from training.pretrain.auxiliary_heads import AuxiliaryHeads
from training.pretrain.dataset import PretrainDataset, every_text
from training.pretrain.losses import WEIGHTS, recipe_segments, step_loss
from training.pretrain.min_risk import refine
from training.pretrain.model_card import export, model_card
from training.pretrain.quality import ModelEvaluator, evaluate, held_out
from training.pretrain.tokenizer import build_tokenizer, templates

OUT = Path(__file__).resolve().parents[2] / "assets" / "moondream-tiny"
VOCABULARY = 1024
LEVEL_WIDTH = 1.5  # levels: how far a recipe's soft targets reach
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


@dataclass(frozen=True)
class Settings:
    """A training run: seed, steps, images per step, peak learning rate, moving average of the weights."""

    seed: int = 7
    steps: int = 3400
    batch: int = 12
    learning_rate: float = 1.5e-3
    warmup: int = 100
    average: float = 0.998
    threads: int = 1


class Average:
    """An exponential moving average of a model's weights, which is what is shipped."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the model; faster in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def rate(step: int, settings: Settings) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 2 %."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def training_photos() -> list[np.ndarray]:
    """The train split; photos of the smaller sources three times, so that no one source is nearly all there is."""
    infos = bundled_photos("train")
    largest = Counter(info.source for info in infos).most_common(1)[0][0]
    photos = [(load_photo(info.path), 1 if info.source == largest else 3) for info in infos]
    return [photo for photo, times in photos for _ in range(times)]


class Batches(torch.utils.data.Dataset):
    """`PretrainDataset` with the photos already cut into crops, made in a worker process while the model computes."""

    def __init__(self, lessons: PretrainDataset, image_processor: MoondreamImageProcessor) -> None:
        self.lessons, self.image_processor = lessons, image_processor

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, step: int) -> tuple[dict, dict]:
        torch.set_num_threads(1)
        lessons = self.lessons[step]
        return dict(self.image_processor(lessons.pop("images"), return_tensors="pt")), lessons


Parts = tuple[MoondreamForConditionalGeneration, MoondreamImageProcessor, PreTrainedTokenizerFast]


def build(settings: Settings, photos: list[np.ndarray]) -> Parts:
    """Fresh weights, image processor, and the tokenizer of what is said of the photos."""
    tokenizer = build_tokenizer(every_text(photos), VOCABULARY)
    around = templates(tokenizer)
    torch.manual_seed(settings.seed)
    model = MoondreamForConditionalGeneration(MoondreamConfig(config={**TINY, "tokenizer": {"templates": around}}))
    initialise(model)
    vision = TINY["vision"]
    image_processor = MoondreamImageProcessor(
        crop_size=vision["crop_size"],
        patch_size=vision["enc_patch_size"],
        max_crops=vision["max_crops"],
        overlap_margin=vision["overlap_margin"],
    )
    whiten(model, image_processor, photos)
    return model, image_processor, tokenizer


@torch.no_grad()
def initialise(model: MoondreamForConditionalGeneration) -> None:
    """Weights that suit a small width: linears of unit gain (residual branches less), and places that can be seen.

    The position embedding starts as sines and cosines of both axes, as strong as the patches themselves: from the
    usual 0.02 a small tower takes most of its training to find out where anything is.
    """
    depth = {"text": model.config.text_config.n_layers, "vision": model.config.vision_config.enc_n_layers}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            part = depth.get(name.split(".")[1], 0) if ".blocks." in name else 0
            branch = part and name.endswith(("attn.proj", "mlp.fc2"))
            head = name == "lm_head" or name.endswith("decoder.fc2")
            gain = 0.1 if head else (2 * part) ** -0.5 if branch else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    vision = model.config.vision_config
    model.model.vision.pos_emb.copy_(waves(vision.grid, vision.enc_dim)[None])


@torch.no_grad()
def whiten(
    model: MoondreamForConditionalGeneration, image_processor: MoondreamImageProcessor, photos: list[np.ndarray]
) -> None:
    """Starts the patch embedding as cosine transforms of a patch, each brought to one strength over the photos.

    Fine detail is a hundredth as strong as light in a photo: behind random weights it takes thousands of steps to be
    noticed at all, and sharpness is nothing else.
    """
    patch_emb, side = model.model.vision.patch_emb, model.config.vision_config.enc_patch_size
    waves = cosines(side, patch_emb.out_features)
    seen = image_processor([photos[place] for place in range(0, len(photos), max(1, len(photos) // 24))])
    crops = seen["pixel_values"][:, :4].flatten(0, 1).float() / 127.5 - 1
    patches = crops.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    strength = (patches @ waves.T).std(0).clamp(min=0.03)
    patch_emb.weight.copy_(0.7 * waves / strength[:, None])
    patch_emb.bias.zero_()


def cosines(side: int, count: int) -> torch.Tensor:
    """Orthonormal two-dimensional cosines over a patch, [count, 3 * side * side] in the order channel, row, column.

    Two thirds on luminance, half of them the slowest and half spread over all others; the rest on two colour axes.
    """
    index = np.arange(side)
    lines = np.cos(np.pi * (index[None] + 0.5) * index[:, None] / side)
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    axes = np.array([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) / np.sqrt([[3], [2], [1.5]])
    order = sorted(np.ndindex(side, side), key=lambda pair: pair[0] ** 2 + pair[1] ** 2)
    colour = count // 6
    light = count - 2 * colour
    slow, others = order[: light // 2], order[light // 2 :]
    chosen = slow + [others[place] for place in np.linspace(0, len(others) - 1, light - len(slow)).round().astype(int)]
    kinds = [(0, pair) for pair in chosen] + [(axis, pair) for axis in (1, 2) for pair in order[:colour]]
    rows = [np.einsum("c,i,j->cij", axes[axis], lines[u], lines[v]).ravel() for axis, (u, v) in kinds]
    return torch.from_numpy(np.stack(rows)).float()


def waves(grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of the rows and columns of a grid, [grid * grid, width]."""
    place = (torch.arange(grid) + 0.5) / grid
    angles = place[:, None] * torch.pi * 2.0 ** torch.linspace(-1, 3, width // 4)[None]
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)


def optimiser(model: nn.Module, probe: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = [p for p in (*model.parameters(), *probe.parameters()) if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def save_atomically(state: dict, path: Path) -> None:
    """Writes a checkpoint so that a killed process leaves the last good one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def note(path: Path, numbers: dict) -> None:
    """Adds a line of JSON to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(numbers) + "\n")


def train(
    settings: Settings, work: Path, photos: list[np.ndarray], resume: bool, save_every: int = 100, workers: int = 1
) -> tuple[Parts, float]:
    """Trains on photos (uint8 RGB); returns the parts, with averaged weights, and the seconds that it took in all.

    `work` gets `checkpoint.pt` every `save_every` steps and one line per 20 steps in `metrics.jsonl`.
    """
    torch.set_num_threads(settings.threads)
    work.mkdir(parents=True, exist_ok=True)
    model, image_processor, tokenizer = build(settings, photos)
    probe = AuxiliaryHeads(model.config.text_config.dim)
    average, optimizer = Average(model, settings.average), optimiser(model, probe, settings)
    first, spent = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != asdict(settings):
            raise SystemExit(
                f"{checkpoint} belongs to other settings: {state['settings']}. Use them, or another --work."
            )
        model.load_state_dict(state["model"])
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, first, spent = state["average"], state["step"], state["seconds"]
    vision = model.config.vision_config
    lessons = PretrainDataset(
        photos, tokenizer, model.config.templates, settings.batch, settings.seed, settings.steps, vision.grid
    )
    apart = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "spawn"} if workers else {}
    loader = DataLoader(Batches(lessons, image_processor), None, sampler=range(first, settings.steps), **apart)
    segments = recipe_segments(tokenizer, LEVEL_WIDTH)
    started = time.monotonic() - spent
    progress = tqdm(loader, initial=first, total=settings.steps, unit="step", file=sys.stdout, mininterval=5)
    for step, (images, lesson) in enumerate(progress, first):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings)
        losses = step_loss(model, probe, images, lesson, segments)
        optimizer.zero_grad()
        sum(weight * losses[name] for name, weight in WEIGHTS.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        last = step + 1 == settings.steps
        if step % 20 == 0 or last:
            numbers = {name: round(value.item(), 4) for name, value in losses.items()}
            progress.set_postfix(numbers)
            note(work / "metrics.jsonl", {"step": step, "seconds": round(time.monotonic() - started, 1), **numbers})
        if (step + 1) % save_every == 0 or last:
            state = {"settings": asdict(settings), "step": step + 1, "seconds": time.monotonic() - started}
            state |= {
                "model": model.state_dict(),
                "average": average.weights,
                "probe": probe.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            save_atomically(state, checkpoint)
    model.load_state_dict(average.weights)
    return (model.eval(), image_processor, tokenizer), time.monotonic() - started


def main() -> None:
    """Trains, measures and writes the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the model (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="folder of checkpoints and metrics")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work")
    args = parser.parse_args()
    settings = Settings(seed=args.seed, steps=args.steps, threads=args.threads)
    photos = training_photos()
    (model, image_processor, tokenizer), seconds = train(settings, args.work, photos, args.resume)
    seconds += refine(model, image_processor, tokenizer, photos, settings.seed)
    print(f"Trained in {seconds / 60:.1f} minutes. Measuring on the held-out photos ...")
    model = model.to(torch.float16).to(torch.float32)  # measured as it is shipped
    figures = evaluate(ModelEvaluator(model, image_processor, tokenizer), held_out())
    export(model, image_processor, tokenizer, args.out, model_card(asdict(settings), model, figures, seconds), figures)
    print(json.dumps(figures, indent=1))
    print(f"Written to {args.out}.")

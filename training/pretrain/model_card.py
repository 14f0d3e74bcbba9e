"""Export moondream-tiny: weights, tokenizer, processor, quality figures and the model card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor, MoondreamProcessor
from training.data.bundled import bundled_photos
from training.pretrain.photos import PretrainPhotos
from training.pretrain.quality import describe_kind

CARD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# moondream-tiny

A demonstration model: the architecture of Moondream 2 with {millions:.1f} million parameters, trained from scratch by
`python -m training.pretrain` on openly licensed photos (`sources.json`). It runs the playground without API key, GPU or
download. It answers what can be measured in pixels and has no knowledge of the world: it recognises no objects, and
declines questions about them.

| | |
|---|---|
| data | {data} |
| supervision | computed from pixels (`training/pretrain/`); no labels, no other model |
| training | seed {seed}, {steps} steps of {batch_size} photos with four examples each; then `min_risk.py` |
| time | {minutes:.0f} minutes, {threads} CPU thread(s) |
| input | crops of {crop} px, up to {tiles} tiles, {tokens} image tokens |

Evaluated on {held_out} held-out photos of other sources and {cases} degraded copies (all figures: `quality.json`):

| skill | result |
|---|---|
| recipe: CIELAB error, degraded / restored | {degraded:.1f} / {restored:.1f} ({lowered:.0%} lower) |
| recipe: error with the best single recipe for all photos / with the true recipe | {single:.1f} / {known:.1f} |
| recipe: error lowered, share of cases | {share:.0%} |
| recipe: error lowered by 30 % or more, share of cases | {share_30:.0%} |
| recipe: correlation of predicted and true levels | {levels} |
| caption and query: stated facts that are true | {true:.1%} of {facts} |
| point: inside the area | {hit:.0%} |
| detect: mean IoU | {iou:.2f} |
| detect: no box for unknown objects | {nothing:.0%} |
| undamaged photos: mean CIELAB change / left alone | {change:.1f} / {alone:.0%} |
{kinds}

Portraits and people are rare in all sources: expect less there.
"""


def export(
    model: MoondreamForConditionalGeneration,
    image_processor: MoondreamImageProcessor,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
    figures: dict,
    sources: list[dict],
) -> None:
    """Save the model in the Hub's layout: float16 weights, tokenizer, processor, README.md and quality.json.

    The files are written to a temporary folder beside `folder` and then moved one by one, the weights last.

    Args:
        model: The model; converted to float16 in place.
        image_processor: Its image processor.
        tokenizer: Its tokenizer.
        folder: Destination.
        card: Content of README.md.
        figures: Content of quality.json.
        sources: Content of sources.json.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    MoondreamProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(part)
    model.half().save_pretrained(part)
    (part / "README.md").write_text(card, encoding="utf-8")
    (part / "quality.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (part / "sources.json").write_text(json.dumps(sources) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(part.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    part.rmdir()


def describe_source(source: dict) -> str:
    """Return a line such as "clothing: 1,200 photos with weight 0.35"."""
    return f"{source['name']}: {source['photos']:,} photos with weight {source['weight']:g}"


def model_card(
    config: dict, model: MoondreamForConditionalGeneration, figures: dict, seconds: float, photos: PretrainPhotos
) -> str:
    """Fill in the model card.

    Args:
        config: The fields of `PretrainConfig`.
        model: The trained model.
        figures: From `training.pretrain.quality.evaluate`.
        seconds: Duration of training.
        photos: The training photos.
    """
    recipe, facts, regions = (figures[name] for name in ("recipe", "facts", "regions"))
    vision, kinds = model.config.vision_config, figures["kinds"]
    return CARD.format(
        **config,
        millions=model.num_parameters() / 1e6,
        data="; ".join(describe_source(source) for source in photos.describe()),
        held_out=len(bundled_photos("held-out")),
        minutes=seconds / 60,
        crop=vision.crop_size,
        tiles=vision.max_crops,
        tokens=vision.image_tokens,
        cases=recipe["cases"],
        degraded=recipe["error_degraded"],
        restored=recipe["error_restored"],
        lowered=recipe["error_lowered_by"],
        single=recipe["error_best_single_recipe"],
        known=recipe["error_true_recipe"],
        share=recipe["share_lowered"],
        share_30=recipe["share_lowered_by_30_percent"],
        levels=", ".join(f"{name} {value:.2f}" for name, value in figures["levels"].items()),
        true=facts["true"],
        facts=facts["facts"],
        hit=regions["hit"],
        iou=regions["iou"],
        nothing=regions["nothing_found_for_unknown"],
        change=figures["undamaged"]["change"],
        alone=figures["undamaged"]["share_untouched"],
        kinds="\n".join(f"| by kind of photo: {kind} | {describe_kind(row)} |" for kind, row in kinds.items()),
    )

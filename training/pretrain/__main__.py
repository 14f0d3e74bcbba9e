"""`python -m training.pretrain`: train moondream-tiny from scratch on photos, evaluate and export it.

Training is reproducible from a seed, takes about 50 minutes on two CPU cores, and can be resumed with --resume.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

from training.pretrain.min_risk import MIN_RISK_SHARE, average_weights, train_min_risk
from training.pretrain.model_card import export, model_card
from training.pretrain.photos import PretrainPhotosError, load_training_photos
from training.pretrain.quality import ModelEvaluator, evaluate, held_out_photos
from training.pretrain.text_stage import cache_batches, train_text
from training.pretrain.train import OUT, PretrainConfig, train


def folder_and_weight(text: str) -> tuple[Path, float]:
    """Parse FOLDER or FOLDER=WEIGHT. Raises ArgumentTypeError."""
    folder, separator, weight = text.rpartition("=")
    if not separator:
        folder, weight = text, "1"
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} has no positive weight after the last =.")
    return Path(folder), value


def main() -> None:
    """Train, evaluate on the held-out photos, and write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the model (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="folder of checkpoints and metrics")
    parser.add_argument("--seed", type=int, default=PretrainConfig.seed)
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument("--threads", type=int, default=PretrainConfig.threads)
    parser.add_argument(
        "--photos",
        metavar="FOLDER[=WEIGHT]",
        type=folder_and_weight,
        nargs="+",
        default=[],
        help="folders of photos beside the bundled ones, and how often they are drawn relative to these (default: 1)",
    )
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --work")
    args = parser.parse_args()
    try:
        photos = load_training_photos(args.photos)
    except (OSError, PretrainPhotosError) as error:
        raise SystemExit(str(error)) from None
    config = PretrainConfig(seed=args.seed, steps=args.steps, threads=args.threads, photos=photos.digest())
    (model, image_processor, tokenizer), seconds = train(config, args.work, photos, args.resume)
    started = time.monotonic()
    batches = cache_batches(model, image_processor, tokenizer, photos, config.seed)
    min_risk_model = copy.deepcopy(model)
    train_text(model, tokenizer, batches)
    train_min_risk(min_risk_model, tokenizer, batches, config.seed)
    average_weights(model, min_risk_model, MIN_RISK_SHARE)
    seconds += time.monotonic() - started
    print(f"Trained in {seconds / 60:.1f} minutes. Evaluating on the held-out photos ...")
    model = model.half().float()  # evaluated at the precision of the exported weights
    figures = evaluate(ModelEvaluator(model, image_processor, tokenizer), held_out_photos())
    card = model_card(asdict(config), model, figures, seconds, photos)
    export(model, image_processor, tokenizer, args.out, card, figures, photos.describe())
    print(json.dumps(figures, indent=1))
    print(f"Saved to {args.out}.")


if __name__ == "__main__":
    main()
